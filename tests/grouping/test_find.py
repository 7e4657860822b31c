"""Channel groups of small networks: their slots, and the reasons why channels must stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.errors import PlanError, UsageError
from passdeploy.grouping.find import find_groups, map_channels
from passdeploy.slimming.slim import slim
from passdeploy.slimming.verify import verify
from tests import nets

IMAGES = torch.zeros(1, 3, 16, 16)


def groups_of(net: nn.Module, inputs: Tensor = IMAGES) -> dict[str, ChannelGroup]:
    return {group.name: group for group in find_groups(net, inputs)}


def test_a_group_holds_the_filter_its_norm_and_the_layers_that_read_it():
    group = groups_of(nets.Plain())["first.0"]
    assert group.width == 8
    assert group.slots[0].tensor == "first.0.weight"
    assert {(slot.tensor, slot.dim) for slot in group.slots} == {
        ("first.0.weight", 0),
        ("first.1.weight", 0),
        ("first.1.bias", 0),
        ("first.1.running_mean", 0),
        ("first.1.running_var", 0),
        ("second.0.weight", 1),
    }
    assert [slot.tensor for slot in group.slots if slot.is_output] == ["first.0.weight"]
    assert [slot.tensor for slot in group.slots if slot.is_input] == ["second.0.weight"]


def test_one_channel_of_a_flattened_map_is_many_inputs():
    group = groups_of(nets.Plain())["second.0"]
    slot = next(slot for slot in group.slots if slot.tensor == "fc.weight")
    assert slot.dim == 1
    assert slot.index.shape == (6, 16)
    assert slot.index[2].tolist() == list(range(32, 48))


def test_added_channels_are_one_group():
    groups = groups_of(nets.Residual())
    assert set(groups) == {"stem.0", "inner.0.0.0", "inner.1.0.0", "head.fc"}
    assert {"stem.0", "inner.0.1.0", "inner.1.1.0", "head.fc"} <= set(groups["stem.0"].layers)


def test_concatenated_channels_stay_in_separate_groups():
    groups = groups_of(nets.Concatenated())
    assert [groups[name].width for name in ("stem.0", "left.0", "right.0")] == [6, 4, 4]
    slot = next(slot for slot in groups["left.0"].slots if slot.tensor == "head.fc.weight")
    assert slot.index.flatten().tolist() == [6, 7, 8, 9]


def test_few_wide_groups_become_narrower_and_many_narrow_ones_go_whole():
    groups = groups_of(nets.Grouped())
    assert groups["stem.0"].slots[0].index.tolist() == [[place, place + 6] for place in range(6)]
    # `many` takes four groups of two from eight channels, which `wide` loses in pairs, one from either half.
    assert groups["wide.0"].slots[0].index.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    places = {slot.tensor: slot.index.tolist() for slot in groups["wide.0"].slots}
    assert places["many.0.weight"] == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]


def test_padded_channels_stay_and_the_rest_is_tied_across_the_pad():
    groups = groups_of(nets.PaddedShortcut())
    padded = [group for group in groups.values() if group.name.startswith("block.1.0")]
    assert sum(group.width for group in padded) == 4  # two zeros on either side
    assert all("must stay" in group.reason for group in padded)
    stream = groups["stem.0"]
    slot = next(slot for slot in stream.slots if slot.tensor == "block.1.0.weight")
    assert slot.index.flatten().tolist() == [2, 3, 4, 5, 6, 7]


def test_the_output_stays_and_says_so():
    group = groups_of(nets.Plain())["fc"]
    assert not group.is_prunable
    assert group.reason == "the model's output"


def test_an_unknown_operation_protects_its_group_with_op_module_and_line():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nets.conv_bn(3, 8), nets.conv_bn(8, 6), nets.Head(6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x = x.sort(dim=1).values  # the order depends on the values
            return self.head(self.b(x))

    groups = groups_of(Odd())
    assert not groups["a.0"].is_prunable
    assert "aten.sort" in groups["a.0"].reason
    assert "test_find.py:" in groups["a.0"].reason
    assert groups["b.0"].is_prunable


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x - x.std(1, keepdim=True),
        lambda x: x.cumsum(1),
        lambda x: x * torch.arange(8.0).view(1, 8, 1, 1),
        lambda x: torch.fft.fft(x, dim=1).real,
        lambda x: x[:, [3, 1, 2, 0, 4, 5, 6, 7]],
        lambda x: x.flatten(1).view(x.size(0), 4, 2, 16, 16).sum(1).repeat(1, 4, 1, 1),
    ],
    ids=["std", "cumsum", "fixed table", "fft", "index", "partial sum"],
)
def test_operations_that_mix_channels_protect_them(mix):
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nets.conv_bn(3, 8), nets.conv_bn(8, 6), nets.Head(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(mix(self.a(x))))

    groups = groups_of(Mixing())
    assert not groups["a.0"].is_prunable
    assert groups["b.0"].is_prunable


def test_halves_of_a_chunk_lose_the_same_places():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nets.conv_bn(3, 8), nets.Head(4)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.a(x).chunk(2, 1)
            return self.head(left) + 0 * self.head(right)

    group = groups_of(Gated())["a.0"]
    assert group.width == 4
    assert group.slots[0].index.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_pixel_shuffle_keeps_whole_blocks():
    class Upscaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nets.conv_bn(3, 12), nets.conv_bn(3, 4), nets.Head(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(F.pixel_shuffle(self.a(x), 2)))

    group = groups_of(Upscaling())["a.0"]
    assert group.width == 3
    assert group.span == 4
    assert group.slots[0].index[1].tolist() == [4, 5, 6, 7]


def test_excluded_layers_stay_and_name_the_pattern():
    channels = map_channels(nets.Residual(), IMAGES, exclude=["inner.1.*"])
    by_name = {group.name: group for group in channels.groups}
    assert "excluded by 'inner.1.*'" in by_name["inner.1.0.0"].reason
    assert not by_name["stem.0"].is_prunable  # inner.1 writes to the same stream
    assert by_name["inner.0.0.0"].is_prunable
    only = {group.name: group for group in map_channels(nets.Residual(), IMAGES, include=["inner.*.0.0"]).groups}
    assert [name for name, group in only.items() if group.is_prunable] == ["inner.0.0.0", "inner.1.0.0"]
    assert only["stem.0"].reason == "not included (stem.0)"


def test_excluded_blocks_are_not_skipped_by_any_plan():
    channels = map_channels(nets.Residual(), IMAGES, with_blocks=True)
    free = [block.name for block in channels.costs.blocks]
    assert "inner.1" in free
    chosen = map_channels(nets.Residual(), IMAGES, exclude=["inner.1.*"], with_blocks=True)
    assert [block.name for block in chosen.costs.blocks] == [name for name in free if name != "inner.1"]
    assert {block.name: block.is_prunable for block in chosen.blocks}["inner.1"] is False
    with pytest.raises(PlanError, match=r"must stay: excluded by 'inner\.1\.\*'"):
        Plan({}, ("inner.1",)).check(chosen.groups, chosen.blocks)


@pytest.mark.parametrize(
    ("patterns", "advice"),
    [
        ({"exclude": ["inner.1"]}, r"'inner.1' matches no layer .* followed.\nDid you mean 'inner.1.\*'\?"),
        ({"exclude": ["stem*", "ster.0"]}, r"'ster.0' matches .*\nDid you mean 'stem.0'\?"),
        ({"include": ["nothing*"]}, r"'nothing\*' matches .*\n\* stands for any characters"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(patterns: dict[str, list[str]], advice: str):
    with pytest.raises(UsageError, match=advice):
        map_channels(nets.Residual(), IMAGES, **patterns)


class OwnWeights(nn.Module):
    """A network that holds its weights itself, without layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x.mean((2, 3)) @ self.first.T) @ self.second.T


