"""The folder of cached measurements: latency tables, and the timing caches of TensorRT's builder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from passdeploy.errors import MissingError


def cache_folder() -> Path:
    """Return the folder of cached measurements: $PASSDEPLOY_CACHE, else the user's cache; it need not exist.

    Raises:
        MissingError: the user has no home.
    """
    if configured := os.environ.get("PASSDEPLOY_CACHE"):
        return Path(configured).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "passdeploy"
    except RuntimeError as error:  # a user whom the system does not know, as in a container, and no $HOME
        raise MissingError(
            "this user has no home folder, in which measurements would be kept.\nName a folder: PASSDEPLOY_CACHE"
        ) from error


def timing_cache_path(processor: str, version: str) -> Path:
    """Return the file with TensorRT's kernel timings on a GPU, by its name and the version of TensorRT."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"timing-{processor}-{version}")
    return cache_folder() / f"{name}.cache"
