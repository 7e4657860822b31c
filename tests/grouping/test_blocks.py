"""Blocks of small networks: which are found, what takes their place, and why others must stay."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from passdeploy import Block, Plan, find_blocks, verify
from passdeploy.channels.blocks import Replacement, replacements_of
from passdeploy.grouping.find import map_channels
from passdeploy.models.cifar_resnet import resnet20_cifar
from passdeploy.slimming.verify import check_equivalence
from tests import nets
from tests.random_networks import Fn

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def conv(inputs: int = 6, outputs: int = 6) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Around(nn.Module):
    """A stem, a module that is given to it, and a head."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Sequential(conv(3), nn.BatchNorm2d(6)), block, nets.Head(6)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.block(self.stem(x)))


def blocks_around(function: Callable[[Any, Tensor], Any], **parts: Any) -> tuple[Block, ...]:
    """The blocks of a network whose middle module computes a function of itself and its input."""
    return find_blocks(Around(Fn(function, **parts)).eval(), IMAGES)


def only(blocks: tuple[Block, ...]) -> Block:
    assert len(blocks) == 1, blocks
    return blocks[0]


def shown(block: Block) -> list[tuple[str, str]]:
    return [(one.module, one.by) for one in block.replacements]


# What is found


def test_a_module_that_computes_nothing_but_the_block_goes_as_a_whole():
    block = only(blocks_around(lambda own, x: x + own.conv(x), conv=conv()))
    assert block.is_prunable
    assert block.name == "block"
    assert shown(block) == [("block", "identity")]
    assert block.tensors == ("block.conv.weight", "block.conv.bias")
    assert block.source.startswith("test_blocks.py:")
    assert (block.addition.module, block.addition.call_index, block.addition.branch) == ("block", 0, 1)


def test_a_relu_after_the_sum_stays_unless_the_input_has_been_through_one():
    first, second = (Fn(lambda own, x: F.relu(x + own.conv(x)), conv=conv()) for _ in range(2))
    blocks = find_blocks(Around(nn.Sequential(first, second)).eval(), IMAGES)
    assert [shown(block) for block in blocks] == [[("block.0", "relu")], [("block.1", "identity")]]


@pytest.mark.parametrize("after", [F.silu, torch.sigmoid, lambda x: 0.5 * x, lambda x: F.relu(x) * 2])
def test_what_else_follows_the_sum_stays_in_its_module(after: Callable[[Tensor], Tensor]):
    block = only(blocks_around(lambda own, x: after(x + own.conv(x)), conv=conv()))
    assert shown(block) == [("block.conv", "zero")]


def test_both_branches_of_a_transformer_block_are_found():
    model = VisionTransformer(image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=12)
    blocks = find_blocks(model.eval(), torch.zeros(1, 3, 16, 16))
    layer = "encoder.layers.encoder_layer_0"
    assert [block.name for block in blocks[:2]] == [f"{layer}.self_attention", f"{layer}.mlp"]
    assert all(block.is_prunable for block in blocks)
    ways = [("ln_1", "first"), ("self_attention", "first"), ("dropout", "zero")]
    assert shown(blocks[0]) == [(f"{layer}.{part}", by) for part, by in ways]
    assert blocks[0].replacements[1].entries == 2  # nn.MultiheadAttention returns its weights as well
    assert [block.chains[0] for block in blocks] == [Replacement(layer, "identity")] * 2  # where both go
    assert f"{layer}.mlp.0" in blocks[1].groups


def test_a_module_of_three_branches_stays_where_one_of_them_is_a_module_of_its_own():
    def forward(own: Any, x: Tensor) -> Tensor:
        x = own.local(x)
        x = x + own.attention(x)
        return x + own.linear(x)

    local = Fn(lambda own, x: x + own.conv(x), conv=conv())
    model = Around(Fn(forward, local=local, attention=conv(), linear=conv())).eval()
    channels = map_channels(model, IMAGES, with_blocks=True)
    names = [block.name for block in channels.blocks]
    assert names == ["block.local", "block.attention", "block.linear"]
    for count in (1, 2, 3):
        for skipped in itertools.combinations(names, count):
            check_equivalence(model, channels.groups, Plan({}, skipped), IMAGES, tolerance=1e-6, blocks=channels.blocks)
    whole = Replacement("block", "identity")
    assert replacements_of(channels.blocks, names[1:]) != [whole]
    assert whole in replacements_of(channels.blocks, names)


def test_code_between_modules_that_needs_shapes_gets_the_input():
    def forward(own: Any, x: Tensor) -> Tensor:
        rows = own.norm(x).permute(0, 2, 3, 1).flatten(1, 2)
        return 0.5 * (x + own.drop(own.mix(rows).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)))

    block = only(blocks_around(forward, norm=nn.BatchNorm2d(6), mix=nn.Linear(6, 6), drop=nn.Identity()))
    assert shown(block) == [("block.norm", "first"), ("block.mix", "first"), ("block.drop", "zero")]


