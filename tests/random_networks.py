"""Random networks for tests, as descriptions that can be read, shrunk and pasted into a bug report.

A description is a list of layers that state their output width and infer their input width:

    Network((3, 8, 8), (Conv(8), BatchNorm(), Residual((Conv(4), Act("relu"))), MeanPool(), Linear(5)))

Shapes that do not fit are adapted as real networks do: a branch that is added to another gets a 1 x 1 convolution to
its width and is resized to its height and width. `build` makes the module, `examine` checks that slimming it keeps its
function, `shrink` makes a failing network small. Shapes are those of one image: (channels, height, width) for maps,
(tokens, channels) for tokens, (channels,) for vectors. Beyond its layers a network may have traits: a wrapper, patched
instances, outputs other than tensors, code that depends on the image size, branches on widths, position embeddings
without weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from random import Random
from types import MethodType, SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map_only

import passdeploy
from passdeploy import Plan, count, masked, slim, verify
from passdeploy.channels.blocks import replacements_of
from passdeploy.channels.groups import ChannelGroup
from passdeploy.grouping.find import map_channels
from passdeploy.models.outputs import comparable_in, tensors_in
from passdeploy.models.wrappers import calling_eagerly, unwrapped
from passdeploy.slimming.agreement import relative_error
from passdeploy.slimming.size_attributes import size_attributes_after
from passdeploy.slimming.slim import hidden_state, resize_
from passdeploy.tracing.counts import Counts

Shape = tuple[int, ...]

CLASSES = 5
TOLERANCE = 1e-9  # of the relative error of a slim network, in float64
TRAITS = ("wrapped", "patched", "outputs", "reshapes", "branches", "positions")  # that networks are drawn with
BLOCK_TRAITS = ("blocks", "patched", "outputs")  # where their blocks are left out


class Layer:
    """One layer of a description; it prints as the Python that makes it."""

    def build(self, shape: Shape) -> nn.Module:
        """Make the module, for inputs of this shape."""
        raise NotImplementedError

    def __repr__(self) -> str:
        shown = []
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.default is MISSING:
                shown.append(repr(value))
            elif value != field.default:
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print the network on several lines, for hypothesis."""
        printer.text(describe(self) if isinstance(self, Network) else repr(self))


Body = tuple[Layer, ...]
layer = dataclass(frozen=True, repr=False)


@layer
class Network(Layer):
    """A whole network: the shape of an image, the layers in order, a key of PATCHES, and a key of WRAPPERS."""

    image: Shape
    layers: Body
    patch: str = ""
    wrapper: str = ""

    def build(self, shape: Shape = ()) -> nn.Module:
        net: nn.Module = sequence(self.layers, self.image)
        if self.patch:
            PATCHES[self.patch](net)
        return WRAPPERS[self.wrapper](net) if self.wrapper else net


def describe(network: Network) -> str:
    """Print the network as Python, one layer a line."""
    lines = "".join(f"    {one!r},\n" for one in network.layers)
    traits = "".join(f", {name}={value!r}" for name in ("patch", "wrapper") if (value := getattr(network, name)))
    return f"Network({network.image}, (\n{lines}){traits})"


def build(network: Network, seed: int) -> nn.Module:
    """Make the network with random weights and statistics, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = network.build()
        with torch.no_grad():
            for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
                if tensor.ndim > 1:
                    tensor.normal_(std=(2 / (tensor.numel() / len(tensor))) ** 0.5)
                elif name.endswith(("bias", "mean")):
                    tensor.uniform_(-0.3, 0.3)
                elif tensor.is_floating_point():
                    tensor.uniform_(0.5, 1.5)
    return net.eval()


def example_input(network: Network, seed: int, batch: int = 2, size: Shape = ()) -> Tensor:
    """Make random images for the network, shape (batch, *image), or of another height and width."""
    image = (network.image[0], *size) if size else network.image
    return torch.randn(batch, *image, generator=torch.Generator().manual_seed(seed))


# Putting layers together


class Fn(nn.Module):
    """A module that calls a function of itself and its input; its attributes are what the function uses."""

    def __init__(self, function: Callable[[Any, Any], Any], **own: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


def shape_after(module: nn.Module, shape: Shape) -> Shape:
    """Run a module on zeros; returns the shape of one image's output, or () if the output is no tensor."""
    training = module.training
    with torch.no_grad(), calling_eagerly(module):
        found = module.eval()(torch.zeros(2, *shape))
    module.train(training)
    return tuple(found.shape[1:]) if isinstance(found, Tensor) else ()


def sequence(body: Body, shape: Shape) -> nn.Sequential:
    """Make the layers one after the other."""
    modules = []
    for one in body:
        modules.append(one.build(shape))
        shape = shape_after(modules[-1], shape)
    return nn.Sequential(*modules)


def fitted(body: Body, shape: Shape, target: Shape) -> nn.Sequential:
    """Make the layers, and append convolutions and resizing until the output has the shape `target`."""
    modules = sequence(body, shape)
    found = shape_after(modules, shape)
    if len(found) == len(target) == 3:
        if found[0] != target[0]:
            modules.append(nn.Conv2d(found[0], target[0], 1))
        if found[1:] != target[1:]:
            modules.append(nn.Upsample(target[1:]))
    elif len(found) == len(target) and found[:-1] == target[:-1]:
        if found[-1] != target[-1]:
            modules.append(nn.Linear(found[-1], target[-1]))
    else:
        raise ValueError(f"{found} cannot be made {target}")
    return modules


def at_channels(shape: Shape) -> int:
    """Return the channel dimension of a batch: the last one for tokens."""
    return -1 if len(shape) == 2 else 1


def width_of(shape: Shape) -> int:
    return shape[-1] if len(shape) == 2 else shape[0]


def table(shape: Shape) -> nn.Parameter:
    """Make a parameter of one number per channel that broadcasts over the input."""
    return nn.Parameter(torch.ones(shape[0], 1, 1) if len(shape) == 3 else torch.ones(shape[-1]))


# Wrappers around a network, and what an instance may carry


def _averaged(net: nn.Module) -> nn.Module:
    averaged = AveragedModel(nn.Identity())
    averaged.module = net  # not copied: functions of a copy would go on calling the layers of the original
    return averaged


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "torch.compile": lambda net: torch.compile(net, backend="eager"),
    "DataParallel": lambda net: nn.DataParallel(net),
    "AveragedModel": _averaged,
}


def _doubled(value: Any) -> Any:
    """Double the floating-point tensors in the input or the output of a module."""
    return tree_map_only(Tensor, lambda tensor: tensor * 2 if tensor.is_floating_point() else tensor, value)


def _run_doubled(module: nn.Module, x: Tensor) -> Any:
    return type(module).forward(module, _doubled(x))


def _first_layer(module: nn.Module) -> Any:
    """Return the first convolution or linear layer in a module; an unused one if there is none."""
    unused = nn.utils.skip_init(nn.Linear, 1, 1)
    nn.init.ones_(unused.weight)  # its weight is in no state dict
    return next((one for one in module.modules() if isinstance(one, nn.Conv2d | nn.Linear)), unused)


def _closing_over_itself(module: nn.Sequential) -> None:
    def forward(x: Tensor) -> Any:
        for child in module:
            x = child(x)
        return x

    module.forward = forward  # type: ignore[method-assign]


def _closing_over_a_layer(module: nn.Sequential) -> None:
    layer = _first_layer(module)
    layer.forward = lambda x: type(layer).forward(layer, x)


def _closing_over_tensors(module: nn.Sequential) -> None:
    layer = _first_layer(module)
    weight, bias = layer.weight, layer.bias
    if isinstance(layer, nn.Linear):
        layer.forward = lambda x: F.linear(x, weight, bias)
    elif layer.groups == 1:
        stride, padding = layer.stride, layer.padding
        layer.forward = lambda x: F.conv2d(x, weight, bias, stride, padding)


def _closing_over_the_old_forward(module: nn.Sequential) -> None:
    old = module.forward
    module.forward = lambda x: old(_doubled(x))  # type: ignore[method-assign]


def _hook_on_a_layer(module: nn.Sequential) -> None:
    layer = _first_layer(module)
    module.register_forward_hook(
        lambda _, inputs, output: tree_map_only(
            Tensor, lambda x: x + layer.weight.sum() if x.is_floating_point() else x, output
        )
    )


def _pre_hook_on_a_layer(module: nn.Sequential) -> None:
    layer = _first_layer(module)
    module.register_forward_pre_hook(lambda _, inputs: (inputs[0] + layer.weight.sum(),))


PATCHES: dict[str, Callable[[Any], object]] = {
    "compile in place": lambda module: module.compile(backend="eager"),
    "forward over itself": _closing_over_itself,
    "forward over a layer": _closing_over_a_layer,
    "forward over tensors": _closing_over_tensors,
    "forward over the old one": _closing_over_the_old_forward,
    "forward as a method": lambda module: setattr(module, "forward", MethodType(_run_doubled, module)),
    "forward as a partial": lambda module: setattr(module, "forward", partial(_run_doubled, module)),
    "hook": lambda module: module.register_forward_hook(lambda _, inputs, output: _doubled(output)),
    "hook over a layer": _hook_on_a_layer,
    "hook as a method": lambda module: module.register_forward_hook(
        MethodType(lambda own, _, inputs, output: _doubled(output), module)
    ),
    "pre-hook": lambda module: module.register_forward_pre_hook(lambda _, inputs: _doubled(inputs)),
    "pre-hook over a layer": _pre_hook_on_a_layer,
}


