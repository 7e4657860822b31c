"""Code that the example does not reach, or that hides what it computes: it stays, or `verify` refuses the cut."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy import Plan, find_groups, slim, verify
from passdeploy.errors import EquivalenceError, ModelError
from passdeploy.grouping.risk import RequiredCheck, required_check
from passdeploy.tracing.trace_channels import trace_channels

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    """A stem, what `body` makes of it, and a head."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def body(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


class EarlyExit(Base):
    """Returns the answer of an exit for images on which it is sure; the example is no such image."""

    def __init__(self, *, runs_before: bool) -> None:
        super().__init__()
        self.runs_before, self.exit, self.late = runs_before, nn.Linear(16, 10), nn.Conv2d(16, 24, 3, padding=1)
        self.head = nn.Conv2d(24, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.runs_before:
            answer = self.exit(x.mean((2, 3)))
            if answer.softmax(1).amax(1).min() > 0.99:
                return answer
        elif x.amax() > 50:
            return self.exit(x.mean((2, 3)))
        return self.head(self.late(x).relu()).mean((2, 3))


def prunable(net: nn.Module, images: Tensor = IMAGES) -> dict[str, bool]:
    torch.manual_seed(0)
    return {group.name: group.is_prunable for group in find_groups(net.eval(), images)}


@pytest.mark.parametrize(("runs_before", "layer"), [(True, "exit"), (False, "stem")])
def test_the_classes_of_an_early_exit_stay_and_what_it_reads_where_it_did_not_run(runs_before: bool, layer: str):
    found = prunable(EarlyExit(runs_before=runs_before))
    assert not found[layer]
    assert found["late"]


class KeepsAnOutput(Base):
    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Conv2d(16, 10, 1)

    def body(self, x: Tensor) -> Tensor:
        self.answer, self.features = self.classes(x).flatten(2).mean(2), x
        return x


def test_what_is_kept_in_an_attribute_and_read_by_no_layer_is_an_output():
    found = prunable(KeepsAnOutput())
    assert not found["classes"]
    assert found["stem"]  # its channels are kept as well, and the head reads them


class OwnTensor(torch.Tensor):
    pass


def test_images_of_a_class_that_hides_where_values_come_from_are_refused():
    with pytest.raises(ModelError, match="no output of the network can be followed"):
        find_groups(Base().eval(), IMAGES.as_subclass(OwnTensor))


class AsOwnTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).as_subclass(OwnTensor)


def test_outputs_of_such_a_class_are_refused():
    with pytest.raises(ModelError, match="Give and return plain tensors"):
        find_groups(AsOwnTensor().eval(), IMAGES)


class DropsChannels(Base):
    def body(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), self.dim, 1, 1) < 0.9) if self.training else x


class FlippedInTraining(Base):
    def body(self, x: Tensor) -> Tensor:
        return x.flip(1) if self.training else x


class CentredInTraining(Base):
    def body(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True) if self.training else x


class AuxiliaryHead(Base):
    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(16, 4)

    def body(self, x: Tensor) -> Tensor:
        if self.training:
            self.extra = self.auxiliary(x.permute(0, 2, 3, 1).reshape(-1, self.dim)).mean(0)
        return x


class TwoViews(Base):
    def body(self, x: Tensor) -> Tensor:
        return x.view(2, -1, self.dim, *x.shape[2:])[0] if self.training else x


class MixedByNumpyAndPython(Base):
    def body(self, x: Tensor) -> Tensor:
        share = float(np.random.beta(1, 1)) * random.random() if self.training else 0.0  # noqa: NPY002
        return x + share * x.flip(0)


class BranchByChance(Base):
    def body(self, x: Tensor) -> Tensor:
        return x + x.std() if self.training and torch.rand(1).item() < 0.3 else x


class BranchOfThree(Base):
    def body(self, x: Tensor) -> Tensor:
        which = int(torch.randint(0, 3, (1,))) if self.training else 0
        return x.flip(1) if which == 1 else x


class BranchByPython(Base):
    def body(self, x: Tensor) -> Tensor:
        return x.flip(1) if self.training and random.random() > 0.9 else x