def test_a_branch_that_the_input_is_added_to_in_place_becomes_zeros_of_its_shape():
    def forward(own: Any, x: Tensor) -> Tensor:
        out = own.conv(x)
        out += x
        return out * own.scale

    block = only(blocks_around(forward, conv=conv(), scale=nn.Parameter(torch.ones(6, 1, 1))))
    assert shown(block) == [("block.conv", "zeros")]
    assert "block.scale" not in block.tensors


def test_what_is_overwritten_later_is_not_the_input_itself():
    inner = Fn(lambda own, x: x + own.conv(x), conv=conv())
    blocks = blocks_around(lambda own, x: own.inner(x).relu_() - x, inner=inner)
    assert shown(only(blocks)) == [("block.inner.conv", "zero")]  # were `inner` an identity, `x` would be overwritten


def test_code_that_overwrites_what_a_module_returns_does_not_get_the_input():
    def forward(own: Any, x: Tensor) -> Tensor:
        return 0.5 * (x + own.second(own.first(x).relu_()))

    assert shown(only(blocks_around(forward, first=conv(), second=conv()))) == [
        ("block.first", "zero"),
        ("block.second", "zero"),
    ]


def test_the_input_is_not_overwritten_where_it_stands_in_for_what_a_module_returns():
    def forward(own: Any, x: Tensor) -> Tensor:
        rows = own.first(x).relu_().flatten(2).transpose(1, 2)
        return 0.5 * (x + own.mix(rows).transpose(1, 2).view(x.shape))

    block = only(blocks_around(forward, first=conv(), mix=nn.Linear(6, 6)))
    assert block.reason == "block computes with its branch in a way that zeros do not pass through"


def test_what_a_network_returns_of_a_branch_is_used_elsewhere():
    class Returning(Around):
        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            y = self.block(x)
            return self.head(x + y), y

    block = only(find_blocks(Returning(nn.Sequential(conv())).eval(), IMAGES))
    assert "something else uses what aten.convolution" in block.reason


def test_a_branch_in_a_part_of_a_tensor_is_left_alone():
    def forward(own: Any, x: Tensor) -> Tensor:
        out = own.conv(x)
        out[:, :3] += x[:, :3]
        return out

    assert not only(blocks_around(forward, conv=conv())).is_prunable


def test_a_shortcut_may_be_scaled():
    block = only(
        blocks_around(lambda own, x: own.scale * x + own.conv(x), conv=conv(), scale=nn.Parameter(torch.rand(1)))
    )
    assert shown(block) == [("block.conv", "zero")]


def test_a_block_within_a_block_is_known():
    inner = Fn(lambda own, x: x + own.conv(x), conv=conv())
    blocks = find_blocks(Around(Fn(lambda own, x: x + own.body(x), body=nn.Sequential(inner, conv()))).eval(), IMAGES)
    assert [block.name for block in blocks] == ["block.body.0", "block"]
    assert blocks[1].contains == ("block.body.0",)


def test_groups_that_live_only_inside_of_a_block_go_with_it_and_those_of_the_stream_do_not():
    def forward(own: Any, x: Tensor) -> Tensor:
        return x + own.second(own.first(x))

    net = Around(Fn(forward, first=conv(6, 9), second=conv(9, 6))).eval()
    channels = map_channels(net, IMAGES, with_blocks=True)
    block = only(channels.blocks)
    assert block.groups == ("block.first",)
    gone = sum(parameter.numel() for parameter in net.block.parameters())
    without = Plan({}, ("block",)).widths()
    lost = {kind: channels.costs.of(kind) - channels.costs.of(kind, without) for kind in ("params", "macs", "channels")}
    assert lost == {"params": gone, "macs": 2 * (2 * 64) * 9 * 6 * 9, "channels": 9}


def test_blocks_are_left_alone_where_only_groups_are_asked_for():
    assert map_channels(nets.Residual(), IMAGES).blocks == ()


# What must stay


def _used_elsewhere(own: Any, x: Tensor) -> Tensor:
    y = own.conv(x)
    return x + own.other(y) + y.mean()


def _with_hook() -> nn.Module:
    layer = conv()
    layer.register_forward_hook(lambda *_: None)
    return layer


def _with_projection(own: Any, x: Tensor) -> Tensor:
    return own.other(x) + own.conv(x)


