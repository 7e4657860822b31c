"""Networks on which mutated code is checked, and the check itself, which runs in a process of its own.

    python -m benchmarks.mutation_networks prepare FILE [NAME ...]   # with the true code: groups and plans into FILE
    python -m benchmarks.mutation_networks check FILE                # with the mutated code: prints the first finding

Each network is built by name, always with the same weights. `check` cuts it by the plan in the file and calls `verify`.
Groups and plans come from the true code, so that the checks of `find_groups` do not hide a fault.
"""

from __future__ import annotations

import json
import pickle
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import passdeploy
from passdeploy import Block, ChannelGroup, Plan, slim, verify
from passdeploy.channels.groups import ChannelMap
from passdeploy.grouping.find import map_channels
from passdeploy.models.cifar_resnet import resnet20_cifar
from passdeploy.runtime import seeds
from passdeploy.slimming.tensors import groups_after

TOLERANCE = 1e-5


class Divided(nn.Module):
    """A convolution whose channels are divided by buffers: statistics from outside, and a table that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)
        self.register_buffer("deviation", torch.rand(1, 8, 1, 1) + 0.5)
        self.register_buffer("shift", torch.rand(1, 8, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.stem(x) / self.deviation + self.shift).relu())


class Standardised(nn.Conv2d):
    """A convolution whose weights are standardised by a batch norm, as timm's are."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = nn.functional.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6)
        return nn.functional.conv2d(x, weight.reshape_as(self.weight), self.bias)


class RmsNormed(nn.Module):
    """Token layers with an RMS norm, a layer norm and an embedding of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.places = nn.Linear(6, 12), nn.Embedding(9, 12)
        self.rms, self.norm = nn.RMSNorm(12), nn.LayerNorm(12)
        self.hidden, self.head = nn.Linear(12, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.places(torch.arange(x.size(1)))
        x = x.sigmoid() + self.rms(x)
        return self.head(self.hidden(self.norm(x).sigmoid()).relu())


class SharedWeight(nn.Module):
    """Two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 5)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.one(x).relu() + self.two(x).relu())


class Split(nn.Module):
    """A layer whose output is split into parts of stored sizes, and views with a stored number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(6, 20), nn.Linear(8, 6), nn.Linear(12, 6)
        self.sizes = [8, 12]
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).relu().split(self.sizes, dim=-1)
        return self.head((self.left(left) + self.right(right)).relu())


class Attention(nn.Module):
    """Self-attention with stored numbers of heads and of channels a head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 4, 6
        self.stem, self.qkv, self.out = nn.Linear(6, 10), nn.Linear(10, 72), nn.Linear(24, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        attended = ((q @ k.mT) * 0.4).softmax(-1) @ v
        return self.head(x + self.out(attended.transpose(1, 2).flatten(2)))


class Branches(nn.Module):
    """Branches around one stream of tokens, with what may follow an addition or lie in a branch.

    One ends in a ReLU, one is inside of the branch of another, one is scaled, one is added to in place, and one is made
    of two modules.
    """

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, width), nn.Linear(width, 5)
        self.rectified = _Branch(width, after=nn.ReLU())
        self.outer = _Branch(width, inner=_Branch(width))
        self.first, self.second = nn.Linear(width, 7), nn.Linear(7, width)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.scaled, self.in_place = nn.Linear(width, width), nn.Linear(width, width)
        self.pair = nn.Sequential(_Branch(width), _Branch(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.outer(self.rectified(self.stem(x)))
        x = x + self.second(self.first(x).sigmoid())
        x = x + self.scale * self.scaled(x)
        branch = self.in_place(x)
        branch.add_(x)
        return self.head(self.pair(branch).sigmoid())


class _Branch(nn.Module):
    """A module that computes `after(x + body(x))`, with another branch inside of its own one or not."""

    def __init__(self, width: int, after: nn.Module | None = None, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, 7), nn.Sigmoid(), nn.Linear(7, width))
        self.after, self.inner = after or nn.Identity(), inner or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.inner(self.body(x)))


def _nets(name: str, **settings: Any) -> nn.Module:
    """Build a network of tests/nets.py."""
    from tests import nets

    return getattr(nets, name)(**settings)


def _channels_last() -> nn.Module:
    return _nets("Residual").to(memory_format=torch.channels_last)


def _partly_frozen() -> nn.Module:
    net = _nets("SqueezeExcite")
    net.stem.requires_grad_(False)
    return net


def _statistic(name: str) -> nn.Module:
    from tests.slimming.test_masked_reductions import RESTRICTED, Net

    return Net(RESTRICTED[name])


