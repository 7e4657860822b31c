"""What got a cut network past the operations where it stopped, remembered from one search to the next.

After another choice of dimensions most of a network stops at the same lines as before, with the same errors, and most
attempts to repair it fail again. So what helped is tried first, and where nothing did, nothing is tried again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from passdeploy.channels.groups import SizeAttribute
from passdeploy.grouping.shape_check import Stop

# The attributes that had to follow a width, the key of a width equality, or None where only protection helped.
Remedy = frozenset[SizeAttribute] | tuple[str, ...] | None
_StopKey = tuple[object, ...]


@dataclass
class Remedies:
    """The remedy of every stop so far, by what can be seen of it: the line of code, shapes, channels, and the error."""

    _known: dict[_StopKey, Remedy] = field(default_factory=dict)

    def has(self, stop: Stop) -> bool:
        """True if the network stopped like this before."""
        return _key_of(stop) in self._known

    def of(self, stop: Stop) -> Remedy:
        """Return what helped, None where nothing did or the stop is not known."""
        return self._known.get(_key_of(stop))

    def remember(self, stop: Stop, remedy: Remedy) -> None:
        """Remember what helped."""
        self._known[_key_of(stop)] = remedy


def _key_of(stop: Stop) -> _StopKey:
    record = stop.record
    tensors = [
        (shape, *((dim, len(vector.unique())) for dim, vector in labels.items()))
        for shape, labels in (*record.inputs, *record.results)
    ]
    return record.op, record.source, record.modules, stop.error, tuple(tensors)
