"""Position embeddings without weights that are added to a stream: the stream is cut, and channels of them selected."""

from __future__ import annotations

import copy
import pickle
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

import passdeploy as pd
from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Plan
from passdeploy.errors import EquivalenceError
from passdeploy.export.onnx_graph import export_onnx
from passdeploy.grouping.find import map_channels
from passdeploy.models.selected_channels import SelectedChannels
from passdeploy.slimming import fixed_outputs, masked
from passdeploy.slimming.size_attributes import size_attributes_after
from passdeploy.slimming.slim import hidden_state, resize_
from passdeploy.slimming.tensors import groups_after
from passdeploy.slimming.verify import check_equivalence
from passdeploy.trainers.slim_file import Rebuild, rebuild, save_slim
from tests.fixed_embeddings import PlainTable, SinePositions, TinyDetr, Unprojected, sines

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OTHERS = torch.randn(1, 3, 24, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network_of(kind: type[nn.Module] = TinyDetr, **options: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(**options).eval()


def every_other(channels: ChannelMap) -> Plan:
    return Plan({group.name: tuple(range(1, group.width, 2)) for group in channels.prunable})


def groups_by_name(channels: ChannelMap) -> dict[str, pd.ChannelGroup]:
    return {group.name: group for group in channels.groups}


@pytest.fixture(scope="module")
def detr() -> tuple[nn.Module, ChannelMap, Plan]:
    net = network_of()
    channels = map_channels(net, IMAGES.float())
    return net.double(), channels, every_other(channels)


def test_the_projection_before_an_encoder_is_cut_with_its_position_embedding(detr):
    net, channels, plan = detr
    stream = groups_by_name(channels)["projection"]
    assert stream.is_prunable
    (output,) = stream.fixed_outputs
    assert (output.module, output.dim, output.size) == ("positions", 1, 16)
    assert output.index.flatten().tolist() == stream.slots[0].index.flatten().tolist()
    found = check_equivalence(net, channels.groups, plan, IMAGES, tolerance=1e-12)
    assert [shape[0][2:] for shape in found.input_shapes] == [[16, 16], [33, 35], [16, 16]]
    smaller = pd.slim(net, channels.groups, plan)
    assert smaller(OTHERS).shape == (1, 5)
    assert smaller.positions(torch.Size([2, 8, 3, 4]), IMAGES).shape == (2, 8, 3, 4)
    whole = net.positions(torch.Size([1, 16, 3, 4]), IMAGES)
    assert torch.equal(smaller.positions(torch.Size([1, 8, 3, 4]), IMAGES), whole[:, list(plan.kept["projection"])])


def test_what_the_widths_cost_is_what_the_slim_network_has(detr):
    net, channels, plan = detr
    smaller = pd.slim(net, channels.groups, plan)
    assert channels.costs.of("params", plan.widths()) == sum(p.numel() for p in smaller.parameters())
    counted = pd.count(smaller, IMAGES)
    assert channels.costs.of("macs", plan.widths()) == counted.macs


def test_a_slim_network_is_copied_pickled_saved_and_rebuilt(detr, tmp_path):
    net, channels, plan = detr
    smaller = pd.slim(net, channels.groups, plan)
    assert smaller.state_dict().keys() - net.state_dict().keys() == {"positions.kept_of_16_along_1"}
    assert net.state_dict().keys() <= smaller.state_dict().keys()
    rebuilt = network_of().double()
    resize_(rebuilt, smaller.state_dict(), size_attributes_after(channels.groups, Plan.from_json(plan.to_json())))
    path = save_slim(
        smaller, Rebuild.of(net, channels.groups, plan, ()), channels.groups, tmp_path / "slim.safetensors"
    )
    twins = rebuilt, copy.deepcopy(smaller), pickle.loads(pickle.dumps(smaller)), rebuild(network_of().double(), path)
    expected = smaller(IMAGES)
    for twin in twins:
        assert torch.equal(twin(IMAGES), expected)
        assert twin.state_dict().keys() == smaller.state_dict().keys()
    assert smaller.half().positions.kept_along(1).dtype == torch.int64


def test_a_slim_network_is_exported(tmp_path):
    net = network_of(Unprojected)
    channels = map_channels(net, IMAGES.float())
    smaller = pd.slim(net, channels.groups, every_other(channels))
    path = tmp_path / "slim.onnx"
    export_onnx(smaller, IMAGES[:1].float(), path, opset=18, batch=(1, 1, 4))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.float().numpy()})
    assert torch.allclose(torch.from_numpy(found), smaller(IMAGES.float()), atol=1e-5)


