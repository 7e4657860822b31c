"""Which channels we keep: the decision, apart from any model, so that it can be read before a weight is cut.

From scores and a budget to a plan: one threshold for all groups (Huang et al., PASS, arXiv:2407.17412, global
pruning), found where the budget is met, with kept widths rounded to what the hardware likes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

import numpy as np
import torch
from torch import Tensor

from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelGroup
from passdeploy.errors import BudgetError, PlanError

STRICT_KINDS = ("latency",)  # kinds for which less than a block of channels saves nothing
Scores = Mapping[str, Tensor]  # group name -> importance, shape (width,), higher is better


@dataclass(frozen=True)
class Plan:
    """The channels that survive; a group that is not named keeps all of them."""

    kept: Mapping[str, tuple[int, ...]]  # group name -> ascending channel indices

    @classmethod
    def of_masks(cls, masks: Mapping[str, Tensor]) -> Plan:
        """From a mask per group, bool (width,), True stays; where nothing does, the first channel."""
        return cls({name: tuple(mask.nonzero().flatten().tolist()) or (0,) for name, mask in masks.items()})

    def check(self, groups: Sequence[ChannelGroup]) -> None:
        """Raise PlanError unless every entry names a prunable group and some of its channels, in order."""
        by_name = {group.name: group for group in groups}
        for name, kept in self.kept.items():
            if (group := by_name.get(name)) is None:
                raise PlanError(
                    f"plan names group {name!r}, but the network has no such group.\n"
                    "This plan was made for another model, or for other layers to exclude."
                )
            if not kept:
                raise PlanError(f"plan keeps nothing of group {name!r}; a layer needs at least one channel.")
            if list(kept) != sorted(set(kept)):
                raise PlanError(f"plan lists the channels of group {name!r} out of order or twice.")
            if kept[0] < 0 or kept[-1] >= group.width:
                raise PlanError(
                    f"plan keeps channel {kept[-1] if kept[0] >= 0 else kept[0]} of group {name!r}, "
                    f"but that group has {group.width} channels (0 to {group.width - 1}).\n"
                    "This plan was made for another model."
                )
            if len(kept) < group.width and not group.is_prunable:
                raise PlanError(
                    f"plan cuts group {name!r}, which must stay whole: {group.reason or 'it has a single channel'}."
                )

    def widths(self) -> dict[str, int]:
        """Group name -> how many channels it keeps, for the groups named."""
        return {name: len(kept) for name, kept in self.kept.items()}

    def removed(self, group: ChannelGroup) -> Tensor:
        """The channels of `group` that go, ascending."""
        if group.name not in self.kept:
            return torch.zeros(0, dtype=torch.int64)
        stays = np.zeros(group.width, bool)
        stays[list(self.kept[group.name])] = True
        return torch.from_numpy(np.flatnonzero(~stays))

    def to_json(self) -> dict[str, object]:
        """Group name -> kept channels, in plain lists."""
        return {name: list(kept) for name, kept in self.kept.items()}


def reconcile(
    by_layer: Mapping[str, Tensor], groups: Sequence[ChannelGroup], *, how: str = "union"
) -> dict[str, Tensor]:
    """What layers say of their output channels, as what each group says of its channels.

    Layers that are added up share their channels, so they must agree: a mask or score per layer, as a pruner that
    thinks in layers gives it, is pooled over every layer of a group and every channel that a group's channel spans.

    Args:
        by_layer: layer -> one value per output channel, shape (channels,); bool for masks (True stays), else scores.
        groups: of the network; those of which no layer is named are left out, as are those that must stay.
        how: `union` (stays if any layer wants it; the highest score), `intersection` (if all do; the lowest) or `mean`.

    Returns:
        Group -> value per channel, shape (width,), of the kind that was given; a `mean` of masks is a share.

    Raises:
        PlanError: a layer is unknown, or its values are not one per channel.
    """
    layers = {slot.layer: len(slot.index) for group in groups for slot in group.slots if slot.is_output}
    if unknown := sorted(set(by_layer) - set(layers)):
        raise PlanError(f"no layer {unknown[0]!r} puts out channels; known are {', '.join(list(layers)[:5])}, ...")
    pooled = {}
    for group in groups:
        votes = []
        for slot in group.slots:
            if slot.is_output and slot.layer in by_layer and slot.tensor.endswith("weight"):
                values = by_layer[slot.layer]
                if int(slot.index.max()) >= len(values):
                    raise PlanError(
                        f"layer {slot.layer!r} puts out at least {int(slot.index.max()) + 1} channels, "
                        f"but {len(values)} values are given for it."
                    )
                votes.append(values[slot.index])  # (width, channels that one spans)
        if votes and group.is_prunable:
            every = torch.cat(votes, dim=1)
            if how == "mean":
                pooled[group.name] = every.float().mean(1)
            else:
                pooled[group.name] = every.amax(1) if how == "union" else every.amin(1)
    return pooled


@dataclass(frozen=True)
class Budget:
    """What the slim network may cost at most."""

    kind: str  # macs, params, channels or latency
    limit: int  # in units of that kind; latency counts nanoseconds

    @classmethod
    def of(cls, kind: str, amount: float, costs: CostModel) -> Budget:
        """A fraction of the dense network below or at 1, an absolute count above."""
        return cls(kind, int(amount * costs.of(kind)) if amount <= 1 else int(amount))


def width_step(group: ChannelGroup, round_to: int) -> int:
    """The smallest number of channels of `group` whose layer width is a multiple of `round_to`.

    A group that spans several output channels per channel (a flattened map, a grouped convolution) needs fewer. A layer
    that is narrower than two steps goes by the largest power of two that still leaves it a choice.
    """
    step = round_to // gcd(round_to, group.span)
    if 2 * step <= group.width:
        return step
    return 1 << (max(1, group.width // 2).bit_length() - 1)


def rungs_of(group: ChannelGroup, round_to: int, *, is_strict: bool = False) -> np.ndarray:
    """The widths that `group` may have, ascending; the last one is its own.

    Args:
        group: to be cut.
        round_to: layer widths become multiples of this.
        is_strict: every layer that is wider than one step goes in whole steps, where else a layer of less than two
            goes in smaller ones: for a kernel that computes blocks of channels, what is left of a block saves nothing.
            Below one block other kernels may run, so narrower layers go in its half and its quarter.
    """
    if not is_strict:
        step = width_step(group, round_to)
        return np.array([*range(step, group.width, step), group.width])
    step = round_to // gcd(round_to, group.span)
    if group.width > step:
        return np.array([*range(step, group.width, step), group.width])
    return np.array(sorted({group.width, *(part for part in (step // 4, step // 2) if 0 < part < group.width)}))


def floor_width(group: ChannelGroup, round_to: int, kind: str = "macs") -> int:
    """The least that may be kept of `group` under a budget of `kind`: one step."""
    return int(rungs_of(group, round_to, is_strict=kind in STRICT_KINDS)[0])


def choose_channels(
    scores: Scores,
    groups: Sequence[ChannelGroup],
    costs: CostModel,
    budget: Budget,
    *,
    round_to: int = 8,
    per_cost: bool = True,
    allocation: str = "global",
) -> Plan:
    """Keep the best channels that the budget pays for.

    Args:
        scores: importance of every channel of every prunable group.
        groups: the network's groups; those that are not prunable stay whole.
        costs: prices widths.
        budget: what the result may cost at most.
        round_to: layer widths become multiples of this; a layer narrower than twice that goes in smaller steps.
        per_cost: rank channels by score per unit of cost instead of by score alone. The cost of a channel is that
            of the dense network's, so a ranking does not depend on what else is cut.
        allocation: `global` (one threshold for all groups) or `uniform` (the same share of every group).

    Raises:
        BudgetError: even the narrowest network that `round_to` allows costs more.
    """
    cut = [group for group in groups if group.is_prunable and group.name in scores]
    smallest_plan(cut, costs, budget, round_to=round_to)
    ladder = _Ladder.build(scores, cut, costs, budget.kind, round_to, per_cost and allocation == "global")
    price = costs.price(budget.kind).value
    kept = ladder.uniform(price, budget.limit) if allocation == "uniform" else ladder.climb(price, budget.limit)
    return Plan(
        {
            group.name: tuple(sorted(order[:count].tolist()))
            for group, order, count in zip(cut, ladder.orders, kept, strict=True)
        }
    )


def smallest_plan(
    groups: Sequence[ChannelGroup], costs: CostModel, budget: Budget, *, round_to: int
) -> Mapping[str, int]:
    """The narrowest widths that `round_to` allows, group name -> channels.

    Raises:
        BudgetError: even they cost more than the budget.
    """
    widths = {group.name: floor_width(group, round_to, budget.kind) for group in groups if group.is_prunable}
    smallest, whole = costs.of(budget.kind, widths), costs.of(budget.kind)
    if smallest > budget.limit:
        least = in_units(budget.kind, smallest).removesuffix(f" {budget.kind}")
        advice = f"Ask for more, set prune.round_to below {round_to}" if round_to > 1 else "Ask for more"
        raise BudgetError(
            f"asked for {in_units(budget.kind, budget.limit)} ({budget.limit / whole:.1%} of the dense network's), but "
            f"the smallest that can be reached is {least} ({smallest / whole:.1%}).\n"
            f"{advice}, or exclude fewer layers."
        )
    return widths


def in_units(kind: str, amount: int) -> str:
    """An amount as a person says it.

    >>> in_units("macs", 1234567), in_units("latency", 1_800_000)
    ('1,234,567 macs', '1.8 ms')
    """
    return f"{amount / 1e6:.3g} ms" if kind == "latency" else f"{amount:,} {kind}"


@dataclass(frozen=True)
class _Ladder:
    """Every group as a ladder of widths, best channels first, and the worth of each rung."""

    orders: list[Tensor]  # per group: channels, best first
    rungs: list[np.ndarray]  # per group: the widths it may have, ascending; the last one is full
    worth: list[np.ndarray]  # per group: the mean score of the channels that each rung after the first adds
    columns: np.ndarray  # where each group's width stands in the cost model's vector
    full: np.ndarray  # the cost model's dense widths

    @classmethod
    def build(
        cls,
        scores: Scores,
        groups: Sequence[ChannelGroup],
        costs: CostModel,
        kind: str,
        round_to: int,
        per_cost: bool,
    ) -> _Ladder:
        full = costs.vector({})
        position = {name: number for number, name in enumerate(costs.widths)}
        columns = np.array([position[group.name] for group in groups], int)
        prices = costs.price(kind).gradient(full) if per_cost else np.ones(len(full))
        orders, rungs, worth = [], [], []
        for group, column in zip(groups, columns, strict=True):
            values, order = scores[group.name].detach().double().cpu().sort(descending=True, stable=True)
            widths = rungs_of(group, round_to, is_strict=kind in STRICT_KINDS)
            values = values.numpy() / prices[column]
            orders.append(order)
            rungs.append(widths)
            worth.append(np.array([values[low:high].mean() for low, high in pairwise(widths)]))
        return cls(orders, rungs, worth, columns, full)

    @property
    def floor(self) -> np.ndarray:
        return np.array([widths[0] for widths in self.rungs], np.int64)

    def widths(self, kept: np.ndarray) -> np.ndarray:
        """The cost model's vector when each group keeps `kept` channels."""
        vector: np.ndarray = self.full.copy()
        vector[self.columns] = kept
        return vector

    def climb(self, price: Callable[[np.ndarray], int], limit: int) -> np.ndarray:
        """Take rungs, best first over all groups: up to one threshold, then whatever still fits below it."""
        # A rung needs those below it, so it is worth no more than they are.
        worth = [np.minimum.accumulate(values) for values in self.worth]
        group = np.repeat(np.arange(len(worth)), [len(values) for values in worth])
        group = group[np.argsort(-np.concatenate([*worth, []]), kind="stable")]
        low, high = 0, len(group)
        while low < high:  # the longest run of steps that the limit pays for: costs only grow along the ladder
            middle = (low + high + 1) // 2
            fits = price(self.widths(self._at(self._heights(group[:middle])))) <= limit
            low, high = (middle, high) if fits else (low, middle - 1)
        height, full = self._heights(group[:low]), set()
        for step in group[low:].tolist():
            if step not in full:
                height[step] += 1
                if price(self.widths(self._at(height))) > limit:
                    height[step] -= 1
                    full.add(step)
        return self._at(height)

    def uniform(self, price: Callable[[np.ndarray], int], limit: int) -> np.ndarray:
        """The largest share that, kept of every group, costs no more than `limit`."""
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if price(self.widths(self._share(middle))) <= limit else (low, middle)
        return self._share(high if price(self.widths(self._share(high))) <= limit else low)

    def _share(self, share: float) -> np.ndarray:
        nearest = [widths[np.abs(widths - share * widths[-1]).argmin()] for widths in self.rungs]
        return np.array(nearest, np.int64)

    def _heights(self, steps: np.ndarray) -> np.ndarray:
        """The rung of every group after `steps`, each one group's next rung."""
        heights: np.ndarray = np.bincount(steps, minlength=len(self.rungs))
        return heights

    def _at(self, height: np.ndarray) -> np.ndarray:
        return np.array([widths[h] for widths, h in zip(self.rungs, height, strict=True)], np.int64)
