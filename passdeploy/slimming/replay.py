"""Record the decisions of one network (ranking, thresholds, NMS) and replay them in another that it is compared with.

Rounding breaks a tie differently in two networks that are equal but for rounding, and from there on they compute with
different boxes. With the decisions of the first, only what is computed from them is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RANKING = ("aten.topk", "aten.sort")  # return values and their indices: the values follow from the indices
CHOOSING = ("torchvision.nms", "aten.nonzero", "aten.argsort", "aten.argmax")
COMPARING = ("aten.gt", "aten.ge", "aten.lt", "aten.le")


class DecisionLog:
    """Results of ranking, choosing and comparing operations, in the order of the forward pass."""

    def __init__(self) -> None:
        self._made: list[tuple[str, Tensor]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record decisions in this context."""
        self._made.clear()
        with _Watched(self._remember):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Return the recorded decisions in this context, as long as the same operations ask for them."""
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
            self._left = iter(())  # another sequence of operations: from here on its own results count
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
        """Run any operation; record or replace its result if it is a decision."""
        result = func(*args, **(kwargs or {}))
        op = str(func.overloadpacket)
        if op in _DECISIVE and all(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            names = (slot.name for slot in func._schema.arguments)
            return self._decide(op, {**dict(zip(names, args, strict=False)), **(kwargs or {})}, result)
        return result


_DECISIVE = {*RANKING, *CHOOSING, *COMPARING}


def decides(ops: Sequence[str]) -> bool:
    """Return True if one of these operations ranks or chooses."""
    return any(op in RANKING or op in CHOOSING for op in ops)
