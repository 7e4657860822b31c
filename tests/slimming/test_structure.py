"""What `structure_fault` finds in a slim network: missing modules, shared memory, and sizes that layers state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from passdeploy.channels.blocks import Block, Replacement
from passdeploy.channels.groups import ChannelGroup, Slot
from passdeploy.channels.plan import Plan
from passdeploy.slimming.size_attributes import update_size_attributes_
from passdeploy.slimming.structure import structure_fault
from passdeploy.slimming.tensors import Removed, storage_of

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
    if isinstance(layer, nn.RNNBase):  # which computes with a list of its own
        assert [id(one) for one in layer._flat_weights] == [id(one) for one in layer.parameters()]


LOSING: dict[str, tuple[nn.Module, list[int], dict[str, int]]] = {  # -> what went of dimension 0, and what is left
    "a group of two": (nn.Conv2d(4, 8, 1, groups=2), [0, 1, 2, 3], {"groups": 1, "in_channels": 2, "out_channels": 4}),
    "a place in each of two groups": (
        nn.Conv2d(4, 8, 1, groups=2),
        [0, 4],
        {"groups": 2, "in_channels": 4, "out_channels": 6},
    ),
    "nothing of two groups": (nn.Conv2d(4, 8, 1, groups=2), [], {"groups": 2, "in_channels": 4, "out_channels": 8}),
    "a transposed group of two": (
        nn.ConvTranspose2d(4, 8, 1, groups=2),
        [2, 3],
        {"groups": 1, "in_channels": 2, "out_channels": 4},
    ),
    "a normalised group of two": (nn.GroupNorm(2, 4), [0, 1], {"num_groups": 1, "num_channels": 2}),
    "a place in each of two normalised groups": (nn.GroupNorm(2, 4), [1, 2], {"num_groups": 2, "num_channels": 2}),
}


@pytest.mark.parametrize("what", LOSING)
def test_which_channels_went_tells_whether_a_layer_has_fewer_groups(what: str):
    layer, gone, sizes = LOSING[what]
    layer, removed = copy.deepcopy(layer), Removed()
    removed.add(torch.arange(layer.weight.size(0))[:, None], torch.tensor(gone, dtype=torch.int64))
    stay = [index for index in range(layer.weight.size(0)) if index not in gone]
    layer.weight = nn.Parameter(layer.weight[stay])
    update_size_attributes_(layer, lambda weight: removed if weight is layer.weight else None)
    assert {name: getattr(layer, name) for name in sizes} == sizes


def test_a_module_that_is_missing_is_a_fault():
    whole, other = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Sequential(nn.Linear(2, 3))
    other.load_state_dict(whole.state_dict())
    assert structure_fault(whole, other, (), NOTHING) == "module 1 is missing"


BLOCK = Block("1", replacements=(Replacement("1", "identity"),), tensors=("1.0.weight", "1.0.bias"))
SKIPPED = Plan({}, ("1",))


def three(middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), middle, nn.Linear(2, 3))


def test_what_is_left_of_a_skipped_block_is_a_fault():
    whole = three(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    smaller = copy.deepcopy(whole)
    smaller[1] = nn.Identity()
    assert structure_fault(whole, smaller, (), SKIPPED, (BLOCK,)) == ""
    assert structure_fault(whole, smaller, (), NOTHING, (BLOCK,)).startswith("1.0.bias exists, or is shared, in one")
    smaller[1] = copy.deepcopy(whole[1])
    assert structure_fault(whole, smaller, (), SKIPPED, (BLOCK,)) == "1.0.weight is left of a block that is skipped"
    smaller[1] = nn.Sequential(nn.ReLU())
    assert structure_fault(whole, smaller, (), SKIPPED, (BLOCK,)) == "module 1.0 is left of a block that is skipped"


def test_a_fault_behind_a_skipped_block_is_found():
    whole = three(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    smaller = copy.deepcopy(whole)
    smaller[1] = nn.Identity()
    smaller[2].eval()
    assert structure_fault(whole, smaller, (), SKIPPED, (BLOCK,)).startswith("2 is in another mode")
    smaller[2].train()
    smaller[1].eval()
    assert structure_fault(whole, smaller, (), SKIPPED, (BLOCK,)).startswith("1 is in another mode")


def test_groups_of_another_network_are_a_fault():
    slot = Slot("other.weight", 0, torch.arange(2)[:, None], is_output=True, is_input=False)
    whole = nn.Linear(2, 2)
    fault = structure_fault(whole, copy.deepcopy(whole), (ChannelGroup("other", 2, (slot,)),), Plan({"other": (0,)}))
    assert fault == "the groups name other.weight, which the network does not have"


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
