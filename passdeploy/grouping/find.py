"""Find the channel groups of a network: trace it, try cuts, and choose other dimensions where channels were lost.

Where they are asked for, its blocks are found as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from passdeploy.channels.blocks import Block
from passdeploy.channels.groups import ChannelGroup, ChannelMap
from passdeploy.grouping.blocks import blocks_of
from passdeploy.grouping.remedies import Remedies
from passdeploy.grouping.traced_network import TracedNetwork
from passdeploy.grouping.trial_search import TrialSearch
from passdeploy.models.chosen_outputs import OutputChoice
from passdeploy.models.modes import outside_inference_mode
from passdeploy.models.positional import positional
from passdeploy.models.wrappers import unwrapped
from passdeploy.runtime.garbage import garbage_collection_paused
from passdeploy.tracing.meta_model import MetaModel
from passdeploy.tracing.trace import DimChoiceKey
from passdeploy.tracing.trace_channels import trace_channels

MAX_ROUNDS = 4  # of choosing other dimensions


def find_groups(
    model: nn.Module, example_inputs: Tensor | Sequence[Tensor], *, outputs: OutputChoice | None = None
) -> tuple[ChannelGroup, ...]:
    """Find the channel groups of `model`, prunable and protected, in the order of the forward pass.

    Args:
        model: any network; it is run in evaluation mode and left as it was.
        example_inputs: one tensor or several, sized as in use; a batch of one is enough.
        outputs: which of the model's outputs count: only these are protected, and compared in trials. A name in a
            dictionary or of an attribute (`a.b` for `b` inside of `a`), an index, several of these in a list, or a
            function of what the model returns. None: all.

    Raises:
        UsageError: the model returns nothing of that name or at that index; the example inputs are a dictionary or of
            another type than a tensor or a list of arguments.
        ModelError: the model returns nothing that can be compared, or cannot be copied.
    """
    return map_channels(model, example_inputs, outputs=outputs).groups


def find_blocks(
    model: nn.Module, example_inputs: Tensor | Sequence[Tensor], *, outputs: OutputChoice | None = None
) -> tuple[Block, ...]:
    """Find the blocks of `model`, those that may be skipped and those that must stay, in the order of the forward pass.

    Args:
        model: any network; it is run in evaluation mode and left as it was.
        example_inputs: one tensor or several, sized as in use; a batch of one is enough.
        outputs: which of the model's outputs count, as for `find_groups`.
    """
    return map_channels(model, example_inputs, with_blocks=True, outputs=outputs).blocks


@garbage_collection_paused()  # hundreds of thousands of small objects, hardly any of them garbage
@outside_inference_mode()
def map_channels(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    with_blocks: bool = False,
    outputs: OutputChoice | None = None,
) -> ChannelMap:
    """Find the channel groups of `model` and the model of what their widths cost.

    Args:
        model: any network; it is run in evaluation mode and left as it was.
        example_inputs: one tensor or several, sized as in use.
        include: patterns (as in `fnmatch`) of the layers whose output channels may be cut, and of blocks.
        exclude: patterns of the layers whose output channels must stay, and of blocks; see `ChannelMap.chosen`.
        with_blocks: find the blocks as well.
        outputs: which of the model's outputs count, as for `find_groups`.

    Raises:
        UsageError: a pattern matches nothing.
    """
    model = unwrapped(model)
    inputs = positional(example_inputs)
    meta_model, remedies = MetaModel.of(model, inputs), Remedies()

    def search_with(chosen: Mapping[DimChoiceKey, int]) -> TrialSearch:
        trace = trace_channels(model, inputs, choose=chosen, meta_model=meta_model, outputs=outputs)
        network = TracedNetwork.of(model, inputs, meta_model, trace)
        return TrialSearch(network, remedies, {module for module, *_ in chosen})

    best, chosen = search_with({}), dict[DimChoiceKey, int]()
    best.settle_sizes()
    _settle_values_unless_other_choices(best, {})
    anywhere, tried = False, list[Mapping[DimChoiceKey, int]]()
    for _ in range(MAX_ROUNDS):
        other = _other_choices(best, chosen, anywhere=anywhere)
        choices = {**chosen, **other}
        if other and choices not in tried:
            tried.append(choices)
            search = _settled_if_better(search_with(choices), choices, best.removable)
            if search is not None:
                best, chosen, anywhere = search, choices, False
                continue
        if anywhere:
            break
        anywhere = True
    best.settle_values()
    channel_map = best.channel_map
    if with_blocks:
        channel_map = best.channel_map_with(blocks_of(best.network, channel_map.groups))
    return channel_map.chosen(include=include, exclude=exclude)


def _settled_if_better(search: TrialSearch, chosen: Mapping[DimChoiceKey, int], least: int) -> TrialSearch | None:
    """Settle a search and return it if more than `least` channels may be removed; settling never adds any."""
    if search.removable > least:
        search.settle_sizes(stop_at=least)
    if search.removable > least:
        _settle_values_unless_other_choices(search, chosen)
    return search if search.removable > least else None


def _settle_values_unless_other_choices(search: TrialSearch, chosen: Mapping[DimChoiceKey, int]) -> None:
    """Compare outputs, unless other choices are tried next anyway."""
    if not _other_choices(search, chosen, anywhere=True):
        search.settle_values()


def _other_choices(
    search: TrialSearch, chosen: Mapping[DimChoiceKey, int], *, anywhere: bool
) -> dict[DimChoiceKey, int]:
    """Return the next option of each choice of dimension whose channels turned out to be protected.

    Of choices about the same channels only the last ones, with equally many labels, are changed: a reshape separates
    queries from keys first, and then heads from their widths.

    Args:
        search: the search after the trial cuts.
        chosen: options chosen so far, other than the first.
        anywhere: change every such choice; else only those in modules where the protections arose.
    """
    choices, labels = search.network.trace.choices, search.constraints.labels
    protections, _ = labels.protections()
    roots = {key: labels.find(choice.labels).unique().numpy() for key, choice in choices.items()}
    protected = {key: found[protections[found] >= 0] for key, found in roots.items()}
    inside = {
        key
        for key, found in protected.items()
        if any(name == key[0] or name.startswith(key[0] + ".") for name in labels.modules_that_protect(found))
    }
    sizes: dict[int, int] = {}  # root -> number of labels of the last choice about it
    options = {}
    for key, choice in reversed(choices.items()):
        size = len(choice.labels)
        if not len(protected[key]) or not (anywhere or key in inside):
            continue
        if any(sizes.setdefault(root, size) != size for root in protected[key].tolist()):
            continue
        if (option := chosen.get(key, 0) + 1) < choice.options:
            options[key] = option
    return options
