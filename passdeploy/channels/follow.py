"""Follow every channel of a network through one forward pass.

The network's own code runs, on an example input, under a `TorchDispatchMode` that sees every
tensor operation; without values (sketch.py) where it gets along without them. Beside each tensor
we keep the labels along each of its dimensions; a rule per operation (rules.py) says how labels
pass through it. Nothing is inferred from autograd or from module types, so reshapes, chunks,
shuffles and functional calls are followed like anything else.

An operation without a rule protects the channels that touch it, with its name, its module and the
line of the model's code as the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeVar
from unittest.mock import patch
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from passdeploy.channels.labels import LabelBook, Reason
from passdeploy.channels.sketch import Sketch, shapes_of
from passdeploy.statistics import STATISTICS, Turns

DimLabels = dict[int, Tensor]  # dimension -> labels along it, shape (size of that dimension,)


@dataclass(frozen=True)
class StateDim:
    """One dimension of one parameter or buffer, and its labels."""

    tensor: str  # its first name in the state dict
    dim: int
    labels: Tensor  # shape (size,)


@dataclass(frozen=True)
class Work:
    """Multiply-adds of one operation, and the dimensions they grow with."""

    module: str
    macs: int
    dims: tuple[Tensor, ...]  # the labels along each dimension that the count is proportional to


Labelled = tuple[tuple[int, ...], DimLabels]  # a tensor's shape and its labels


@dataclass(frozen=True)
class Happening:
    """One tensor operation of the walk: what ran, where, and the labels that went in and came out."""

    op: str
    modules: tuple[str, ...]  # those that were running, outermost first
    source: str  # file:line of the model's own code
    inputs: tuple[Labelled, ...]
    results: tuple[Labelled, ...]
    factors: tuple[float, ...]  # see `Call.factors`
    is_derived: bool  # its sizes are read off its tensors: nobody could have stated them
    has_constants: bool  # one of its tensors was made of numbers


_ARITHMETIC = ("aten.mul", "aten.mul_", "aten.div", "aten.div_", "aten.pow", "aten.add", "aten.sub", "aten.rsub")


@dataclass(frozen=True)
class Call:
    """One tensor operation as it happened: arguments by their schema's names."""

    op: torch._ops.OpOverload
    arguments: Mapping[str, Any]
    result: Any

    @classmethod
    def bind(cls, op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Call:
        """Name the arguments, in the schema's order and with its defaults filled in."""
        arguments = {}
        for place, slot in enumerate(op._schema.arguments):
            if place < len(args):
                arguments[slot.name] = args[place]
            elif slot.name in kwargs or slot.has_default_value():
                arguments[slot.name] = kwargs.get(slot.name, slot.default_value)
        return cls(op, arguments, result)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def name(self) -> str:
        """The operation without its overload: `aten.convolution`."""
        return str(self.op.overloadpacket)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, lists included."""
        return list(_tensors_in(self.arguments.values()))

    @property
    def factors(self) -> tuple[float, ...]:
        """The numbers it computes with: those with a fraction, and in arithmetic whole ones, too."""
        kinds = (int, float) if self.name in _ARITHMETIC else (float,)
        return tuple(value for value in self.arguments.values() if type(value) in kinds)

    @cached_property
    def results(self) -> list[Tensor]:
        """Every tensor among the results."""
        return list(_tensors_in((self.result,)))


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the values of an operation; those may be lists, of lists at the most."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)


Known = TypeVar("Known")


class TensorTable(Generic[Known]):
    """What is known of tensors for as long as they live; a plain dictionary that looks twice."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[ref[Tensor], Known]] = {}

    def __setitem__(self, tensor: Tensor, known: Known) -> None:
        self._known[id(tensor)] = ref(tensor), known

    def get(self, tensor: Tensor) -> Known | None:
        """What is known of `tensor`, if anything is."""
        found = self._known.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def forget(self, tensor: Tensor) -> None:
        """Nothing is known of it any more."""
        self._known.pop(id(tensor), None)


Rule = Callable[["Walk", Call], None]


ChoiceKey = tuple[str, str, str, int]  # module, operation, source, and how often it came by there


@dataclass(frozen=True)
class Choice:
    """Labels varied along several dimensions, and one was chosen to remove channels along."""

    labels: Tensor  # along the chosen dimension
    options: int  # how many dimensions there were


@dataclass(frozen=True)
class TakenStatistic:
    """A mean, a norm, a maximum or a softmax over channels: of those that are left, once some are gone."""

    module: str  # that was running
    turn: int  # how many statistics the module had taken before
    dim: int  # of the tensor it was taken of, counted from the last: -1, -2, ...
    labels: Tensor  # along that dimension


@dataclass
class Trace:
    """What one forward pass told: who is joined with whom, who must stay, and what it cost."""

    book: LabelBook
    state: tuple[StateDim, ...]
    parameters: dict[str, int]  # name -> number of elements
    produced: list[Tensor] = field(default_factory=list)  # the labels that layers put out, in order of use
    read: list[Tensor] = field(default_factory=list)  # the labels of the weight slices that read channels
    work: list[Work] = field(default_factory=list)
    choices: dict[ChoiceKey, Choice] = field(default_factory=dict)
    happenings: list[Happening] = field(default_factory=list)
    statistics: list[TakenStatistic] = field(default_factory=list)
    is_sketched: bool = False  # whether the network ran without values


class WholeFunctions(TorchFunctionMode):
    """Shows functions that torch would take apart as one operation: their parts hide what they are.

    An RMS norm, say, becomes a mean of squares over channels, which nobody could cut, and attention becomes another
    kernel on every device. A recurrent network is the other way round: one kernel hides its steps, which are shown
    after the states that they start from.

    Args:
        tell: hears of each call, and what it returned.
        taking: is entered around each statistic that can be restricted to a part of the channels.
        deriving: is entered around each function that reads sizes off its tensors and states none.
        is_sketch: whether tensors have no values.
    """

    def __init__(
        self,
        tell: Callable[[Call], None],
        taking: Callable[[], AbstractContextManager[None]],
        deriving: Callable[[], AbstractContextManager[None]],
        *,
        is_sketch: bool,
    ) -> None:
        super().__init__()
        self._tell, self._taking, self._deriving, self._is_sketch = tell, taking, deriving, is_sketch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Any function of torch, on its way."""
        if func is F.multi_head_attention_forward:  # what a function calls in turn, torch does not show to a mode
            attend = partial(self._whole, F.scaled_dot_product_attention)
            with patch.object(F, "scaled_dot_product_attention", lambda *args, **kwargs: attend(args, kwargs)):
                return func(*args, **(kwargs or {}))
        if func in _WHOLE:
            return self._whole(func, args, kwargs or {})
        if func in _RECURRENT and len(args) > 3 and isinstance(args[3], bool):  # else it is a packed sequence
            self._tell(Call.bind(_RECURRENT[func], args, {}, args[1]))
            with step_by_step():
                return func(*args)
        if func in _DERIVING:
            with self._deriving():
                return func(*args, **(kwargs or {}))
        if func in STATISTICS:
            with self._taking():
                return (_normalised if func is F.normalize else func)(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _whole(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        with _disable_current_modes():
            result = shapes_of(func, args, kwargs) if self._is_sketch else func(*args, **kwargs)
            self._tell(Call.bind(_WHOLE[func], args, kwargs, result))
        return result


_RMS_NORM = torch.ops.aten.rms_norm.default
_WHOLE: dict[Callable[..., Any], torch._ops.OpOverload] = {
    torch.rms_norm: _RMS_NORM,
    F.rms_norm: _RMS_NORM,
    F.scaled_dot_product_attention: torch.ops.aten.scaled_dot_product_attention.default,
}


def _normalised(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None) -> Tensor:
    """`F.normalize`, by broadcasting: the norm that it expands to every channel would seem to have channels itself."""
    return torch.div(input, input.norm(p, dim, keepdim=True).clamp_min(eps), out=out)


_DERIVING = {torch.flatten, Tensor.flatten, torch.chunk, Tensor.chunk, torch.unbind, Tensor.unbind}


_RECURRENT: dict[Callable[..., Any], torch._ops.OpOverload] = {
    torch.lstm: torch.ops.aten.lstm.input,
    torch.gru: torch.ops.aten.gru.input,
    torch.rnn_tanh: torch.ops.aten.rnn_tanh.input,
    torch.rnn_relu: torch.ops.aten.rnn_relu.input,
}


class Onlooker(TorchDispatchMode):
    """Hears of every tensor operation after it ran; a subclass says what to make of it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled while a network is watched; torch's guard against it would cost more than the rules."""
        return False

    def __init__(self, *, is_sketch: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sketch = is_sketch

    def happen(self, call: Call) -> None:
        """One operation, with what came out."""
        raise AssertionError("a subclass says what to make of an operation")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Any operation, on its way."""
        given = kwargs or {}
        result = shapes_of(func, args, given) if self.is_sketch else func(*args, **given)
        self.happen(Call.bind(func, args, given, result))
        return result

    def watch(self, model: nn.Module, inputs: Sequence[Any]) -> Any:
        """Run `model` and return its outputs; attention and other composites show as what they are."""
        whole = WholeFunctions(self.happen, self.taking, self.deriving, is_sketch=self.is_sketch)
        with plain_attention(), whole, self:
            return model(*inputs)

    def taking(self) -> AbstractContextManager[None]:
        """What to do around a statistic that the network takes."""
        return nullcontext()

    is_deriving = False  # whether the sizes of what happens now are read off its tensors

    @contextmanager
    def deriving(self) -> Iterator[None]:
        """Know that they are."""
        self.is_deriving = True
        try:
            yield
        finally:
            self.is_deriving = False


class Walk(Onlooker):
    """The mode under which the model runs; rules read and write labels through it."""

    def __init__(
        self,
        model: nn.Module,
        find_rule: Callable[[torch._ops.OpOverload], Rule | None],
        choose: Mapping[ChoiceKey, int],
        *,
        is_sketch: bool,
    ) -> None:
        super().__init__(is_sketch=is_sketch)
        self.book = LabelBook()
        self._find_rule, self._choose = find_rule, choose
        self._labels = TensorTable[DimLabels]()
        self._state = TensorTable[str]()  # parameters and buffers, and their names
        self._turns = Turns()
        self._taken: tuple[str, int] | None = None  # the statistic that is being taken: which module's, and its number
        self._used: set[str] = set()  # names of parameters and buffers
        sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
        self.trace = Trace(self.book, tuple(self._label_state(model)), sizes, is_sketched=is_sketch)

    def _label_state(self, model: nn.Module) -> Iterator[StateDim]:
        state = [*model.named_parameters(), *model.named_buffers()]
        # A dimension of size one has nothing to remove.
        dims = [
            (name, tensor, dim, size) for name, tensor in state for dim, size in enumerate(tensor.shape) if size > 1
        ]
        sizes = [size for *_, size in dims]
        own = {name: DimLabels() for name, _ in state}
        for name, tensor in state:
            self._labels[tensor], self._state[tensor] = own[name], name
        for (name, _, dim, _), labels in zip(dims, self.book.fresh(sum(sizes)).split(sizes), strict=True):
            own[name][dim] = labels
            yield StateDim(name, dim, labels)

    # What rules use

    def labels(self, tensor: Tensor | None) -> DimLabels:
        """The labels of a tensor by dimension; dimensions without removable channels are absent."""
        return {} if tensor is None else self._labels.get(tensor) or {}

    def set_labels(self, tensor: Tensor, labels: DimLabels) -> None:
        """Give `tensor` its labels; dimensions of size one carry none."""
        for dim, vector in labels.items():
            if tensor.size(dim) != len(vector):
                raise AssertionError(f"{len(vector)} labels along dimension {dim} of {tuple(tensor.shape)}")
        alone = [dim for dim in labels if tensor.size(dim) == 1]
        for dim in alone:
            self.protect(labels[dim], "picked out alone")
        self._labels[tensor] = {dim: vector for dim, vector in labels.items() if dim not in alone}

    def is_state(self, tensor: Tensor | None) -> bool:
        """Whether `tensor` is a parameter or buffer itself, not computed from one."""
        return tensor is not None and self._state.get(tensor) is not None

    def join(self, first: Tensor, second: Tensor, why: str) -> None:
        """Join two label vectors; what meets NONE is protected for the reason `why`."""
        self.book.join(first, second, self.reason(why))

    def protect(self, labels: Tensor, why: str) -> None:
        """These channels must stay."""
        self.book.protect(labels, self.reason(why))

    def protect_all(self, tensors: Sequence[Tensor], why: str) -> None:
        """Every channel of these tensors must stay."""
        for tensor in tensors:
            for vector in self.labels(tensor).values():
                self.protect(vector, why)

    def produces(self, labels: Tensor) -> None:
        """These labels are the output channels of the layer that is running."""
        self.trace.produced.append(labels)

    def reads(self, labels: Tensor) -> None:
        """These labels are the weight slices with which the running layer reads its input."""
        self.trace.read.append(labels)

    def count(self, macs: int, *dims: Tensor | None) -> None:
        """Book `macs` multiply-adds that are proportional to each of the labelled `dims`."""
        module = self._turns.module
        self.trace.work.append(Work(module, macs, tuple(dim for dim in dims if dim is not None)))

    def reason(self, why: str) -> Reason:
        """`why`, with the operation, the module and the line of code that is running."""
        op = self._running.name if self._running else ""
        return Reason(why, op, self._turns.module, self._source)

    def box(self, field: Tensor) -> DimLabels:
        """Labels of every element of a tensor as labels along its dimensions; see `LabelBook.squeeze_to_box`.

        Where there is a choice of dimension it is noted, so that `follow` can be told to choose again.
        """
        place = (
            self._turns.module,
            self._running.name if self._running else "",
            self._source,
        )
        key = (*place, sum(known[:3] == place for known in self.trace.choices))
        rank = self._choose.get(key, 0)
        boxed, options = self.book.squeeze_to_box(field, self.reason("cannot be removed from a box"), rank=rank)
        if options > 1:
            self.trace.choices[key] = Choice(next(iter(boxed.values())), options)
        return boxed

    def give_up(self, call: Call, why: str) -> None:
        """Every channel that an operation touches must stay, and nothing is known of its results."""
        self.protect_all(call.tensors, why)
        for result in call.results:
            self._labels[result] = {}

    # What `follow` uses

    def following(self, model: nn.Module) -> AbstractContextManager[None]:
        """Know, while the model runs, which of its modules is running."""
        return self._turns.following(model)

    def run(self, model: nn.Module, inputs: Sequence[Any]) -> None:
        """Walk through one forward pass; what comes out must stay."""
        for leaf in tree_leaves(list(inputs)):
            if isinstance(leaf, Tensor):
                self._labels[leaf] = {}
        outputs = self.watch(model, inputs)
        self._running = None
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor):
                for vector in self.labels(output).values():
                    self.book.protect(vector, Reason("the model's output"))

    def has_unseen(self, model: nn.Module) -> bool:
        """Whether a parameter was not used."""
        return any(name not in self._used for name, _ in model.named_parameters())

    def run_in_training(self, model: nn.Module, inputs: Sequence[Any]) -> None:
        """Walk once more in training mode, for heads that run only then; a model that wants targets is left alone.

        Joins and protections are kept. What the pass cost and how it went are not: nobody deploys it.
        """
        main, scratch = self.trace, Trace(self.book, self.trace.state, self.trace.parameters)
        buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
        twice = [torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim else leaf for leaf in inputs]
        self.trace, self._choose = scratch, {}
        try:
            with evaluating(model, training=True), torch.random.fork_rng(devices=[]):
                self.run(model, twice)
        except Exception:
            if self.is_sketch:
                raise  # with values it may go well
            self._running = None
        finally:
            for name, tensor in model.named_buffers():
                tensor.copy_(buffers[name])
            self.trace = main
            main.produced += scratch.produced
            main.read += scratch.read

    _running: Call | None = None
    _source = ""  # file:line of the model's own code that is running

    def happen(self, call: Call) -> None:
        """Pass the labels on through one operation, and note that it happened."""
        self._running, self._source = call, source_line()
        self._used.update(name for tensor in call.tensors if (name := self._state.get(tensor)))
        inputs = self._seen(call.tensors)  # before the rule: an operation in place changes them
        constants = [self._labels.get(tensor) is None for tensor in call.tensors]
        rule = self._find_rule(call.op)
        if rule is None:
            self.give_up(call, "no rule follows channels through this operation")
        else:
            try:
                rule(self, call)
            except Exception as error:
                if self.is_sketch:
                    raise  # it may want values
                # A case the rule did not foresee costs these channels, not the model.
                self.give_up(call, f"could not be followed: {error}")
        self._running = None
        for result in call.results:
            if all(constants):
                self._labels.forget(result)
            elif self._labels.get(result) is None:
                self._labels[result] = {}
        self.trace.happenings.append(
            Happening(
                call.name,
                tuple(self._turns.running),
                self._source,
                inputs,
                self._seen(call.results),
                call.factors,
                self.is_deriving,
                any(constants),
            )
        )

    def _seen(self, tensors: Sequence[Tensor]) -> tuple[Labelled, ...]:
        return tuple((tuple(tensor.shape), self.labels(tensor)) for tensor in tensors)

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Know which statistic the operations of the next moments are part of."""
        self._taken = self._turns.next()
        try:
            yield
        finally:
            self._taken = None

    def restrict(self, dim: int, labels: Tensor) -> bool:
        """Note that a statistic is taken over these channels; False if it is one that `masked` cannot restrict."""
        if self._taken is None:
            return False
        self.trace.statistics.append(TakenStatistic(*self._taken, dim, labels))
        return True


def follow(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    choose: Mapping[ChoiceKey, int] | None = None,
    sketch: Sketch | None = None,
) -> Trace:
    """Run `model` once in evaluation mode and follow its channels; the model is left as it was.

    Args:
        model: any network; its weights are read, never written.
        example_inputs: one tensor, or a sequence of positional arguments. Every size that the
            network decides on should be as in use; the batch may be 1.
        choose: key of a choice (in `Trace.choices`) -> which of its options to take instead of the first.
        sketch: of the model and these inputs, if there is one already.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    try:
        sketch = sketch or Sketch.of(model, inputs)
        return _walk(sketch.model, sketch.inputs, choose or {}, is_sketch=True)
    except Exception:  # values are wanted; or something is wrong with the network, which will show
        return _walk(model, inputs, choose or {}, is_sketch=False)


def _walk(model: nn.Module, inputs: Sequence[Any], choose: Mapping[ChoiceKey, int], *, is_sketch: bool) -> Trace:
    from passdeploy.channels.rules import find_rule

    walk = Walk(model, find_rule, choose, is_sketch=is_sketch)
    with torch.no_grad():
        with walk.following(model), evaluating(model):
            walk.run(model, inputs)
        if walk.has_unseen(model):
            with walk.following(model):
                walk.run_in_training(model, inputs)
    return walk.trace


@contextmanager
def plain_attention() -> Iterator[None]:
    """Run `nn.MultiheadAttention` operation by operation instead of as one fused kernel that hides its channels."""
    was_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)


@contextmanager
def step_by_step() -> Iterator[None]:
    """Run recurrent networks operation by operation instead of as one kernel of oneDNN or cuDNN."""
    was_enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(was_enabled)


@contextmanager
def evaluating(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Put every module into evaluation mode (or training mode), and back into the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def source_line() -> str:
    """File and line of the innermost running frame of the model's own code, or else of a torch module."""
    frame, torch_module = sys._getframe(1), ""
    while frame is not None and frame.f_code not in _OUTERMOST:
        owner, name = _owner_of(frame.f_code.co_filename)
        if owner == "model":
            return f"{name}:{frame.f_lineno}"
        if owner == "torch module" and not torch_module:
            torch_module = f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return torch_module


_OUTERMOST = {_walk.__code__, Onlooker.watch.__code__}  # who ran the model


@cache
def _owner_of(filename: str) -> tuple[str, str]:
    """Whose code a file is (model, torch module, torch, ours), and its name."""
    file = Path(filename)
    if "torch" in file.parts:
        is_module = file.parent.name == "modules" and file.name != "module.py"
        return ("torch module" if is_module else "torch"), file.name
    return ("ours" if file.parent == Path(__file__).parent else "model"), file.name


__all__ = [
    *("NONE", "Call", "DimLabels", "StateDim", "Trace", "Walk", "Work"),
    *("evaluating", "follow", "plain_attention", "source_line"),
]
