"""Compare a slim network with the masked one, and make sure that the comparison can be believed.

Two networks that both run the dense weights agree perfectly. So `verify` also checks that the plan had an effect, that
neither network reads the tensors of the original, that the slim network is what its own class computes with its own
tensors, that these tensors are the slices that the plan keeps with nothing left of a skipped block (structure.py), and
that a copy without any cut computes what the network itself does.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from passdeploy.channels.blocks import Block, replacements_of
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.errors import EquivalenceError, first_line
from passdeploy.models.chosen_outputs import OutputChoice
from passdeploy.models.cloning import ModelCloner, deep_copy, named_plain_tensors, named_state
from passdeploy.models.input_sizes import doubled, first_taken, one_sample, shapes_of, takes
from passdeploy.models.modes import outside_inference_mode
from passdeploy.models.positional import positional
from passdeploy.models.selected_channels import is_index_name
from passdeploy.models.wrappers import unwrapped
from passdeploy.slimming.agreement import REPORT, SameInputs, largest_error
from passdeploy.slimming.agreement import relative_error as relative_error
from passdeploy.slimming.fixed_outputs import select_outputs_
from passdeploy.slimming.float64 import NarrowingWatch, in_float64, is_large, to_float64_
from passdeploy.slimming.masked import masked
from passdeploy.slimming.masked_branches import additions_of, muted_branches
from passdeploy.slimming.parts import PART_TOLERANCE, error_by_part
from passdeploy.slimming.replay import DecisionLog
from passdeploy.slimming.size_attributes import size_attributes_after, update_size_attributes_, write_size_attribute_
from passdeploy.slimming.slim import NOTHING, slim
from passdeploy.slimming.structure import structure_fault
from passdeploy.slimming.substitutes import replace_modules_
from passdeploy.slimming.tensors import like, removed_indices, storage_of
from passdeploy.slimming.training_mode import TrainingRun, train_alike


def verify(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    plan: Plan,
    inputs: Tensor | Sequence[Tensor],
    *,
    tolerance: float,
    blocks: Sequence[Block] = (),
    outputs: OutputChoice | None = None,
) -> float:
    """Compare `slim` with `masked` on real inputs and return the largest relative error.

    The error of an output is its largest difference divided by its largest absolute value. A detector's boxes are
    ranked once: the slim network takes over what the masked one decided, since rounding settles ties either way; where
    it would have decided otherwise, the error of what it decided by counts as well. Where the network takes another
    image size and batch size (see `input_sizes.other_sizes`), both are compared there, too, and on the first sample
    alone. Where the network runs in training mode, both are compared in it, whichever way chance decides, but without
    dropout. Where a part of an output that is very small beside others, as class scores beside boxes in pixels, differs
    by more than `tolerance` of its own magnitude, it is compared once more in float64, which tells a wrong part from
    rounding (networks of up to 100 million parameters that run in float64).

    Args:
        model: the network.
        groups: its channel groups.
        plan: channels to keep, and blocks to skip.
        inputs: one tensor or several.
        tolerance: the largest relative error that is allowed.
        blocks: its blocks; only needed where the plan skips some.
        outputs: which of the network's outputs are compared, as for `find_groups`; None: all.

    Raises:
        EquivalenceError: the error is above `tolerance` or not a number; a small part of an output is wrong; there is
            nothing to compare; the plan had no effect; what is called is not what the tensors of the slim network say;
            these tensors, hooks, modes and stated sizes are not those of the network without the removed channels; or
            a copy without any cut answers otherwise.
        ModelError: the network cannot be copied.
        PlanError: the plan does not fit the groups, or the groups not the network.
    """
    return check_equivalence(
        model, groups, plan, inputs, tolerance=tolerance, blocks=blocks, outputs=outputs
    ).max_rel_error


@dataclass(frozen=True)
class Equivalence:
    """The agreement of a slim network with the masked one."""

    max_rel_error: float  # over all outputs and inputs
    input_shapes: list[list[list[int]]]  # for each run: the shapes of the network's arguments

    @property
    def size_text(self) -> str:
        """The shapes of the inputs in words, such as `8x3x64x64 and 9x3x96x96`."""
        return " and ".join(", ".join("x".join(map(str, shape)) for shape in run) for run in self.input_shapes)


@outside_inference_mode()
def check_equivalence(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    plan: Plan,
    inputs: Tensor | Sequence[Tensor],
    *,
    tolerance: float,
    blocks: Sequence[Block] = (),
    outputs: OutputChoice | None = None,
) -> Equivalence:
    """Do what `verify` does, and also return the sizes at which the networks were compared."""
    model = unwrapped(model)
    arguments = positional(inputs)
    run = SameInputs(arguments, outputs)
    reference, smaller = masked(model, groups, plan, blocks), slim(model, groups, plan, blocks)
    fault = structure_fault(model, smaller, groups, plan, blocks)  # now: some networks change buffers when they run
    with _tensors_unread(model):
        here = run.compare(reference, smaller)
        _require_tolerance(here.error, tolerance, run)
        compared = [(run, here)]
        for other in _other_inputs(reference, arguments):
            there = SameInputs(other, outputs)
            compared.append((there, there.compare(reference, smaller)))
            _require_tolerance(compared[-1][1].error, tolerance, there)
        _require_training(reference, smaller, run, tolerance)
    with _state_restored(model):
        _require_effect(model, groups, plan, blocks, run, here.found, tolerance)
    difference = run.compare(smaller, _rebuilt(model, smaller, groups, plan, blocks)).error
    if not difference <= tolerance:
        raise EquivalenceError(
            "the slim network computes something else than its class does with the same tensors: "
            f"they differ by {difference:.1e} (relative).\n" + REPORT
        )
    if fault:
        raise EquivalenceError(f"the slim network is not the dense one without what was removed: {fault}.\n" + REPORT)
    with _state_restored(model):
        _require_true_copy(model, groups, run, tolerance)
    for one, found in compared:
        if found.error_of_parts > tolerance:
            _require_equal_parts(model, groups, plan, blocks, one, tolerance)
    return Equivalence(max(found.error for _, found in compared), [shapes_of(one.arguments) for one, _ in compared])


def _other_inputs(reference: nn.Module, arguments: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Yield inputs of another size, and the first sample alone, as far as the network takes them.

    A copy tries them: some networks count their calls, or keep averages of what they have seen.
    """
    if (other := first_taken(deep_copy(reference), arguments)) is not None:
        yield other
    if (alone := one_sample(arguments)) is not None and takes(deep_copy(reference), alone):
        yield alone