class ReturnsMore(Base):
    """Returns a term of the loss in training mode."""

    def more(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return (self.head(x), self.more(x)) if self.training else self.head(x)


class MaskedAtRandom(ReturnsMore):
    def more(self, x: Tensor) -> Tensor:
        return (x * (torch.rand(len(x), 1, *x.shape[2:]) > 0.5)).mean(1)


class SomeMinusInfinity(ReturnsMore):
    def more(self, x: Tensor) -> Tensor:
        attention = x.mean(1)
        return attention.masked_fill(torch.arange(attention.shape[-1]) > 3, -float("inf"))


class GradientPenalty(ReturnsMore):
    def more(self, x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(x.mean(1).square().sum(), x, create_graph=True)
        return slope.square().sum((1, 2, 3))


class TwoViewsAgree(ReturnsMore):
    def more(self, x: Tensor) -> Tensor:
        one, two = F.conv2d(3 * x, self.head.weight), 3 * F.conv2d(x, self.head.weight)
        return (one - two).square().mean()  # zero up to rounding


class ScaledByWhatItSaw(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def body(self, x: Tensor) -> Tensor:
        scaled = x / self.scale
        if self.training:
            self.scale = 0.9 * self.scale + 0.1 * x.detach().square().mean().sqrt()
        return scaled


class ScaledByATensorItKeeps(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.last = torch.ones(1), torch.zeros(())

    def body(self, x: Tensor) -> Tensor:
        scaled = x / self.scale
        if self.training:
            self.last = x.detach().square().mean()
            self.scale.mul_(0.9).add_(0.1 * self.last.sqrt())
        return scaled


class CentredByAFunction(Base):
    def body(self, x: Tensor) -> Tensor:
        return centred(self, x)


def centred(module: nn.Module, x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True) if getattr(module, "training") else x  # noqa: B009 - as somebody may write it


class InFloat32(Base):
    def body(self, x: Tensor) -> Tensor:
        return x.float() + 0.02 * x.float().std() if self.training else x


class CentringDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True) if self.training else x


class NamedLikeDropout(Base):
    def __init__(self) -> None:
        super().__init__()
        self.drop = CentringDropout()

    def body(self, x: Tensor) -> Tensor:
        return self.drop(x)  # type: ignore[no-any-return]


class NoiseOfItsOwn(Base):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def body(self, x: Tensor) -> Tensor:
        return x + torch.randn(len(x), 1, 1, 1, generator=self.generator) if self.training else x


class KeepsAtLeastOne(Base):
    def body(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.rand(3) > 0.5
        while not keep.any():
            keep = torch.rand(3) > 0.5
        return x * keep.sum()


HIDDEN = np.random.default_rng(0)


class NoiseOfAHiddenGenerator(Base):
    def body(self, x: Tensor) -> Tensor:
        return x * float(HIDDEN.random()) if self.training else x


class DropsAsUsual(Base):
    def body(self, x: Tensor) -> Tensor:
        keep = x.new_empty(len(x), 1, 1, 1).bernoulli_(0.8) if self.training else 1
        return F.dropout(F.dropout2d(x, 0.3, self.training), 0.2, self.training).relu() * keep


@pytest.mark.parametrize(
    "make",
    [
        DropsChannels,
        FlippedInTraining,
        CentredInTraining,
        AuxiliaryHead,
        TwoViews,
        BranchByChance,
        BranchOfThree,
        BranchByPython,
        MaskedAtRandom,
        GradientPenalty,
        SomeMinusInfinity,
        ScaledByWhatItSaw,
        ScaledByATensorItKeeps,
        CentredByAFunction,
        InFloat32,
        NamedLikeDropout,
    ],
)
def test_channels_stay_that_are_told_apart_in_training_mode_alone(make: Callable[[], nn.Module]):
    torch.manual_seed(0)
    (stem,) = (group for group in find_groups(make().eval(), IMAGES) if group.name == "stem")
    assert "in training mode the function changes with their number" in (stem.reason or "")


class InfiniteInTraining(Base):
    def body(self, x: Tensor) -> Tensor:
        return x.flip(1) / 0 if self.training else x


class WantsTargets(Base):
    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.training:
            return F.cross_entropy(super().forward(x).mean((2, 3)), targets)
        return super().forward(x)


def states_of_generators() -> tuple[object, list[int], int]:
    _, keys, position, *_ = np.random.get_state()  # noqa: NPY002
    return random.getstate(), keys.tolist(), position


@pytest.mark.parametrize(
    "make",
    [
        Base,
        DropsAsUsual,
        MixedByNumpyAndPython,
        InfiniteInTraining,
        WantsTargets,
        TwoViewsAgree,
        NoiseOfItsOwn,
        KeepsAtLeastOne,
        NoiseOfAHiddenGenerator,
    ],
)
def test_dropout_keeps_no_channel_and_neither_does_what_cannot_be_compared(make: Callable[[], nn.Module]):
    torch.manual_seed(0)
    net = make().eval()
    drawn = states_of_generators()
    groups = find_groups(net, IMAGES)
    assert groups[0].is_prunable
    assert verify(net, groups, Plan({"stem": tuple(range(0, 16, 2))}), IMAGES, tolerance=1e-5) < 1e-6
    assert states_of_generators() == drawn


class AloneByStatedWidth(Base):
    def body(self, x: Tensor) -> Tensor:
        return x.view(self.dim, *x.shape[2:])[None] if x.shape[0] == 1 else x


class AloneFlipped(Base):
    def body(self, x: Tensor) -> Tensor:
        return x.roll(1, 1) if len(x) == 1 else x


class LargeInTiles(Base):
    def body(self, x: Tensor) -> Tensor:
        if x.shape[-1] <= 100:
            return x
        whole = x.new_zeros(len(x), self.dim, *x.shape[2:])
        for start in range(0, x.shape[2], 64):
            whole[:, :, start : start + 64] = x[:, :, start : start + 64]
        return whole


class LargeFlipped(Base):
    def body(self, x: Tensor) -> Tensor:
        return x.flip(1) if x.shape[-1] >= 500 else x


class SmallFlipped(Base):
    def body(self, x: Tensor) -> Tensor:
        return x.flip(1) if x.shape[-1] < 10 else x


class SeveralFlipped(Base):
    def body(self, x: Tensor) -> Tensor:
        return x.flip(1) if len(x) > 1 else x


class LargePooled(Base):
    def body(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 4) if x.shape[-1] > 200 else x


@pytest.mark.parametrize(
    ("make", "images"),
    [
        (AloneByStatedWidth, IMAGES),
        (AloneFlipped, IMAGES),
        (LargeInTiles, IMAGES),
        (LargeFlipped, IMAGES),
        (SmallFlipped, IMAGES),
        (SeveralFlipped, IMAGES[:1]),
    ],
)
def test_channels_stay_that_are_told_apart_at_another_size_alone(make: Callable[[], nn.Module], images: Tensor):
    assert not prunable(make(), images)["stem"]


def test_another_path_that_treats_channels_alike_keeps_none():
    assert prunable(LargePooled())["stem"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (DropsChannels, "does not run in training mode"),
        (TwoViews, "does not run in training mode"),
        (FlippedInTraining, "in training mode the slim network differs from the masked one"),
        (AloneByStatedWidth, "does not run on inputs of shape 1x3x16x16"),
        (AloneFlipped, "differs from the masked one"),
    ],
)
def test_what_another_mode_or_a_single_image_shows_is_refused(make: Callable[[], nn.Module], words: str):
    torch.manual_seed(0)
    net, groups = make().eval(), find_groups(Base().eval(), IMAGES)
    state = torch.get_rng_state()
    with pytest.raises(EquivalenceError, match=words):
        verify(net, groups, Plan({"stem": tuple(range(0, 16, 2))}), IMAGES, tolerance=1e-5)
    assert torch.equal(torch.get_rng_state(), state)


class ChangesItsInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5).div_(0.2))


def test_a_network_that_changes_its_input_is_compared_on_the_same_images():
    net, images = ChangesItsInput().eval(), IMAGES.clone()
    groups = find_groups(net, IMAGES.clone())
    assert verify(net, groups, Plan({"stem": tuple(range(7))}), images, tolerance=1e-5) <= 1e-5
    assert torch.equal(images, IMAGES)


class Computed(nn.Module):
    """A convolution whose weight is computed, or no parameter."""

    def __init__(self, inputs: int, outputs: int, compute: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        weight = torch.randn(outputs, inputs, 3, 3, generator=torch.Generator().manual_seed(0))
        self.compute = compute or (lambda given: given)
        if compute is None:
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.compute(self.weight), padding=1)


@pytest.mark.parametrize(
    ("compute", "is_prunable"),
    [(torch.sigmoid, False), (lambda weight: 1 + weight, False), (None, False), (lambda weight: 0.5 * weight, True)],
)
def test_weights_that_a_mask_does_not_make_zero_are_compared(
    compute: Callable[[Tensor], Tensor] | None, is_prunable: bool
):
    net = nn.Sequential(Computed(3, 16, compute), nn.ReLU(), Computed(16, 5, compute))
    assert prunable(net).get("0", False) == is_prunable


@pytest.mark.parametrize("norm", [nn.InstanceNorm1d(64), nn.BatchNorm1d(64, track_running_stats=False)])
def test_statistics_of_a_batch_over_channels_keep_them(norm: nn.Module):
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.head = nn.Conv2d(3, 16, 2, stride=2), norm, nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.stem(x).flatten(2).transpose(1, 2)))

    assert not prunable(Tokens())["stem"]


