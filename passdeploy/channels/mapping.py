"""From a network to its channel groups: follow, rehearse, and choose again where a choice was in vain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from passdeploy.channels.follow import ChoiceKey, Trace, follow
from passdeploy.channels.groups import ChannelGroup, ChannelMap
from passdeploy.channels.rehearse import rehearse

MOST_ROUNDS = 3


def find_groups(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> tuple[ChannelGroup, ...]:
    """The channel groups of `model`, prunable and protected, in the order of the forward pass.

    Args:
        model: any network; it is run in evaluation mode and left as it was.
        example_inputs: one tensor or several, sized as in use; a batch of one is enough.
    """
    return map_channels(model, example_inputs).groups


def map_channels(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> ChannelMap:
    """The groups of `model` and its cost model.

    Args:
        model: any network; it is run in evaluation mode and left as it was.
        example_inputs: one tensor or several, sized as in use.
        include: patterns (as in `fnmatch`) of the layers whose output channels may be cut.
        exclude: patterns of layers whose output channels stay all the same.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    choose: dict[ChoiceKey, int] = {}
    best: ChannelMap | None = None
    for _ in range(MOST_ROUNDS):
        trace = follow(model, inputs, choose=choose)
        found = rehearse(model, inputs, trace)
        if best is None or _removable(found) > _removable(best):
            best = found
        vain = _choices_in_vain(trace, choose)
        if not vain:
            break
        choose = {**choose, **vain}
    assert best is not None
    return best.chosen(include=include, exclude=exclude)


def _removable(found: ChannelMap) -> int:
    return sum(group.width * group.span for group in found.prunable)


def _choices_in_vain(trace: Trace, chosen: Mapping[ChoiceKey, int]) -> dict[ChoiceKey, int]:
    """Choices whose channels must stay after all, and that have another option: which -> that option."""
    protections, _ = trace.book.protections()
    return {
        key: chosen.get(key, 0) + 1
        for key, choice in trace.choices.items()
        if chosen.get(key, 0) + 1 < choice.options and (protections[trace.book.find(choice.labels).numpy()] >= 0).any()
    }
