"""Transcripts of runs by shapes alone, which tell whether a network does something else in another mode or size.

They cost far less than a trace, which follows channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from passdeploy.models.cloning import ModelCloner
from passdeploy.models.modes import evaluating
from passdeploy.models.outputs import tensors_in
from passdeploy.models.without_dropout import without_dropout
from passdeploy.runtime.seeds import seeded_python_and_numpy, states_of_python_and_numpy
from passdeploy.tracing.meta_model import MetaMode, to_meta

Transcript = list[tuple[Any, ...]]  # of each operation its name, its arguments and its results, tensors as numbers


def transcript_of(
    cloner: ModelCloner[nn.Module], inputs: Sequence[Any], *, training: bool = False
) -> Transcript | None:
    """Run a copy of a network on the meta device and write down what it does, a batch norm alike in both modes.

    Args:
        cloner: of the network on the meta device.
        inputs: its positional arguments, on any device.
        training: run in training mode. Both modes run without dropout, and record gradients.

    Returns:
        A line for each operation, one for draws outside of torch, and one for the outputs; None if the network does
        not run so.
    """
    writer = _Writer()
    if (ran := _run(cloner, inputs, writer, training=training)) is None:
        return None
    return [*writer.lines, ("draws from Python or NumPy", ran.drew), tuple(map(writer.numbered, ran.outputs))]


def operations_of(cloner: ModelCloner[nn.Module], inputs: Sequence[Any]) -> list[str] | None:
    """Run a copy as `transcript_of` does, and list the names of the operations alone.

    They are the same at all sizes unless the code does something else.
    """
    names = _Names()
    return None if _run(cloner, inputs, names) is None else names.names


class _Ran(NamedTuple):
    outputs: list[Tensor]
    drew: bool  # random numbers from Python or NumPy


def _run(
    cloner: ModelCloner[nn.Module], inputs: Sequence[Any], mode: MetaMode, *, training: bool = False
) -> _Ran | None:
    model = cloner.copy(lambda _, tensor: tensor if tensor.is_meta else tensor.clone())
    on_meta = tree_map(lambda leaf: to_meta(leaf) if isinstance(leaf, Tensor) else leaf, list(inputs))
    try:
        with (
            torch.enable_grad(),
            seeded_python_and_numpy(),
            torch.random.fork_rng(devices=[]),
            evaluating(model, training=training),
            without_dropout(model) if training else nullcontext(),
            mode,
        ):
            drawn = states_of_python_and_numpy()
            outputs = model(*on_meta)
            return _Ran(tensors_in(outputs), states_of_python_and_numpy() != drawn)
    except Exception:  # it may want targets, or other sizes
        return None


class _Names(MetaMode):
    """The mode that lists the names of operations, except those on whole numbers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation and note its name."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        first = result[0] if isinstance(result, tuple | list) and result else result
        if isinstance(first, Tensor) and first.is_meta and func is not torch.ops.aten.detach.default:
            self.names.append(func.name())
        return result


class _Writer(MetaMode):
    """The mode that writes down operations, except those on whole numbers alone, such as a counter of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: Transcript = []
        self._numbers: dict[int, int] = {}  # id of a tensor -> its number in the order of appearance
        self._next_number = count()
        self._alive: list[Tensor] = []  # so that ids stay their own

    def numbered(self, leaf: Any) -> Any:
        """Return the number of a tensor, and anything else as it is."""
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self._numbers:
            self._numbers[id(leaf)] = next(self._next_number)
            self._alive.append(leaf)
        return self._numbers[id(leaf)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation and write it down."""
        leaves = tree_leaves((args, kwargs))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.detach.default:  # layers do it where gradients are recorded
            self._numbers[id(result)] = self.numbered(args[0])
            self._alive.append(result)
            return result
        decides = torch.Tag.nondeterministic_seeded in func.tags  # which branch the code takes, perhaps
        if decides or any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in (*leaves, *tree_leaves(result))):
            is_batch_norm = "batch_norm" in func.name()  # is another operation in training mode
            taken = ["batch_norm", args[0]] if is_batch_norm else [func.name(), *leaves]
            given = tree_leaves(result)[:1] if is_batch_norm else tree_leaves(result)
            self.lines.append(tuple(map(self.numbered, [*taken, *given])))
        return result