def _require_tolerance(error: float, tolerance: float, run: SameInputs) -> None:
    if error == float("inf"):
        raise EquivalenceError(
            f"the slim network's outputs have other shapes than the masked one's, or values that are not finite, on "
            f"inputs of shape {run.shapes_text}.\n"
            "Where the groups were found with outputs=..., give verify the same. " + REPORT
        )
    if not error <= tolerance:
        raise EquivalenceError(
            f"the slim network differs from the masked one by {error:.1e} (relative) on inputs of shape "
            f"{run.shapes_text}, allowed is {tolerance:.1e}.\n" + REPORT
        )


def _require_training(reference: nn.Module, smaller: nn.Module, run: SameInputs, tolerance: float) -> None:
    """Raise EquivalenceError if the slim network fails or computes something else in training mode than `reference`."""
    try:
        training = TrainingRun(doubled(run.arguments), run.choice)
        are_alike = train_alike(reference, smaller, training, tolerance=tolerance, wide_tolerance=tolerance)
    except Exception as problem:  # any kind: the code meets sizes that it does not know
        raise EquivalenceError(
            "the slim network does not run in training mode, in which its code does something else: "
            f"{first_line(problem)}\n" + REPORT
        ) from problem
    if not are_alike:
        raise EquivalenceError(
            "in training mode the slim network differs from the masked one: its code does something else there.\n"
            + REPORT
        )


def _require_true_copy(model: nn.Module, groups: Sequence[ChannelGroup], run: SameInputs, tolerance: float) -> None:
    """Raise EquivalenceError if a copy without any cut answers otherwise: slim and masked may agree and be wrong."""
    difference = run.compare(model, slim(model, groups, Plan({}))).error
    if not difference <= tolerance:
        raise EquivalenceError(
            f"a copy of the network without any cut answers otherwise: by {difference:.1e} (relative), allowed is "
            f"{tolerance:.1e}.\n" + REPORT
        )


def _require_equal_parts(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    plan: Plan,
    blocks: Sequence[Block],
    run: SameInputs,
    tolerance: float,
) -> None:
    """Raise EquivalenceError if a part of an output, however small beside others, differs in float64 as well.

    Where that cannot be told, since the network is large or computes in float32 whatever it is given, it passes.
    """
    if is_large(model):
        return
    wide, decisions, narrowing = SameInputs(in_float64(run.arguments), run.choice), DecisionLog(), NarrowingWatch()
    try:
        reference = to_float64_(masked(model, groups, plan, blocks))
        with narrowing:
            expected = wide.outputs_of(reference, decisions.recording())
        found = wide.outputs_of(to_float64_(slim(model, groups, plan, blocks)), decisions.replaying())
    except Exception:  # it runs in its own type alone
        return
    error = max(map(error_by_part, expected, found), default=0.0)
    if error > max(tolerance, PART_TOLERANCE) and not narrowing.was_seen:
        raise EquivalenceError(
            f"the slim network differs from the masked one by {error:.1e} (relative) in a part of an output that is "
            f"small beside the others, on inputs of shape {run.shapes_text}.\n" + REPORT
        )


