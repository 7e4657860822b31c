"""On which test images two networks differ: how many became right and how many became wrong."""

from __future__ import annotations

import base64

import numpy as np
from torch import Tensor


def packed(right: Tensor) -> str:
    """Write which images were right, (images,) bool, as text: base 85 of a bit per image, the first one highest."""
    return base64.b85encode(np.packbits(right.numpy()).tobytes()).decode("ascii")


def changed_answers(before: str | None, after: Tensor, *, images: int | None) -> dict[str, int] | None:
    """Count the images whose answer changed between two networks.

    Args:
        before: the answers of the first network, from `packed`; None where a run of an earlier version has none.
        after: those of the second one, (images,) bool.
        images: that `before` is of; None where a run of an earlier version has not written it down.

    Returns:
        `became_right` and `became_wrong`, numbers of images; None without `before`, or if that is of other images.
    """
    if before is None or images not in (None, len(after)):
        return None
    bits = np.frombuffer(base64.b85decode(before), dtype=np.uint8)
    if len(bits) != (len(after) + 7) // 8:
        return None
    was_right, is_right = np.unpackbits(bits, count=len(after)).astype(bool), after.numpy()
    return {
        "became_right": int((~was_right & is_right).sum()),
        "became_wrong": int((was_right & ~is_right).sum()),
    }
