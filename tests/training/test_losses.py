"""Mixed images, distillation, the weight average, and the options of a training step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.data.splits import ImageData, load_data
from passdeploy.errors import MissingError, TrainingError
from passdeploy.recipe import DataSpec, DistillSpec, TrainSpec
from passdeploy.training.evaluate import evaluate
from passdeploy.training.loop import fit
from passdeploy.training.losses import TrainingLoss
from passdeploy.training.mixing import MixedLabels, Mixing
from passdeploy.training.optimizers import WeightAverage
from tests.training.test_loop import Memory, same_bits, small_net

IMAGES = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)
LABELS = torch.arange(4)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(DataSpec(name="digits", image_size=8))


def mixed(mixing: Mixing, step: int) -> tuple[Tensor, MixedLabels]:
    images, labels = mixing.mix(IMAGES, LABELS, 0, step)
    assert isinstance(labels, MixedLabels)
    return images, labels


def test_without_mixing_images_and_labels_are_what_they_were():
    images, labels = Mixing().mix(IMAGES, LABELS, 0)
    assert images is IMAGES
    assert labels is LABELS


@pytest.mark.parametrize("step", range(5))
def test_mixup_blends_pixels_as_it_blends_labels(step: int):
    images, mixed_labels = mixed(Mixing(mixup=1.0), step)
    expected = mixed_labels.share * mixed_labels.labels + (1 - mixed_labels.share) * mixed_labels.others
    torch.testing.assert_close(images, expected.view(4, 1, 1, 1).expand_as(images))
    assert 0 < mixed_labels.share < 1


@pytest.mark.parametrize("step", range(5))
def test_cutmix_shares_are_the_shares_of_the_pixels(step: int):
    images, mixed_labels = mixed(Mixing(cutmix=1.0), step)
    for image, own, other in zip(images, mixed_labels.labels, mixed_labels.others, strict=True):
        assert set(image.unique().tolist()) <= {float(own), float(other)}
        if own != other:
            assert (image == own).float().mean().item() == pytest.approx(mixed_labels.share)


def test_mixing_is_a_function_of_its_key():
    first, again, other = (mixed(Mixing(mixup=0.4, cutmix=1.0), step)[0] for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_loss_of_mixed_labels_is_the_weighted_sum_of_both():
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    mixed_labels = MixedLabels(LABELS, LABELS.flip(0), 0.3)
    expected = 0.3 * F.cross_entropy(logits, LABELS) + 0.7 * F.cross_entropy(logits, LABELS.flip(0))
    torch.testing.assert_close(TrainingLoss().loss(logits, IMAGES, mixed_labels), expected)


def test_images_on_which_the_teacher_is_worse_are_not_distilled():
    logits, teacher_logits = (torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    class Teacher(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return teacher_logits

    student_loss, teacher_loss = (
        F.cross_entropy(scores, LABELS, reduction="none") for scores in (logits, teacher_logits)
    )
    assert 0 < (teacher_loss < student_loss).sum() < 4
    p, q = (teacher_logits / 2).softmax(1), (logits / 2).softmax(1)
    divergences = torch.where(teacher_loss < student_loss, 4 * (p * (p / q).log()).sum(1), student_loss)
    training_loss = TrainingLoss(teacher=Teacher(), distill=DistillSpec(alpha=0.3, temperature=2.0, only_better=True))
    expected = 0.7 * student_loss.mean() + 0.3 * divergences.mean()
    torch.testing.assert_close(training_loss.loss(logits, IMAGES, LABELS), expected)
    teacher_logits = -10 * F.one_hot(LABELS, 4).float()
    torch.testing.assert_close(training_loss.loss(logits, IMAGES, LABELS), F.cross_entropy(logits, LABELS))


def test_an_average_follows_the_weights_and_forgets_the_first_ones():
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 0.0)
    average = WeightAverage(net, 0.9)
    nn.init.constant_(net.weight, 1.0)
    average.update_(net)
    assert average.tensors["weight"].item() == pytest.approx(1 - 2 / 11)
    for _ in range(100):
        average.update_(net)
    assert average.tensors["weight"].item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("change", [{"mixup": 0.2, "cutmix": 1.0}, {"ema": 0.9}, {"precision": "bf16"}])
def test_with_every_option_a_network_learns_and_resumes_to_the_bit(digits: ImageData, change: dict[str, object]):
    spec = TrainSpec(epochs=3, optimizer={"lr": 0.1}, **change)
    whole, interrupted, fresh = small_net(), small_net(), small_net(seed=9)
    fit(whole, digits, spec, batch_size=64, seed=0, device="cpu")
    assert evaluate(whole, digits.test, batch_size=512).top1 > 0.8
    memory = Memory(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        fit(interrupted, digits, spec, batch_size=64, seed=0, device="cpu", checkpoint=memory)
    fit(fresh, digits, spec, batch_size=64, seed=0, device="cpu", checkpoint=memory)
    assert same_bits(fresh, whole)


def test_the_average_is_what_training_ends_with(digits: ImageData):
    plain, averaged = small_net(), small_net()
    for net, ema in ((plain, None), (averaged, 0.99)):
        fit(net, digits, TrainSpec(epochs=1, ema=ema), batch_size=64, seed=0, device="cpu")
    assert not torch.equal(plain[0].weight, averaged[0].weight)


def test_a_loss_that_is_not_finite_leaves_the_state_of_the_last_epoch(digits: ImageData):
    class BreaksWeights(Memory):
        def save(self, tensors, facts):
            super().save(tensors, facts)
            with torch.no_grad():
                net[8].bias.fill_(float("nan"))

    net, memory = small_net(), BreaksWeights()
    with pytest.raises(TrainingError, match="The state after step 22 is kept"):
        fit(net, digits, TrainSpec(epochs=2), batch_size=64, seed=0, device="cpu", checkpoint=memory)
    assert memory.saved is not None
    assert all(tensor.isfinite().all() for tensor in memory.saved[0].values())


def test_a_compiler_that_does_not_work_is_a_missing_error(digits: ImageData, monkeypatch: pytest.MonkeyPatch):
    from torch._dynamo.exc import BackendCompilerFailed

    def compile_(model: nn.Module) -> object:
        def forward(images: Tensor) -> Tensor:
            raise BackendCompilerFailed("inductor", RuntimeError("no g++"), None)

        return forward

    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.raises(MissingError, match=r"torch\.compile does not work here"):
        fit(small_net(), digits, TrainSpec(epochs=1, compile=True), batch_size=64, seed=0, device="cpu")
