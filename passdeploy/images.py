"""Images as networks get them, for programs outside of passdeploy: decoded, turned upright, cropped, resized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from passdeploy.data.images import Frame, decode_file


def decoded(path: str | Path, size: int) -> NDArray[np.uint8]:
    """Read an image file as training and testing do: the largest centred square, uint8 (size, size, 3), RGB.

    Raises:
        DataError: it cannot be read.
    """
    return np.ascontiguousarray(decode_file(path, Frame(size)).transpose(1, 2, 0))