def _of_tensors(name: str) -> nn.Module:
    from tests.slimming import test_tensors

    return getattr(test_tensors, name)()


def _embedded(name: str) -> nn.Module:
    from tests import fixed_embeddings

    return getattr(fixed_embeddings, name)()


def _recurrent(kind: type[nn.RNNBase], **options: Any) -> nn.Module:
    from tests.tracing.test_recurrent import Reader

    return Reader(kind, **options)


def _carried(name: str) -> nn.Module:
    from tests.models.test_wrappers import CARRIED, UNWRAPPED

    return {**CARRIED, **UNWRAPPED}[name]()


def _grouped_norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.GroupNorm(3, 12),
        nn.PReLU(12),
        nn.BatchNorm2d(12, affine=False),
        nn.Conv2d(12, 16, 3),
        nn.GroupNorm(8, 16),
        nn.Sigmoid(),
        nn.Conv2d(16, 5, 1),
    )


def _standardised() -> nn.Module:
    return nn.Sequential(Standardised(3, 8, 3), nn.Sigmoid(), Standardised(8, 10, 3), nn.Sigmoid(), nn.Conv2d(10, 5, 1))


def _swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], 24, [1, 1], [2, 4], [4, 4], num_classes=7)


def _vit() -> nn.Module:
    """Build a ViT whose attention returns a tuple."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 16, 2, 2, 16, 24, num_classes=7)


def _torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name, weights=None, num_classes=7)


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=7)


def _convnext_v2() -> nn.Module:
    """Build a ConvNeXt with global response norms."""
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(num_classes=7, depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), use_grn=True, ls_init_value=None)


SMALL, LARGE, TOKENS, SEQUENCE = (2, 3, 16, 16), (1, 3, 64, 64), (2, 9, 6), (2, 3, 7)
Make = Callable[[], nn.Module]
NETWORKS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "a chain": (partial(_nets, "Plain"), SMALL),
    "residual blocks": (partial(_nets, "Residual"), SMALL),
    "a dense block": (partial(_nets, "Concatenated"), SMALL),
    "depthwise convolutions": (partial(_nets, "Depthwise"), SMALL),
    "grouped convolutions": (partial(_nets, "Grouped"), SMALL),
    "transposed convolutions": (partial(_nets, "Transposed"), SMALL),
    "padded shortcuts": (partial(_nets, "PaddedShortcut"), SMALL),
    "channels last": (_channels_last, SMALL),
    "partly frozen": (_partly_frozen, SMALL),
    "divided by buffers": (Divided, SMALL),
    "a shared weight": (SharedWeight, TOKENS),
    "group norms": (_grouped_norms, SMALL),
    "many groups": (partial(_of_tensors, "ManyGroups"), SMALL),
    "layer norm, RMS norm, embedding": (RmsNormed, TOKENS),
    "standardised weights": (_standardised, SMALL),
    "a weight that a hook computes": (partial(_carried, "masks of torch.nn.utils.prune"), SMALL),
    "stored sizes of a split": (Split, TOKENS),
    "attention": (Attention, TOKENS),
    "response norm": (partial(_statistic, "response norm"), SMALL),
    "mean over channels": (partial(_statistic, "mean"), SMALL),
    "softmax over channels": (partial(_statistic, "softmax"), SMALL),
    "statistics over two layers": (partial(_of_tensors, "WithStatistics"), SMALL),
    "an embedding without weights": (partial(_embedded, "TinyDetr"), SMALL),
    "an embedding in a product": (partial(_embedded, "Unprojected"), SMALL),
    "an embedding that is a plain tensor": (partial(_embedded, "PlainTable"), SMALL),
    "LSTM": (partial(_recurrent, nn.LSTM, num_layers=2, bidirectional=True), SEQUENCE),
    "GRU": (partial(_recurrent, nn.GRU), SEQUENCE),
    "forward that closes over the network": (
        partial(_carried, "forward replaced by a function that closes over the network"),
        SMALL,
    ),
    "forward that closes over a method": (partial(_carried, "forward replaced by a wrapper around the old one"), SMALL),
    "forward that is a bound method": (
        partial(_carried, "forward replaced by a bound method that closes over a layer"),
        SMALL,
    ),
    "forward with defaults": (partial(_carried, "forward replaced by a function with defaults"), SMALL),
    "forward that is a partial": (partial(_carried, "forward replaced by a partial with a keyword"), SMALL),
    "a weak reference": (partial(_carried, "a weak reference to the network"), SMALL),
    "a hook": (partial(_carried, "a forward hook"), SMALL),
    "compiled in place": (partial(_carried, "nn.Module.compile on the root"), SMALL),
    "torch.compile": (partial(_carried, "torch.compile"), SMALL),
    "an averaged model": (partial(_carried, "an averaged model"), SMALL),
    "torch.compile of DataParallel": (partial(_carried, "torch.compile of DataParallel"), SMALL),
    "a graph module": (partial(_carried, "a graph module"), SMALL),
    "torchvision/resnet18": (partial(_torchvision, "resnet18"), LARGE),
    "torchvision/shufflenet_v2_x0_5": (partial(_torchvision, "shufflenet_v2_x0_5"), LARGE),
    "torchvision swin, small": (_swin, (1, 3, 32, 32)),
    "timm/test_vit": (partial(_timm, "test_vit"), (1, 3, 160, 160)),
    "timm/test_convnext": (partial(_timm, "test_convnext"), LARGE),
    "timm ConvNeXt V2, small": (_convnext_v2, LARGE),
    "timm/test_nfnet": (partial(_timm, "test_nfnet"), LARGE),
    "branches, without the first": (Branches, TOKENS),
    "branches, without the others": (Branches, TOKENS),
    "branches, without any": (Branches, TOKENS),
    "timm/test_vit, without blocks": (partial(_timm, "test_vit"), (1, 3, 160, 160)),
    "torchvision ViT, without blocks": (_vit, (1, 3, 32, 32)),
    "ResNet-20, without blocks": (resnet20_cifar, (2, 3, 32, 32)),
}
CUT_AGAIN = (
    "many groups",
    "statistics over two layers",
    "an embedding without weights",
)  # a cut of a cut is verified, too
SKIPPED = {  # network -> which of its blocks a plan skips, in the order of the forward pass
    "branches, without the first": slice(0, None, 2),
    "branches, without the others": slice(1, None, 2),
    "branches, without any": slice(None),
    "timm/test_vit, without blocks": slice(0, 5),
    "torchvision ViT, without blocks": slice(0, 3),
    "ResNet-20, without blocks": slice(1, None, 2),
}
Case = tuple[tuple[ChannelGroup, ...], Plan, tuple[Block, ...]]


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Build a network with random weights that are always the same, and an input for it."""
    from benchmarks.zoo import randomise_

    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    net = randomise_(make())
    return net, torch.randn(shape, generator=seeds.generator("input", name))


