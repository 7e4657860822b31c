"""From a network and a plan to a smaller network, and the proof that it is the same function.

`masked` leaves every shape alone and lets the removed channels contribute nothing; `slim` cuts them out.
The two compute the same, to rounding: that is the promise of the whole project, and `verify` checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.rules.contractions import cuts_whole_groups
from passdeploy.cloning import Mould, modules_by_name, named_state
from passdeploy.collection import no_collection
from passdeploy.cutting import Removed, cut_tensors, like, removed_places
from passdeploy.decisions import Decisions
from passdeploy.errors import EquivalenceError
from passdeploy.norms import KeptPlaces, with_restricted_norms_
from passdeploy.plan import Plan
from passdeploy.running import evaluating
from passdeploy.statistics import CallKey, Existing

NOTHING = Removed()
NumberKey = tuple[str, str, int | None]  # module, attribute, place in it


@no_collection()
def slim(model: nn.Module, groups: Sequence[ChannelGroup], plan: Plan) -> nn.Module:
    """A new network of the same classes without the channels that `plan` drops; `model` is untouched.

    Parameter names, training mode and `requires_grad` are as in `model`.

    Raises:
        PlanError: the plan does not fit the groups.
    """
    return slim_from(Mould(model), groups, plan)


def slim_from(mould: Mould[nn.Module], groups: Sequence[ChannelGroup], plan: Plan) -> nn.Module:
    """`slim` of a network of which many copies are wanted."""
    plan.check(groups)
    removed = removed_places(groups, plan)
    state = cut_tensors(mould.state, removed)
    gone: dict[int, Removed] = {}  # id of a tensor -> what it lost along its first dimension

    def cut(name: str, old: Tensor) -> Tensor:
        is_shape_alone = old.is_meta and state[name] is old
        new = old if is_shape_alone else like(old, state[name])
        gone[id(new)] = removed.get((name, 0), NOTHING)
        return new

    smaller = mould.copy(cut)
    for _, module in modules_by_name(smaller):
        _state_true_widths_(module, lambda weight: gone.get(id(weight)))
    for number, value in numbers_after(groups, plan):
        write_number_(smaller, number, value)
    return smaller


def numbers_after(groups: Sequence[ChannelGroup], plan: Plan) -> list[tuple[NumberKey, int]]:
    """The numbers that modules keep and that are sizes, and what they say once `plan` is carried out."""
    widths = {group.name: group.width for group in groups} | plan.widths()
    return [(number, size.size(widths)) for group in groups for number, size in group.numbers]


def hidden_state(smaller: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """Buffers of a slim network that were cut and that its state dict leaves out; rebuilding it takes them too."""
    known = smaller.state_dict().keys()
    names = {slot.tensor for group in groups if group.is_prunable for slot in group.slots} - known
    return {name: smaller.get_buffer(name) for name in sorted(names)}


def masked(model: nn.Module, groups: Sequence[ChannelGroup], plan: Plan) -> nn.Module:
    """A copy of `model` with the same shapes in which the dropped channels contribute nothing to any consumer.

    Raises:
        PlanError: the plan does not fit the groups.
    """
    return masked_from(Mould(model), groups, plan)


def masked_from(mould: Mould[nn.Module], groups: Sequence[ChannelGroup], plan: Plan) -> nn.Module:
    """`masked` of a network of which many copies are wanted."""
    plan.check(groups)
    reference = mould.copy(lambda _, old: like(old, old))
    parameters = {name: tensor for name, tensor in named_state(reference) if isinstance(tensor, nn.Parameter)}
    kept: dict[str, KeptPlaces] = {}
    with torch.no_grad():
        for (name, dim), removed in removed_places(groups, plan).items():
            if name in parameters:  # running statistics are divided by: they stay as they are
                parameter = parameters[name]
                parameter.index_fill_(dim, removed.places.to(parameter.device), 0.0)
                kept.setdefault(name, KeptPlaces(parameter.shape)).removed[dim] = removed.places
    return with_restricted_norms_(reference, kept, _existing(groups, plan))


def _existing(groups: Sequence[ChannelGroup], plan: Plan) -> dict[CallKey, list[Existing]]:
    """What exists of the channels that statistics go over, where any are gone."""
    found: dict[tuple[CallKey, int], Tensor] = {}
    for group in groups:
        removed = plan.removed(group)
        for one in group.statistics if len(removed) else ():
            exists = ~torch.isin(one.channels, torch.as_tensor(removed))
            key = (one.module, one.turn), one.dim
            found[key] = found[key] & exists if key in found else exists
    by_call: dict[CallKey, list[Existing]] = {}
    for (call, dim), exists in found.items():
        by_call.setdefault(call, []).append((dim, exists))
    return by_call


def verify(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    plan: Plan,
    inputs: Tensor | Sequence[Tensor],
    *,
    tolerance: float,
) -> float:
    """Compare `slim` with `masked` on real inputs; returns the largest relative error.

    The error of an output is its largest difference divided by its largest absolute value. A detector's boxes are
    ranked once: the slim network takes over what the masked one decided, since rounding settles ties either way.

    Raises:
        EquivalenceError: it is above `tolerance`, or not a number.
    """
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    reference, smaller, decisions = masked(model, groups, plan), slim(model, groups, plan), Decisions()
    with torch.no_grad(), evaluating(reference), evaluating(smaller):
        with decisions.making():
            expected = tree_leaves(reference(*arguments))
        with decisions.repeating():
            found = tree_leaves(smaller(*arguments))
    error = max(relative_error(a, b) for a, b in zip(expected, found, strict=True) if isinstance(a, Tensor))
    if not error <= tolerance:
        raise EquivalenceError(
            f"the slim network differs from the masked one by {error:.1e} (relative), allowed is {tolerance:.1e}.\n"
            "This is a defect of passdeploy: please report the model. `prune.exclude` can leave layers alone."
        )
    return error


def relative_error(expected: Tensor, found: Tensor) -> float:
    """Largest difference over largest magnitude; infinite where shapes differ or a value is not finite."""
    if expected.shape != found.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    difference = (expected.double() - found.double()).abs().max()
    error = float(difference / expected.double().abs().max().clamp_min(1e-30))
    return error if error == error else float("inf")


def resize_(model: nn.Module, state: Mapping[str, Tensor], numbers: Sequence[tuple[NumberKey, int]] = ()) -> None:
    """Give `model` the parameters and buffers in `state`, whatever their shapes, and the attributes that go with them.

    This is how a slim network is rebuilt from its factory and its tensors. Shared parameters stay shared.

    Args:
        model: as its factory made it.
        state: its tensors by name; those that are missing stay.
        numbers: as `numbers_after` gave them when the network was cut.
    """
    new = {
        id(old): like(old, state[name].to(old.device, old.dtype)) if name in state else old
        for name, old in named_state(model)
    }
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for attribute, old in table.items():
                if old is not None:
                    table[attribute] = new[id(old)]  # type: ignore[assignment]
        _state_true_widths_(module, lambda _: None)
    for number, value in numbers:
        write_number_(model, number, value)


_GATES = {"LSTM": 4, "GRU": 3}  # rows of a recurrent network's weights for each of its units


def _loses_groups(groups: int, size: int, inputs_per_group: int, removed: Removed | None) -> bool:
    """Whether some of the groups of channels of a layer go, else all of them become narrower.

    Args:
        groups: how many there were.
        size: channels of all of them, along the first dimension of the weight.
        inputs_per_group: how many there were.
        removed: places along that dimension that went; None: the layer is rebuilt from the widths it was made with.
    """
    if removed is None:
        return cuts_whole_groups(groups, inputs_per_group)
    if groups == 1 or not len(removed):
        return False
    lost = torch.bincount(removed.places // (size // groups), minlength=groups)
    return bool((lost == size // groups).any())


def _state_true_widths_(module: nn.Module, removed_of: Callable[[Tensor], Removed | None]) -> None:
    """Make a module's own numbers agree with its weights.

    Args:
        module: with its new weights, and the old numbers.
        removed_of: weight -> places along its first dimension that went, or None where nobody knows.
    """
    if isinstance(module, nn.RNNBase):
        module.input_size = module.get_parameter("weight_ih_l0").size(1)
        module.hidden_size = module.get_parameter("weight_hh_l0").size(0) // _GATES.get(module.mode, 1)
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
        return
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.modules.conv._ConvNd):
        inputs, outputs = (weight.size(0), weight.size(1)) if module.transposed else (weight.size(1), weight.size(0))
        spelled_out, size = (inputs, module.in_channels) if module.transposed else (outputs, module.out_channels)
        if _loses_groups(module.groups, size, module.in_channels // module.groups, removed_of(weight)):
            module.groups = spelled_out // (size // module.groups)
        module.in_channels = inputs if module.transposed else inputs * module.groups
        module.out_channels = outputs * module.groups if module.transposed else outputs
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len(weight)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        per_group = module.num_channels // module.num_groups
        if _loses_groups(module.num_groups, module.num_channels, per_group, removed_of(weight)):
            module.num_groups = len(weight) // per_group
        module.num_channels = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape


def read_number(model: nn.Module, number: NumberKey) -> Any:
    """What a number of a module says; `index` is its place where the attribute is a tuple or a list."""
    module, attribute, index = number
    value = getattr(model.get_submodule(module), attribute)
    return value if index is None else value[index]


def write_number_(model: nn.Module, number: NumberKey, value: int) -> None:
    """Make it say `value`."""
    name, attribute, index = number
    module = model.get_submodule(name)
    if index is None:
        setattr(module, attribute, value)
        return
    old = getattr(module, attribute)
    new = [*old[:index], value, *old[index + 1 :]]
    setattr(module, attribute, tuple(new) if isinstance(old, tuple) else new)