def _require_effect(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    plan: Plan,
    blocks: Sequence[Block],
    run: SameInputs,
    found: Sequence[Tensor],
    tolerance: float,
) -> None:
    """Raise EquivalenceError if the slim network answers like the dense one, although what was removed matters."""
    if not plan.skipped and not any(len(plan.removed(group)) for group in groups):
        return
    dense = run.outputs_of(model)
    if largest_error(dense, found) > tolerance:
        return
    with removed_slices_zeroed_(model, groups, plan), muted_branches(model, additions_of(plan, blocks)):
        zeroed = run.outputs_of(model)
    if (change := largest_error(dense, zeroed)) > max(tolerance, 1e-6):
        raise EquivalenceError(
            "the plan had no effect: the slim network answers like the dense one, although without what was removed "
            f"the dense network's answer changes by {change:.1e} (relative).\n" + REPORT
        )


@contextmanager
def removed_slices_zeroed_(model: nn.Module, groups: Sequence[ChannelGroup], plan: Plan) -> Iterator[None]:
    """Set the slices that a plan removes to zero in the network's own parameters; afterwards they are what they were.

    This is a second reference for `slim`, independent of `masked`: exact for networks without statistics over channels
    (layer norms, softmax and the like over channels that are cut), and no copy of the network is made.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        for group in groups:
            kept = set(plan.kept.get(group.name, range(group.width)))
            for slot in group.slots:
                if slot.tensor in parameters:
                    gone = [
                        place for channel, row in enumerate(slot.index.tolist()) if channel not in kept for place in row
                    ]
                    parameters[slot.tensor].data.transpose(0, slot.dim)[gone] = 0.0
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(saved[name])


def _rebuilt(
    model: nn.Module, smaller: nn.Module, groups: Sequence[ChannelGroup], plan: Plan, blocks: Sequence[Block]
) -> nn.Module:
    """Build the slim network another way: Python's own copy of the dense one, around the slim one's tensors."""
    removed = removed_indices(groups, plan)
    state = {
        name: tensor if isinstance(tensor, nn.Parameter) else tensor.clone()  # one network may change its buffers
        for name, tensor in named_state(smaller)
        if not is_index_name(name)
    }
    new = {name: like(old, state[name]) if name in state else old for name, old in named_state(model)}
    plain = dict(named_plain_tensors(smaller))
    cut = {
        id(old): plain[name]
        for name, old in named_plain_tensors(model)
        if any((name, dim) in removed for dim in range(old.ndim))
    }
    lost = {id(new[name]): removed.get((name, 0), NOTHING) for name in new}
    rebuilt = ModelCloner(model).deep_copy({**{id(old): new[name] for name, old in named_state(model)}, **cut})
    select_outputs_(rebuilt, groups, plan)
    replace_modules_(rebuilt, replacements_of(blocks, plan.skipped))
    for module in rebuilt.modules():
        update_size_attributes_(module, lambda weight: lost.get(id(weight)))
    for attribute, value in size_attributes_after(groups, plan, blocks):
        write_size_attribute_(rebuilt, attribute, value)
    return rebuilt


_CONTAINERS = (list, dict, set, deque, defaultdict, OrderedDict)


@contextmanager
def _state_restored(model: nn.Module) -> Iterator[None]:
    """Give a network back what it changes itself when it runs: parameters, buffers, attributes and what they hold."""
    saved = [(tensor, tensor.detach().clone()) for _, tensor in named_state(model) if tensor.layout == torch.strided]
    attributes = [vars(module) for module in model.modules()]
    containers = [one for held in attributes for one in held.values() if type(one) in _CONTAINERS]
    contents = [(one, copy.copy(one)) for one in (*attributes, *containers)]
    try:
        yield
    finally:
        for container, as_it_was in contents:
            container.clear()
            (container.extend if isinstance(container, list | deque) else container.update)(as_it_was)
        for tensor, before in saved:
            if not torch.equal(tensor.detach(), before):
                tensor.data.copy_(before)


class _Reads(TorchDispatchMode):
    """Watch for operations that read certain storages."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run any operation, unless it reads one of them."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and (name := self._names.get(storage_of(leaf))) is not None:
                raise EquivalenceError(
                    f"a copy of the network computes with {name} of the original: {func.name()}.\n"
                    "Its code or an attribute holds on to the layers themselves; let it use `self`."
                )
        return func(*args, **(kwargs or {}))


@contextmanager
def _tensors_unread(model: nn.Module) -> Iterator[None]:
    """Raise EquivalenceError if anything in here reads the parameters or buffers of `model`."""
    names = {storage_of(tensor): name for name, tensor in named_state(model)}
    names.pop(0, None)  # tensors without values
    with _Reads(names):
        yield
