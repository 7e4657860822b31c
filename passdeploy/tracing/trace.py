"""The trace: labels, operations, reductions and costs recorded during one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from passdeploy.models.chosen_outputs import OutputChoice
from passdeploy.tracing.labels import LabelUnionFind

DimLabels = dict[int, Tensor]  # dimension -> labels along it, shape (size of that dimension,)


@dataclass(frozen=True)
class StateDim:
    """One dimension of one parameter or buffer, and its labels."""

    tensor: str  # its first name in the state dict
    dim: int
    labels: Tensor  # shape (size,)


@dataclass(frozen=True)
class OutputDim:
    """One dimension of what a module without weights returns, and its labels."""

    module: str
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
    """One tensor operation of the forward pass: its name, its location, and the labels of its inputs and results."""

    op: str  # without its overload: `aten.convolution`
    modules: tuple[str, ...]  # the running modules, outermost first
    source: str  # file:line of the model's own code
    inputs: tuple[LabelledShape, ...]
    results: tuple[LabelledShape, ...]
    scalars: tuple[float, ...]  # see `OpCall.scalars`
    has_derived_sizes: bool  # torch reads its sizes off its tensors (`flatten`, `chunk`): the model states none
    has_constants: bool  # one of its tensors depends on no input, parameter or buffer
    has_computed_weight: bool = False  # a convolution or matrix product by what is no parameter


DimChoiceKey = tuple[str, str, str, int]  # module, operation, source, and number of earlier choices at that location


@dataclass(frozen=True)
class DimChoice:
    """A tensor whose labels varied along several dimensions, and the dimension chosen to remove channels along."""

    labels: Tensor  # along the chosen dimension
    options: int  # number of dimensions to choose from


@dataclass(frozen=True)
class ReductionRecord:
    """A mean, norm, maximum or softmax over channels; a slim network takes it over the remaining ones."""

    module: str  # the innermost one that was running
    call_index: int  # number of reduction calls of that module before this one
    dim: int  # the reduced dimension, counted from the last: -1, -2, ...
    labels: Tensor  # along that dimension


@dataclass
class Trace:
    """The record of one forward pass: joined and protected labels, operations, and multiply-adds."""

    union_find: LabelUnionFind
    state: tuple[StateDim, ...]
    parameters: dict[str, int]  # name -> number of elements
    fixed_outputs: list[OutputDim] = field(default_factory=list)  # in order of their labels, which are the last ones
    fixed_from: int = 0  # the first label that belongs to a plain tensor attribute or a fixed output
    output_labels: list[Tensor] = field(default_factory=list)  # output channels of layers, in order of use
    read_labels: list[Tensor] = field(default_factory=list)  # weight slices that read channels, in order of use
    op_macs: list[OpMacs] = field(default_factory=list)
    choices: dict[DimChoiceKey, DimChoice] = field(default_factory=dict)
    op_log: list[OpRecord] = field(default_factory=list)
    reductions: list[ReductionRecord] = field(default_factory=list)
    idle_layers: tuple[str, ...] = ()  # modules whose parameters no pass has used
    is_meta: bool = False  # the network ran on the meta device, without values
    outputs: OutputChoice | None = None  # those that count; None: all
