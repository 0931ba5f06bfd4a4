#!/usr/bin/env bash
# Sets up what `make demo` needs, once: system packages, .venv with the pinned versions, and DeepSpeed's shared-memory
# op for the CPU. Run again, it finds its stamp and does nothing.
#   PYTHON=python3.11 scripts/setup.sh     to choose the interpreter (3.10 to 3.12)
#   scripts/setup.sh --no-dev              without the tools for tests, lint and documentation, as in the image
#   scripts/setup.sh --system              only installs the system packages, a layer of the image
#   scripts/setup.sh --slurm               only installs Slurm and munge, for tests/slurm, as `make test` does
# Without root, FFCV's libraries come from the active conda environment, from modules or, on Debian and Ubuntu, out of
# packages that are unpacked into .venv/system. If uv is on the PATH, it supplies the parts of Python that are missing.
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
}

has_headers() {
    "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
}

missing_packages() {
    local python=$1 compiler=${CXX:-g++} missing=()
    command -v "${compiler%% *}" >/dev/null || missing+=(g++)
    command -v pkg-config >/dev/null || missing+=(pkg-config)
    pkg-config --exists opencv4 2>/dev/null || missing+=(libopencv-dev)
    pkg-config --exists libturbojpeg 2>/dev/null || missing+=(libturbojpeg0-dev)
    if [ -z "$python" ]; then
        missing+=(python3 python3-venv python3-dev)
    else
        command -v uv >/dev/null || "$python" -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
        has_headers "$python" || missing+=(python3-dev)
    fi
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

# On Debian and Ubuntu anyone may download packages. FFCV's build asks pkg-config for flags; it calls only cv::resize and
# libturbojpeg. Its path to the libraries is relative, because pip may install the compiled wheel into another clone.
unpack_libraries() {
    local package names file libraries system=$PWD/.venv/system
    for package in "$@"; do
        case $package in pkg-config | libopencv-dev | libturbojpeg0-dev) ;; *) return 1 ;; esac
    done
    if [ ! -x "$system/bin/pkg-config" ]; then
        command -v apt-get >/dev/null && command -v dpkg >/dev/null || return 1
        names=$(apt-get -qq --simulate --no-install-recommends install "$@" | awk '/^Inst/ { print $2 }') || return 1
        echo "setup: without root: unpacking $* and what they need into .venv/system"
        rm -rf "$system"
        mkdir -p "$system/archives" "$system/bin"
        # shellcheck disable=SC2086  # a list of package names
        (cd "$system/archives" && apt-get -qq download $names) || return 1
        for file in "$system"/archives/*.deb; do dpkg -x "$file" "$system"; done
        rm -r "$system/archives"
        cat >"$system/bin/pkg-config" <<END
#!/bin/sh
case "\$*" in
    *opencv4*) echo "-I$system/usr/include/opencv4 -I/usr/include/opencv4 -lopencv_imgproc -lopencv_core" ;;
    *) echo -lturbojpeg ;;
esac
END
        chmod +x "$system/bin/pkg-config"
    fi
    libraries=$(basename "$system"/usr/lib/*-linux-gnu*)
    export PATH=$system/bin:$PATH CPATH=$system/usr/include LIBRARY_PATH=$system/usr/lib/$libraries
    libraries="\$ORIGIN/../../../../system/usr/lib/$libraries"
    export LDFLAGS="-Wl,--disable-new-dtags,-rpath,$libraries:$libraries/lapack:$libraries/blas"
}

dev=1 only_system=
case ${1:-} in
    "") ;;
    --no-dev) dev='' ;;
    --system) only_system=1 ;;
    --slurm)
        # tests/slurm start a Slurm of their own in a temporary folder; without it they are skipped. A machine that has
        # Slurm's commands belongs to a cluster and is left alone.
        if ! command -v sbatch >/dev/null && ! install_packages slurm-wlm munge; then
            echo "setup: Slurm is not installed, so tests/slurm will be skipped (with root: apt-get install slurm-wlm munge)"
        fi
        exit 0 ;;
    *) fail "unknown argument $1; there are --no-dev, --system and --slurm" ;;
esac

if [ -z "$only_system" ]; then
    stamp=.venv/.setup-${dev:+dev-}$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -c1-16)
    [ -f "$stamp" ] && exit 0
    if [ -L .venv ]; then
        echo "setup: .venv is a link: another clone's environment is left as it is; remove the link for one of its own" >&2
        exit 0
    fi
fi

chosen=${PYTHON:-}
PYTHON=$(find_python)
if [ -z "$chosen" ] && command -v uv >/dev/null && { [ -z "$PYTHON" ] || ! has_headers "$PYTHON"; }; then
    uv python install --quiet 3.11 || fail "uv could not install Python 3.11; name one: PYTHON=/path/to/python3.11"
    PYTHON=$(uv python find --managed-python 3.11)
fi
packages=$(missing_packages "$PYTHON")
# shellcheck disable=SC2086  # a list of package names
if [ -n "$packages" ] && ! install_packages $packages && ! unpack_libraries $packages; then
    fail "these system packages are missing and could not be installed: $packages
  with root:     apt-get install $packages
  without root:  conda install -c conda-forge python=3.11 opencv libjpeg-turbo pkg-config cxx-compiler, and run this
                 again inside that environment; or put uv on the PATH for Python, and modules for the rest; or use the
                 container (docs/install.md)"
fi
PYTHON=${PYTHON:-$(find_python)}
[ -n "$PYTHON" ] || fail "no Python 3.10 to 3.12 found; name one: make ${MAKECMDGOALS:-test} PYTHON=/path/to/python3.11"

if ! command -v jpegtran >/dev/null && ! install_packages libjpeg-turbo-progs; then
    echo "setup: jpegtran is not installed, so conversion encodes all JPEGs again (with root: apt-get install libjpeg-turbo-progs)"
fi
if ! command -v git >/dev/null && ! install_packages git; then
    echo "setup: git is not installed, so run records will not name the commit (with root: apt-get install git)"
fi
[ -z "$only_system" ] || exit 0

if [ ! -x .venv/bin/python ]; then
    if "$PYTHON" -c 'import ensurepip' 2>/dev/null; then
        "$PYTHON" -m venv .venv
    else
        uv venv --quiet --seed --allow-existing --python "$PYTHON" .venv
    fi
fi
python=.venv/bin/python
echo "setup: installing the pinned Python packages into .venv (several GB the first time)"
"$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt \
    -e ".[ffcv,parquet,onnx,detection,wandb,mlflow${dev:+,docs,dev}]"
if ! "$python" -c 'import cv2' 2>/dev/null; then # the build that FFCV names needs libGL, which few compute nodes have
    headless=opencv-python-headless==$(sed -n 's/^opencv-python==\([^ ]*\).*/\1/p' constraints.txt)
    "$python" -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps "$headless"
fi

echo "setup: building DeepSpeed's shared-memory op for the CPU (about a minute the first time)"
# One process builds it here, because a half-built op with a stale lock file makes later jobs wait forever.
rm -rf .venv/torch_extensions
DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions" PATH="$PWD/.venv/bin:$PATH" "$python" -c '
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
ShareMemCommBuilder().load(verbose=False)' >/dev/null

rm -f .venv/.setup-*
touch "$stamp"
echo "setup: ready (.venv)"
