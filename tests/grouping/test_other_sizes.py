"""Groups hold for other image sizes, batch sizes and widths than those of the example, or are protected."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import passdeploy as pd
from passdeploy.errors import EquivalenceError
from passdeploy.grouping.width_reads import reads_widths
from passdeploy.slimming.verify import check_equivalence

IMAGES = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Reshaping(nn.Module):
    """Positions and channels reshaped into each other, without a transpose, and back."""

    def __init__(self, channels: int = 64, inside: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.mix = nn.Conv2d(3, channels, 3, 2, 1), nn.Linear(channels, channels)
        self.body, self.head = nn.Conv2d(channels, 32, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        batch, channels, height, width = x.shape
        x = self.mix(x.reshape(batch, height * width, channels)).reshape(batch, channels, height, width)
        return self.head(self.body(x).relu().mean((2, 3)))


class Transposing(Reshaping):
    """The same with transposes: channels stay channels."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        batch, channels, height, width = x.shape
        x = self.mix(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(batch, channels, height, width)
        return self.head(self.body(x).relu().mean((2, 3)))


class AcrossBatch(nn.Module):
    """Samples and channels reshaped into each other; with one sample nobody can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        mixed = x.transpose(0, 1).reshape(x.shape)
        return self.head(self.body(x + mixed).relu().mean((2, 3)))


class PositionAttention(nn.Module):
    """Attention over positions, whose result (positions, channels) is reshaped to an image without a transpose.

    Args:
        strength: of the result beside what it is added to.
        bias: added to all units after it.
    """

    def __init__(self, strength: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.value = nn.Conv2d(3, 64, 3, 8, 1), nn.Conv2d(64, 64, 1)
        self.body, self.head, self.strength = nn.Conv2d(64, 32, 1), nn.Linear(32, 5), strength
        self.body.bias.data += bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        values = self.value(x).flatten(2).mT
        attention = (values @ values.mT).softmax(-1)
        mixed = (attention @ values).reshape(x.shape)
        return self.head(self.body(x + self.strength * mixed).relu().mean((2, 3)))


@pytest.mark.parametrize(
    "net",
    [
        *(Reshaping(), Reshaping(48), AcrossBatch(), PositionAttention()),
        PositionAttention(strength=1e-6),  # in float32 the error looks like rounding
        PositionAttention(bias=-100.0),  # all units after it are off, whatever comes in
    ],
    ids=["64", "48", "batch", "attention", "faint attention", "attention before dead units"],
)
def test_a_group_that_holds_at_one_size_only_is_protected(net: nn.Module):
    net.eval()
    groups = {group.name: group for group in pd.find_groups(net, IMAGES)}
    assert not groups["stem"].is_prunable
    assert groups["body"].is_prunable
    plan = pd.Plan({name: tuple(range(group.width // 2)) for name, group in groups.items() if group.is_prunable})
    for size in (16, 24, 32):
        assert pd.verify(net, tuple(groups.values()), plan, torch.randn(2, 3, size, size), tolerance=1e-5) <= 1e-5


def test_lists_of_images_are_tried_at_other_sizes_too():
    """Detectors take images of different sizes, in a list."""

    class OfList(Reshaping):
        def forward(self, images: list[Tensor]) -> list[Tensor]:
            return [super(OfList, self).forward(image[None])[0] for image in images]

    net, images = OfList().eval(), [IMAGES[0]]
    groups = {group.name: group for group in pd.find_groups(net, (images,))}
    assert not groups["stem"].is_prunable
    assert groups["body"].is_prunable
    plan = pd.Plan({"body": tuple(range(7))})
    equivalence = check_equivalence(net, tuple(groups.values()), plan, (images,), tolerance=1e-5)
    assert equivalence.input_shapes == [[[3, 16, 16]], [[3, 33, 35], [3, 33, 35]]]


class InFours(Reshaping):
    """Any four neighbours are mixed, which every width allows at even image sizes only."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.mix(x.reshape(len(x), -1, 4)).reshape(x.shape)
        return self.head(self.body(x).relu().mean((2, 3)))


@pytest.mark.parametrize("channels", [8, 64])
def test_a_group_that_holds_at_even_image_sizes_only_is_protected(channels: int):
    net = InFours(channels).eval()
    groups = {group.name: group for group in pd.find_groups(net, IMAGES)}
    assert not groups["stem"].is_prunable
    assert groups["body"].is_prunable
    plan = pd.Plan({"body": tuple(range(7))})
    assert pd.verify(net, tuple(groups.values()), plan, torch.randn(1, 3, 18, 22), tolerance=1e-5) <= 1e-5


def test_what_holds_at_every_size_stays_prunable():
    net = Transposing().eval()
    groups = {group.name: group for group in pd.find_groups(net, IMAGES)}
    assert groups["stem"].is_prunable


class InFloat32Alone(nn.Module):
    """A network that does not run in float64: it makes numbers in float32, whatever its weights are."""

    def __init__(self, network: Reshaping) -> None:
        super().__init__()
        self.network, self.shift = network, nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) + self.shift(torch.arange(4, dtype=torch.float32))


