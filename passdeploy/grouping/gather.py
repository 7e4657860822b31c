"""Build channel groups from a trace: dimensions that share labels become the slots of one group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from passdeploy.channels.blocks import Block
from passdeploy.channels.costs import CostModel, Factor, Term
from passdeploy.channels.groups import ChannelGroup, ChannelMap, FixedOutput, SizeAttribute, Slot, Statistic
from passdeploy.grouping.constraints import Constraints, LabelledSize
from passdeploy.tracing.labels import NONE, LabelUnionFind
from passdeploy.tracing.trace import Trace

RootedGroup = tuple[ChannelGroup, np.ndarray]  # a group and the roots of its channels, shape (width,)


class GroupBuilder:
    """Builder of the channel groups of one trace under any constraints.

    Args:
        trace: of the network.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        # Dimensions of parameters, buffers and plain tensors, and then those of fixed outputs.
        labels = [*(one.labels for one in trace.state), *(one.labels for one in trace.fixed_outputs)]
        sizes = [len(vector) for vector in labels]
        starts = np.array([int(vector[0]) for vector in labels])
        self._first_outputs = _first_uses(trace.output_labels, starts, len(trace.state))
        self._first_reads = _first_uses(trace.read_labels, starts, len(trace.state))
        # One entry per label of these: the number of its dimension, and its index along it.
        self._labels = torch.cat(labels) if sizes else torch.zeros(0, dtype=torch.int64)
        self._dims = np.repeat(np.arange(len(sizes)), sizes)
        self._indices = np.concatenate([np.arange(size) for size in sizes]) if sizes else np.zeros(0, int)
        self._cache: dict[int, tuple[list[RootedGroup], _SizeFactors]] = {}  # by version of the labels, the last two

    def gather(self, constraints: Constraints | None = None) -> tuple[ChannelGroup, ...]:
        """Build the groups in the order of the forward pass.

        Args:
            constraints: conditions on a cut; None: only those of the trace.
        """
        constraints = constraints or Constraints(self._trace.union_find)
        groups, factors = self._groups_of(constraints.labels)
        return _with_size_attributes(groups, constraints.size_attributes, factors)

    def assemble(self, constraints: Constraints, blocks: Sequence[Block] = ()) -> ChannelMap:
        """Build the groups and the model of what their widths and the blocks cost.

        Args:
            constraints: conditions on a cut.
            blocks: of the network; each is told which groups live only inside it.
        """
        groups, factors = self._groups_of(constraints.labels)
        with_attributes = _with_size_attributes(groups, constraints.size_attributes, factors)
        told = tuple(replace(block, groups=_groups_inside(block, with_attributes)) for block in blocks)
        costs = _cost_model(self._trace, groups, factors, told)
        return ChannelMap(with_attributes, costs, told, self._trace.idle_layers)

    def size_of(self, constraints: Constraints, labels: Tensor) -> Factor:
        """Return the size of the dimension with these labels as a function of the widths of prunable groups."""
        return self._groups_of(constraints.labels)[1].factor_of(labels)

    def _groups_of(self, labels: LabelUnionFind) -> tuple[list[RootedGroup], _SizeFactors]:
        if labels.version not in self._cache:
            groups = _with_statistics(self._build(labels), self._trace, labels)
            last = list(self._cache.items())[-1:]  # the search returns to these after a failed attempt
            self._cache = dict(last) | {labels.version: (groups, _SizeFactors(labels, groups))}
        return self._cache[labels.version]

    def _build(self, labels: LabelUnionFind) -> list[RootedGroup]:
        """Build groups from labels, in the order in which layers first output them."""
        trace, first_outputs = self._trace, self._first_outputs
        roots = labels.find(self._labels).numpy()
        is_output = np.zeros(len(trace.state) + len(trace.fixed_outputs), bool)
        is_output[list(first_outputs)] = True
        is_channel = np.zeros(labels.size, bool)  # by root
        is_channel[roots[is_output[self._dims]]] = True
        is_used = is_channel[roots]
        dims, indices, roots = self._dims[is_used], self._indices[is_used], roots[is_used]
        by_root = np.argsort(roots, kind="stable")  # within a root, dimensions and indices keep their order
        dims, indices, roots = dims[by_root], indices[by_root], roots[by_root]
        found: list[tuple[int, ChannelGroup, np.ndarray]] = []
        for rows, reason in _channel_kinds(dims, roots, labels):
            own = dims[rows[0]]  # dimension of each label of one channel; the same for all channels of a kind
            order = {int(dim): first_outputs.get(int(dim), len(trace.output_labels)) for dim in np.unique(own)}
            lead = min(order, key=lambda dim: (order[dim], dim))
            rows = rows[np.argsort(indices[rows[:, np.flatnonzero(own == lead)[0]]])]
            table = indices[rows]  # (width, labels of one channel)
            slots, outputs = list[Slot](), list[FixedOutput]()
            for dim in sorted(order, key=lambda dim: (order[dim], dim)):
                index = torch.from_numpy(table[:, own == dim])
                if dim >= len(trace.state):
                    fixed = trace.fixed_outputs[dim - len(trace.state)]
                    outputs.append(FixedOutput(fixed.module, fixed.dim, len(fixed.labels), index))
                    continue
                state, is_read = trace.state[dim], dim in self._first_reads
                slots.append(Slot(state.tensor, state.dim, index, is_output=dim in first_outputs, is_input=is_read))
            group = ChannelGroup(slots[0].output_name, len(rows), tuple(slots), reason, fixed_outputs=tuple(outputs))
            found.append((order[lead], group, roots[rows[:, 0]]))
        return _with_unique_names(sorted(found, key=lambda item: (item[0], int(item[1].slots[0].index[0, 0]))))


