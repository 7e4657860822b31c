"""Data sets: finding their images on disk, train and test splits, decoding, batches.

`load_data` is imported when it is first used, since processes that only decode images need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passdeploy.data.splits import load_data as load_data

__all__ = ["load_data"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from passdeploy.data import splits

    return getattr(splits, name)