def test_a_slim_network_is_cut_again(detr):
    net, channels, plan = detr
    once, left = pd.slim(net, channels.groups, plan), groups_after(channels.groups, plan)
    second = Plan(
        {group.name: tuple(range(group.width - 1)) for group in left if group.is_prunable and group.width > 1}
    )
    pd.verify(once, left, second, IMAGES, tolerance=1e-12)
    twice = pd.slim(once, left, second)
    assert isinstance(twice.positions.whole, SinePositions)
    kept = [plan.kept["projection"][place] for place in second.kept["projection"]]
    assert twice.positions.kept_along(1).tolist() == kept
    anew = map_channels(once.float(), IMAGES.float())
    (output,) = groups_by_name(anew)["projection"].fixed_outputs
    assert (output.module, output.size) == ("positions", 8)
    pd.verify(once.double(), anew.groups, every_other(anew), IMAGES, tolerance=1e-12)


def plant_in_selection(monkeypatch: pytest.MonkeyPatch, change) -> None:
    """Let every selection be made with other arguments than asked for."""
    original = fixed_outputs.select_channels_

    def planted(model: nn.Module, module: str, dim: int, size: int, index: Tensor) -> None:
        original(model, module, *change(dim, size, index))

    monkeypatch.setattr(fixed_outputs, "select_channels_", planted)


@pytest.mark.parametrize(
    "change",
    [
        lambda dim, size, index: (dim, size, index.flip(0)),
        lambda dim, size, index: (dim, size, torch.arange(len(index))),
        lambda dim, size, index: (dim + 1, 4, torch.arange(4)),
    ],
    ids=["wrong order", "other channels", "wrong dimension"],
)
def test_verify_refuses_a_wrong_selection(detr, monkeypatch, change):
    net, channels, plan = detr
    plant_in_selection(monkeypatch, change)
    with pytest.raises(EquivalenceError):
        pd.verify(net, channels.groups, plan, IMAGES, tolerance=1e-12)


def test_the_tensors_are_checked_where_outputs_do_not_show_the_mistake(monkeypatch):
    net = network_of().double()
    channels = map_channels(net.float(), IMAGES.float())
    plan = every_other(channels)
    with torch.no_grad():  # nothing depends on the positions
        for layer in net.layers:
            layer.attention.queries.weight.zero_()
            layer.attention.keys.weight.zero_()
    plant_in_selection(monkeypatch, lambda dim, size, index: (dim, size, index.flip(0)))
    with pytest.raises(EquivalenceError, match="of the output of positions other channels are selected"):
        pd.verify(net.double(), channels.groups, plan, IMAGES, tolerance=1e-12)


def test_an_output_is_zero_where_it_is_masked(monkeypatch):
    net = network_of(Unprojected)
    channels = map_channels(net, IMAGES.float())
    (group,) = channels.prunable
    assert group.name == "projection"
    plan = every_other(channels)
    assert pd.verify(net.double(), channels.groups, plan, IMAGES, tolerance=1e-12) < 1e-12
    monkeypatch.setattr(masked, "mask_outputs_", lambda *_: [])
    with pytest.raises(EquivalenceError, match="differs from the masked one"):
        pd.verify(net, channels.groups, plan, IMAGES, tolerance=1e-12)


def test_a_table_that_is_a_plain_attribute_is_cut():
    net = network_of(PlainTable)
    channels = map_channels(net, IMAGES.float())
    plan = every_other(channels)
    assert groups_by_name(channels)["patches"].is_prunable
    pd.verify(net.double(), channels.groups, plan, IMAGES, tolerance=1e-12)
    smaller = pd.slim(net, channels.groups, plan)
    assert torch.equal(smaller.table, net.table[..., list(plan.kept["patches"])])
    assert smaller.state_dict().keys() == net.state_dict().keys()
    rebuilt = network_of(PlainTable).double()
    state = {**smaller.state_dict(), **hidden_state(smaller, channels.groups)}
    resize_(rebuilt, state, size_attributes_after(channels.groups, plan))
    assert torch.equal(rebuilt(IMAGES), smaller(IMAGES))
    assert not isinstance(rebuilt.table, nn.Parameter)
    assert smaller.table.data_ptr() != net.table.data_ptr()