class OwnNorm(nn.LayerNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), (self.width,), self.weight, self.bias).movedim(-1, 1)


@pytest.mark.parametrize(
    "body",
    [
        lambda self, x: x.narrow(1, 0, self.dim),
        lambda self, x: x.split([self.dim], 1)[0],
        lambda self, x: x.unfold(1, self.dim, 1)[..., 0, :, :, :].movedim(-1, 1),
        lambda self, x: self.norm(x),
    ],
)
def test_whole_widths_that_the_code_states_follow_the_cut(body: Callable[[nn.Module, Tensor], Tensor]):
    class Stating(Base):
        def __init__(self) -> None:
            super().__init__()
            self.dim, self.norm = 16, OwnNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(body(self, self.stem(x)))

    torch.manual_seed(0)
    net = Stating().eval()
    groups = find_groups(net, IMAGES)
    plan = Plan({group.name: tuple(range(0, 16, 2)) for group in groups if group.is_prunable})
    assert not plan.kept or verify(net, groups, plan, IMAGES, tolerance=1e-5) <= 1e-5


def test_a_norm_of_a_subclass_may_state_its_width():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), OwnNorm(16), nn.Conv2d(16, 4, 1)).eval()
    trace = trace_channels(net, IMAGES)
    assert required_check(trace, lambda name: type(net.get_submodule(name))) >= RequiredCheck.SIZES


