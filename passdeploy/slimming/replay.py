"""Two networks that are compared must decide alike: which box is best, which ones overlap, what passes a threshold.

Rounding settles a tie one way in one network and the other way in the other, and from there on they look at different
boxes. So the second network takes over what the first one decided, and only what is computed from it is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RANKING = ("aten.topk", "aten.sort")  # give values and their places: the values follow from the places
CHOOSING = ("torchvision.nms", "aten.nonzero", "aten.argsort", "aten.argmax")
COMPARING = ("aten.gt", "aten.ge", "aten.lt", "aten.le")


class DecisionLog:
    """What a network decided, to be decided again by another one."""

    def __init__(self) -> None:
        self._made: list[tuple[str, Tensor]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Remember what is decided in here."""
        self._made.clear()
        with _Watched(self._remember):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Decide in here as was decided before, as long as the questions are the same."""
        self._left = iter(self._made)
        with _Watched(self._repeat):
            yield

    def _remember(self, op: str, given: Mapping[str, Any], result: Any) -> Any:
        self._made.append((op, result[1] if op in RANKING else result))
        return result

    def _repeat(self, op: str, given: Mapping[str, Any], result: Any) -> Any:
        asked, decided = next(self._left, ("", None))
        own = result[1] if op in RANKING else result
        if decided is None or asked != op or (op in (*RANKING, *COMPARING) and decided.shape != own.shape):
            self._left = iter(())  # another course of things: from here on it decides by itself
            return result
        if op not in RANKING:
            return decided
        source = given["self"]
        return (source.gather(given.get("dim", -1), decided), decided) if source.ndim else result


class _Watched(TorchDispatchMode):
    def __init__(self, decide: Callable[[str, Mapping[str, Any], Any], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._decide = decide

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Any operation, on its way."""
        result = func(*args, **(kwargs or {}))
        op = str(func.overloadpacket)
        if op in _DECISIVE and all(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            names = (slot.name for slot in func._schema.arguments)
            return self._decide(op, {**dict(zip(names, args, strict=False)), **(kwargs or {})}, result)
        return result


_DECISIVE = {*RANKING, *CHOOSING, *COMPARING}


def decides(ops: Sequence[str]) -> bool:
    """Whether a network with these operations ranks or chooses."""
    return any(op in RANKING or op in CHOOSING for op in ops)
