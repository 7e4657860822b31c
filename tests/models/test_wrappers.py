"""Every form in which a network may come, with what happens: followed and cut as it is, unwrapped, or refused."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

import passdeploy as pd
from passdeploy.errors import EquivalenceError, ModelError, PassDeployError
from passdeploy.slimming.size_attributes import size_attributes_after
from passdeploy.slimming.slim import resize_

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x).relu()).relu().mean((2, 3)))


def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


def halves(groups: tuple[pd.ChannelGroup, ...]) -> pd.Plan:
    return pd.Plan({group.name: tuple(range(1, group.width, 2)) for group in groups if group.is_prunable})


def patched(forward: Callable[[Small], Any], name: str = "") -> Small:
    """The network with another `forward` on the instance."""
    net = small()
    module = net.get_submodule(name)
    module.forward = forward(net)  # type: ignore[method-assign]
    return net


def hooked(hook: Callable[[Small], Any], *, pre: bool = False) -> Small:
    net = small()
    register = net.body.register_forward_pre_hook if pre else net.body.register_forward_hook
    register(hook(net))
    return net


def compiled_in_place(name: str = "") -> Small:
    net = small()
    net.get_submodule(name).compile(backend="eager")
    return net


def doubled(module: nn.Module, x: Tensor) -> Tensor:
    return 2 * type(module).forward(module, x)


def plain_forward(net: Small) -> Any:
    """A function that closes over the network."""
    return lambda x: net.head(net.body(net.stem(x).relu()).relu().mean((2, 3)))


def wrapped_forward(net: Small) -> Any:
    old = net.forward

    def forward(x: Tensor) -> Tensor:
        return 3 * old(x)

    return forward


def closing_over_a_layer(net: Small) -> Any:
    stem = net.stem
    return lambda x: F.conv2d(x, stem.weight, stem.bias)


def closing_over_a_tensor(net: Small) -> Any:
    weight, bias = net.stem.weight, net.stem.bias
    return lambda x: F.conv2d(x, weight, bias)


def with_defaults() -> Small:
    """A `forward` with defaults, beside a cell that holds a number."""
    net, factor = small(), 3.0

    def forward(x: Tensor, scale: float = 2.0, *, shift: float = 0.5) -> Tensor:
        return net.head(net.body(net.stem(x).relu() * scale + shift).relu().mean((2, 3)) * factor)

    net.forward = forward  # type: ignore[method-assign]
    return net


def with_a_keyword() -> Small:
    """A partial with a keyword, of a function that closes over a layer."""
    net = small()
    stem = net.stem

    def scaled(x: Tensor, factor: float = 1.0) -> Tensor:
        return F.conv2d(x, stem.weight, stem.bias) * factor

    stem.forward = partial(scaled, factor=0.3)  # type: ignore[method-assign]
    return net


class Looking(Small):
    """A network that reaches its own layer through a weak reference."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "own", weakref.ref(self))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.own().stem(x).relu()).relu().mean((2, 3)))


def looking_at_itself() -> Small:
    torch.manual_seed(0)
    return Looking().eval()


class Clamped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(-1, 1)


def parametrized() -> Small:
    net = small()
    parametrize.register_parametrization(net.stem, "bias", Clamped())
    return net


def keeping_an_unregistered_parent() -> Small:
    net = small()
    object.__setattr__(net.stem, "parent", net)
    return net


def with_act(act: Callable[[Small], Any]) -> Small:
    class Acting(Small):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.body(self.stem(x).relu())).mean((2, 3)))

    torch.manual_seed(0)
    net = Acting().eval()
    net.act = act(net)
    return net


def lazy_run_once() -> nn.Module:
    net = nn.Sequential(nn.LazyConv2d(16, 3), nn.ReLU(), nn.Conv2d(16, 5, 3)).eval()
    net(IMAGES)
    return net


def feature_extractor() -> nn.Module:
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(small(), {"body": "out"})