def test_weights_that_the_network_itself_holds_have_their_own_names():
    net = OwnWeights()
    assert list(groups_of(net)) == ["first", "second"]
    assert map_channels(net, IMAGES, exclude=["fir*"]).groups[0].reason == "excluded by 'fir*' (first)"
    assert map_channels(net, IMAGES, include=["first"]).groups[0].is_prunable


def test_following_changes_neither_mode_nor_statistics():
    net = nets.Residual().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    find_groups(net, torch.randn(2, 3, 16, 16))
    assert all(module.training for module in net.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("dropout", [nn.Dropout(0.5), nn.Dropout2d(0.5), nn.FeatureAlphaDropout(0.5)], ids=repr)
def test_dropout_keeps_nothing_where_a_pass_in_training_mode_looks_for_heads(dropout: nn.Module):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), dropout, nn.Conv2d(8, 5, 1))
    net.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    groups = {group.name: group for group in find_groups(net.eval(), IMAGES)}
    assert groups["0"].is_prunable
    assert verify(net, tuple(groups.values()), Plan({"0": (1, 2, 5)}), IMAGES, tolerance=1e-5) <= 1e-5


def test_a_head_that_runs_only_in_training_is_followed_and_cut_along():
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nets.conv_bn(3, 8), nets.conv_bn(8, 6)
            self.head, self.aux = nets.Head(6), nn.Sequential(nets.conv_bn(8, 4), nets.Head(4))

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            x = self.stem(x)
            y = self.head(self.body(x))
            return (y, self.aux(x)) if self.training else y

    net = Auxiliary().eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    groups = find_groups(net, IMAGES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    by_name = {group.name: group for group in groups}
    assert "aux.0.0" in by_name["stem.0"].layers
    assert by_name["aux.0.0"].is_prunable
    assert by_name["aux.1.fc"].reason == "the model's output"
    plan = Plan({group.name: tuple(range(0, group.width, 2)) for group in groups if group.is_prunable})
    smaller = slim(net, groups, plan)
    assert smaller.aux[0][0].weight.shape[:2] == (2, 4)
    main, aux = smaller.train()(torch.randn(2, 3, 16, 16))
    (main.sum() + aux.sum()).backward()
