"""From a network to its channel groups: follow, rehearse, and choose again where a choice was in vain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from passdeploy.channels.groups import ChannelGroup, ChannelMap
from passdeploy.grouping.trial_cuts import TrialSearch
from passdeploy.runtime.garbage import garbage_collection_paused
from passdeploy.tracing.meta_model import MetaModel
from passdeploy.tracing.trace import DimChoiceKey, Trace
from passdeploy.tracing.trace_channels import trace_channels

MOST_ROUNDS = 4


def find_groups(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> tuple[ChannelGroup, ...]:
    """The channel groups of `model`, prunable and protected, in the order of the forward pass.

    Args:
        model: any network; it is run in evaluation mode and left as it was.
        example_inputs: one tensor or several, sized as in use; a batch of one is enough.
    """
    return map_channels(model, example_inputs).groups


@garbage_collection_paused()  # hundreds of thousands of small objects, hardly any of them garbage
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
    meta_model = MetaModel.of(model, inputs)

    def search_of(choose: Mapping[DimChoiceKey, int]) -> TrialSearch:
        trace = trace_channels(model, inputs, choose=choose, meta_model=meta_model)
        return TrialSearch(model, inputs, meta_model, trace)

    best, chosen = search_of({}), dict[DimChoiceKey, int]()
    best.settle_sizes()
    _settle_values_where_chosen_well(best, {})
    widely, tried = False, list[Mapping[DimChoiceKey, int]]()
    for _ in range(MOST_ROUNDS):
        vain = _choices_in_vain(best.trace, chosen, widely=widely)
        choose = {**chosen, **vain}
        if vain and choose not in tried:
            tried.append(choose)
            search = _better(search_of(choose), choose, best.removable)
            if search is not None:
                best, chosen, widely = search, choose, False
                continue
        if widely:
            break
        widely = True
    best.settle_values()
    return best.found().chosen(include=include, exclude=exclude)


def _better(search: TrialSearch, choose: Mapping[DimChoiceKey, int], most: int) -> TrialSearch | None:
    """The stage, settled, if more than `most` channels can be removed from it; the rehearsals only ever protect."""
    if search.removable > most:
        search.settle_sizes(least=most)
        if search.removable > most:
            _settle_values_where_chosen_well(search, choose)
            if search.removable > most:
                return search
    return None


def _settle_values_where_chosen_well(search: TrialSearch, choose: Mapping[DimChoiceKey, int]) -> None:
    """Compare, unless other choices will be tried anyway."""
    if not _choices_in_vain(search.trace, choose, widely=True):
        search.settle_values()


def _choices_in_vain(trace: Trace, chosen: Mapping[DimChoiceKey, int], *, widely: bool) -> dict[DimChoiceKey, int]:
    """Choices whose channels must stay after all, and that have another option: which -> that option.

    Of choices that follow from each other it is the last, and those that are like it: heads are told from their widths
    after queries are told from keys.

    Args:
        trace: of a walk that was rehearsed.
        chosen: what was chosen other than the first option.
        widely: all of them; else those in the modules where the channels met their fate.
    """
    union_find, vain = trace.union_find, {}
    protections, _ = union_find.protections()
    roots = {key: union_find.find(choice.labels).unique().numpy() for key, choice in trace.choices.items()}
    lost = {key: found[protections[found] >= 0] for key, found in roots.items()}
    near = {
        key
        for key, found in lost.items()
        if any(name == key[0] or name.startswith(key[0] + ".") for name in union_find.modules_that_protect(found))
    }
    seen: dict[int, int] = {}  # root -> how many labels the last choice among them was about
    for key, choice in reversed(trace.choices.items()):
        size = len(choice.labels)
        if not len(lost[key]) or not (widely or key in near):
            continue
        if any(seen.setdefault(root, size) != size for root in lost[key].tolist()):
            continue
        if (option := chosen.get(key, 0) + 1) < choice.options:
            vain[key] = option
    return vain