CARRIED = {
    "a plain network": small,
    "nn.Module.compile on the root": compiled_in_place,
    "nn.Module.compile on a child": partial(compiled_in_place, "stem"),
    "forward replaced by a function that closes over the network": lambda: patched(plain_forward),
    "forward replaced by a wrapper around the old one": lambda: patched(wrapped_forward),
    "forward of a child that closes over the child": lambda: patched(closing_over_a_layer, "stem"),
    "forward of a child that closes over its tensors": lambda: patched(closing_over_a_tensor, "stem"),
    "forward replaced by a bound method": lambda: patched(lambda net: types.MethodType(doubled, net.stem), "stem"),
    "forward replaced by a bound method that closes over a layer": lambda: patched(
        lambda net: types.MethodType(lambda self, x: F.conv2d(x, self.stem.weight, net.stem.bias).mul(2), net), "stem"
    ),
    "forward replaced by a partial": lambda: patched(lambda net: partial(doubled, net.stem), "stem"),
    "forward replaced by a partial that names what it wraps": lambda: patched(
        lambda net: update_wrapper(partial(doubled, net.stem), net.stem.forward), "stem"
    ),
    "forward replaced by a function with defaults": with_defaults,
    "forward replaced by a partial with a keyword": with_a_keyword,
    "a weak reference to the network": looking_at_itself,
    "a forward hook": lambda: hooked(lambda net: lambda module, inputs, output: output * 2),
    "a forward hook that closes over a layer": lambda: hooked(lambda net: lambda m, i, o: o + net.stem(IMAGES).mean()),
    "a forward hook that is a method": lambda: hooked(lambda net: types.MethodType(lambda self, m, i, o: o * 2, net)),
    "a forward pre-hook": lambda: hooked(lambda net: lambda module, inputs: (inputs[0] * 2,), pre=True),
    "a parametrisation": parametrized,
    "an attribute that is a function of the network": lambda: with_act(lambda net: lambda x: x + net.body.bias.sum()),
    "an attribute that is a plain function": lambda: with_act(lambda net: F.relu),
    "a reference to the parent": keeping_an_unregistered_parent,
    "a lazy layer that has run": lazy_run_once,
    "a graph module": lambda: torch.fx.symbolic_trace(small()),
    "a feature extractor": feature_extractor,
    "new weight norm": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 5, 3)
    ).eval(),
    "spectral norm": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 5, 3)
    ).eval(),
    "masks of torch.nn.utils.prune": lambda: nn.Sequential(
        prune.l1_unstructured(nn.Conv2d(3, 8, 3), "weight", amount=0.5), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 5, 3)
    ).eval(),
}
UNWRAPPED = {
    "torch.compile": lambda: torch.compile(small(), backend="eager"),
    "DataParallel": lambda: nn.DataParallel(small()),
    "an averaged model": lambda: AveragedModel(small()).eval(),
    "torch.compile of DataParallel": lambda: torch.compile(nn.DataParallel(small()), backend="eager"),
}
HOLDER = types.SimpleNamespace()
GLOBAL: Any = None


def reaching_a_global() -> Small:
    global GLOBAL
    GLOBAL = small()
    GLOBAL.stem.forward = lambda x: F.conv2d(x, GLOBAL.stem.weight, GLOBAL.stem.bias)
    return GLOBAL


def reaching_through_a_list() -> Small:
    net = small()
    layers = [net.stem]
    net.stem.forward = lambda x: F.conv2d(x, layers[0].weight, layers[0].bias)  # type: ignore[method-assign]
    return net


def reaching_through_an_object() -> Small:
    net = small()
    trainer = types.SimpleNamespace(model=net)
    net.body.register_forward_hook(lambda module, inputs, output: output + trainer.model.stem.bias.sum())
    return net


def reaching_through_a_default() -> Small:
    net = small()
    net.stem.forward = lambda x, stem=net.stem: F.conv2d(x, stem.weight, stem.bias)  # type: ignore[method-assign]
    return net


def reaching_through_a_weak_reference() -> Small:
    net = small()
    stem = weakref.ref(net.stem)
    net.stem.forward = lambda x: F.conv2d(x, stem().weight, stem().bias)  # type: ignore[method-assign, union-attr]
    return net


def sharded() -> Small:
    net = small()
    net.body.__class__ = type("FullyShardedDataParallel", (nn.Conv2d,), {})  # a process group is needed for a real one
    return net


def with_child(child: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(child(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 5, 3)).eval()


@pytest.fixture
def no_deprecations(recwarn: pytest.WarningsRecorder) -> None:
    import warnings

    warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "TorchScript": (lambda: torch.jit.script(small()), "is TorchScript"),
    "a trace of TorchScript": (lambda: torch.jit.trace(small(), IMAGES), "is TorchScript"),
    "a scripted child": (lambda: with_child(torch.jit.script), "'0' of the network is TorchScript"),
    "a compiled child": (
        lambda: with_child(lambda layer: torch.compile(layer, backend="eager")),
        r"'0' of the network is wrapped in OptimizedModule.*\n.*0\._orig_mod",
    ),
    "DataParallel inside": (lambda: with_child(nn.DataParallel), r"wrapped in DataParallel.*\n.*0\.module"),
    "a lazy layer": (lambda: nn.Sequential(nn.LazyConv2d(8, 3)).eval(), "0.weight has no size yet"),
    "sharded parameters": (sharded, "sharded over processes"),
    "a function that reaches the network through a global variable": (reaching_a_global, "global variable 'GLOBAL'"),
    "a function that reaches it through a list": (reaching_through_a_list, "an object of list"),
    "a hook that reaches it through an object": (reaching_through_an_object, "an object of SimpleNamespace"),
    "a function that reaches it through a default": (reaching_through_a_default, "the default of an argument"),
    "a function with a weak reference": (reaching_through_a_weak_reference, "an object of ReferenceType"),
}