@layer
class Patched(Layer):
    """A body as a module that carries something besides its layers, a key of PATCHES."""

    body: Body
    how: str

    def build(self, shape: Shape) -> nn.Module:
        module = sequence(self.body, shape)
        PATCHES[self.how](module)
        return module


# Convolutions and linear layers


@layer
class Conv(Layer):
    out: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    bias: bool = False

    def build(self, shape: Shape) -> nn.Module:
        padding = self.kernel // 2 if self.kernel > self.stride else 0
        return nn.Conv2d(shape[0], self.out, self.kernel, self.stride, padding, groups=self.groups, bias=self.bias)


@layer
class Depthwise(Layer):
    multiplier: int = 1
    stride: int = 1
    bias: bool = False

    def build(self, shape: Shape) -> nn.Module:
        return nn.Conv2d(shape[0], shape[0] * self.multiplier, 3, self.stride, 1, groups=shape[0], bias=self.bias)


@layer
class Transposed(Layer):
    """A transposed convolution that doubles height and width."""

    out: int
    groups: int = 1
    bias: bool = False

    def build(self, shape: Shape) -> nn.Module:
        return nn.ConvTranspose2d(shape[0], self.out, 2, 2, groups=self.groups, bias=self.bias)


@layer
class Conv3d(Layer):
    """A 3-d convolution over a video of one frame."""

    out: int

    def build(self, shape: Shape) -> nn.Module:
        conv = nn.Conv3d(shape[0], self.out, (1, 3, 3), padding=(0, 1, 1))
        return Fn(lambda own, x: own.conv(x.unsqueeze(2)).squeeze(2), conv=conv)


@layer
class StandardConv(Layer):
    """A convolution whose filters are standardised in every forward pass."""

    out: int

    def build(self, shape: Shape) -> nn.Module:
        def forward(own: Any, x: Tensor) -> Tensor:
            spread, mean = torch.var_mean(own.conv.weight, (1, 2, 3), keepdim=True)
            return F.conv2d(x, (own.conv.weight - mean) / (spread + 1e-4).sqrt(), own.conv.bias, padding=1)

        return Fn(forward, conv=nn.Conv2d(shape[0], self.out, 3))


@layer
class Linear(Layer):
    """A linear layer over the channels of vectors, of tokens, or of every pixel."""

    out: int
    bias: bool = True

    def build(self, shape: Shape) -> nn.Module:
        linear = nn.Linear(width_of(shape), self.out, self.bias)
        if len(shape) < 3:
            return linear
        return Fn(lambda own, x: own.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), linear=linear)


@layer
class MixTokens(Layer):
    """A linear layer along the tokens, or a convolution if `kernel` is set."""

    kernel: int = 0

    def build(self, shape: Shape) -> nn.Module:
        mix: nn.Module = nn.Linear(shape[0], shape[0])
        if self.kernel:
            mix = nn.Conv1d(shape[1], shape[1], self.kernel, padding=self.kernel // 2)
        return Fn(lambda own, x: own.mix(x.transpose(1, 2)).transpose(1, 2), mix=mix)


# Norms, activations, scales


@layer
class BatchNorm(Layer):
    def build(self, shape: Shape) -> nn.Module:
        if len(shape) == 2:
            return Fn(lambda own, x: own.norm(x.transpose(1, 2)).transpose(1, 2), norm=nn.BatchNorm1d(shape[1]))
        return nn.BatchNorm2d(shape[0]) if len(shape) == 3 else nn.BatchNorm1d(shape[0])


@layer
class LayerNorm(Layer):
    """A layer norm over the channels, in the ways that models write it.

    On maps `module` permutes around the torch module; `whole` normalises the entire map.
    """

    spelling: str = "module"  # module, stored, from_shape, by_hand, whole

    def build(self, shape: Shape) -> nn.Module:
        channels, dim = width_of(shape), at_channels(shape)
        if self.spelling == "whole":
            return nn.LayerNorm(shape)
        if self.spelling == "by_hand":

            def by_hand(own: Any, x: Tensor) -> Tensor:
                centred = x - x.mean(dim, keepdim=True)
                x = centred * (centred.square().mean(dim, keepdim=True) + 1e-6).rsqrt()
                return x * own.weight + own.bias

            return Fn(by_hand, weight=table(shape), bias=table(shape))
        own: dict[str, Any] = {"norm": nn.LayerNorm(channels)}
        function: Callable[[Any, Tensor], Tensor] = lambda own, x: own.norm(x)  # noqa: E731
        if self.spelling != "module":
            own = {"weight": nn.Parameter(torch.ones(channels)), "bias": nn.Parameter(torch.zeros(channels))}
            own["shape"] = (channels,)
            function = lambda own, x: F.layer_norm(x, own.shape, own.weight, own.bias)  # noqa: E731
            if self.spelling == "from_shape":
                function = lambda own, x: F.layer_norm(x, x.shape[-1:], own.weight, own.bias)  # noqa: E731
        if len(shape) < 3:
            return Fn(function, **own)
        return Fn(lambda own, x: function(own, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), **own)


@layer
class RMSNorm(Layer):
    def build(self, shape: Shape) -> nn.Module:
        norm = nn.RMSNorm(width_of(shape))
        if len(shape) < 3:
            return norm
        return Fn(lambda own, x: own.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=norm)


@layer
class GroupNorm(Layer):
    groups: int = 1

    def build(self, shape: Shape) -> nn.Module:
        return nn.GroupNorm(self.groups, shape[0])


@layer
class InstanceNorm(Layer):
    affine: bool = True
    tracks: bool = False

    def build(self, shape: Shape) -> nn.Module:
        return nn.InstanceNorm2d(shape[0], affine=self.affine, track_running_stats=self.tracks)


@layer
class LocalNorm(Layer):
    """Local response normalisation, over neighbouring channels."""

    def build(self, shape: Shape) -> nn.Module:
        return nn.LocalResponseNorm(3, alpha=0.5)


@layer
class ResponseNorm(Layer):
    """ConvNeXt-V2's response norm: the norm of each channel divided by the mean norm over channels."""

    def build(self, shape: Shape) -> nn.Module:
        def forward(own: Any, x: Tensor) -> Tensor:
            energy = x.norm(2, (2, 3), keepdim=True)
            return x + own.weight * (x * energy / (energy.mean(1, keepdim=True) + 1e-6)) + own.bias

        return Fn(forward, weight=table(shape), bias=table(shape))


@layer
class UnitLength(Layer):
    """Scaling of every pixel or token to length one."""

    def build(self, shape: Shape) -> nn.Module:
        return Fn(lambda own, x: F.normalize(x, dim=own.dim), dim=at_channels(shape))


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "softplus": nn.Softplus,
    "relu6_": lambda: nn.ReLU6(inplace=True),
    "hardswish_": lambda: nn.Hardswish(inplace=True),
    "dropout": lambda: nn.Dropout(0.1),
    "one_prelu": nn.PReLU,
}


@layer
class Act(Layer):
    """An activation; those whose names end in _ work in place."""

    name: str

    def build(self, shape: Shape) -> nn.Module:
        return nn.PReLU(shape[0]) if self.name == "prelu" else ACTIVATIONS[self.name]()


@layer
class Scale(Layer):
    """Multiplication by a parameter per channel, or addition of a fixed number per channel."""

    fixed: bool = False

    def build(self, shape: Shape) -> nn.Module:
        if self.fixed:
            return Fn(lambda own, x: x + own.shift, shift=nn.Buffer(table(shape).detach()))
        return Fn(lambda own, x: x * own.gamma, gamma=table(shape))


# Blocks


@layer
class Residual(Layer):
    body: Body

    def build(self, shape: Shape) -> nn.Module:
        found = shape_after(sequence(self.body, shape), shape)
        target = found if len(found) == 3 else shape
        skip = nn.Identity() if target == shape else fitted((), shape, target)
        return Fn(lambda own, x: own.skip(x) + own.body(x), body=fitted(self.body, shape, target), skip=skip)


def _pair(own: Any, x: Tensor) -> Tensor:
    x = x + own.drop(own.body(x))
    return x + own.drop(own.scale * own.body2(x))


def _in_place(own: Any, x: Tensor) -> Tensor:
    out: Tensor = own.body(x) * 1
    out.add_(x)  # what it returns is not used
    return out


