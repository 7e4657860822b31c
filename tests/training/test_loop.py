"""Training loop: it learns, repeats and resumes to the bit, and restores modes and random generators."""

import math
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passdeploy.data import splits
from passdeploy.data.feeding import DeviceFeed
from passdeploy.data.splits import ImageData, Split, load_data
from passdeploy.errors import RunError, TrainingError
from passdeploy.recipe import DataSpec, DistillSpec, OptimizerSpec, TrainSpec
from passdeploy.runtime.events import Event, Stage, Step
from passdeploy.training import loop, saving
from passdeploy.training.batch_norm import recalibrate_batch_norm_
from passdeploy.training.evaluate import evaluate
from passdeploy.training.loop import fit
from passdeploy.training.losses import TrainingLoss, logits_of
from passdeploy.training.optimizers import Schedule, make_optimizer
from tests.device_reads import DeviceReads


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(DataSpec(name="digits", image_size=8))


def small_net(seed: int = 0) -> nn.Module:
    """Make a network with batch norm and dropout, which make resuming hard, and with a depthwise convolution."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 10),
        ).eval()


def spec(epochs: int = 2, **changes: Any) -> TrainSpec:
    return TrainSpec(epochs=epochs, **{"optimizer": OptimizerSpec(lr=0.1), **changes})


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class Memory:
    """A checkpoint that keeps everything in memory, and can end the process after some epochs."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.saved: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self.stop_after, self.saves = stop_after, 0

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self.saved

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.saved = ({name: t.detach().clone().contiguous() for name, t in tensors.items()}, dict(facts))
        self.saves += 1
        if self.saves == self.stop_after:
            raise KeyboardInterrupt


def test_a_small_network_learns_the_digits(digits: ImageData):
    net = small_net()
    result = fit(net, digits, spec(5), batch_size=64, seed=0, device="cpu")
    accuracy = evaluate(net, digits.test, batch_size=128)
    assert accuracy.top1 > 0.93
    assert accuracy.top1 == accuracy.correct / accuracy.total
    assert accuracy.total == len(digits.test) == len(accuracy.right)
    assert int(accuracy.right.sum()) == accuracy.correct
    assert [epoch.epoch for epoch in result.history] == [0, 1, 2, 3, 4]
    assert result.history[-1].loss < result.history[0].loss