def _with_unique_names(found: Sequence[tuple[int, ChannelGroup, np.ndarray]]) -> list[RootedGroup]:
    """Number groups of the same name: "layer", "layer[2]", "layer[3]"."""
    named: list[RootedGroup] = []
    counts: dict[str, int] = {}
    for _, group, roots in found:
        counts[group.name] = counts.get(group.name, 0) + 1
        name = group.name if counts[group.name] == 1 else f"{group.name}[{counts[group.name]}]"
        named.append((replace(group, name=name), roots))
    return named


def _channel_kinds(dims: np.ndarray, roots: np.ndarray, labels: LabelUnionFind) -> Iterator[tuple[np.ndarray, str]]:
    """Yield sets of channels that have equally many labels in the same dimensions and the same reason to stay.

    Args:
        dims: number of the dimension of each label, those of one channel side by side and ascending.
        roots: root of each label, ascending.
        labels: the union-find.

    Yields:
        The positions in `dims` of the labels of each channel, shape (channels, labels of one), and the reason why they
        must stay, or "".
    """
    if not len(roots):
        return
    first = np.flatnonzero(np.diff(roots, prepend=-1))
    counts = np.diff(first, append=len(roots))
    protections, reasons = labels.protections()
    numbers: dict[str, int] = {}  # text of a reason -> its number
    number_of = [numbers.setdefault(text, len(numbers)) for text in (*map(str, reasons), "")]  # the last one is for -1
    reason_of, texts = np.array(number_of)[protections[roots[first]]], list(numbers)
    # A random number for each dimension and reason: channels with equal sums are of one kind.
    draw = np.random.default_rng(0)
    of_dim, of_reason = (draw.integers(2**63, size=size) for size in (int(dims.max()) + 1, len(texts)))
    _, members, kind = np.unique(
        np.add.reduceat(of_dim[dims], first) + of_reason[reason_of], return_index=True, return_inverse=True
    )
    for number, member in enumerate(members):
        rows = first[kind == number][:, None] + np.arange(counts[member])
        assert (dims[rows] == dims[rows[0]]).all()
        yield rows, texts[reason_of[member]]


