"""Copies of networks: they share nothing with the original but the tensors that were asked for."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from passdeploy.channels.plan import Plan
from passdeploy.errors import ModelError
from passdeploy.grouping.find import map_channels
from passdeploy.models.cloning import ModelCloner, clone
from passdeploy.models.modes import evaluating
from passdeploy.slimming.masked import masked
from passdeploy.slimming.slim import slim


class Tied(nn.Module):
    """A network with a shared module and a shared parameter, a list, a plain tensor and a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.sizes = [4, 4]
        self.table = torch.arange(4)
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self.first.register_forward_hook(lambda *_: None)


class Counted(nn.Linear):
    """A layer with its own `__deepcopy__`, which counts its calls."""

    copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Counted:
        Counted.copies += 1
        copied = Counted(self.in_features, self.out_features)
        copied.load_state_dict(self.state_dict())
        return copied


def test_what_is_shared_stays_shared_and_nothing_else_is():
    net = Tied()
    copied = clone(net, lambda _, tensor: nn.Parameter(tensor + 1) if isinstance(tensor, nn.Parameter) else tensor)
    assert copied.again is copied.first is not net.first
    assert copied.second.weight is copied.first.weight is not net.first.weight
    assert torch.equal(copied.first.weight, net.first.weight + 1)
    assert copied.count is net.count  # as it was told
    assert copied.sizes == net.sizes
    assert copied.sizes is not net.sizes
    assert copied.table is not net.table
    assert torch.equal(copied.table, net.table)
    assert copied.first._forward_hooks.keys() == net.first._forward_hooks.keys()
    copied.first.register_forward_hook(lambda *_: None)
    assert len(net.first._forward_hooks) == 1


def test_the_modules_of_torch_are_copied_as_deepcopy_does():
    nets = [
        get_model("mobilenet_v3_small", weights=None),
        nn.MultiheadAttention(8, 2),
        nn.LSTM(3, 4, bidirectional=True),
    ]
    for net in nets:
        copied = clone(net, lambda _, tensor: copy.deepcopy(tensor))
        assert str(copied) == str(copy.deepcopy(net))
        assert [type(module) for module in copied.modules()] == [type(module) for module in net.modules()]
        for name, value in net.state_dict().items():
            assert torch.equal(copied.state_dict()[name], value)
        ours = {id(module) for module in net.modules()} | {id(tensor) for tensor in net.parameters()}
        assert not ours & {id(module) for module in copied.modules()} | ours & {id(p) for p in copied.parameters()}
        copied.train(not net.training)
        assert copied.training is not net.training


def test_a_class_that_copies_itself_does():
    before = Counted.copies
    copied = clone(nn.Sequential(Counted(2, 3)), lambda _, tensor: tensor)
    assert Counted.copies == before + 1
    assert isinstance(copied[0], Counted)


def test_a_cloned_network_computes_the_same():
    net, images = get_model("shufflenet_v2_x0_5", weights=None).eval(), torch.randn(1, 3, 64, 64)
    other: nn.Module = clone(net, lambda _, tensor: copy.deepcopy(tensor))
    with torch.no_grad():
        found: Tensor = other(images)
        assert torch.equal(net(images), found)


def test_what_is_dropped_is_gone_at_once() -> None:
    """Check that no reference cycle holds a copy, which would stay in memory until the next garbage collection."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    groups = map_channels(net, torch.zeros(1, 3, 8, 8)).groups
    plan = Plan({group.name: (0, 1) for group in groups if group.is_prunable})
    gc.collect()
    gc.disable()
    try:
        for make in (
            lambda: clone(net, lambda _, old: old),
            lambda: masked(net, groups, plan),
            lambda: slim(net, groups, plan),
        ):
            made = make()
            with evaluating(made):
                made(torch.zeros(1, 3, 8, 8))
            reference = weakref.ref(made)
            del made
            assert reference() is None
    finally:
        gc.enable()


class Remembering(nn.Module):
    """A network whose `__new__` sets an attribute, as that of segmentation_models_pytorch does."""

    def __new__(cls, *_: Any) -> Remembering:
        made = super().__new__(cls)
        vars(made)["arguments"] = []
        return made

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.arguments.append(width)


def test_a_class_with_a_new_of_its_own_is_copied_as_deepcopy_does(monkeypatch: pytest.MonkeyPatch):
    expected = copy.deepcopy(Remembering(3))
    monkeypatch.setattr(ModelCloner, "deep_copy", lambda *_: pytest.fail("copied by copy.deepcopy as a whole"))
    net = Remembering(3)
    copied = clone(net, lambda _, tensor: tensor)
    assert copied.arguments == expected.arguments == [3]
    assert copied.arguments is not net.arguments
    assert vars(copied).keys() == vars(expected).keys()


@pytest.mark.parametrize(
    "layer",
    [
        nn.AvgPool3d(2),
        nn.LogSoftmax(dim=1),
        nn.MultiheadAttention(8, 2),
        nn.Softmax(dim=1),
        nn.Softmin(dim=1),
        nn.TransformerDecoderLayer(8, 2),
        nn.TransformerEncoderLayer(8, 2),
        nn.Upsample(scale_factor=2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_only_convert_old_pickles_are_copied_quickly(layer: nn.Module, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ModelCloner, "deep_copy", lambda *_: pytest.fail("copied by copy.deepcopy as a whole"))
    net = nn.Sequential(nn.Linear(8, 8), layer)
    copied = clone(net, lambda _, tensor: tensor)
    assert type(copied[1]) is type(layer)
    expected = copy.deepcopy(layer)
    assert vars(copied[1]).keys() == vars(expected).keys()
    assert copied[1].extra_repr() == expected.extra_repr()


def test_what_cannot_be_copied_is_named():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)).eval()
    network[1].lock = threading.Lock()
    for copies in (ModelCloner(network).deep_copy, lambda: clone(network, lambda _, old: old)):
        with pytest.raises(ModelError, match=r"cannot be copied: TypeError: .*lock"):
            copies()
    with pytest.raises(ModelError, match=r"attribute 'lock' of a ReLU"):
        map_channels(network, torch.zeros(1, 3, 8, 8))


def test_features_that_a_training_step_left_behind_are_copied():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)).eval()
    network.features = {"last": [network(torch.zeros(1, 3, 8, 8))]}
    for twin in (ModelCloner(network).deep_copy(), clone(network, lambda _, old: old)):
        assert torch.equal(twin.features["last"][0], network.features["last"][0])
    assert map_channels(network, torch.zeros(1, 3, 8, 8)).prunable