# Of these modules no part goes; each does more than the block, so that it cannot go as a whole.
REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "projected": (lambda own, x: own.other(x) + own.conv(x), "both summands are computed from its input"),
    "concatenated": (lambda own, x: torch.cat([x, own.conv(x)], 1)[:, :6], "concatenated with its input"),
    "used elsewhere": (_used_elsewhere, "something else uses what aten.convolution at test_blocks.py:"),
    "functions": (lambda own, x: 0.5 * (x + torch.tanh(x)), "block computes its branch itself, by functions"),
    "functional layers": (
        lambda own, x: 0.5 * (x + own.relu(F.conv2d(x, own.conv.weight, padding=1))),
        "block computes layers of its branch itself",
    ),
    "the module runs twice": (lambda own, x: 0.5 * ((y := x + own.conv(x)) + own.conv(y)), "block.conv runs 2 times"),
    "the weight is read elsewhere": (
        lambda own, x: own.conv.weight.mean() * (x + own.conv(x)),
        "aten.mean at test_blocks.py:",
    ),
    "not zero for zero": (lambda own, x: 0.5 * (x + torch.sigmoid(own.conv(x))), "in a way that zeros do not pass"),
    "a shift on the branch": (lambda own, x: 0.5 * (x + (own.conv(x) + 1)), "in a way that zeros do not pass"),
    "the input is scaled": (lambda own, x: torch.add(own.conv(x), x, alpha=2), "its input is multiplied by a number"),
    "the shape grows": (
        lambda own, x: (small := x.mean((2, 3), keepdim=True)) + own.conv(x) * small,
        "the sum has another shape or type than its input",
    ),
    "an addition that torch hides": (
        lambda own, x: 0.5 * torch.ops.aten.add(x, own.conv(x)),
        "the addition is not a call of torch.add",
    ),
}


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_left_out_says_why_and_where(function: Callable[[Any, Tensor], Any], reason: str):
    blocks = blocks_around(function, conv=conv(), other=conv(), relu=nn.ReLU())
    assert not any(block.is_prunable for block in blocks), blocks
    assert any(reason in block.reason for block in blocks), blocks
    assert all(block.source.startswith("test_blocks.py:") for block in blocks)


def test_a_module_with_a_hook_stays():
    block = only(blocks_around(lambda own, x: x + own.conv(x), conv=_with_hook()))
    assert block.reason == "block.conv has a hook"


def test_a_module_that_shares_a_tensor_with_others_stays():
    net = Around(Fn(lambda own, x: x + own.conv(x), conv=conv()))
    net.other = conv()
    net.other.weight = net.block.conv.weight
    assert only(find_blocks(net.eval(), IMAGES)).reason == "block.conv shares a tensor with a layer outside of it"


def test_a_network_that_adds_to_its_own_input_is_no_block():
    net = Fn(lambda own, x: own.head((x + own.conv(x)).repeat(1, 2, 1, 1)), conv=conv(3, 3), head=nets.Head(6))
    assert only(find_blocks(net.eval(), IMAGES)).reason == "its input is that of the network"


def test_code_that_runs_a_layer_under_another_name_fails_the_trial():
    layer = conv()
    function = Fn(lambda own, x: 0.5 * (x + own.held[0](x)), conv=layer)
    function.held = [layer]  # whatever takes the place of `conv`, this one runs
    block = only(find_blocks(Around(function).eval(), IMAGES))
    assert block.reason == "the network without it computes something else than with a branch of zero"


def test_code_that_reads_an_attribute_of_what_goes_fails_the_trial():
    block = only(blocks_around(lambda own, x: own.conv.out_channels * (x + own.conv(x)), conv=conv()))
    assert "does not run without it" in block.reason
    assert "out_channels" in block.reason


def test_what_goes_keeps_attributes_that_are_no_sizes():
    function = Fn(lambda own, x: own.norm.eps * 1e3 * x + own.norm(x), norm=nn.BatchNorm2d(6))
    network = Around(function).eval()
    block = only(find_blocks(network, IMAGES))
    assert block.is_prunable, block.reason
    assert verify(network, (), Plan(kept={}, skipped=(block.name,)), IMAGES, blocks=(block,), tolerance=1e-5) <= 1e-6


class Encoder(nn.Module):
    """Two encoder layers of torch, which in evaluation mode run as one fused operation each."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first)
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 5)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -1] = True
        return self.head(self.layers(self.embed(x), src_key_padding_mask=padding).mean(1))


@pytest.mark.parametrize("norm_first", [True, False])
def test_both_branches_of_an_encoder_layer_of_torch_may_go(norm_first: bool):
    encoder, tokens = Encoder(norm_first=norm_first).eval(), torch.randn(2, 4, 6)
    channels = map_channels(encoder, tokens, with_blocks=True)
    assert [block.is_prunable for block in channels.blocks] == [True] * 4, channels.blocks
    names = [block.name for block in channels.blocks]
    kept = {group.name: tuple(range(group.width // 2)) for group in channels.prunable}
    for skipped in (*[(name,) for name in names], (names[0], names[3]), tuple(names)):
        plan = Plan(kept=kept, skipped=skipped)
        assert verify(encoder, channels.groups, plan, tokens, blocks=channels.blocks, tolerance=1e-5) <= 1e-6


def test_what_goes_wrong_in_training_mode_alone_fails_the_trial():
    def forward(own: Any, x: Tensor) -> Tensor:
        y = own.conv(x)
        return 0.5 * (x + (own.conv.weight.sum() * y if own.training else y))

    assert "in training mode" in only(blocks_around(forward, conv=conv())).reason


def test_the_first_block_of_a_stage_stays_and_the_others_go():
    blocks = find_blocks(resnet20_cifar(), torch.zeros(1, 3, 32, 32))
    assert [block.is_prunable for block in blocks] == [True] * 3 + [False, True, True] * 2


def test_a_dense_block_has_no_blocks():
    blocks = find_blocks(nets.Concatenated(), IMAGES)
    assert blocks
    assert all("concatenated" in block.reason for block in blocks)