def test_a_network_that_does_not_run_in_float64_is_compared_in_float32():
    with pytest.raises(RuntimeError):
        InFloat32Alone(Transposing()).double()(IMAGES.double())
    for network, is_prunable in ((Transposing(), True), (Reshaping(), False)):
        groups = {group.name: group for group in pd.find_groups(InFloat32Alone(network), IMAGES)}
        assert groups["network.stem"].is_prunable == is_prunable


def test_verify_finds_a_group_that_holds_at_the_size_of_its_inputs_only():
    """Without channels in `other` the mean over a window of 16 x 16 is a mean over the image."""

    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.other, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            if x.shape[2] > 16:
                x = x * x.shape[1]  # a number of channels, in images that the groups were not found with
            return self.head(self.other(x).relu().mean((2, 3)))

    net = Windowed().eval()
    plan = pd.Plan({"stem": tuple(range(8))})
    groups = pd.find_groups(nn.Sequential(net.stem, net.other), IMAGES)  # a network without the branch
    renamed = tuple(
        type(group)(
            {"0": "stem", "1": "other"}[group.name],
            group.width,
            tuple(
                type(slot)(
                    slot.tensor.replace("0.", "stem.").replace("1.", "other."),
                    slot.dim,
                    slot.index,
                    slot.is_output,
                    slot.is_input,
                )
                for slot in group.slots
            ),
            group.reason,
        )
        for group in groups
    )
    with pytest.raises(EquivalenceError, match=r"on inputs of shape 2x3x33x35"):
        pd.verify(net, renamed, plan, IMAGES, tolerance=1e-5)
    found = {group.name: group.is_prunable for group in pd.find_groups(net, IMAGES)}
    assert found == {"stem": False, "other": True, "head": False}


# Numbers that meet