class ByWidth(Base):
    def body(self, x: Tensor) -> Tensor:
        kernel = 3 if x.shape[1] > 4 else 1
        return F.avg_pool2d(x, kernel, 1, kernel // 2)


def test_a_kernel_that_is_chosen_by_a_width_keeps_it():
    assert not prunable(ByWidth())["stem"]


def test_copies_are_followed_where_torch_makes_them():
    class Copying(Base):
        def body(self, x: Tensor) -> Tensor:
            return copy.deepcopy(x)

    assert prunable(Copying())["stem"]


class NestedTensors(Base):
    def body(self, x: Tensor) -> Tensor:
        return torch.nested.nested_tensor(list(x)).to_padded_tensor(0.0)


class Broken(Base):
    def body(self, x: Tensor) -> Tensor:
        raise RuntimeError("of its own")


def test_a_network_that_runs_but_cannot_be_followed_is_refused_with_the_reason():
    with pytest.raises(ModelError, match="its channels cannot be followed: RuntimeError"):
        find_groups(NestedTensors().eval(), IMAGES)
    with pytest.raises(RuntimeError, match="of its own"):
        find_groups(Broken().eval(), IMAGES)


class OwnParameter(nn.Parameter):
    def doubled(self) -> Tensor:
        return self * 2


class ScaledByOwnParameter(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scale = OwnParameter(torch.randn(16))
        self.scale.gain = 3.0

    def body(self, x: Tensor) -> Tensor:
        return x * (self.scale.doubled() * self.scale.gain)[:, None, None]


def test_parameters_keep_their_class_and_their_attributes():
    torch.manual_seed(0)
    net, plan = ScaledByOwnParameter().eval(), Plan({"stem": tuple(range(0, 16, 2))})
    groups = find_groups(net, IMAGES)
    assert verify(net, groups, plan, IMAGES, tolerance=1e-5) < 1e-6
    scale = slim(net, groups, plan).scale
    assert (type(scale), scale.gain, scale.shape, scale.requires_grad) == (OwnParameter, 3.0, (8,), True)


class CachesAWeight(Base):
    cached: Tensor | None = None

    def body(self, x: Tensor) -> Tensor:
        if self.cached is None:
            self.cached = torch.ones(3)
        return x * self.cached[0]


def test_verify_leaves_no_attributes_behind_in_the_network():
    torch.manual_seed(0)
    net = CachesAWeight().eval()
    groups = find_groups(net, IMAGES)
    verify(net, groups, Plan({"stem": tuple(range(0, 16, 2))}), IMAGES, tolerance=1e-5)
    assert "cached" not in vars(net)