def _with_statistics(groups: list[RootedGroup], trace: Trace, labels: LabelUnionFind) -> list[RootedGroup]:
    """Add to each group the statistics that are taken over its channels."""
    if not trace.reductions:
        return groups
    group_of, channel_of = np.full((2, labels.size), -1)  # by root
    for number, (_, roots) in enumerate(groups):
        group_of[roots], channel_of[roots] = number, np.arange(len(roots))
    found: list[list[Statistic]] = [[] for _ in groups]
    for reduction in trace.reductions:
        roots = labels.find(reduction.labels).numpy()
        for number in np.unique(group_of[roots]):
            if number >= 0:
                channels = torch.from_numpy(np.where(group_of[roots] == number, channel_of[roots], -1))
                found[number].append(Statistic(reduction.module, reduction.call_index, reduction.dim, channels))
    return [(replace(group, statistics=tuple(own)), roots) for (group, roots), own in zip(groups, found, strict=True)]


def _with_size_attributes(
    groups: Sequence[RootedGroup], sizes: Sequence[LabelledSize], factors: _SizeFactors
) -> tuple[ChannelGroup, ...]:
    """Add to each group the size attributes that follow its width; one that follows several goes to the first."""
    by_group: dict[str, list[tuple[SizeAttribute, Factor]]] = {}
    for size in sizes:
        factor = factors.factor_of(size.labels)
        if factor.spans:
            by_group.setdefault(factor.spans[0][0], []).append((size.attribute, factor))
    return tuple(replace(group, size_attributes=tuple(by_group.get(group.name, ()))) for group, _ in groups)


def _first_uses(uses: Sequence[Tensor], starts: np.ndarray, count: int) -> dict[int, int]:
    """Map the number of each state dimension to the index of the first use with labels of it.

    Args:
        uses: label vectors in order of use.
        starts: first label of each dimension, ascending; those of the state come first.
        count: number of dimensions of the state.
    """
    first: dict[int, int] = {}
    for order, labels in enumerate(uses):
        own = labels[labels != NONE].unique().numpy()
        for dim in np.unique(np.searchsorted(starts, own, side="right") - 1):
            if dim < count:
                first.setdefault(int(dim), order)
    return first


class _SizeFactors:
    """Sizes of dimensions as functions of the widths of the prunable groups."""

    def __init__(self, labels: LabelUnionFind, groups: Sequence[RootedGroup]) -> None:
        self._union_find, self._cache = labels, dict[bytes, Factor]()
        self._groups = [group for group, _ in groups]
        self._group_of = np.full(labels.size, len(groups))  # root -> number of its group; len(groups): of none
        for number, (group, roots) in enumerate(groups):
            if group.is_prunable:
                self._group_of[roots] = number

    def factor_of(self, labels: Tensor) -> Factor:
        """Return the size of the dimension with these labels."""
        key = labels.numpy().tobytes()
        if key not in self._cache:
            counts = np.bincount(self._group_of[self._union_find.find(labels).numpy()], minlength=len(self._groups) + 1)
            spans = ((self._groups[g].name, int(counts[g]) // self._groups[g].width) for g in counts[:-1].nonzero()[0])
            self._cache[key] = Factor(int(counts[-1]), tuple(spans))
        return self._cache[key]


def _groups_inside(block: Block, groups: Sequence[ChannelGroup]) -> tuple[str, ...]:
    """Name the groups whose slots are all in tensors that go with the block."""
    tensors = set(block.tensors)
    return tuple(group.name for group in groups if all(slot.tensor in tensors for slot in group.slots))


def _cost_model(
    trace: Trace, groups: Sequence[RootedGroup], factors: _SizeFactors, blocks: Sequence[Block]
) -> CostModel:
    """Build the model of multiply-adds and parameters as functions of the groups' widths."""
    shapes: dict[str, list[Factor]] = {}
    for state in trace.state:
        shapes.setdefault(state.tensor, []).append(factors.factor_of(state.labels))
    channels: list[Term] = []
    for group, _ in groups:
        width = [Factor(0, ((group.name, group.span),))] if group.is_prunable else []
        channels.append(Term(group.width * group.span, width, group.name))
    return CostModel.build(
        {group.name: group.width for group, _ in groups},
        macs=[
            Term(op_macs.macs, [factors.factor_of(dim) for dim in op_macs.dims], op_macs.module)
            for op_macs in trace.op_macs
        ],
        params=[Term(numel, shapes.get(name, []), name) for name, numel in trace.parameters.items()],
        channels=channels,
        blocks=blocks,
    )
