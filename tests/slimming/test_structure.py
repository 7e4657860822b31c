"""What `structure_fault` finds in a slim network: missing modules, shared memory, and sizes that layers state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from passdeploy.channels.plan import Plan
from passdeploy.slimming.size_attributes import update_size_attributes_
from passdeploy.slimming.structure import storage_of, structure_fault

NOTHING = Plan({})
STATED: dict[str, tuple[nn.Module, tuple[str, ...]]] = {  # -> attributes that state the sizes of its tensors
    "convolution": (nn.Conv2d(4, 6, 3, groups=2), ("in_channels", "out_channels", "groups")),
    "transposed convolution": (nn.ConvTranspose2d(4, 6, 3, groups=2), ("in_channels", "out_channels", "groups")),
    "linear": (nn.Linear(4, 6), ("in_features", "out_features")),
    "batch norm": (nn.BatchNorm2d(6), ("num_features",)),
    "batch norm without a scale": (nn.BatchNorm1d(6, affine=False), ("num_features",)),
    "group norm": (nn.GroupNorm(2, 6), ("num_channels",)),
    "PReLU": (nn.PReLU(6), ("num_parameters",)),
    "embedding": (nn.Embedding(4, 6), ("num_embeddings", "embedding_dim")),
}


@pytest.mark.parametrize(("kind", "attribute"), [(kind, name) for kind, (_, names) in STATED.items() for name in names])
def test_a_layer_that_states_another_size_is_a_fault(kind: str, attribute: str):
    layer = STATED[kind][0]
    other = copy.deepcopy(layer)
    assert structure_fault(layer, other, (), NOTHING) == ""
    setattr(other, attribute, 2 * getattr(layer, attribute))
    assert "states other sizes than its weight has" in structure_fault(layer, other, (), NOTHING)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_that_states_another_shape_is_a_fault(norm: type[nn.Module]):
    layer, other = norm((3, 4)), norm((3, 4))
    assert structure_fault(layer, other, (), NOTHING) == ""
    other.normalized_shape = (3, 5)
    assert "states other sizes" in structure_fault(layer, other, (), NOTHING)


CUT: dict[str, tuple[nn.Module, nn.Module]] = {  # -> a layer before, and one as it is to be after a cut
    "convolution": (nn.Conv2d(4, 6, 3), nn.Conv2d(3, 2, 3)),
    "depthwise convolution": (nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(3, 6, 3, groups=3)),
    "convolution of two narrower groups": (nn.Conv2d(12, 8, 3, groups=2), nn.Conv2d(10, 6, 3, groups=2)),
    "transposed convolution": (nn.ConvTranspose2d(4, 6, 3), nn.ConvTranspose2d(3, 2, 3)),
    "transposed depthwise convolution": (nn.ConvTranspose2d(4, 8, 3, groups=4), nn.ConvTranspose2d(3, 6, 3, groups=3)),
    "linear": (nn.Linear(4, 6), nn.Linear(3, 5)),
    "batch norm": (nn.BatchNorm2d(6), nn.BatchNorm2d(5)),
    "batch norm without a scale": (nn.BatchNorm1d(6, affine=False), nn.BatchNorm1d(5, affine=False)),
    "layer norm": (nn.LayerNorm((3, 4)), nn.LayerNorm((3, 2))),
    "RMS norm": (nn.RMSNorm(4), nn.RMSNorm(3)),
    "group norm of whole groups": (nn.GroupNorm(6, 12), nn.GroupNorm(5, 10)),
    "group norm of two narrower groups": (nn.GroupNorm(2, 12), nn.GroupNorm(2, 10)),
    "PReLU": (nn.PReLU(6), nn.PReLU(5)),
    "embedding": (nn.Embedding(4, 6), nn.Embedding(4, 5)),
    "LSTM": (nn.LSTM(4, 6, 2), nn.LSTM(3, 5, 2)),
    "GRU": (nn.GRU(4, 6), nn.GRU(3, 5)),
    "RNN": (nn.RNN(4, 6), nn.RNN(3, 5)),
}


@pytest.mark.parametrize("kind", CUT)
def test_sizes_are_read_from_the_tensors_of_a_file(kind: str):
    layer, cut = CUT[kind]
    layer = copy.deepcopy(layer)
    layer._parameters.update(copy.deepcopy(cut)._parameters)
    layer._buffers.update(copy.deepcopy(cut)._buffers)
    update_size_attributes_(layer, lambda _: None)  # which channels were removed is not known
    assert layer.extra_repr() == cut.extra_repr()


def test_a_module_that_is_missing_is_a_fault():
    whole, other = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Sequential(nn.Linear(2, 3))
    other.load_state_dict(whole.state_dict())
    assert structure_fault(whole, other, (), NOTHING) == "module 1 is missing"


def test_memory_that_is_shared_is_a_fault():
    whole = nn.Linear(2, 3)
    other = copy.deepcopy(whole)
    other.bias = nn.Parameter(whole.bias.detach())
    assert structure_fault(whole, other, (), NOTHING) == "bias shares memory with the dense network"


def test_tensors_without_memory_are_compared_by_what_they_have():
    whole = nn.Linear(2, 3, device="meta")
    whole.register_buffer("pairs", torch.eye(3).to_sparse())
    assert storage_of(whole.pairs) == 0
    other = copy.deepcopy(whole)
    assert structure_fault(whole, other, (), NOTHING) == ""
    other.pairs = torch.eye(4).to_sparse()
    assert structure_fault(whole, other, (), NOTHING) == "pairs has the shape (4, 4) and should have (3, 3)"
    other.pairs = torch.eye(3)
    assert structure_fault(whole, other, (), NOTHING) == "pairs has another dtype, device or layout than before"
