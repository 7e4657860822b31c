"""What a walk through a network leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from passdeploy.tracing.labels import LabelUnionFind

DimLabels = dict[int, Tensor]  # dimension -> labels along it, shape (size of that dimension,)


@dataclass(frozen=True)
class StateDim:
    """One dimension of one parameter or buffer, and its labels."""

    tensor: str  # its first name in the state dict
    dim: int
    labels: Tensor  # shape (size,)


@dataclass(frozen=True)
class OpMacs:
    """Multiply-adds of one operation, and the dimensions they grow with."""

    module: str
    macs: int
    dims: tuple[Tensor, ...]  # the labels along each dimension that the count is proportional to


LabelledShape = tuple[tuple[int, ...], DimLabels]  # a tensor's shape and its labels


@dataclass(frozen=True)
class OpRecord:
    """One tensor operation of the walk: what ran, where, and the labels that went in and came out."""

    op: str
    modules: tuple[str, ...]  # those that were running, outermost first
    source: str  # file:line of the model's own code
    inputs: tuple[LabelledShape, ...]
    results: tuple[LabelledShape, ...]
    scalars: tuple[float, ...]  # see `OpCall.scalars`
    has_derived_sizes: bool  # its sizes are read off its tensors: nobody could have stated them
    has_constants: bool  # one of its tensors was made of numbers


DimChoiceKey = tuple[str, str, str, int]  # module, operation, source, and how often it came by there


@dataclass(frozen=True)
class DimChoice:
    """Labels varied along several dimensions, and one was chosen to remove channels along."""

    labels: Tensor  # along the chosen dimension
    options: int  # how many dimensions there were


@dataclass(frozen=True)
class ReductionRecord:
    """A mean, a norm, a maximum or a softmax over channels: of those that are left, once some are gone."""

    module: str  # that was running
    call_index: int  # how many statistics the module had taken before
    dim: int  # of the tensor it was taken of, counted from the last: -1, -2, ...
    labels: Tensor  # along that dimension


@dataclass
class Trace:
    """What one forward pass told: who is joined with whom, who must stay, and what it cost."""

    union_find: LabelUnionFind
    state: tuple[StateDim, ...]
    parameters: dict[str, int]  # name -> number of elements
    output_labels: list[Tensor] = field(default_factory=list)  # the labels that layers put out, in order of use
    read_labels: list[Tensor] = field(default_factory=list)  # the labels of the weight slices that read channels
    op_macs: list[OpMacs] = field(default_factory=list)
    choices: dict[DimChoiceKey, DimChoice] = field(default_factory=dict)
    op_log: list[OpRecord] = field(default_factory=list)
    reductions: list[ReductionRecord] = field(default_factory=list)
    is_meta: bool = False  # whether the network ran without values
