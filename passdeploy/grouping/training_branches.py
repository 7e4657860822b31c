"""Find out whether a network does in training mode what its trace, of evaluation mode, does not show.

Batch norms and dropout do not count: they treat every channel alike. Where nothing else differs, which a run by shapes
alone shows, nothing need be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from passdeploy.grouping.traced_network import TracedNetwork
from passdeploy.grouping.width_branches import functions_of
from passdeploy.models.input_sizes import with_one_more
from passdeploy.models.modes import drops_at_random, evaluating, train_without_chance_
from passdeploy.models.outputs import tensors_in
from passdeploy.tracing.meta_model import MetaMode


def may_train_otherwise(network: TracedNetwork) -> bool:
    """True if code of the network asks which mode it is in, and may do something else in training mode."""
    if not asks_for_training_mode(network.model):
        return False
    if not network.trace.is_meta or (there := _transcript(network, training=True)) is None:
        return True
    return there != _transcript(network, training=False)


def asks_for_training_mode(model: nn.Module) -> bool:
    """True if code of the network, other than torch's own and that of dropout, asks which mode it is in."""
    modules = (module for module in model.modules() if not drops_at_random(module))
    return any(_reads_mode(function.__code__) for function in {one for each in modules for one in functions_of(each)})


def _reads_mode(code: CodeType) -> bool:
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return "training" in code.co_names or any(map(_reads_mode, nested))


class _Transcript(MetaMode):
    """The operations of a run by shapes: names, which tensors they take, and all other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[Any, ...]] = []
        self._numbers: dict[int, int] = {}  # id of a tensor -> its number in the order of appearance
        self._alive: list[Tensor] = []  # so that ids stay their own

    def numbered(self, leaf: Any) -> Any:
        """Return the number of a tensor, and anything else as it is."""
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self._numbers:
            self._numbers[id(leaf)] = len(self._numbers)
            self._alive.append(leaf)
        return self._numbers[id(leaf)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation and note it, unless it computes with whole numbers, such as a counter of batches."""
        leaves = tree_leaves((args, kwargs))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in (*leaves, *tree_leaves(result))):
            is_batch_norm = "batch_norm" in func.name()
            taken = ["batch_norm", args[0]] if is_batch_norm else [func.name(), *leaves]
            given = tree_leaves(result)[:1] if is_batch_norm else tree_leaves(result)
            self.lines.append(tuple(map(self.numbered, [*taken, *given])))
        return result


def _transcript(network: TracedNetwork, *, training: bool) -> list[tuple[Any, ...]] | None:
    """Run a copy of the network on the meta device, without dropout; None if it does not run in that mode."""
    model = network.trial_cloner.copy(lambda _, tensor: tensor if tensor.is_meta else tensor.clone())
    transcript = _Transcript()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(model, training=training), transcript:
            if training:
                train_without_chance_(model)
            outputs = model(*with_one_more(network.trial_inputs))  # a batch norm may want more than one sample
    except Exception:  # it may want targets, or batches of another size
        return None
    return [*transcript.lines, tuple(map(transcript.numbered, tensors_in(outputs)))]
