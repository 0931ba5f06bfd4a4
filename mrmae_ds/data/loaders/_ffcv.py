"""Import of ffcv without side effects, and with a clear error if it is missing."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from mrmae_ds.errors import UserError


@contextmanager
def keep_torch_threads() -> Iterator[None]:
    """Restore torch's number of threads, which ffcv changes at import and at each epoch."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def import_ffcv() -> None:
    """Import ffcv, after which its modules can be imported as usual.

    Numba's compiler is disabled meanwhile: ffcv fills a typed dictionary at import, which takes 2.6 seconds compiled
    and none as a plain one. The threading layer is TBB unless ``NUMBA_THREADING_LAYER`` is set: with ``workqueue`` a
    second live loader aborts the process, and ``omp`` kills forked children.

    Raises:
        UserError: if ffcv or TBB is missing.
    """
    try:
        import numba

        _load_tbb()
        if "NUMBA_THREADING_LAYER" not in os.environ:
            numba.config.THREADING_LAYER = "tbb"
        before = numba.config.DISABLE_JIT
        numba.config.DISABLE_JIT = True
        try:
            with keep_torch_threads():
                import ffcv.fields.rgb_image
                import ffcv.loader  # noqa: F401
        finally:
            numba.config.DISABLE_JIT = before
    except ImportError as error:
        raise UserError(
            f"the ffcv backend needs ffcv, numba and tbb ({error}): install the system packages libopencv-dev, "
            "libturbojpeg0-dev and pkg-config, then in the clone: pip install -e '.[ffcv]' -c constraints.txt; or do "
            "without, with data.backend=pillow"
        ) from error
    except ValueError as error:
        if "threading layer" not in str(error):
            raise
        raise UserError(
            f"numba finds no TBB library ({error}); in the clone: pip install tbb -c constraints.txt"
        ) from error


def _load_tbb() -> None:
    """Load pip's TBB if the system has none: numba's threading layer searches only the system's folders."""
    for name in ("libtbb.so.12", str(Path(sys.prefix) / "lib" / "libtbb.so.12")):
        with suppress(OSError):
            ctypes.CDLL(name)
            return