@pytest.mark.parametrize("make", CARRIED.values(), ids=CARRIED)
def test_what_an_instance_carries_is_carried_over(make: Callable[[], nn.Module], no_deprecations: None):
    net = make()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    groups = pd.find_groups(net, IMAGES)
    plan = halves(groups)
    assert plan.kept, "nothing can be cut"
    assert pd.verify(net, groups, plan, IMAGES, tolerance=1e-5) <= 1e-5
    smaller = pd.slim(net, groups, plan)
    with torch.no_grad():
        whole, cut = (torch.cat([*leaves_of(network(IMAGES))]) for network in (net, smaller))
    assert not torch.allclose(whole, cut), "the slim network runs the dense one"
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in net.parameters())
    with torch.no_grad():
        copied = torch.cat([*leaves_of(pd.slim(net, groups, pd.Plan({}))(IMAGES))])
    assert torch.allclose(whole, copied, atol=1e-6), "a copy without any cut computes something else"
    assert [module.training for module in smaller.modules()] == [module.training for module in net.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    smaller.train()(IMAGES)
    smaller.eval()(IMAGES)


def leaves_of(outputs: Any) -> list[Tensor]:
    return [leaf.flatten() for leaf in torch.utils._pytree.tree_leaves(outputs)]


@pytest.mark.parametrize(
    "forward", [plain_forward, closing_over_a_layer, closing_over_a_tensor], ids=lambda forward: forward.__name__
)
def test_a_rebuilt_network_computes_with_the_tensors_it_was_given(forward: Callable[[Small], Any]):
    name = "" if forward is plain_forward else "stem"
    net = patched(forward, name)
    groups = pd.find_groups(net, IMAGES)
    plan = halves(groups)
    smaller, rebuilt = pd.slim(net, groups, plan), patched(forward, name)
    with torch.no_grad():
        rebuilt.stem.weight.zero_()
        resize_(rebuilt, smaller.state_dict(), size_attributes_after(groups, plan))
        assert torch.equal(rebuilt(IMAGES), smaller(IMAGES))


@pytest.mark.parametrize("make", UNWRAPPED.values(), ids=UNWRAPPED)
def test_a_wrapper_is_taken_off(make: Callable[[], nn.Module]):
    net = make()
    groups = pd.find_groups(net, IMAGES)
    assert [group.name for group in groups] == ["stem", "body", "head"]
    plan = halves(groups)
    assert pd.verify(net, groups, plan, IMAGES, tolerance=1e-5) <= 1e-5
    for smaller in (pd.slim(net, groups, plan), pd.slim(small(), groups, plan)):
        assert type(smaller) is Small
        assert smaller.stem.out_channels == 8
    assert pd.count(net, IMAGES) == pd.count(small(), IMAGES)
    assert type(pd.masked(net, groups, plan)) is Small


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_copied_is_refused(make: Callable[[], nn.Module], words: str, no_deprecations: None):
    net = make()
    with pytest.raises(ModelError, match=words) as refused:
        pd.find_groups(net, IMAGES)
    assert str(refused.value).count("\n") < 3
    if words != "0.weight has no size yet":
        with pytest.raises(PassDeployError):
            pd.slim(net, (), pd.Plan({}))


def test_a_network_that_reads_the_original_in_its_own_code_is_found_by_verify():
    """No attribute tells: the class itself looks its layer up in a table outside."""
    table: dict[str, nn.Module] = {}

    class Looking(Small):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(table["stem"](x).relu()).relu().mean((2, 3)))

    torch.manual_seed(0)
    net = Looking().eval()
    table["stem"] = net.stem
    groups = pd.find_groups(net, IMAGES)
    with pytest.raises(EquivalenceError, match=r"computes with stem\.weight of the original"):
        pd.verify(net, groups, pd.Plan({"body": (0, 1, 2)}), IMAGES, tolerance=1e-5)


def test_hooks_that_collect_go_on_collecting_for_the_original_only_where_they_are_its_own():
    net, seen = small(), list[tuple[int, ...]]()
    net.body.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    groups = pd.find_groups(net, IMAGES)
    seen.clear()
    pd.slim(net, groups, pd.Plan({"body": (0, 1, 2)}))(IMAGES)
    assert seen == [(2, 3, 4, 4)]  # a list outside of the network is shared, as copy.deepcopy shares it
