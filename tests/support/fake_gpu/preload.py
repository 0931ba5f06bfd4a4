"""Compilation of the stand-in, and restart of a program under it."""

from __future__ import annotations

import functools
import getpass
import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
CUDA_MAJOR = "13"  # the runtime whose structures and constants the source is compiled against
NAME = "libfake_cuda.so"


def missing_requirement() -> str | None:
    """Return the reason why the stand-in cannot be built on this machine; None if it can."""
    version = torch_version()["cuda"]
    if version is None:
        return "needs a CUDA build of torch"
    if version.partition(".")[0] != CUDA_MAJOR:
        return f"needs a torch for CUDA {CUDA_MAJOR}, found one for {version}"
    if compiler() is None:
        return "needs a C compiler"
    missing = [str(folder) for folder in include_folders() if not folder.is_dir()]
    return f"needs CUDA's headers: {', '.join(missing)}" if missing else None


@functools.cache
def torch_version() -> dict[str, str | None]:
    """Read torch's versions without importing it: the environment of the stand-in must be set first."""
    values = runpy.run_path(str(_package("torch") / "version.py"))
    return {"torch": values["__version__"], "cuda": values["cuda"]}


def compiler() -> str | None:
    """Return the path of a C compiler."""
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")


def include_folders() -> list[Path]:
    """Return the folders with the headers of the CUDA runtime, of NCCL and of the driver, from installed packages."""
    site = _package("torch").parent
    return [
        site / "nvidia" / f"cu{CUDA_MAJOR}" / "include",
        site / "nvidia" / "nccl" / "include",
        site / "triton" / "backends" / "nvidia" / "include",
    ]


@functools.cache
def build() -> Path:
    """Compile the stand-in unless this source was compiled for this torch before; return the library.

    Raises:
        RuntimeError: with the compiler's output.
    """
    key = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES) + str(torch_version()).encode()).hexdigest()[
        :16
    ]
    folder = Path(tempfile.gettempdir()) / f"mrmae-fake-gpu-{getpass.getuser()}" / key
    library = folder / NAME
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    # Several processes may build at once: each compiles into a file of its own, and the last one's stays.
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        compiled = Path(staging) / NAME
        headers = [part for folder in include_folders() for part in ("-idirafter", str(folder))]
        command = [str(compiler()), "-O2", "-g", "-shared", "-fPIC", "-w", *headers, "-o", str(compiled)]
        command += [str(path) for path in SOURCES if path.suffix == ".c"]
        done = subprocess.run([*command, "-lpthread"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{SOURCES[0].parent} does not compile:\n{done.stderr}")
        # PyTorch opens a driver of this name, and takes its functions from whatever defines them.
        driver_link = Path(staging) / "libcuda.so.1"
        driver_link.symlink_to(NAME)
        driver_link.replace(folder / "libcuda.so.1")
        compiled.replace(library)
    return library


def variables(timing: bool = False, devices: int = 1) -> dict[str, str]:
    """Return the environment variables of a process on the stand-in.

    Args:
        timing: allocate as on a GPU, and skip copies that a GPU would make beside the host's work.
        devices: number of GPUs of the machine.
    """
    library = build()
    path = os.pathsep.join(filter(None, [str(library.parent), os.environ.get("LD_LIBRARY_PATH")]))
    values = {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": path, "DS_ACCELERATOR": "cuda", "OMP_NUM_THREADS": "1"}
    values["FAKE_CUDA_DEVICES"] = str(devices)
    values["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # threads without Python print their waits: enough to fill a pipe
    if timing:
        return values | {"FAKE_CUDA_TIMING": "1"}
    # New memory is zero, so that values that no kernel wrote are finite and the training loop does not stop at them.
    return values | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def restart(timing: bool = False) -> None:
    """Restart this interpreter with its arguments under the stand-in; return in the restarted process."""
    if NAME in os.environ.get("LD_PRELOAD", ""):
        return
    if reason := missing_requirement():
        sys.exit(f"the GPU stand-in {reason}")
    devices = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", 1))
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | variables(timing, devices))


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{name} is not installed")
    return Path(spec.origin).parent
