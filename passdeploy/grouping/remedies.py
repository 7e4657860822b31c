"""Remedies that got a cut network past the operations where it stopped, remembered from one search to the next.

After another choice of dimensions most of a network stops at the same lines as before, with the same errors, so what
helped is tried first. Where nothing did, all is tried again if the other choice lies in that module: it may have made
it possible, as it does for the heads of an attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from passdeploy.channels.groups import SizeAttribute
from passdeploy.grouping.shape_check import Stop

# The attributes that had to follow a width, or the key of a width equality.
Remedy = frozenset[SizeAttribute] | tuple[str, ...]
_StopKey = tuple[object, ...]


@dataclass
class Remedies:
    """The remedies of stops so far, by what can be seen of a stop: line of code, shapes, channels and error."""

    _known: dict[_StopKey, Remedy] = field(default_factory=dict)
    _hopeless: set[_StopKey] = field(default_factory=set)  # nothing but protection helped

    def of(self, stop: Stop) -> Remedy | None:
        """Return what helped; None where nothing did, or the network never stopped like this."""
        return self._known.get(_key_of(stop))

    def remember(self, stop: Stop, remedy: Remedy) -> None:
        """Remember what helped."""
        self._known[_key_of(stop)] = remedy

    def give_up(self, stop: Stop) -> None:
        """Remember that nothing helped."""
        self._hopeless.add(_key_of(stop))

    def none_helps(self, stop: Stop, chosen_in: Iterable[str]) -> bool:
        """True if nothing helped before, and none of these modules, where dimensions are chosen, has to do with it."""
        here = stop.record.modules[-1] if stop.record.modules else ""
        return _key_of(stop) in self._hopeless and not any(
            not here or _is_inside(here, module) or _is_inside(module, here) for module in chosen_in
        )


def _is_inside(module: str, other: str) -> bool:
    return module == other or module.startswith(f"{other}.")


def _key_of(stop: Stop) -> _StopKey:
    record = stop.record
    tensors = [
        (shape, *((dim, len(vector.unique())) for dim, vector in labels.items()))
        for shape, labels in (*record.inputs, *record.results)
    ]
    return record.op, record.source, record.modules, stop.error, tuple(tensors)
