"""Array types of the data package."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
ImageArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
UIntArray = npt.NDArray[np.uint64]
