"""Images that take the places of unreadable ones, found on the way: nothing is decoded before the work starts.

The place of an image that cannot be read is taken by the next readable one of its class in the split. Which one that is
depends on the files alone, not on when they were looked at, so that a resumed run and any number of workers see the
same pixels.
"""

from __future__ import annotations

from functools import cached_property
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from passdeploy.data.images import ImageSource, Pixels
from passdeploy.errors import DataError, first_line


class StandIns:
    """Decoder of a source's images that replaces those that cannot be read.

    Args:
        source: the images.
        found: is appended with the reason for each image that cannot be read, once.
    """

    def __init__(self, source: ImageSource, found: list[str]) -> None:
        self.source, self.found = source, found
        self._unreadable: set[int] = set()
        self._lock = Lock()

    def decode(self, index: int) -> Pixels:
        """Decode an image, or the one that takes its place.

        Raises:
            DataError: no image of its class can be read.
        """
        if index not in self._unreadable:
            try:
                return self.source.decode(index)
            except DataError as error:
                self.note(index, first_line(error, longest=None))
        return self.replace(index)

    @cached_property
    def _labels(self) -> NDArray[np.int64]:
        return np.asarray(self.source.labels)

    def note(self, index: int, reason: str) -> None:
        """Remember that an image cannot be read."""
        with self._lock:
            if index not in self._unreadable:
                self._unreadable.add(index)
                self.found.append(reason)

    def replace(self, index: int) -> Pixels:
        """Decode the image that takes the place of an unreadable one.

        Raises:
            DataError: no image of its class can be read.
        """
        label = self.source.labels[index]
        members = np.flatnonzero(self._labels == label)
        first = int(np.searchsorted(members, index)) + 1
        for member in np.roll(members, -first)[:-1].tolist():
            if member in self._unreadable:
                continue
            try:
                return self.source.decode(member)
            except DataError as error:
                self.note(member, first_line(error, longest=None))
        raise DataError(
            f"no image of class {label} can be read; the first problem: {self.found[0]}.\n"
            "Replace the files, or remove the class."
        )