def test_the_same_seed_gives_the_same_bits_and_another_does_not(digits: ImageData):
    nets = [small_net() for _ in range(3)]
    for index, (net, seed) in enumerate(zip(nets, (1, 1, 2), strict=True)):
        torch.manual_seed(index)  # must not matter
        fit(net, digits, spec(1), batch_size=256, seed=seed, device="cpu")
    assert same_bits(nets[0], nets[1])
    assert not same_bits(nets[0], nets[2])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_training_resumed_after_an_interruption_ends_with_the_same_bits(
    digits: ImageData, name: str, channels_last: bool
):
    asked = spec(3, optimizer={"name": name, "lr": 0.01}, channels_last=channels_last)
    whole, interrupted, fresh = small_net(), small_net(), small_net(seed=9)
    expected = fit(whole, digits, asked, batch_size=256, seed=0, device="cpu")
    memory = Memory(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        fit(interrupted, digits, asked, batch_size=256, seed=0, device="cpu", checkpoint=memory)
    result = fit(fresh, digits, asked, batch_size=256, seed=0, device="cpu", checkpoint=memory)
    assert result.resumed_at == 2
    assert result.history == expected.history
    assert same_bits(fresh, whole)


@pytest.mark.parametrize("saves", [3, 5, 8])  # in the first epoch, before it is noted as finished, in the second
def test_training_goes_on_in_the_middle_of_an_epoch_with_the_same_bits(
    digits: ImageData, monkeypatch: pytest.MonkeyPatch, saves: int
):
    asked = spec(2, ema=0.9, mixup=0.2)
    whole, fresh = small_net(), small_net(seed=9)
    expected = fit(whole, digits, asked, batch_size=256, seed=0, device="cpu")
    monkeypatch.setattr(saving, "EVERY_S", 0.0)
    monkeypatch.setattr(saving, "_LARGEST_SHARE", math.inf)
    memory, steps = Memory(stop_after=saves), list[Step]()
    with pytest.raises(KeyboardInterrupt):
        fit(small_net(), digits, asked, batch_size=256, seed=0, device="cpu", checkpoint=memory)
    assert memory.saved is not None
    assert memory.saved[1]["step"] == (saves if saves < 6 else saves - 6)  # five steps and the end of an epoch
    stage = Stage("x", lambda event: steps.append(event) if isinstance(event, Step) else None)
    result = fit(fresh, digits, asked, batch_size=256, seed=0, device="cpu", checkpoint=memory, stage=stage)
    assert [step.done for step in steps] == list(range(1 + saves - (saves > 5), 11))
    assert result.history == expected.history
    assert same_bits(fresh, whole)


def test_ctrl_c_waits_for_the_end_of_a_step_and_its_state(digits: ImageData):
    def interrupt(event: Event) -> None:
        if isinstance(event, Step) and event.done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    memory, stage = Memory(), Stage("x", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(small_net(), digits, spec(1), batch_size=256, seed=0, device="cpu", checkpoint=memory, stage=stage)
    assert memory.saved is not None
    assert memory.saved[1]["step"] == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_finished_training_is_loaded_without_a_step(digits: ImageData):
    memory, steps = Memory(), list[Event]()
    done, again = small_net(), small_net(seed=9)
    fit(done, digits, spec(1), batch_size=256, seed=0, device="cpu", checkpoint=memory)
    fit(again, digits, spec(1), batch_size=256, seed=0, device="cpu", checkpoint=memory, stage=Stage("x", steps.append))
    assert not steps
    assert same_bits(done, again)


def test_a_checkpoint_of_another_training_is_refused(digits: ImageData):
    memory = Memory()
    fit(small_net(), digits, spec(1), batch_size=256, seed=0, device="cpu", checkpoint=memory)
    with pytest.raises(RunError, match="spec changed"):
        fit(small_net(), digits, spec(2), batch_size=256, seed=0, device="cpu", checkpoint=memory)


def test_training_leaves_the_mode_the_layout_and_the_global_generator_alone(digits: ImageData):
    net = small_net().train()
    net[1].eval()
    before = torch.get_rng_state()
    fit(net, digits, spec(1, channels_last=True), batch_size=512, seed=0, device="cpu")
    evaluate(net, digits.test, batch_size=512)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in (net, net[1], net[5])] == [True, False, True]
    assert all(parameter.is_contiguous() and parameter.grad is None for parameter in net.parameters())


def test_frozen_weights_stay_and_batches_take_the_dtype_of_the_model(digits: ImageData):
    net = small_net().double()
    net[0].requires_grad_(False)
    frozen, trained = net[0].weight.clone(), net[8].weight.clone()
    fit(net, digits, spec(1), batch_size=512, seed=0, device="cpu", clip_norm=1.0)
    assert torch.equal(net[0].weight, frozen)
    assert not torch.equal(net[8].weight, trained)


def test_every_step_is_reported_with_its_learning_rate(digits: ImageData):
    events: list[Event] = []
    asked = spec(2, warmup_epochs=1.0)
    fit(small_net(), digits, asked, batch_size=256, seed=0, device="cpu", stage=Stage("finetune", events.append))
    steps = [event for event in events if isinstance(event, Step)]
    assert [(step.done, step.total) for step in steps] == [(done, 10) for done in range(1, 11)]
    rates = [step.metrics["lr"] for step in steps]
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_the_learning_rate_falls_even_in_a_single_epoch(digits: ImageData):
    events: list[Event] = []
    asked = spec(1, warmup_epochs=1.0)
    fit(small_net(), digits, asked, batch_size=144, seed=0, device="cpu", stage=Stage("finetune", events.append))
    rates = [event.metrics["lr"] for event in events if isinstance(event, Step)]
    half = len(rates) // 2
    assert half > 1
    assert rates[:half] == pytest.approx([0.1 * (step + 1) / half for step in range(half)])
    assert rates[half:] == sorted(rates[half:], reverse=True)
    assert rates[-1] < 0.03


def test_a_loss_that_is_not_finite_names_the_step_and_the_learning_rate(digits: ImageData):
    net = small_net()
    with torch.no_grad():
        net[8].bias.fill_(math.nan)
    before = net[0].weight.clone()
    with pytest.raises(TrainingError, match=r"nan at step 1 of 22, with a learning rate of 0\.1") as caught:
        fit(net, digits, spec(1, warmup_epochs=0.0), batch_size=64, seed=0, device="cpu")
    assert caught.value.exit_code == 4
    assert torch.equal(net[0].weight, before)  # no step was made with it


@dataclass
class NanFromStep:
    """A split whose images are NaN from a step of an epoch on."""

    split: Split
    epoch: int
    step: int = 0

    def __len__(self) -> int:
        return len(self.split)

    def batches(self, batch_size: int, *, epoch: int, **options: object) -> Iterator[tuple[Tensor, Tensor]]:
        for step, (images, labels) in enumerate(self.split.batches(batch_size, epoch=epoch, **options)):
            yield (images * math.nan if (epoch, step) >= (self.epoch, self.step) else images), labels


def test_a_loss_that_is_not_finite_keeps_the_state_after_the_last_epoch(digits: ImageData):
    checkpoint = Memory()
    with_nans = replace(digits, train=NanFromStep(digits.train, 1))
    with pytest.raises(TrainingError, match=r"the loss is nan at step 23 of 44.*The state after step 22 is kept"):
        fit(small_net(), with_nans, spec(2), batch_size=64, seed=0, device="cpu", checkpoint=checkpoint)
    tensors, facts = checkpoint.load()
    assert len(facts["history"]) == 1
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read losses as seldom as on a GPU."""
    monkeypatch.setattr(loop, "steps_per_report", lambda device: 10)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixup": 0.2, "cutmix": 1.0, "ema": 0.9, "label_smoothing": 0.1},
        {"optimizer": OptimizerSpec(name="adamw", lr=0.01), "precision": "bf16", "channels_last": False},
        {"distill": DistillSpec()},
    ],
)
def test_nothing_is_read_from_the_device_between_reports(digits: ImageData, as_on_a_gpu: None, changes: dict[str, Any]):
    net, teacher, events = small_net(), small_net(seed=1), list[tuple[int, int]]()
    with DeviceReads([*net.state_dict().values(), *teacher.state_dict().values()]) as reads:
        stage = Stage("train", lambda event: events.append((event.done, reads.count)))
        fit(
            net,
            digits,
            spec(1, **changes),
            batch_size=64,
            seed=0,
            device="cpu",
            stage=stage,
            teacher=teacher,
            clip_norm=1,
        )
    assert events == [(step, (step + 9) // 10) for step in range(1, 23)]
    assert reads.count == 4  # of steps 1 to 10, 11 to 20, 21 and 22; of the finiteness of the weights


def test_reading_late_changes_neither_weights_nor_history(digits: ImageData, monkeypatch: pytest.MonkeyPatch):
    histories, nets, events = [], [small_net(), small_net()], ([], [])
    for net, heard, every in zip(nets, events, (1, 10), strict=True):
        monkeypatch.setattr(loop, "steps_per_report", lambda device, every=every: every)
        stage = Stage("train", heard.append)
        histories.append(fit(net, digits, spec(2), batch_size=64, seed=0, device="cpu", stage=stage).history)
    assert same_bits(*nets)
    assert histories[0] == histories[1]
    assert events[0] == events[1]


@pytest.mark.parametrize("is_resident", [True, False])
def test_batches_made_for_a_gpu_train_and_evaluate_with_the_same_bits(
    digits: ImageData, monkeypatch: pytest.MonkeyPatch, is_resident: bool
):
    monkeypatch.setattr(DeviceFeed, "_fits", lambda self: is_resident)
    nets, found = [small_net(), small_net()], []
    for net, is_fed in zip(nets, (False, True), strict=True):
        monkeypatch.setattr(splits, "is_fed", lambda device, is_fed=is_fed: is_fed)
        result = fit(net, digits, spec(2), batch_size=64, seed=0, device="cpu")
        found.append((result.history, evaluate(net, digits.test, batch_size=50)))
    assert same_bits(*nets)
    assert found[0] == found[1]


def test_an_answer_that_is_not_a_number_is_wrong(digits: ImageData):
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(digits.image_shape), 10))
    nn.init.constant_(net[1].bias, math.nan)  # whose largest is the first class
    accuracy = evaluate(net, digits.test, batch_size=50)
    assert (accuracy.top1, accuracy.correct) == (0.0, 0)


def test_evaluation_reads_the_device_at_its_end_alone(digits: ImageData):
    net = small_net()
    with DeviceReads(net.state_dict().values()) as reads:
        evaluate(net, digits.test, batch_size=50)
    assert reads.count == 2  # sums, and which images were right


@pytest.mark.parametrize("step", [1, 6, 22])
def test_a_loss_that_is_read_late_names_its_own_step_and_is_never_saved(
    digits: ImageData, as_on_a_gpu: None, step: int
):
    checkpoint, heard = Memory(), list[int]()
    with_nans = replace(digits, train=NanFromStep(digits.train, epoch=1, step=step - 1))
    stage = Stage("train", lambda event: heard.append(event.done))
    expected = rf"nan at step {22 + step} of 66.*The state after step 22 is kept"
    with pytest.raises(TrainingError, match=expected) as caught:
        fit(small_net(), with_nans, spec(3), batch_size=64, seed=0, device="cpu", checkpoint=checkpoint, stage=stage)
    assert f"with a learning rate of {Schedule(0.1, 22, 66).lr_at(21 + step):.3g}." in str(caught.value)
    assert heard == list(range(1, 22 + step))
    tensors, facts = checkpoint.load()
    assert len(facts["history"]) == 1
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_weights_that_are_not_finite_after_an_epoch_are_not_saved(digits: ImageData):
    checkpoint, net = Memory(), small_net()
    net[8].bias.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match="a weight is not a number at step 1 of 1"):
        fit(net, digits, spec(1), batch_size=5000, seed=0, device="cpu", checkpoint=checkpoint)
    assert checkpoint.load() is None


def test_a_set_smaller_than_a_batch_still_trains(digits: ImageData):
    events: list[Event] = []
    fit(small_net(), digits, spec(1), batch_size=5000, seed=0, device="cpu", stage=Stage("x", events.append))
    assert len(events) == 1


def test_the_schedule_ends_just_above_zero():
    schedule = Schedule(peak=1.0, warmup_steps=0, steps=100)
    assert schedule.lr_at(0) == 1.0
    assert 0 < schedule.lr_at(99) < 0.001


def test_a_fused_optimizer_has_its_buffers_in_the_order_of_the_weights(
    digits: ImageData, monkeypatch: pytest.MonkeyPatch
):
    """With a loss scaler the buffers are there before the first gradient; a fused step on a GPU compares strides."""
    orders: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def fused(model: nn.Module, spec: OptimizerSpec, *, is_fused: bool) -> torch.optim.Optimizer:
        optimizer = make_optimizer(model, spec, is_fused=True)
        orders.extend((p.stride(), optimizer.state[p]["momentum_buffer"].stride()) for p in model.parameters())
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", fused)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 10, 6), nn.Flatten())
    fit(net, digits, TrainSpec(epochs=1, channels_last=True), batch_size=900, seed=0, device="cpu")
    assert [weight for weight, _ in orders] == [buffer for _, buffer in orders]
    assert orders[0][0] == (27, 1, 9, 3)


def test_norms_and_biases_do_not_decay():
    net = small_net()
    decaying, others = make_optimizer(net, OptimizerSpec(weight_decay=0.1)).param_groups
    assert [p.ndim for p in decaying["params"]] == [4, 4, 2]
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(others["params"]) == 4  # batch norm's two, two biases


def test_distillation_weighs_labels_against_the_teachers_softened_outputs():
    logits, images, labels = (
        torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
        torch.zeros(4),
        torch.arange(4) % 3,
    )
    teacher_logits = logits.flip(0)

    class Teacher(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return teacher_logits

    p, q = (teacher_logits / 2).softmax(1), (logits / 2).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    expected = 0.7 * F.cross_entropy(logits, labels) + 0.3 * 4 * divergence
    training_loss = TrainingLoss(teacher=Teacher(), distill=DistillSpec(alpha=0.3, temperature=2.0))
    torch.testing.assert_close(training_loss.loss(logits, images, labels), expected)
    torch.testing.assert_close(TrainingLoss().loss(logits, images, labels), F.cross_entropy(logits, labels))


def test_a_student_learns_from_the_teachers_outputs_alone_and_the_teacher_stays_as_it_is(digits: ImageData):
    teacher, student = small_net(), small_net(seed=1)
    fit(teacher, digits, spec(3), batch_size=64, seed=0, device="cpu")
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    teacher.train()
    asked = spec(2, distill=DistillSpec(alpha=1.0, temperature=2.0))
    fit(student, digits, asked, batch_size=64, seed=0, device="cpu", teacher=teacher)
    assert evaluate(student, digits.test, batch_size=512).top1 > 0.85  # never saw a label
    assert teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_statistics_of_a_network_that_draws_at_random_are_the_same_again():
    """Detectors in training mode sample proposals."""
    norm, batches = nn.BatchNorm1d(3), [torch.randn(16, 3) for _ in range(2)]

    def run(network: nn.Module, batch: Tensor) -> None:
        network(batch[torch.randperm(len(batch))[:4]])

    found = []
    for _ in range(2):
        state = torch.get_rng_state()
        recalibrate_batch_norm_(norm, batches, run=run)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(norm.running_mean.clone())
        torch.rand(1)
    assert torch.equal(*found)


def test_recalibrated_statistics_are_plain_averages_over_the_batches():
    norm = nn.BatchNorm1d(2, momentum=0.3).eval()
    net = nn.Sequential(norm, nn.Dropout(0.9)).eval()
    batches = [torch.randn(8, 2, generator=torch.Generator().manual_seed(seed)) + seed for seed in range(3)]
    recalibrate_batch_norm_(net, ((batch, torch.zeros(8)) for batch in batches))
    torch.testing.assert_close(norm.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert (norm.momentum, norm.training, net.training) == (0.3, False, False)


def test_recalibration_without_a_batch_changes_nothing():
    norm = nn.BatchNorm1d(2)
    norm.running_mean = torch.ones(2)
    with pytest.raises(ValueError, match="no batch"):
        recalibrate_batch_norm_(norm, [])
    assert norm.running_mean.tolist() == [1, 1]


def test_the_first_of_several_outputs_is_the_scores():
    assert logits_of((torch.ones(1), torch.zeros(1))).item() == 1
