"""Build channel groups from a trace: dimensions that share labels become the slots of one group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from passdeploy.channels.costs import CostModel, Factor, Term
from passdeploy.channels.groups import ChannelGroup, ChannelMap, SizeAttribute, Slot, Statistic
from passdeploy.tracing.labels import NONE
from passdeploy.tracing.trace import Trace


@dataclass(frozen=True)
class LabelledSize:
    """A size attribute that must follow a dimension, found by a trial cut."""

    attribute: SizeAttribute
    labels: Tensor  # along the dimension whose size the attribute states


class GroupBuilder:
    """Gathers the groups of a walk, again and again while its labels are joined and protected further."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        sizes = [len(state.labels) for state in trace.state]
        starts = np.array([int(state.labels[0]) for state in trace.state])
        self._made, self._read = _dims_of(trace.output_labels, starts), _dims_of(trace.read_labels, starts)
        # One row per label of the state: which dimension, and which place along it.
        self._labels = (
            torch.cat([state.labels for state in trace.state]) if sizes else torch.zeros(0, dtype=torch.int64)
        )
        self._dims = np.repeat(np.arange(len(sizes)), sizes)
        self._places = np.concatenate([np.arange(size) for size in sizes]) if sizes else np.zeros(0, int)
        self._known: dict[int, tuple[list[tuple[ChannelGroup, np.ndarray]], _Sizes]] = {}  # by version

    def gather(self, numbers: Sequence[LabelledSize] = ()) -> tuple[ChannelGroup, ...]:
        """The groups as they are now.

        Args:
            numbers: of modules, that must follow the widths.
        """
        groups, sizes = self._now()
        return _with_numbers(groups, numbers, sizes)

    def assemble(self, numbers: Sequence[LabelledSize] = ()) -> ChannelMap:
        """`gather`, and what the groups' widths cost."""
        groups, sizes = self._now()
        return ChannelMap(_with_numbers(groups, numbers, sizes), _price(self._trace, groups, sizes))

    def _now(self) -> tuple[list[tuple[ChannelGroup, np.ndarray]], _Sizes]:
        version = self._trace.union_find.version
        if version not in self._known:
            groups = _with_statistics(self._gather(), self._trace)
            last = list(self._known.items())[-1:]  # what was tried in vain is forgotten, and the one before comes back
            self._known = dict(last) | {version: (groups, _Sizes(self._trace, groups))}
        return self._known[version]

    def _gather(self) -> list[tuple[ChannelGroup, np.ndarray]]:
        """Groups with the roots of their channels, in the order in which layers first put them out."""
        trace, made = self._trace, self._made
        roots = trace.union_find.find(self._labels).numpy()
        put_out = np.zeros(len(trace.state), bool)
        put_out[list(made)] = True
        is_channel = np.zeros(trace.union_find.size, bool)
        is_channel[roots[put_out[self._dims]]] = True
        mine = is_channel[roots]
        dims, places, roots = self._dims[mine], self._places[mine], roots[mine]
        by_root = np.argsort(roots, kind="stable")  # in which dimensions and places keep their order
        dims, places, roots = dims[by_root], places[by_root], roots[by_root]
        found: list[tuple[int, ChannelGroup, np.ndarray]] = []
        for rows, reason in self._kinds(dims, roots):
            own = dims[rows[0]]  # which dimensions one channel has places in; the same for all of a kind
            order = {int(dim): made.get(int(dim), len(trace.output_labels)) for dim in np.unique(own)}
            lead = min(order, key=lambda dim: (order[dim], dim))
            rows = rows[np.argsort(places[rows[:, np.flatnonzero(own == lead)[0]]])]
            table = places[rows]  # (width, places of one channel)
            slots = tuple(
                Slot(
                    trace.state[dim].tensor,
                    trace.state[dim].dim,
                    torch.from_numpy(table[:, own == dim]),
                    is_output=dim in made,
                    is_input=dim in self._read,
                )
                for dim in sorted(order, key=lambda dim: (order[dim], dim))
            )
            found.append((order[lead], ChannelGroup(slots[0].layer, len(rows), slots, reason), roots[rows[:, 0]]))
        named: list[tuple[ChannelGroup, np.ndarray]] = []
        taken: dict[str, int] = {}
        for _, group, group_roots in sorted(found, key=lambda item: (item[0], int(item[1].slots[0].index[0, 0]))):
            taken[group.name] = taken.get(group.name, 0) + 1
            name = group.name if taken[group.name] == 1 else f"{group.name}[{taken[group.name]}]"
            named.append((replace(group, name=name), group_roots))
        return named

    def _kinds(self, dims: np.ndarray, roots: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
        """Channels with as many places in the same dimensions, and the same fate.

        Args:
            dims: of every label, those of one channel side by side and ascending.
            roots: of every label, ascending.

        Yields:
            Which labels each channel of the kind has, shape (channels, labels of one), and why they must stay.
        """
        if not len(roots):
            return
        first = np.flatnonzero(np.diff(roots, prepend=-1))
        counts = np.diff(first, append=len(roots))
        protections, reasons = self._trace.union_find.protections()
        texts: dict[str, int] = {}
        alike = [texts.setdefault(text, len(texts)) for text in (*map(str, reasons), "")]  # "" is what -1 stands for
        why, words = np.array(alike)[protections[roots[first]]], list(texts)
        # A random number for every dimension and fate: where their sums are the same, so are they.
        draw = np.random.default_rng(0)
        of_dim, of_fate = (draw.integers(2**63, size=size) for size in (int(dims.max()) + 1, len(words)))
        _, members, kind = np.unique(
            np.add.reduceat(of_dim[dims], first) + of_fate[why], return_index=True, return_inverse=True
        )
        for number, member in enumerate(members):
            rows = first[kind == number][:, None] + np.arange(counts[member])
            assert (dims[rows] == dims[rows[0]]).all()
            yield rows, words[why[member]]


def _with_statistics(
    groups: list[tuple[ChannelGroup, np.ndarray]], trace: Trace
) -> list[tuple[ChannelGroup, np.ndarray]]:
    """The groups, each with the statistics that go over its channels."""
    if not trace.reductions:
        return groups
    group_of, channel_of = np.full((2, trace.union_find.size), -1)
    for number, (_, roots) in enumerate(groups):
        group_of[roots], channel_of[roots] = number, np.arange(len(roots))
    found: list[list[Statistic]] = [[] for _ in groups]
    for taken in trace.reductions:
        roots = trace.union_find.find(taken.labels).numpy()
        for number in np.unique(group_of[roots]):
            if number >= 0:
                channels = np.where(group_of[roots] == number, channel_of[roots], -1)
                found[number].append(Statistic(taken.module, taken.call_index, taken.dim, torch.from_numpy(channels)))
    return [(replace(group, statistics=tuple(own)), roots) for (group, roots), own in zip(groups, found, strict=True)]


def _with_numbers(
    groups: Sequence[tuple[ChannelGroup, np.ndarray]], numbers: Sequence[LabelledSize], sizes: _Sizes
) -> tuple[ChannelGroup, ...]:
    """Add to each group the size attributes that follow its width; one that follows several goes to the first."""
    follows: dict[str, list[tuple[SizeAttribute, Factor]]] = {}
    for number in numbers:
        factor = sizes.of(number.labels)
        if factor.spans:
            follows.setdefault(factor.spans[0][0], []).append((number.attribute, factor))
    return tuple(replace(group, size_attributes=tuple(follows.get(group.name, ()))) for group, _ in groups)


def _dims_of(used: Sequence[Tensor], starts: np.ndarray) -> dict[int, int]:
    """Number of a state dimension -> the first use whose labels belong to it."""
    first: dict[int, int] = {}
    for order, labels in enumerate(used):
        own = labels[labels != NONE].unique().numpy()
        for dim in np.unique(np.searchsorted(starts, own, side="right") - 1):
            first.setdefault(int(dim), order)
    return first


class _Sizes:
    """Sizes of dimensions as functions of the widths of the prunable groups."""

    def __init__(self, trace: Trace, groups: Sequence[tuple[ChannelGroup, np.ndarray]]) -> None:
        self._union_find, self._known = trace.union_find, dict[bytes, Factor]()
        self._groups = [group for group, _ in groups]
        self._group_of = np.full(
            trace.union_find.size, len(groups)
        )  # root -> number of its group; past the last: of none
        for number, (group, roots) in enumerate(groups):
            if group.is_prunable:
                self._group_of[roots] = number

    def of(self, labels: Tensor) -> Factor:
        """The size of the dimension that has these labels."""
        key = labels.numpy().tobytes()
        if key not in self._known:
            counts = np.bincount(self._group_of[self._union_find.find(labels).numpy()], minlength=len(self._groups) + 1)
            spans = ((self._groups[g].name, int(counts[g]) // self._groups[g].width) for g in counts[:-1].nonzero()[0])
            self._known[key] = Factor(int(counts[-1]), tuple(spans))
        return self._known[key]


def _price(trace: Trace, groups: Sequence[tuple[ChannelGroup, np.ndarray]], sizes: _Sizes) -> CostModel:
    """The cost model of a walk: multiply-adds and parameters as functions of the groups' widths."""
    along: dict[str, list[Factor]] = {}
    for state in trace.state:
        along.setdefault(state.tensor, []).append(sizes.of(state.labels))
    channels: list[Term] = []
    for group, _ in groups:
        factors = [Factor(0, ((group.name, group.span),))] if group.is_prunable else []
        channels.append((group.width * group.span, factors))
    return CostModel.build(
        {group.name: group.width for group, _ in groups},
        macs=[(op_macs.macs, [sizes.of(dim) for dim in op_macs.dims]) for op_macs in trace.op_macs],
        params=[(numel, along.get(name, [])) for name, numel in trace.parameters.items()],
        channels=channels,
    )