def _into_input(own: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x += own.body(x)
    return x


def _shared_relu(own: Any, x: Tensor) -> Tensor:
    out: Tensor = own.body2(own.relu(own.norm(own.body(x))))
    return own.relu(out + x)


# How a block joins its branch to its input. A branch of some forms must stay; of the others, modules or all of it go.
BLOCK_FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "sum": lambda own, x: x + own.body(x),
    "swapped": lambda own, x: torch.add(own.body(x), x),
    "relu": lambda own, x: F.relu(x + own.body(x)),
    "relu module": lambda own, x: own.relu(own.body(x).add_(x)),
    "silu": lambda own, x: F.silu(x + own.body(x)),
    "scaled": lambda own, x: (x + own.body(x)) * 0.7,
    "layer scale": lambda own, x: x + own.scale * own.body(x),
    "pair": _pair,
    "scaled shortcut": lambda own, x: x * own.scale + own.body(x),
    "in place": _in_place,
    "into the input": _into_input,
    "tuple": lambda own, x: x + own.wrapped(x)[0],
    "keyword": lambda own, x: x + own.body(input=x),
    "alpha": lambda own, x: torch.add(x, own.body(x), alpha=0.5),
    "input times two": lambda own, x: torch.add(own.body(x), x, alpha=2),
    "shared relu": _shared_relu,
    "bodies in parallel": lambda own, x: x + (own.body(x) + own.body2(x)),
    "nested": lambda own, x: x + own.outer(x),
    "twice": lambda own, x: own.body(x + own.body(x)),
    "used elsewhere": lambda own, x: (lambda y: x + own.body2(y) + y.mean())(own.body(x)),
    "functions": lambda own, x: x + torch.tanh(x * own.scale),
    "with the input's mean": lambda own, x: x + own.body(x) * x.mean(),
    "reshaped": lambda own, x: x + own.body(x).flatten(1).view(x.shape),
    "concatenated": lambda own, x: torch.cat([x, own.body(x)], 1 if x.ndim == 4 else -1),
}


@layer
class Block(Layer):
    """A residual block around a body, of a form of BLOCK_FORMS."""

    body: Body
    form: str = "sum"

    def build(self, shape: Shape) -> nn.Module:
        def body() -> nn.Module:
            return fitted(self.body, shape, shape)

        parts: dict[str, nn.Module | nn.Parameter] = {"body": body(), "relu": nn.ReLU(inplace=True)}
        if self.form in ("pair", "used elsewhere", "shared relu", "bodies in parallel"):
            parts |= {"body2": body(), "drop": nn.Dropout(0.1), "norm": BatchNorm().build(shape)}
        if self.form in ("layer scale", "scaled shortcut", "pair", "functions"):
            parts["scale"] = table(shape)
        if self.form == "tuple":
            parts["wrapped"] = Fn(lambda own, x: (own.body(x), None), body=parts.pop("body"))
        if self.form == "nested":
            parts["outer"] = nn.Sequential(Block(self.body).build(shape), parts.pop("body"))
        return Fn(BLOCK_FORMS[self.form], **parts)


@layer
class Branches(Layer):
    """Several bodies on the same input, and one of cat, add, mul, max, stack to combine their outputs."""

    bodies: tuple[Body, ...]
    join: str = "cat"

    def build(self, shape: Shape) -> nn.Module:
        ends = [shape_after(sequence(body, shape), shape) for body in self.bodies]
        if self.join == "cat":
            dim = at_channels(shape)
            ends = [(end[0], *ends[0][1:]) if dim == 1 else (*ends[0][:-1], end[-1]) for end in ends]
            join: Callable[[list[Tensor]], Tensor] = lambda found: torch.cat(found, dim)  # noqa: E731
        else:
            ends = [ends[0]] * len(ends)
            join = {
                "add": lambda found: sum(found[1:], found[0]),
                "mul": lambda found: found[0] * torch.sigmoid(found[1]),
                "max": lambda found: torch.maximum(found[0], found[1]),
                "stack": lambda found: torch.stack(found, 1).mean(1),
            }[self.join]
        bodies = nn.ModuleList(fitted(body, shape, end) for body, end in zip(self.bodies, ends, strict=True))
        return Fn(lambda own, x: join([body(x) for body in own.bodies]), bodies=bodies)


@layer
class Dense(Layer):
    """A concatenation of the input and the body's output."""

    body: Body

    def build(self, shape: Shape) -> nn.Module:
        return Branches(((), self.body)).build(shape)


@layer
class Shared(Layer):
    """One body used twice in a row, with the same weights."""

    body: Body

    def build(self, shape: Shape) -> nn.Module:
        return Fn(lambda own, x: own.body(own.body(x)), body=fitted(self.body, shape, shape))


@layer
class Tied(Layer):
    """Two modules that share one weight, each a linear map of every pixel, token or vector."""

    out: int

    def build(self, shape: Shape) -> nn.Module:
        kind = (lambda: nn.Conv2d(shape[0], self.out, 1)) if len(shape) == 3 else None
        one, two = ((kind or (lambda: nn.Linear(width_of(shape), self.out)))() for _ in range(2))
        two.weight = one.weight
        return Fn(lambda own, x: own.one(x) + F.relu(own.two(x * 0.5)), one=one, two=two)


@layer
class Split(Layer):
    """A split of the channels into parts, a body on each, and a concatenation of their outputs.

    `chunk` makes equal parts; `sizes` and `slice` use numbers that the module stores; `half` takes its number from
    the shape; `strided` takes every other channel. `chained` adds the output of each part to the next part's input.
    """

    bodies: tuple[Body, ...]
    how: str = "chunk"
    sizes: tuple[int, ...] = ()
    chained: bool = False

    def build(self, shape: Shape) -> nn.Module:
        dim, own = at_channels(shape), {}
        if self.how == "chunk":
            parts = lambda own, x: x.chunk(len(self.bodies), dim)  # noqa: E731
        elif self.how == "sizes":
            own["sizes"] = list(self.sizes)
            parts = lambda own, x: x.split(own.sizes, dim)  # noqa: E731
        elif self.how == "slice":
            own["first"] = self.sizes[0]
            parts = lambda own, x: (x[:, : own.first], x[:, own.first :])  # noqa: E731
        elif self.how == "half":
            parts = lambda own, x: (x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :])  # noqa: E731
        else:
            parts = lambda own, x: (x[:, ::2], x[:, 1::2])  # noqa: E731

        def forward(own: Any, x: Tensor) -> Tensor:
            done: list[Tensor] = []
            for part, body in zip(parts(own, x), own.bodies, strict=True):
                done.append(body(part + done[-1] if self.chained and done else part))
            return torch.cat(done, dim)

        starts = [tuple(part.shape[1:]) for part in parts(Fn(parts, **own), torch.zeros(2, *shape))]
        bodies = nn.ModuleList()
        for body, start in zip(self.bodies, starts, strict=True):
            end = shape_after(sequence(body, start), start)
            target = start if self.chained else (end[0], *start[1:]) if dim == 1 else (*start[:-1], end[-1])
            bodies.append(fitted(body, start, target))
        return Fn(forward, bodies=bodies, **own)


@layer
class TrainOnly(Layer):
    """A residual branch that runs only in training mode."""

    body: Body

    def build(self, shape: Shape) -> nn.Module:
        body = fitted(self.body, shape, shape)
        return Fn(lambda own, x: x + own.body(x) if own.training else x, body=body)


# Gates


@layer
class SqueezeExcite(Layer):
    reduced: int
    by: str = "conv"  # conv, linear

    def build(self, shape: Shape) -> nn.Module:
        if self.by == "conv":
            squeeze: nn.Module = nn.Conv2d(shape[0], self.reduced, 1)
            excite: nn.Module = nn.Conv2d(self.reduced, shape[0], 1)
            return Fn(
                lambda own, x: x * own.excite(F.silu(own.squeeze(F.adaptive_avg_pool2d(x, 1)))).sigmoid(),
                squeeze=squeeze,
                excite=excite,
            )
        return Fn(
            lambda own, x: x * F.hardsigmoid(own.excite(own.squeeze(x.mean((2, 3))).relu()))[:, :, None, None],
            squeeze=nn.Linear(shape[0], self.reduced),
            excite=nn.Linear(self.reduced, shape[0]),
        )


@layer
class Glu(Layer):
    """A gated linear unit: one half of the channels gates the other."""

    spelling: str = "glu"  # glu, chunk, product

    def build(self, shape: Shape) -> nn.Module:
        def forward(own: Any, x: Tensor) -> Tensor:
            if self.spelling == "glu":
                return F.glu(x, own.dim)
            left, right = x.chunk(2, own.dim)
            return left * right if self.spelling == "product" else F.silu(left) * right

        return Fn(forward, dim=at_channels(shape))


@layer
class AlongChannels(Layer):
    """Gates computed along the channels: eca (a convolution along them), pixel (their mean and maximum), softmax."""

    kind: str

    def build(self, shape: Shape) -> nn.Module:
        if self.kind == "eca":
            return Fn(
                lambda own, x: x * own.conv(x.mean((2, 3))[:, None]).transpose(1, 2)[..., None].sigmoid(),
                conv=nn.Conv1d(1, 1, 3, padding=1, bias=False),
            )
        if self.kind == "pixel":
            return Fn(
                lambda own, x: x * own.conv(torch.cat([x.mean(1, True), x.amax(1, True)], 1)).sigmoid(),
                conv=nn.Conv2d(2, 1, 3, padding=1, bias=False),
            )
        return Fn(lambda own, x: x * x.mean((2, 3), keepdim=True).softmax(1))


