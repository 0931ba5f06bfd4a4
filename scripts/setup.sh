#!/usr/bin/env bash
# Sets up what `make demo` needs, once: system packages, .venv with the pinned versions, and DeepSpeed's shared-memory
# op for the CPU. Run again, it finds its stamp and does nothing.
#   PYTHON=python3.11 scripts/setup.sh     to choose the interpreter (3.10 to 3.12)
#   scripts/setup.sh --slurm               only installs Slurm and munge, for tests/slurm, as `make test` does
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf '\nsetup: %s\n' "$*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.10 python3 python; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"; return
        fi
        [ "$candidate" != "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not a Python 3.10 to 3.12"
    done
    fail "no Python 3.10 to 3.12 found; name one: make ${MAKECMDGOALS:-test} PYTHON=/path/to/python3.11"
}

missing_packages() {
    local python=$1 missing=()
    command -v g++ >/dev/null || missing+=(g++)
    command -v pkg-config >/dev/null || missing+=(pkg-config)
    pkg-config --exists opencv4 2>/dev/null || missing+=(libopencv-dev)
    pkg-config --exists libturbojpeg 2>/dev/null || missing+=(libturbojpeg0-dev)
    "$python" -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
        || missing+=(python3-dev)
    echo "${missing[*]:-}"
}

install_packages() {
    local sudo=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null && sudo -n true 2>/dev/null || return 1
        sudo=(sudo -n)
    fi
    command -v apt-get >/dev/null || return 1
    echo "setup: installing system packages: $*"
    "${sudo[@]}" apt-get update -qq
    DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

case ${1:-} in
    "") ;;
    --slurm)
        # tests/slurm start a Slurm of their own in a temporary folder; without it they are skipped. A machine that has
        # Slurm's commands belongs to a cluster and is left alone.
        if ! command -v sbatch >/dev/null && ! install_packages slurm-wlm munge; then
            echo "setup: Slurm is not installed, so tests/slurm will be skipped (with root: apt-get install slurm-wlm munge)"
        fi
        exit 0 ;;
    *) fail "unknown argument $1; the only one is --slurm" ;;
esac

stamp=.venv/.setup-$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -c1-16)
[ -f "$stamp" ] && exit 0

PYTHON=$(find_python)
packages=$(missing_packages "$PYTHON")
if [ -n "$packages" ]; then
    # shellcheck disable=SC2086  # a list of package names
    install_packages $packages || fail "these system packages are missing and could not be installed: $packages
  with root:     apt-get install $packages
  without root:  conda install -c conda-forge opencv libjpeg-turbo pkg-config cxx-compiler, and run this again
                 inside that environment (FFCV compiles against them)"
fi

if ! command -v jpegtran >/dev/null && ! install_packages libjpeg-turbo-progs; then
    echo "setup: jpegtran is not installed, so conversion encodes all JPEGs again (with root: apt-get install libjpeg-turbo-progs)"
fi

[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
python=.venv/bin/python
echo "setup: installing the pinned Python packages into .venv (several GB the first time)"
"$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt \
    -e '.[ffcv,parquet,onnx,detection,wandb,mlflow,docs,dev]'

echo "setup: building DeepSpeed's shared-memory op for the CPU (about a minute the first time)"
# One process builds it here, because a half-built op with a stale lock file makes later jobs wait forever.
rm -rf .venv/torch_extensions
DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions" PATH="$PWD/.venv/bin:$PATH" "$python" -c '
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
ShareMemCommBuilder().load(verbose=False)' >/dev/null

rm -f .venv/.setup-*
touch "$stamp"
echo "setup: ready (.venv)"