def part_of(groups: Sequence[ChannelGroup], key: str) -> Plan:
    """Keep a random three fifths of every group that can be cut."""
    draw = seeds.generator("plan", key)
    kept = {
        group.name: sorted(torch.randperm(group.width, generator=draw)[: -(-group.width * 3 // 5)].tolist())
        for group in groups
        if group.is_prunable
    }
    return Plan({name: tuple(channels) for name, channels in kept.items()})


def prepare(names: Sequence[str]) -> dict[str, Case]:
    """Find the groups and blocks of the networks and choose plans."""
    cases: dict[str, Case] = {}
    for name in names:
        net, inputs = build(name)
        channels = map_channels(net, inputs, with_blocks=name in SKIPPED)
        plan = replace(part_of(channels.groups, name), skipped=_skipped(channels, name))
        if not plan.kept:
            raise SystemExit(f"nothing of {name!r} can be cut: {[group.reason for group in channels.groups]}")
        cases[name] = channels.groups, plan, channels.blocks
    return cases


def _skipped(channels: ChannelMap, name: str) -> tuple[str, ...]:
    if name not in SKIPPED:
        return ()
    skipped = tuple(block.name for block in channels.blocks if block.is_prunable)[SKIPPED[name]]
    if not skipped:
        raise SystemExit(f"no block of {name!r} can be left out: {channels.blocks}")
    return skipped


def first_finding(cases: dict[str, Case]) -> dict[str, str] | None:
    """Verify the networks one after the other; return the first one that fails, with the reason."""
    for name, (groups, plan, blocks) in cases.items():
        try:
            net, inputs = build(name)
            verify(net, groups, plan, inputs, tolerance=TOLERANCE, blocks=blocks)
            if name in CUT_AGAIN:
                left = groups_after(groups, plan)
                verify(slim(net, groups, plan), left, part_of(left, "again"), inputs, tolerance=TOLERANCE)
        except Exception as error:  # any kind is a finding
            return {"network": name, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]}
    return None


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    action, file, *names = sys.argv[1:]
    if action == "prepare":
        Path(file).write_bytes(pickle.dumps(prepare(names or list(NETWORKS))))
    else:
        package = str(Path(passdeploy.__file__).parent)
        print(json.dumps({"package": package, "finding": first_finding(pickle.loads(Path(file).read_bytes()))}))


if __name__ == "__main__":
    main()