@layer
class SelectKernel(Layer):
    """SKNet's selective kernel: two convolutions, and for every channel a softmax between them."""

    out: int
    reduced: int
    stored: bool = False

    def build(self, shape: Shape) -> nn.Module:
        def forward(own: Any, x: Tensor) -> Tensor:
            both = torch.stack([own.small(x), own.large(x)], 1)  # (batch, 2, channels, height, width)
            gate = own.excite(own.squeeze(both.sum(1).mean((2, 3))).relu())
            gate = gate.view(x.shape[0], 2, own.out if self.stored else -1).softmax(1)
            return (both * gate[..., None, None]).sum(1)

        return Fn(
            forward,
            small=nn.Conv2d(shape[0], self.out, 1),
            large=nn.Conv2d(shape[0], self.out, 3, padding=1),
            squeeze=nn.Linear(self.out, self.reduced),
            excite=nn.Linear(self.reduced, 2 * self.out),
            out=self.out,
        )


# Moving channels and pixels about


@layer
class Shuffle(Layer):
    groups: int
    spelling: str = "view"  # view, stored, module

    def build(self, shape: Shape) -> nn.Module:
        if self.spelling == "module":
            return nn.ChannelShuffle(self.groups)

        def forward(own: Any, x: Tensor) -> Tensor:
            batch, channels, height, width = x.shape
            inside = own.inside if self.spelling == "stored" else channels // self.groups
            return x.view(batch, self.groups, inside, height, width).transpose(1, 2).reshape(x.shape)

        return Fn(forward, inside=shape[0] // self.groups)


@layer
class PixelShuffle(Layer):
    def build(self, shape: Shape) -> nn.Module:
        return nn.PixelShuffle(2)


@layer
class PixelUnshuffle(Layer):
    slices: bool = False

    def build(self, shape: Shape) -> nn.Module:
        if self.slices:
            return Fn(
                lambda own, x: torch.cat(
                    [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1
                )
            )
        return nn.PixelUnshuffle(2)


@layer
class PadChannels(Layer):
    before: int
    after: int

    def build(self, shape: Shape) -> nn.Module:
        return Fn(lambda own, x: F.pad(x, (0, 0, 0, 0, self.before, self.after)))


@layer
class Resize(Layer):
    """A change of height and width to a half or to double."""

    how: str  # max, avg, blur, nearest, bilinear, slice; adaptive: to a size computed from the input's

    def build(self, shape: Shape) -> nn.Module:
        if self.how == "blur":  # a fixed filter on every channel

            def blur(own: Any, x: Tensor) -> Tensor:
                return F.conv2d(x, own.kernel.expand(x.shape[1], 1, 2, 2), stride=2, groups=x.shape[1])

            return Fn(blur, kernel=nn.Buffer(torch.full((1, 1, 2, 2), 0.25)))
        if self.how == "slice":
            return Fn(lambda own, x: x[:, :, ::2, ::2])
        if self.how == "adaptive":
            return Fn(lambda own, x: F.adaptive_avg_pool2d(x, (x.shape[2] // 2, x.shape[3] // 2)))
        if self.how in ("max", "avg"):
            return nn.MaxPool2d(3, 2, 1) if self.how == "max" else nn.AvgPool2d(2)
        return nn.Upsample(scale_factor=2, mode=self.how)


@layer
class Windows(Layer):
    """A body on the tokens of every window of `size` x `size`; with `roll` the windows are shifted by one pixel."""

    body: Body
    roll: bool = False
    size: int = 2

    def build(self, shape: Shape) -> nn.Module:
        def forward(own: Any, x: Tensor) -> Tensor:
            if self.roll:
                x = x.roll((-1, -1), (2, 3))
            batch, channels, height, width = x.shape
            x = x.view(batch, channels, height // size, size, width // size, size).permute(0, 2, 4, 3, 5, 1)
            x = own.body(x.reshape(-1, size * size, channels))
            x = x.view(batch, height // size, width // size, size, size, -1).permute(0, 5, 1, 3, 2, 4)
            x = x.reshape(batch, -1, height, width)
            return x.roll((1, 1), (2, 3)) if self.roll else x

        size = self.size
        tokens = (size * size, shape[0])
        return Fn(forward, body=fitted(self.body, tokens, tokens))


@layer
class Reread(Layer):
    """A layer on a map whose numbers are read in another shape without a transpose, and back.

    `pixels` reads (channels, height, width) as (height * width, channels), `rows` as twice the channels of half the
    height, `pairs` as half the channels of twice the height, `windows` as any number of fours.
    """

    kind: str
    stored: bool = False

    def build(self, shape: Shape) -> nn.Module:
        def forward(own: Any, x: Tensor) -> Tensor:
            batch, channels, height, width = x.shape
            if self.stored:
                channels = own.channels
            if self.kind == "pixels":
                x = own.inner(x.reshape(batch, height * width, channels))
            elif self.kind == "rows":
                x = own.inner(x.reshape(batch, 2 * channels, height // 2, width))
            elif self.kind == "pairs":
                x = own.inner(x.reshape(batch, channels // 2, 2 * height, width))
            else:
                x = own.inner(x.reshape(batch, -1, 4))
            return x.reshape(batch, channels if self.stored else -1, height, width)

        channels = shape[0]
        inner = {
            "pixels": lambda: nn.Linear(channels, channels),
            "rows": lambda: nn.Conv2d(2 * channels, 2 * channels, 1),
            "pairs": lambda: nn.Conv2d(channels // 2, channels // 2, 3, padding=1),
            "windows": lambda: nn.Linear(4, 4),
        }[self.kind]()
        return Fn(forward, inner=inner, channels=channels)


@layer
class WidthBranch(Layer):
    """A body, and code that takes one of two ways by comparing numbers of channels.

    `project`, `same` and `double` compare the stored widths of input and output, `shapes` the shapes of both; `limit`
    and `expected` compare the width of the output with a number that is not used otherwise; `checked` refuses inputs
    of another width than stored.
    """

    body: Body
    kind: str
    limit: int = 4

    def build(self, shape: Shape) -> nn.Module:
        dim, inputs = at_channels(shape), width_of(shape)
        outputs = width_of(shape_after(sequence(self.body, shape), shape))
        target = (*shape[:-1], outputs) if len(shape) == 2 else (outputs, *shape[1:])

        def forward(own: Any, x: Tensor) -> Tensor:
            if self.kind == "checked" and x.shape[dim] != own.inputs:
                raise ValueError(f"expected {own.inputs} channels, got {x.shape[dim]}")
            y: Tensor = own.body(x)
            if self.kind == "project":
                return y + (own.project(x) if own.inputs != own.outputs else x)
            if self.kind == "shapes":
                return y + (x if x.shape == y.shape else own.project(x))
            if self.kind == "same":
                return y + x if own.inputs == own.outputs else y
            if self.kind == "double":
                return y if own.inputs == own.outputs else torch.cat([y, y], dim)
            if self.kind == "limit":
                return y.relu() if y.shape[dim] > own.limit else y * 0.5
            return y * 2 if y.shape[dim] == own.outputs else y

        return Fn(
            forward,
            body=fitted(self.body, shape, target),
            project=fitted((), shape, target),
            inputs=inputs,
            outputs=outputs,
            limit=self.limit,
        )


# Tokens


@layer
class Tokens(Layer):
    """A conversion of pixels to tokens."""

    def build(self, shape: Shape) -> nn.Module:
        return Fn(lambda own, x: x.flatten(2).transpose(1, 2))


@layer
class Map(Layer):
    """A conversion of tokens back to pixels."""

    height: int
    stored: bool = False

    def build(self, shape: Shape) -> nn.Module:
        def forward(own: Any, x: Tensor) -> Tensor:
            channels = own.channels if self.stored else x.shape[-1]
            return x.transpose(1, 2).reshape(x.shape[0], channels, self.height, -1)

        return Fn(forward, channels=shape[1])


@layer
class ClassToken(Layer):
    def build(self, shape: Shape) -> nn.Module:
        token = nn.Parameter(torch.zeros(1, 1, shape[1]))
        return Fn(lambda own, x: torch.cat([own.token.expand(x.shape[0], -1, -1), x], 1), token=token)


@layer
class Position(Layer):
    """A position table that is added to the tokens."""

    embedding: bool = False

    def build(self, shape: Shape) -> nn.Module:
        if self.embedding:
            return Fn(lambda own, x: x + own.table(torch.arange(x.shape[1])), table=nn.Embedding(*shape))
        return Fn(lambda own, x: x + own.table, table=nn.Parameter(torch.zeros(1, *shape)))


class _Sines(nn.Module):
    """A position embedding without weights, for maps or tokens of any size.

    Args:
        channels: of the embedding.
        kept: return the same tensor again for the same shape.
    """

    def __init__(self, channels: int, kept: bool) -> None:
        super().__init__()
        self.channels, self.kept = channels, kept
        self.known: dict[Any, Tensor] = {}

    def forward(self, shape: torch.Size, like: Tensor) -> Tensor:
        key = shape, like.dtype, like.device
        if self.kept and key in self.known:
            return self.known[key]
        places = torch.arange(math.prod(shape[2:] if len(shape) == 4 else shape[1:2]), device=like.device)
        waves = torch.arange(1, self.channels + 1, device=like.device).to(like.dtype)
        table = (places.to(like.dtype)[:, None] / waves).sin()  # (places, channels)
        table = table.T.reshape(1, self.channels, *shape[2:]) if len(shape) == 4 else table[None]
        if self.kept:
            self.known[key] = table
        return table


@layer
class FixedPosition(Layer):
    """A position embedding that is no parameter is added to a map or to tokens, or multiplied with it."""

    kind: str = "module"  # or: kept, a module that returns the same tensor again; attribute, a plain tensor
    operation: str = "add"

    def build(self, shape: Shape) -> nn.Module:
        operation = {"add": torch.add, "mul": torch.mul}[self.operation]
        channels = shape[0] if len(shape) == 3 else shape[1]
        sines = _Sines(channels, self.kind == "kept")
        if self.kind == "attribute":
            table = sines(torch.Size((1, *shape)), torch.zeros(1))
            return Fn(lambda own, x: operation(x, own.table.to(x.device, x.dtype)), table=table)
        return Fn(lambda own, x: operation(x, own.positions(x.shape, x.new_zeros(1))), positions=sines)


@layer
class SelfAttention(Layer):
    """Self-attention by `nn.MultiheadAttention`."""

    heads: int = 1
    batch_first: bool = True
    weights: bool = False

    def build(self, shape: Shape) -> nn.Module:
        def forward(own: Any, x: Tensor) -> Tensor:
            if not self.batch_first:
                x = x.transpose(0, 1)
            x = own.attention(x, x, x, need_weights=self.weights)[0]
            return x if self.batch_first else x.transpose(0, 1)

        return Fn(forward, attention=nn.MultiheadAttention(shape[1], self.heads, batch_first=self.batch_first))


@layer
class Attention(Layer):
    """Self-attention in the ways that models write it.

    Args:
        heads: number of heads.
        width: of the queries of all heads together; keys have the same, values `value_width`.
        core: fused (scaled_dot_product_attention), matmul, einsum, cosine, or channels (channels attend, not tokens).
        packed: how the output of one linear layer for queries, keys and values is divided, chunk or unbind; empty for
            three linear layers.
        numbers: widths and the scale are `stored` by the module, or taken `from_shape`.
        table: a learned bias for every head and pair of tokens.
    """

    heads: int
    width: int
    value_width: int = 0
    core: str = "fused"
    packed: str = ""
    numbers: str = "stored"
    table: bool = False

    def build(self, shape: Shape) -> nn.Module:
        return _Attention(self, *shape)


class _Attention(nn.Module):
    def __init__(self, kind: Attention, tokens: int, channels: int) -> None:
        super().__init__()
        value_width = kind.value_width or kind.width
        self.kind, self.num_heads = kind, kind.heads
        self.head_dim, self.value_dim = kind.width // kind.heads, value_width // kind.heads
        self.scale = self.head_dim**-0.5
        if kind.packed:
            self.qkv = nn.Linear(channels, 3 * kind.width)
        else:
            self.q, self.k = nn.Linear(channels, kind.width), nn.Linear(channels, kind.width)
            self.v = nn.Linear(channels, value_width)
        self.proj = nn.Linear(value_width, channels)
        if kind.table:
            self.table = nn.Parameter(torch.zeros(kind.heads, tokens, tokens))

    def heads_of(self, x: Tensor, width: int) -> Tensor:  # (batch, heads, tokens, width)
        batch, tokens, channels = x.shape
        if self.kind.numbers == "from_shape":
            width = channels // self.num_heads
        return x.reshape(batch, tokens, self.num_heads, width).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        stored = self.kind.numbers == "stored"
        if self.kind.packed == "unbind":
            qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim if stored else -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = self.qkv(x).chunk(3, -1) if self.kind.packed else (self.q(x), self.k(x), self.v(x))
            q, k = (self.heads_of(part, self.head_dim) for part in parts[:2])
            v = self.heads_of(parts[2], self.value_dim)
        x = self.core(q, k, v, self.scale if stored else q.shape[-1] ** -0.5)
        x = x.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.value_dim if stored else -1)
        return self.proj(x)

    def core(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        table = self.table if self.kind.table else None
        if self.kind.core == "fused":
            given = scale if self.kind.numbers == "stored" else None
            return F.scaled_dot_product_attention(q, k, v, table, scale=given)
        if self.kind.core == "channels":
            return ((q.transpose(2, 3) @ k * scale).softmax(-1) @ v.transpose(2, 3)).transpose(2, 3)
        if self.kind.core == "einsum":
            score = torch.einsum("bhtd,bhsd->bhts", q, k) * scale
        elif self.kind.core == "cosine":
            score = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3) * 3.0
        else:
            score = (q * scale) @ k.transpose(-2, -1)
        score = (score if table is None else score + table).softmax(-1)
        return torch.einsum("bhts,bhsd->bhtd", score, v) if self.kind.core == "einsum" else score @ v


@layer
class MapAttention(Layer):
    """Attention between pixels, with 1 x 1 convolutions."""

    heads: int
    width: int
    stored: bool = True

    def build(self, shape: Shape) -> nn.Module:
        def forward(own: Any, x: Tensor) -> Tensor:
            batch, _, height, width = x.shape
            inside = 3 * own.head_dim if self.stored else -1
            q, k, v = own.qkv(x).view(batch, self.heads, inside, height * width).chunk(3, 2)
            score = (q.transpose(2, 3) @ k * own.scale).softmax(-1)  # (batch, heads, pixels, pixels)
            return own.proj((v @ score.transpose(2, 3)).reshape(batch, -1, height, width))

        head_dim = self.width // self.heads
        return Fn(
            forward,
            qkv=nn.Conv2d(shape[0], 3 * self.width, 1),
            proj=nn.Conv2d(self.width, shape[0], 1),
            head_dim=head_dim,
            scale=head_dim**-0.5,
        )


# Ends


@layer
class MeanPool(Layer):
    """A mean over pixels or tokens."""

    module: bool = False

    def build(self, shape: Shape) -> nn.Module:
        if len(shape) == 2:
            return Fn(lambda own, x: x.mean(1))
        if self.module:
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return Fn(lambda own, x: x.mean((2, 3)))


@layer
class FirstToken(Layer):
    def build(self, shape: Shape) -> nn.Module:
        return Fn(lambda own, x: x[:, 0])


@layer
class Flatten(Layer):
    """A flattening of a map or of tokens to one vector; with `pool` a map is first pooled to `pool` x `pool`.

    Its length is found by torch, `stored` by the module, or `computed` from the shape.
    """

    pool: int = 0
    stored: bool = False
    computed: bool = False

    def build(self, shape: Shape) -> nn.Module:
        def forward(own: Any, x: Tensor) -> Tensor:
            if self.pool:
                x = F.adaptive_max_pool2d(x, self.pool)
            if self.computed:
                return x.reshape(x.shape[0], math.prod(x.shape[1:]))
            return x.reshape(x.shape[0], own.size) if self.stored else x.flatten(1)

        size = shape[0] * (self.pool**2 if self.pool else shape[1] * (shape[2] if len(shape) == 3 else 1))
        return Fn(forward, size=size)


@dataclass
class Answer:
    """A result object, as many libraries return one."""

    name: str
    logits: Tensor
    more: list[Tensor]


class Pair(NamedTuple):
    """A named tuple of outputs."""

    logits: Tensor
    more: list[Tensor]


OUTPUT_KINDS: dict[str, Callable[[list[Tensor]], Any]] = {
    "tuple": tuple,
    "dict": lambda found: {"out": found[0], "more": found[1] if len(found) == 2 else found[1:]},
    "nested": lambda found: {"out": found[0], "more": found[1:]},
    "dataclass": lambda found: Answer("answer", found[0], found[1:]),
    "object": lambda found: SimpleNamespace(logits=found[0], more=SimpleNamespace(rest=found[1:])),
    "named tuple": lambda found: Pair(found[0], found[1:]),
    "arrays": lambda found: [one.detach().numpy() for one in found],
    "lists": lambda found: {"out": found[0].tolist(), "more": found[1:]},
    "labels alone": lambda found: {"label": found[0].argmax(1), "more": found[1:]},
    "labels": lambda found: {"logits": found[0], "label": found[0].argmax(1), "more": found[1:]},
}


@layer
class Outputs(Layer):
    """One or several outputs in a container or an object, a key of OUTPUT_KINDS; an empty body returns its input."""

    bodies: tuple[Body, ...]
    kind: str = "tuple"

    def build(self, shape: Shape) -> nn.Module:
        bodies = nn.ModuleList(sequence(body, shape) for body in self.bodies)
        return Fn(lambda own, x: OUTPUT_KINDS[self.kind]([body(x) for body in own.bodies]), bodies=bodies)


# Drawing descriptions

MORE = (False, True, True)


@dataclass(frozen=True)
class Choose:
    """The source of every random choice, and the traits to choose from."""

    pick: Callable[[Sequence[Any]], Any]  # picks one option; the first is the simplest
    traits: Sequence[str]

    def __call__(self, options: Sequence[Any]) -> Any:
        return self.pick(options)

    def trait(self, name: str, options: Sequence[Any]) -> Any:
        """Pick one option if networks may have a trait; else return the first without a random choice."""
        return self.pick(options) if name in self.traits else options[0]


def networks(traits: Sequence[str] = TRAITS) -> st.SearchStrategy[Network]:
    """Make the hypothesis strategy of random networks; they shrink to few, simple layers."""

    @st.composite
    def drawn(draw: st.DrawFn) -> Network:
        return draw_network(Choose(lambda options: options[draw(st.sampled_from(range(len(options))))], traits))

    return drawn()


def network_of_seed(seed: int, traits: Sequence[str] = TRAITS) -> Network:
    """Draw the random network of a seed."""
    return draw_network(Choose(Random(seed).choice, traits))


def draw_network(choose: Choose) -> Network:
    """Draw a network; `choose` makes every random choice."""
    size = choose((8, 4, 6))
    layers: list[Layer] = []
    shape: Shape = (3, size, size)

    def add(more: Body) -> None:
        nonlocal shape
        shape = shape_after(sequence(more, shape), shape)
        layers.extend(more)

    with torch.random.fork_rng(devices=[]):
        add(_conv_block(choose, shape, is_stem=True))
        for _ in range(6):
            if not choose(MORE):
                break
            add(_map_layers(choose, shape, 0))
        if choose((False, False, True)):
            add(_into_tokens(choose, shape))
            for _ in range(3):
                if not choose(MORE):
                    break
                add(_token_layers(choose, shape, 0))
            if ClassToken() not in layers and choose((False, False, True)):
                add((Map(int(shape[0] ** 0.5), stored=choose((False, True))),))
                for _ in range(2):
                    if choose(MORE):
                        add(_map_layers(choose, shape, 0))
        add(_end(choose, shape))
    patch = choose.trait("patched", ("",) * 4 * len(PATCHES) + tuple(PATCHES))
    wrapper = choose.trait("wrapped", ("",) * 4 * len(WRAPPERS) + tuple(WRAPPERS))
    return Network((3, size, size), tuple(layers), patch, wrapper)


def _divisors(number: int, most: int = 12) -> list[int]:
    return [d for d in range(2, min(number, most) + 1) if number % d == 0]


def _width(choose: Choose) -> int:
    return choose((4, 2, 3, 5, 6, 8, 8, 10, 12))


def _body(choose: Choose, shape: Shape, depth: int, least: int = 1) -> Body:
    """Draw a few layers that keep maps maps, tokens tokens and vectors vectors."""
    kinds = {3: _map_layers, 2: _token_layers, 1: _vector_layers}
    body: Body = ()
    for number in range(3):
        if number >= least and not choose(MORE):
            break
        more = kinds[len(shape)](choose, shape, depth + 1)
        body, shape = body + more, shape_after(sequence(more, shape), shape)
    return body


def _one_of(choose: Choose, offers: Sequence[tuple[int, bool, Callable[[], Body]]]) -> Body:
    """Draw one of the offers that fit; each is (weight, fits, function that makes the layers)."""
    return choose([make for weight, fits, make in offers if fits for _ in range(weight)])()


def _act(choose: Choose) -> Act:
    return Act(choose(("relu", "silu", "gelu", "hardswish", "prelu", "leaky", "one_prelu", "sigmoid", "softplus")))


def _conv_block(choose: Choose, shape: Shape, is_stem: bool = False) -> Body:
    """Draw a convolution, often with a norm and an activation."""
    channels, size, _ = shape
    stride = choose((1, 1, 2)) if size >= 4 else 1
    kernel, bias = choose((3, 1, 2)) if stride == 2 else choose((3, 1)), choose((False, True))
    conv: Layer = Conv(_width(choose), kernel, stride, bias=bias)
    kind = "plain" if is_stem else choose(("plain", "plain", "depthwise", "grouped", "grouped"))
    if kind == "depthwise":
        conv = Depthwise(choose((1, 1, 2)) if channels <= 12 else 1, stride, bias)
    elif kind == "grouped" and _divisors(channels):
        groups = choose(_divisors(channels))
        conv = Conv(groups * choose(range(1, max(1, 12 // groups) + 1)), kernel, stride, groups, bias)
    block: Body = (conv,)
    if choose((False, True, True)):
        block += _norm(choose, shape_after(sequence(block, shape), shape))
    if choose((False, True, True)):
        block += (choose((_act(choose), Act("relu6_"), Act("hardswish_"))),)
    return block


def _norm(choose: Choose, shape: Shape) -> Body:
    channels = width_of(shape)
    if len(shape) == 2:
        return choose([(LayerNorm(s),) for s in ("module", "stored", "from_shape", "by_hand")] + [(RMSNorm(),)])
    if len(shape) == 1:
        return choose(((BatchNorm(),), (LayerNorm(),)))
    return _one_of(
        choose,
        [
            (8, True, lambda: (BatchNorm(),)),
            (3, True, lambda: (LayerNorm(choose(("module", "stored", "from_shape", "by_hand", "whole"))),)),
            (2, True, lambda: (GroupNorm(choose([1, *_divisors(channels)])),)),
            (2, shape[1] > 1, lambda: (InstanceNorm(choose((True, False)), choose((False, True))),)),
            (1, True, lambda: (choose((RMSNorm(), UnitLength(), ResponseNorm(), LocalNorm())),)),
        ],
    )


def _bodies(choose: Choose, shapes: Sequence[Shape], depth: int) -> tuple[Body, ...]:
    return tuple(_body(choose, shape, depth, least=0) for shape in shapes)


def _map_layers(choose: Choose, shape: Shape, depth: int) -> Body:
    channels, size, _ = shape
    nests, even, grows = depth < 2, channels % 2 == 0, channels <= 16

    def body(least: int = 1) -> Body:
        return _body(choose, shape, depth, least)

    def split() -> Body:
        how = choose(("chunk", "sizes", "slice", "half", "strided"))
        parts = [p for p in (2, 3, 4) if channels % p == 0] if how == "chunk" else [2]
        if not parts or (how in ("half", "strided") and not even):
            how = "slice"
        sizes: tuple[int, ...] = ()
        if how in ("sizes", "slice"):
            first = choose(range(1, channels))
            sizes = (first, channels - first)
        halves = sizes or (channels // (number := choose(parts)),) * number
        chained = len(set(halves)) == 1 and choose((False, False, True))
        bodies = _bodies(choose, [(part, *shape[1:]) for part in halves], depth)
        return (Split(bodies, how, sizes, chained),)

    def transposed() -> Body:
        groups = choose([1, 1, *_divisors(channels)])
        out = _width(choose) if groups == 1 else groups * choose((1, 2) if groups <= 6 else (1,))
        return (Transposed(out, groups, choose((False, True))),)

    def smaller() -> Body:
        return (Resize(choose(("max", "avg", "slice", "blur", *choose.trait("reshapes", ((), ("adaptive",)))))),)

    def resized() -> Body:
        return (Resize(choose(("nearest", "bilinear"))),)

    def attention() -> Body:
        heads = choose((1, 2))
        return (Residual((MapAttention(heads, heads * choose((2, 4)), choose((True, False))),)),)

    def reread() -> Body:
        fits = {"pixels": True, "rows": size % 2 == 0, "pairs": even, "windows": channels * size * size % 4 == 0}
        kinds = [kind for kind, is_possible in fits.items() if is_possible]
        sizes = [number for number in (2, 3, 4) if size % number == 0]
        if nests and sizes and choose((False, False, True)):
            window = choose(sizes)
            return (Windows(_body(choose, (window * window, channels), 1), choose((False, True)), window),)
        return (Reread(choose(kinds), choose((False, True))),)

    return _one_of(
        choose,
        [
            (8, True, lambda: _conv_block(choose, shape)),
            (1, True, lambda: _norm(choose, shape)),
            (2, True, lambda: (_act(choose),)),
            (6, nests, lambda: (Residual(body()),)),
            (2, nests and grows, lambda: (Dense(body()),)),
            (2, nests and grows, lambda: (Branches(_bodies(choose, [shape] * choose((2, 3)), depth)),)),
            (1, nests, lambda: (Branches((body(), body(0)), choose(("add", "mul", "max", "stack"))),)),
            (2, nests and channels > 1, split),
            (2, True, lambda: (SqueezeExcite(_width(choose), choose(("conv", "linear"))),)),
            (1, even and channels > 2, lambda: (Glu(choose(("glu", "chunk", "product"))),)),
            (1, depth < 1, lambda: (AlongChannels(choose(("eca", "pixel", "softmax"))),)),
            (1, True, lambda: (SelectKernel(_width(choose), _width(choose), choose((False, True))),)),
            (
                1,
                bool(_divisors(channels)),
                lambda: (Shuffle(choose(_divisors(channels)), choose(("view", "stored", "module"))),),
            ),
            (1, channels % 4 == 0 and channels > 4 and size <= 8, lambda: (PixelShuffle(),)),
            (1, channels <= 4 and size % 2 == 0, lambda: (PixelUnshuffle(choose((False, True))),)),
            (1, grows, lambda: (PadChannels(choose((0, 1, 2)), choose((1, 0, 2))),)),
            (1, size >= 4 and size % 2 == 0, smaller),
            (1, size <= 4, resized),
            (1, size <= 6, transposed),
            (1, True, lambda: (Scale(choose((False, False, True))),)),
            (1, nests, lambda: (Shared(body()),)),
            (1, True, lambda: (Tied(_width(choose)),)),
            (1, True, lambda: (Linear(_width(choose)),)),
            (1, True, lambda: (choose((Conv3d(_width(choose)), StandardConv(_width(choose)), Act("dropout"))),)),
            (1, nests and size % 2 == 0, lambda: (Windows(_body(choose, (4, channels), 1), choose((False, True))),)),
            (1, True, attention),
            *_traits(choose, shape, depth),
            (3, "reshapes" in choose.traits, reread),
            (3, "positions" in choose.traits, lambda: (FixedPosition(choose(("module", "kept", "attribute"))),)),
        ],
    )


def _into_tokens(choose: Choose, shape: Shape) -> Body:
    layers: Body = ()
    if shape[1] > 4:  # patches
        layers += (Conv(choose((8, 4, 6, 12)), 2, 2, bias=True),)
    layers += (Tokens(),)
    if choose((False, True)):
        layers += (ClassToken(),)
    if (fixed := _fixed_position(choose)) is not None:
        return (*layers, fixed)
    return layers + choose(((), (Position(),), (Position(embedding=True),)))


def _fixed_position(choose: Choose) -> Layer | None:
    """Draw a position embedding without weights, one time out of three."""
    if not choose.trait("positions", (False, False, True)):
        return None
    return FixedPosition(choose(("module", "attribute", "kept")), choose(("add", "add", "mul")))


def _attention(choose: Choose, shape: Shape) -> Layer:
    channels = shape[1]
    if choose((False, False, True)):
        return SelfAttention(choose([1, *_divisors(channels, 4)]), choose((True, False)), choose((False, True)))
    heads = choose((1, 2, 3, 4))
    width = heads * choose((2, 4, 1, 3))
    packed, core = choose(("", "chunk", "unbind")), choose(("fused", "matmul", "einsum", "cosine", "channels"))
    value_width = 0 if packed or core == "channels" else heads * choose((2, 1, 3, 4))
    tabled = core != "channels" and choose((False, False, True))
    return Attention(heads, width, value_width, core, packed, choose(("stored", "from_shape")), tabled)


def _token_layers(choose: Choose, shape: Shape, depth: int) -> Body:
    channels = shape[1]
    nests, even = depth < 2, channels % 2 == 0

    def block() -> Body:
        """Draw a transformer block: attention and a two-layer MLP, each with a shortcut."""
        first: Body = (*_norm(choose, shape), _attention(choose, shape), *choose(((), (Scale(),))))
        second: Body = (*_norm(choose, shape), Linear(_width(choose)), _act(choose))
        return (Residual(first), Residual((*second, Linear(channels))))

    return _one_of(
        choose,
        [
            (2, True, lambda: (Linear(_width(choose), choose((True, False))),)),
            (2, True, lambda: _norm(choose, shape)),
            (2, True, lambda: (_act(choose),)),
            (5, nests, block),
            (3, True, lambda: (_attention(choose, shape),)),
            (2, nests, lambda: (Residual(_body(choose, shape, depth)),)),
            (1, nests and channels <= 16, lambda: (Dense(_body(choose, shape, depth)),)),
            (1, nests, lambda: (Shared(_body(choose, shape, depth)),)),
            (1, even and nests, lambda: (Split(_bodies(choose, [(shape[0], channels // 2)] * 2, depth)),)),
            (1, even and channels > 2, lambda: (Glu(choose(("glu", "chunk", "product"))),)),
            (1, True, lambda: (Scale(choose((False, False, True))),)),
            (1, True, lambda: (choose((Tied(_width(choose)), BatchNorm(), UnitLength())),)),
            (1, True, lambda: (MixTokens(choose((0, 3))),)),
            *_traits(choose, shape, depth),
        ],
    )


def _vector_layers(choose: Choose, shape: Shape, depth: int) -> Body:
    return _one_of(
        choose,
        [
            (2, True, lambda: (Linear(_width(choose)),)),
            (2, True, lambda: _norm(choose, shape)),
            (2, True, lambda: (_act(choose),)),
            (1, depth < 2, lambda: (Residual(_body(choose, shape, depth)),)),
            (1, True, lambda: (Tied(_width(choose)),)),
            *_traits(choose, shape, depth),
        ],
    )


def _traits(choose: Choose, shape: Shape, depth: int) -> list[tuple[int, bool, Callable[[], Body]]]:
    """List the offers that every kind of shape has, of layers with traits."""
    kinds = ("project", "shapes", "same", "double", "limit", "expected", "checked")

    def patched() -> Body:
        return (Patched(_body(choose, shape, depth), choose(tuple(PATCHES))),)

    def branch() -> Body:
        body = choose((_body(choose, shape, 2), (Conv(_width(choose)) if len(shape) == 3 else Linear(_width(choose)),)))
        return (WidthBranch(body, choose(kinds), choose((4, 2, 6))),)

    def residual() -> Body:
        return (Block(_body(choose, shape, depth), choose(tuple(BLOCK_FORMS))),)

    return [
        (2, depth < 2 and "patched" in choose.traits, patched),
        (3, depth < 2 and "branches" in choose.traits, branch),
        (16, depth < 2 and "blocks" in choose.traits, residual),
    ]


def _end(choose: Choose, shape: Shape, alone: bool = True) -> Body:
    """Draw the last layers, which compute class scores, and sometimes several outputs."""
    if alone and choose((False, False, False, True)):
        kind = choose(("tuple", "dict", "nested"))
        return (Outputs((_end(choose, shape, False), _end(choose, shape, False)), kind),)
    if alone and choose.trait("outputs", (False, False, True)):
        features = choose(((), ((),)))  # the input itself, an intermediate map
        return (Outputs((_end(choose, shape, False), *features), choose(tuple(OUTPUT_KINDS))),)
    computed = ((Flatten(computed=True),),) if "reshapes" in choose.traits else ()
    if len(shape) == 3:
        layers: Body = choose(
            (
                (MeanPool(),),
                (MeanPool(True),),
                (Flatten(),),
                (Flatten(stored=True),),
                (Flatten(2),),
                (Conv(CLASSES, 1),),
                *computed,
            )
        )
    else:
        layers = choose(((MeanPool(),), (FirstToken(),), (Flatten(),), (Flatten(stored=True),), (), *computed))
    shape = shape_after(sequence(layers, shape), shape)
    if len(shape) == 1 and choose((False, False, True)):
        more = _vector_layers(choose, shape, 0)
        layers, shape = layers + more, shape_after(sequence(more, shape), shape)
    return layers + ((Linear(CLASSES),) if len(shape) < 3 else ())


# The promise


@dataclass(frozen=True)
class Examined:
    """Statistics of a network that passed `examine`."""

    channels: int  # without those of the outputs
    prunable: int
    removed: float  # the share of its parameters that the plan removed
    error: float

    @property
    def share(self) -> float:
        """The share of the channels that are prunable."""
        return self.prunable / self.channels if self.channels else 1.0


def random_plan(groups: Sequence[ChannelGroup], seed: int) -> Plan:
    """Plan random channels of every prunable group; the first group loses at least one."""
    generator = Random(seed)
    prunable = [group for group in groups if group.is_prunable]
    counts = [generator.randint(1, group.width - (number == 0)) for number, group in enumerate(prunable)]
    return Plan(
        {
            group.name: tuple(sorted(generator.sample(range(group.width), kept)))
            for group, kept in zip(prunable, counts, strict=True)
        }
    )


def part_plan(groups: Sequence[ChannelGroup], divisor: int, seed: int) -> Plan:
    """Plan exactly one half (or another part) of every prunable group whose width can be divided, chosen at random."""
    generator = Random(seed)
    divided = [group for group in groups if group.is_prunable and group.width % divisor == 0]
    return Plan(
        {group.name: tuple(sorted(generator.sample(range(group.width), group.width // divisor))) for group in divided}
    )


def outputs_of(net: nn.Module, images: Tensor) -> list[Tensor]:
    """Run a network, without its wrapper and compiled code, and list what can be compared of its outputs."""
    net = unwrapped(net)
    with torch.no_grad(), calling_eagerly(net):
        return comparable_in(net(images.clone()))  # a network may change its input in place


def other_images(net: nn.Module, network: Network, seed: int) -> Tensor:
    """Make another number of images, of the first other size that the dense network takes, if any."""
    size = network.image[1]
    for height, width in ((size + 1, size + 3), (size + 4, size), (size * 2, size * 3), (size * 2, size * 2)):
        images = example_input(network, seed, 3, (height, width)).double()
        try:
            outputs = outputs_of(net, images)
        except Exception:  # any error may come up where a network depends on the size
            continue
        if all(bool(leaf.isfinite().all()) for leaf in outputs):
            return images
    return example_input(network, seed, 3).double()


def error_of(
    net: nn.Module,
    groups: Sequence[ChannelGroup],
    plan: Plan,
    inputs: Sequence[Tensor],
    name: str,
    blocks: Sequence[passdeploy.Block] = (),
) -> float:
    """Return the largest relative error of the slim network, compared with the masked one.

    Raises:
        AssertionError: an error is above the tolerance; the message says for what shape and which plan.
    """
    reference, smaller, largest = masked(net, groups, plan, blocks), slim(net, groups, plan, blocks), 0.0
    for images in inputs:
        expected, found = outputs_of(reference, images), outputs_of(smaller, images)
        assert all(bool(leaf.isfinite().all()) for leaf in expected), "the masked network is not finite"
        error = max(relative_error(a, b) for a, b in zip(expected, found, strict=True))
        shape = tuple(images.shape)
        assert error <= TOLERANCE, f"slim differs from masked by {error:.1e} at {shape}, plan {name}"
        largest = max(largest, error)
    return largest


def examine(network: Network, seed: int) -> Examined:
    """Slim a network by a random plan and by exact parts of every group, and check the results.

    Each must compute the same as the masked network, at the example size and others that the network takes. The first
    must leave the original alone, have the predicted counts, agree with its modules' size attributes, be rebuilt from
    its state dict, be copied, and be trained.

    Raises:
        AssertionError: a check failed. Any other exception is a defect, too.
    """
    net, images = build(network, seed), example_input(network, seed)
    channels = map_channels(net, images)
    plan = random_plan(channels.groups, seed)
    widths = plan.widths()

    net, images = net.double(), images.double()
    before = copy.deepcopy(net.state_dict())
    plans = {"random": plan, **{f"1/{part}": part_plan(channels.groups, part, seed) for part in (2, 4)}}
    inputs = [images, other_images(net, network, seed)]
    error = max(
        error_of(net, channels.groups, one, inputs, name) for name, one in plans.items() if one.kept or not widths
    )
    for name, tensor in net.state_dict().items():
        assert torch.equal(before[name], tensor), f"slimming changed {name} of the dense network"
    if any(word in repr(network) for word in ("patch", "Patched", "wrapper", "Outputs")):  # else it repeats the above
        verify(net, channels.groups, plan, images, tolerance=TOLERANCE)

    smaller = slim(net, channels.groups, plan)
    found = outputs_of(smaller, images)
    counted, dense = count(smaller, images), count(net, images)
    priced = Counts(channels.costs.of("params", widths), channels.costs.of("macs", widths))
    if "einsum" in repr(network):  # torch computes a sum of one term element-wise: no multiply-adds
        assert priced.params == counted.params, f"priced {priced}, counted {counted}"
        assert priced.macs >= counted.macs, f"priced {priced}, counted {counted}"
    else:
        assert priced == counted, f"priced {priced}, counted {counted}"
    assert (channels.costs.of("params"), channels.costs.of("macs")) == (dense.params, dense.macs)
    assert counted.params < dense.params or not widths, "the plan removed nothing"
    assert widths_are_true(smaller) == "", widths_are_true(smaller)

    rebuilt = unwrapped(build(network, seed + 1).double())
    state = {**smaller.state_dict(), **hidden_state(unwrapped(smaller), channels.groups)}
    resize_(rebuilt, state, size_attributes_after(channels.groups, plan))
    copied = copy.deepcopy(smaller)
    for twin, what in ((rebuilt, "the rebuilt network"), (copied, "a deep copy")):
        for a, b in zip(found, outputs_of(twin, images), strict=True):
            assert torch.equal(a, b), f"{what} is not the slim network"

    copied.train()
    optimizer = torch.optim.SGD(copied.parameters(), lr=1e-3)
    losses = [leaf.square().mean() for leaf in tensors_in(copied(images)) if leaf.requires_grad]
    if losses:  # else all outputs left torch
        sum(losses).backward()
        optimizer.step()

    inside = [group for group in channels.groups if "the model's output" not in group.reason]
    return Examined(
        channels=sum(group.width * group.span for group in inside),
        prunable=sum(group.width * group.span for group in inside if group.is_prunable),
        removed=1 - counted.params / dense.params if dense.params else 0.0,
        error=error,
    )


@dataclass(frozen=True)
class ExaminedBlocks:
    """Statistics of a network that passed `examine_blocks`."""

    blocks: int
    prunable: int
    substitutes: tuple[str, ...]  # of the modules that go
    error: float


def examine_blocks(network: Network, seed: int) -> ExaminedBlocks:
    """Leave out each block of a network alone, then random ones with channels, and check the results.

    Each must compute the same as the masked network, at the example size and others that the network takes. The last
    one must have the predicted counts, be rebuilt from its state dict, and be trained.

    Raises:
        AssertionError: a check failed. Any other exception is a defect, too.
    """
    net, images = build(network, seed), example_input(network, seed)
    channels = map_channels(net, images, with_blocks=True)
    groups, blocks, draw = channels.groups, channels.blocks, Random(seed)
    names = [block.name for block in blocks if block.is_prunable]
    kept = random_plan(groups, seed).kept if channels.prunable else {}
    plan = Plan(kept, tuple(name for name in names if draw.random() < 0.5) or tuple(names[:1]))

    net, images = net.double(), images.double()
    inputs = [images, other_images(net, network, seed)]
    plans = {**{name: Plan({}, (name,)) for name in names}, "random": plan, "all": Plan({}, tuple(names))}
    error = max(error_of(net, groups, one, inputs, name, blocks) for name, one in plans.items())
    verify(net, groups, plan, images, tolerance=TOLERANCE, blocks=blocks)

    smaller = slim(net, groups, plan, blocks)
    found, counted = outputs_of(smaller, images), count(smaller, images)
    priced = [channels.costs.of(kind, plan.widths()) for kind in ("params", "macs")]
    assert priced[0] == counted.params, f"priced {priced}, counted {counted}"
    assert priced[1] == counted.macs or "einsum" in repr(network), f"priced {priced}, counted {counted}"
    rebuilt = unwrapped(build(network, seed + 1).double())
    sizes = size_attributes_after(groups, plan, blocks)
    resize_(rebuilt, smaller.state_dict(), sizes, replacements_of(blocks, plan.skipped))
    for a, b in zip(found, outputs_of(rebuilt, images), strict=True):
        assert torch.equal(a, b), "the rebuilt network is not the slim network"
    unwrapped(smaller).train()(images)
    gone = [one.by for block in blocks for one in block.replacements if block.is_prunable]
    return ExaminedBlocks(len(blocks), len(names), tuple(gone), error)


def widths_are_true(net: nn.Module) -> str:
    """Describe the first module whose size attributes differ from its weights' shape; empty if there is none."""
    for name, module in net.named_modules():
        weight = getattr(module, "weight", None)
        told: Any = None
        actual: Any = None
        if isinstance(module, nn.modules.conv._ConvNd):
            rows, columns = weight.shape[:2]
            told = (module.in_channels, module.out_channels)
            actual = (rows, columns * module.groups) if module.transposed else (columns * module.groups, rows)
        elif isinstance(module, nn.Linear):
            told, actual = (module.out_features, module.in_features), tuple(weight.shape)
        elif isinstance(module, nn.modules.batchnorm._NormBase) and weight is not None:
            told, actual = module.num_features, len(weight)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            told, actual = tuple(module.normalized_shape), tuple(weight.shape)
        elif isinstance(module, nn.GroupNorm):
            told, actual = module.num_channels, len(weight)
        elif isinstance(module, nn.MultiheadAttention):
            told, actual = module.embed_dim, module.in_proj_weight.size(1)
        if told != actual:
            return f"{name} ({type(module).__name__}) says {told} and has {actual}"
    return ""


# Shrinking


def shrink(network: Network, fails: Callable[[Network], bool], tries: int = 500) -> Network:
    """Search for a smaller network that still fails, in at most `tries` tries."""
    while tries > 0:
        for simpler in _simpler_networks(network):
            tries -= 1
            if _fits_together(simpler) and fails(simpler):
                network = simpler
                break
            if not tries:
                break
        else:
            break  # no simpler network fails
    return network


def _fits_together(network: Network) -> bool:
    """Test whether the layers fit together; a layer may have lost another that it needs before it."""
    try:
        shape_after(unwrapped(network.build()), network.image)
    except Exception:  # any error may come up where a layer for tokens gets a map
        return False
    return True


def _simpler_networks(network: Network) -> Iterator[Network]:
    for trait in ("wrapper", "patch"):
        if getattr(network, trait):
            yield replace(network, **{trait: ""})
    for layers in _simpler_bodies(network.layers):
        yield replace(network, layers=layers)


def _simpler_bodies(body: Body) -> Iterator[Body]:
    size = len(body)
    while size:  # many layers at once, then one by one
        for start in range(0, len(body), size):
            yield body[:start] + body[start + size :]
        size //= 2
    for number, one in enumerate(body):
        before, after = body[:number], body[number + 1 :]
        for inner in [getattr(one, "body", ()), *getattr(one, "bodies", ())]:
            if inner:
                yield before + inner + after
        for simpler in _simpler_layers(one):
            yield (*before, simpler, *after)


def _simpler_layers(one: Layer) -> Iterator[Layer]:
    for field in fields(one):  # type: ignore[arg-type]
        value = getattr(one, field.name)
        if field.name == "body":
            for simpler in _simpler_bodies(value):
                yield replace(one, body=simpler)  # type: ignore[type-var]
        elif field.name == "bodies":
            for number, inner in enumerate(value):
                for simpler in _simpler_bodies(inner):
                    yield replace(one, bodies=(*value[:number], simpler, *value[number + 1 :]))  # type: ignore[type-var]
        elif field.default is not MISSING and value != field.default and field.name != "sizes":
            yield replace(one, **{field.name: field.default})  # type: ignore[type-var]
        elif field.name in ("out", "reduced", "width") and value > 2:
            yield replace(one, **{field.name: value - 1 if value <= 4 else value // 2})  # type: ignore[type-var]