class Comparing(nn.Module):
    """A block whose code compares widths."""

    def __init__(self, how: Callable[[Comparing, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inputs, self.outputs, self.limit = 16, 32, 8
        self.stem, self.wide, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 1), nn.Linear(32, 5)
        self.project, self.how = nn.Conv2d(16, 32, 1), how

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.how(self, self.stem(x).relu()).mean((2, 3)))


BRANCHES: dict[str, Callable[[Comparing, Tensor], Tensor]] = {
    "attributes of layers": lambda net, x: (
        net.wide(x) + (x if net.wide.in_channels == net.wide.out_channels else net.project(x))
    ),
    "layers and tensors": lambda net, x: net.wide(x) * (2.0 if x.shape[1] == net.wide.out_channels // 2 else 1.0),
    "a stale number": lambda net, x: net.wide(x).relu() if x.shape[1] == net.inputs else net.wide(x),
    "a limit": lambda net, x: net.wide(x).relu() if x.size(1) > net.limit else net.wide(x).sigmoid(),
    "numbers alone": lambda net, x: net.project(x) if net.inputs != net.outputs else net.wide(x),
    "a number that is a size elsewhere": lambda net, x: (
        net.wide(x).view(len(x), net.outputs, -1, x.shape[-1]) + (net.project(x) if net.inputs != net.outputs else 0)
    ),
}


@pytest.mark.parametrize("how", BRANCHES.values(), ids=BRANCHES)
def test_a_branch_on_widths_is_not_flipped(how: Callable[[Comparing, Tensor], Tensor]):
    net = Comparing(how).eval()
    groups = pd.find_groups(net, IMAGES)
    prunable = [group for group in groups if group.is_prunable]
    for parts in ((2,), (4,), (2, 4), (4, 2), (1, 2), (2, 1)):
        kept = {
            group.name: tuple(range(group.width // part))
            for group, part in zip(prunable, parts * len(prunable), strict=False)
        }
        assert pd.verify(net, groups, pd.Plan(kept), IMAGES, tolerance=1e-5) <= 1e-5


class Meeting(nn.Module):
    """A block with a shortcut, whose code asks whether two widths are equal that no plan need cut alike."""

    def __init__(self, is_equal: Callable[[Meeting, Tensor, Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.is_equal = nn.Conv2d(3, 20, 3), nn.Conv2d(3, 13, 3), is_equal
        self.body, self.shortcut, self.head = nn.Conv2d(33, 52, 1), nn.Conv2d(33, 52, 1), nn.Linear(52, 5)
        self.body_width = 52

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.first(x), self.second(x)], 1)
        y = self.body(x)
        y = y + (x if self.is_equal(self, x, y) else self.shortcut(x))
        return self.head(y.relu().mean((2, 3)))

    def are_equal(self, one: int, other: int) -> bool:
        return one == other


MEETINGS: dict[str, Callable[[Meeting, Tensor, Tensor], object]] = {
    "shapes": lambda net, x, y: x.shape == y.shape,
    "sizes": lambda net, x, y: x.size(1) == y.size(1),
    "local variables": lambda net, x, y: _local_variables(x, y),
    "layers": lambda net, x, y: net.body.in_channels == net.body.out_channels,
    "a sum": lambda net, x, y: x.shape[1] + 3 - net.body.out_channels == 3,
    "the truth of a difference": lambda net, x, y: not y.shape[1] - x.shape[1],
    "an order": lambda net, x, y: not x.shape[1] < y.shape[1] and not y.shape[1] < x.shape[1],
    "another function": lambda net, x, y: _are_equal(x.shape[1], y.shape[1]),
    "a method": lambda net, x, y: net.are_equal(x.shape[1], net.body.out_channels),
}


def _are_equal(one: int, other: int) -> bool:
    return one == other


def _local_variables(x: Tensor, y: Tensor) -> bool:
    _, x_width, x_height, x_columns = x.shape
    _, y_width, y_height, y_columns = y.shape
    pixels, others = x_height * x_columns * 1 * 1 * 1 * 1, y_height * y_columns * 1 * 1 * 1 * 1
    return abs(pixels + 0 + 0 + 0 - others) < 1 and x_width == y_width


@pytest.mark.parametrize("is_equal", MEETINGS.values(), ids=MEETINGS)
def test_widths_that_plans_can_make_equal_are_protected(is_equal: Callable[[Meeting, Tensor, Tensor], object]):
    net = Meeting(is_equal).eval()
    groups = pd.find_groups(net, IMAGES)
    widths = {group.name: group.width for group in groups if group.is_prunable}
    for first, second, body in ((7, 4, 11), (20, 13, 33), (1, 1, 2), (20, 1, 21)):
        wanted = {"first": first, "second": second, "body": body}
        kept = {name: tuple(range(min(width, wanted[name]))) for name, width in widths.items()}
        assert pd.verify(net, groups, pd.Plan(kept), IMAGES, tolerance=1e-5) <= 1e-5
    assert widths, "some of the three stay prunable"


@pytest.mark.parametrize("is_method", [False, True])
def test_a_number_that_is_compared_with_one_that_follows_a_width(is_method: bool):
    """`o` is a size and follows the width of the stem; `i` is only compared with it, and has to follow as well."""

    class Comparing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.i, self.o = 16, 32
            self.stem, self.head = nn.Linear(8, 16), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.stem(x)
            differs = self.differs(self.i, self.o) if is_method else self.i != self.o
            y = torch.cat([y, y.relu()], -1) if differs else y
            return self.head(y.view(len(x), self.o).tanh())

        def differs(self, one: int, other: int) -> bool:
            return one != other

    net, x = Comparing().eval(), torch.rand(2, 8)
    groups = pd.find_groups(net, x)
    assert [group.name for group in groups if group.is_prunable] == ["stem"]
    for width in range(1, 17):
        assert pd.verify(net, groups, pd.Plan({"stem": tuple(range(width))}), x, tolerance=1e-5) <= 1e-5


def test_widths_that_the_code_compares_and_that_cannot_meet_stay_prunable():
    class Projecting(nn.Conv2d):
        """A convolution that asks whether its input fits, as many do."""

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != self.in_channels:
                raise ValueError(f"{x.shape[1]} channels")
            return super().forward(x)

    net = nn.Sequential(nn.Conv2d(3, 16, 3), Projecting(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(16, 5))
    groups = pd.find_groups(net.eval(), IMAGES)
    assert [group.is_prunable for group in groups] == [True, True, False]


def test_a_flipped_branch_that_a_norm_hides_is_found():
    """The branch doubles all channels, which instance norm takes back: in float32 nothing is left of it."""

    def doubled_and_normalised(own: Comparing, x: Tensor) -> Tensor:
        y = own.wide(x) * 30  # so large that the norm's epsilon hardly counts
        return nn.functional.instance_norm(y * 2 if own.wide.out_channels == 32 else y).relu()

    net = Comparing(doubled_and_normalised)
    groups = pd.find_groups(net.eval(), IMAGES)
    assert not next(group for group in groups if group.name == "wide").is_prunable


class Reading(nn.Module):
    """A network of convolutions whose code does something with the width of the first one."""

    def __init__(self, how: Callable[[nn.Conv2d, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body, self.head, self.how = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3), nn.Linear(12, 5), how

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.how(self.stem, self.stem(x))).mean((2, 3)))


def repeated(x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = F.silu(x)
    return x


READINGS: dict[str, Callable[[nn.Conv2d, Tensor], Tensor]] = {
    "a window": lambda stem, x: F.avg_pool2d(x, x.shape[1] // 8, 1),
    "a bound": lambda stem, x: F.hardtanh(x, 0, x.size(1) // 8),
    "a table": lambda stem, x: {16: F.silu}.get(stem.out_channels, F.relu)(x),
    "a number of steps": lambda stem, x: repeated(x, stem.weight.size(0) // 4),
    "a length": lambda stem, x: repeated(x, len(stem.weight) // 4),
    "a place": lambda stem, x: x.roll(x.shape[1] // 4, 2),
}


@pytest.mark.parametrize("how", READINGS.values(), ids=READINGS)
def test_a_width_that_is_a_number_in_the_code_is_protected(how: Callable[[nn.Conv2d, Tensor], Tensor]):
    groups = pd.find_groups(Reading(how).eval(), IMAGES)
    assert {group.name: group.is_prunable for group in groups} == {"stem": False, "body": True, "head": False}


def test_code_that_reads_a_batch_or_the_size_of_maps_reads_no_widths():
    class Resizing(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            y = F.interpolate(super().forward(x), x.shape[-2:]) + F.interpolate(x, x.size()[2:])
            return y.flatten(2).mean(2).reshape(x.shape[0], -1) * x.size(0)

    class Unpacking(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            batch, channels, _, _ = x.shape
            return super().forward(x).mean((2, 3)).view(batch, channels)

    assert not reads_widths(nn.Sequential(Resizing(3, 4, 1), nn.Flatten(), nn.BatchNorm2d(4)))
    assert reads_widths(nn.Sequential(Unpacking(3, 4, 1)))