def test_a_table_that_modules_share_is_shared_in_the_slim_network():
    class Shared(PlainTable):
        def __init__(self) -> None:
            super().__init__()
            self.layers[0].table = self.table

        def forward(self, images: Tensor) -> Tensor:
            x = self.patches(images).flatten(2).transpose(1, 2)
            return self.head(self.layers[0](x + self.table, self.layers[0].table).mean(1))

    net = network_of(Shared).double()
    channels = map_channels(net, IMAGES)
    plan = every_other(channels)
    pd.verify(net, channels.groups, plan, IMAGES, tolerance=1e-12)
    smaller = pd.slim(net, channels.groups, plan)
    assert smaller.table is smaller.layers[0].table
    assert smaller.table.shape[-1] == 8


def test_verify_refuses_a_table_that_was_cut_elsewhere(monkeypatch):
    net = network_of(PlainTable)
    channels = map_channels(net, IMAGES.float())
    plan = every_other(channels)
    from passdeploy.slimming import slim as slimming

    cut = slimming._cut_plain_tensors
    monkeypatch.setattr(
        slimming, "_cut_plain_tensors", lambda *given: {name: one.flip(-1) for name, one in cut(*given).items()}
    )
    with pytest.raises(EquivalenceError):
        pd.verify(net.double(), channels.groups, plan, IMAGES, tolerance=1e-12)


class AsTuple(SinePositions):
    """Returns its output in a tuple."""

    def forward(self, shape: torch.Size, like: Tensor) -> tuple[Tensor]:
        return (super().forward(shape, like),)


class InTuple(TinyDetr):
    """Takes the embedding out of a tuple."""

    def embedding(self, features: Tensor) -> Tensor:
        return self.positions(features.shape, features)[0]


class OfTheStream(TinyDetr):
    """Tells the embedding the shape of the stream, with its number of channels."""

    def forward(self, images: Tensor) -> Tensor:
        stream = self.projection(self.backbone(images))
        x, positions = (one.flatten(2).transpose(1, 2) for one in (stream, self.positions(stream.shape, stream)))
        for layer in self.layers:
            x = layer(x, positions)
        return self.head(x.mean(1))


class AsWide(SinePositions):
    """Has as many channels as it is told."""

    def forward(self, shape: torch.Size, like: Tensor) -> Tensor:
        return torch.arange(shape[1]).to(like)[None, :, None, None].expand(shape[0], -1, *shape[2:])


class ScaledByWidth(SinePositions):
    """Has a fixed number of channels, whose values depend on the number that it is told."""

    def forward(self, shape: torch.Size, like: Tensor) -> Tensor:
        return super().forward(shape, like) * shape[1]


class Overwriting(TinyDetr):
    """Changes the embedding in place, which the module may have kept."""

    def embedding(self, features: Tensor) -> Tensor:
        positions = self.positions(features.shape, features)
        positions.mul_(0.5)
        return positions


class Counted(TinyDetr):
    """Scales the embedding by its number of channels."""

    def embedding(self, features: Tensor) -> Tensor:
        positions = self.positions(features.shape, features)
        return positions * positions.size(1) ** -0.5


class Copied(SinePositions):
    """Returns memory of its own, which can be changed in place."""

    def forward(self, shape: torch.Size, like: Tensor) -> Tensor:
        return super().forward(shape, like).contiguous()


class Stretched(SinePositions):
    """Has as many channels as the map has columns, times four."""

    def forward(self, shape: torch.Size, like: Tensor) -> Tensor:
        rows = sines(torch.arange(shape[2]).to(like), 4 * shape[3])
        return rows.T[None, :, :, None].expand(shape[0], -1, -1, shape[3])


@pytest.mark.parametrize(
    ("kind", "positions", "reason"),
    [
        (InTuple, AsTuple, "meets a tensor whose size cannot change"),
        (OfTheStream, AsWide, "channels along dimension 1, and some of 16 are to be selected"),
        (OfTheStream, ScaledByWidth, "a factor of"),
        (Overwriting, Copied, "is changed in place"),
        (Counted, SinePositions, "a factor of"),
    ],
)
def test_what_is_not_certain_keeps_the_stream_and_nothing_else(kind, positions, reason):
    net = network_of(kind, positions=positions)
    channels = map_channels(net, IMAGES.float())
    groups = groups_by_name(channels)
    assert not groups["projection"].is_prunable
    assert reason in groups["projection"].reason
    assert groups["backbone.0"].is_prunable
    assert groups["layers.0.mlp.0"].is_prunable
    pd.verify(net.double(), channels.groups, every_other(channels), IMAGES, tolerance=1e-12)


@lru_cache(maxsize=1)
def remembered(height: int, width: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    positions = SinePositions(channels)
    return positions(torch.Size([1, channels, height, width]), torch.zeros(1, dtype=dtype, device=device))


class Remembering(SinePositions):
    """Returns a tensor that is kept by a function, for all networks alike."""

    def forward(self, shape: torch.Size, like: Tensor) -> Tensor:
        return remembered(*shape[2:], 2 * self.half, like.dtype, like.device)


class TwoStreams(nn.Module):
    """Two streams of one width with position embeddings of their own, which are the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(3, 16, 4, 4) for _ in range(2))
        self.positions = nn.ModuleList(Remembering(16) for _ in range(2))
        self.heads = nn.ModuleList(nn.Conv2d(16, 4, 1) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        features = [projection(images) for projection in self.projections]
        embeddings = [one(x.shape, x) for one, x in zip(self.positions, features, strict=True)]
        streams = [(x + y).relu() for x, y in zip(features, embeddings, strict=True)]
        return sum(head(x) for head, x in zip(self.heads, streams, strict=True)).mean((2, 3))


def test_a_tensor_that_two_modules_return_is_cut_by_each_in_its_own_way():
    net = network_of(TwoStreams).double()
    channels = map_channels(net, IMAGES)
    groups = groups_by_name(channels)
    assert [groups[f"projections.{n}"].fixed_outputs[0].module for n in range(2)] == ["positions.0", "positions.1"]
    plan = Plan({"projections.0": (0, 3, 8), "projections.1": tuple(range(5, 16))})
    pd.verify(net, channels.groups, plan, IMAGES, tolerance=1e-12)


class Levels(nn.Module):
    """One position embedding for maps of several sizes, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(3, 16, 4, stride) for stride in (2, 4))
        self.level = nn.Parameter(torch.linspace(-1, 1, 32).view(2, 16))
        self.positions = SinePositions(16)
        self.same = self.positions
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = [projection(images) for projection in self.projections]
        flat = []
        for x, module, level in zip(maps, (self.positions, self.same), self.level, strict=True):
            positions = module(x.shape, x).flatten(2).transpose(1, 2) + level.view(1, 1, -1)
            flat.append(x.flatten(2).transpose(1, 2) + positions)
        x = torch.cat(flat, 1)
        return self.head((x + self.mix(x)).relu().mean(1))


def test_an_embedding_is_called_for_maps_of_several_sizes():
    net = network_of(Levels).double()
    channels = map_channels(net, IMAGES)
    stream = groups_by_name(channels)["projections.0"]
    assert stream.is_prunable
    assert {slot.tensor for slot in stream.slots} >= {"projections.0.weight", "projections.1.weight", "level"}
    plan = every_other(channels)
    pd.verify(net, channels.groups, plan, IMAGES, tolerance=1e-12)
    smaller = pd.slim(net, channels.groups, plan)
    assert smaller.positions is smaller.same


def test_a_block_is_skipped_with_the_position_embedding_inside_of_it():
    class Positioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.positions, self.last = nn.Conv2d(16, 12, 1), SinePositions(12), nn.Conv2d(12, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            inner = self.first(x)
            return x + self.last((inner + self.positions(inner.shape, inner)).relu())

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.blocks = nn.Conv2d(3, 16, 4, 4), nn.Sequential(Positioned(), Positioned())
            self.head = nn.Linear(16, 5)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.blocks(self.stem(images)).mean((2, 3)))

    net = network_of(Network).double()
    channels = map_channels(net, IMAGES, with_blocks=True)
    block = next(block for block in channels.blocks if block.is_prunable)
    plan = Plan(every_other(channels).kept, (block.name,))
    pd.verify(net, channels.groups, plan, IMAGES, tolerance=1e-12, blocks=channels.blocks)
    smaller = pd.slim(net, channels.groups, plan, channels.blocks)
    assert sum(isinstance(module, SelectedChannels) for module in smaller.modules()) == 1


def test_an_embedding_of_another_width_at_another_size_keeps_the_stream():
    net = network_of(TinyDetr, positions=Stretched)
    channels = map_channels(net, IMAGES.float())
    pd.verify(net.double(), channels.groups, every_other(channels), IMAGES, tolerance=1e-12)
