"""One loop for dense training and for fine-tuning, on one device or on several processes with one each.

What a step does follows from (seed, epoch, step) and the weights alone, so training that was interrupted
and goes on from its checkpoint ends with the same bits as training that was not.

The loop reports to the stage it is given and saves through the checkpoint it is given. It prints
nothing, knows no folders, and leaves the global generators and the model's mode as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from passdeploy.chance import global_chance
from passdeploy.data import ImageData, Split
from passdeploy.errors import MissingError, RunError, TrainingError
from passdeploy.events import Stage, silent
from passdeploy.lessons import Lesson, Mixing, logits_of
from passdeploy.optimizers import Schedule, WeightAverage, make_optimizer
from passdeploy.processes import ALONE, Processes

if TYPE_CHECKING:
    from passdeploy.recipe import TrainSpec


@dataclass(frozen=True)
class Accuracy:
    """How well a model names the images of a split."""

    top1: float  # correct / total
    correct: int
    total: int
    loss: float  # mean cross-entropy


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images, measured on the way: augmented images, changing weights."""

    epoch: int  # 0-based
    loss: float
    top1: float
    lr: float  # at its last step


@dataclass(frozen=True)
class FitResult:
    """What training went through; the weights are in the model."""

    history: tuple[Epoch, ...]
    resumed_at: int = 0  # epochs taken over from a checkpoint


class Checkpoint(Protocol):
    """Where a long stage leaves what it needs to go on; `RunFolder.checkpoint` makes one."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest tensors and facts that were saved whole, or None."""

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep these, which JSON and safetensors can hold, in place of earlier ones."""


@dataclass
class TrainState:
    """All that changes while a model trains, as plain tensors and JSON: nothing is pickled."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    settings: Mapping[str, Any]  # what the training was asked to do; a checkpoint of another does not load
    history: list[Epoch] = field(default_factory=list)
    scaler: torch.amp.GradScaler | None = None  # of the loss, in fp16
    average: WeightAverage | None = None

    @property
    def epoch(self) -> int:
        """Epochs that are finished."""
        return len(self.history)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and facts that JSON holds exactly."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, parameter in enumerate(self._trained()):
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{index}.{key}"] = value
        facts: dict[str, Any] = {"settings": dict(self.settings), "history": [asdict(epoch) for epoch in self.history]}
        if self.scaler:
            facts["scaler"] = self.scaler.state_dict()
        if self.average:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
            facts["average_steps"] = self.average.steps
        return tensors, facts

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go back to where `state_dict` was called.

        Raises:
            RunError: the state belongs to a training with other settings.
        """
        if facts["settings"] != dict(self.settings):
            known = facts["settings"]
            keys = {*known, *self.settings}
            changed = sorted(key for key in keys if known.get(key) != self.settings.get(key))
            raise RunError(
                f"the checkpoint was made with other settings: {', '.join(changed)} changed since.\n"
                "Resume with the recipe of the run, or start a new run without --resume."
            )
        weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        self.model.load_state_dict(weights)
        for index, parameter in enumerate(self._trained()):
            prefix = f"optimizer.{index}."
            for name in [name for name in tensors if name.startswith(prefix)]:
                buffer = _laid_out_like(parameter, tensors[name])
                self.optimizer.state[parameter][name.removeprefix(prefix)] = buffer
        if self.scaler:
            self.scaler.load_state_dict(facts["scaler"])
        if self.average:
            averages = {name.removeprefix("average."): t for name, t in tensors.items() if name.startswith("average.")}
            self.average.load_(averages, facts["average_steps"])
        self.history = [Epoch(**epoch) for epoch in facts["history"]]

    def _trained(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def fit(
    model: nn.Module,
    data: ImageData,
    spec: TrainSpec,
    *,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    tell: Stage | None = None,
    teacher: nn.Module | None = None,
    checkpoint: Checkpoint | None = None,
    clip_norm: float | None = None,
    processes: Processes = ALONE,
) -> FitResult:
    """Train `model` in place on `data.train`.

    Parameters that do not require a gradient stay as they are. A last batch that is not full is left
    out of its epoch: batch norms need more than a few images.

    Args:
        model: moved to `device`, and left there; images take its dtype.
        data: the training images; `data.test` is not looked at.
        spec: epochs, optimiser, schedule, smoothing, mixing, averaging, precision, distillation.
        batch_size: images per step, of all processes together; all of them, if there are fewer.
        seed: key of the order, the augmentation, the mixing and dropout.
        device: where to train.
        tell: the stage that hears of every step: loss, top1 of its batch, lr.
        teacher: answers for `spec.distill`, on the same device; unused without it.
        checkpoint: loaded once at the start, saved after each epoch.
        clip_norm: gradients are scaled to at most this norm; None leaves them.
        processes: that train together, each on its part of every batch.

    Raises:
        TrainingError: the loss is no longer a finite number; the checkpoint of the last whole epoch stays.
        RunError: the checkpoint belongs to a training with other settings.
        MissingError: `spec.compile`, and no working compiler.
    """
    device, stage = torch.device(device), tell or Stage("train", silent)
    model.to(device)
    batch_size = min(batch_size, len(data.train))
    steps_per_epoch = len(data.train) // batch_size
    warmup_steps = round(spec.warmup_epochs * steps_per_epoch)
    schedule = Schedule(spec.optimizer.lr, warmup_steps, spec.epochs * steps_per_epoch)
    settings = {
        "spec": spec.model_dump(mode="json"), "batch_size": batch_size, "seed": seed, "clip_norm": clip_norm,
        "images": len(data.train),
    }  # fmt: skip
    state = TrainState(
        model, make_optimizer(model, spec.optimizer), settings,
        scaler=torch.amp.GradScaler(device.type) if spec.precision == "fp16" else None,
        average=WeightAverage(model, spec.ema) if spec.ema else None,
    )  # fmt: skip
    worker = _Worker(state, spec, teacher, batch_size, clip_norm, processes)
    with _mode(model, training=True), _mode(teacher, training=False), _layout(model, spec.channels_last):
        saved = checkpoint.load() if checkpoint else None
        if saved:
            state.load_state_dict(*saved)
        resumed_at = state.epoch
        for epoch in range(resumed_at, spec.epochs):
            batches = data.train.batches(
                batch_size, epoch=epoch, seed=seed, augment=spec.augment != "none", drop_last=True, part=processes.part
            )
            meter, lr = _Meter(), 0.0
            for step, (images, labels) in enumerate(batches, start=epoch * steps_per_epoch):
                lr = schedule.lr_at(step)
                images, labels = _placed(model, images, device), labels.to(device)
                with global_chance("step", seed, epoch, step, processes.rank, device=device):
                    loss, share = worker.step(images, labels, lr, key=(seed, epoch, step, processes.rank))
                # A step that ruins the weights shows in the next loss; the last one of an epoch has no next.
                if not math.isfinite(loss) or (step + 1 == (epoch + 1) * steps_per_epoch and not _has_numbers(model)):
                    kept = f" The state after epoch {epoch} is kept." if checkpoint and epoch else ""
                    what = "a weight is not a number" if math.isfinite(loss) else f"the loss is {loss}"
                    raise TrainingError(
                        f"training diverged: {what} at step {step + 1} of {schedule.steps}, "
                        f"with a learning rate of {lr:.3g}.{kept}\n"
                        f"Lower optimizer.lr (now {spec.optimizer.lr:g}) or raise warmup_epochs."
                    )
                meter.add(loss * batch_size, share * batch_size, batch_size)
                stage.step(step + 1, schedule.steps, loss=loss, top1=share, lr=lr)
            state.history.append(Epoch(epoch, meter.loss, meter.top1, lr))
            if checkpoint:
                checkpoint.save(*state.state_dict())
        state.optimizer.zero_grad()
        if state.average:
            model.load_state_dict(state.average.tensors, strict=False)  # counts of batches have no average
    return FitResult(tuple(state.history), resumed_at)


class _Worker:
    """One step of training, as the recipe asks for it."""

    def __init__(
        self,
        state: TrainState,
        spec: TrainSpec,
        teacher: nn.Module | None,
        batch_size: int,
        clip_norm: float | None,
        processes: Processes,
    ) -> None:
        distill = spec.distill if teacher is not None else None
        self.lesson = Lesson(spec.label_smoothing, teacher if distill else None, distill)
        self.mixing = Mixing(spec.mixup, spec.cutmix)
        self.state, self.batch_size, self.clip_norm, self.processes = state, batch_size, clip_norm, processes
        self.precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(spec.precision)
        self.is_compiled = spec.compile
        self.forward: Callable[[Tensor], Any] = torch.compile(state.model) if spec.compile else state.model
        self.trained = [parameter for parameter in state.model.parameters() if parameter.requires_grad]

    def step(self, images: Tensor, labels: Tensor, lr: float, *, key: tuple[str | int, ...]) -> tuple[float, float]:
        """One step down the gradient, if the loss is a number; that loss, and the share of right answers."""
        optimizer, scaler = self.state.optimizer, self.state.scaler
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        with self.processes.sharing_statistics(), self._autocast(images.device):
            images, targets = self.mixing.mix(images, labels, *key)
            with _compiling(self.is_compiled):
                logits = logits_of(self.forward(images))
            loss = self.lesson.loss(logits.float(), images, targets)
        share = (logits.detach().argmax(dim=1) == labels).float().mean()
        loss, share = (self.processes.weigh(value, len(labels), self.batch_size) for value in (loss, share))
        found, right = (value.item() for value in self.processes.means([loss.detach(), share]))
        if math.isfinite(found):
            with self.processes.sharing_statistics():
                torch.autograd.backward(scaler.scale(loss) if scaler else loss)
            self.processes.average_gradients_(self.trained)
            if scaler:
                scaler.unscale_(optimizer)
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.trained, self.clip_norm)
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            if self.state.average:
                self.state.average.update_(self.state.model)
        return found, right

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, self.precision) if self.precision else nullcontext()


@contextmanager
def _compiling(is_compiled: bool) -> Iterator[None]:
    """The first call of a compiled network compiles; what fails there is news about the machine."""
    try:
        yield
    except Exception as error:
        if not is_compiled or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise MissingError(
            f"torch.compile does not work here: {str(error).strip().splitlines()[0][:120]}\n"
            "Install a C++ compiler, or set compile: false."
        ) from error


def evaluate(model: nn.Module, split: Split, *, batch_size: int, device: torch.device | str | None = None) -> Accuracy:
    """Top-1 accuracy and mean cross-entropy in eval mode, over the whole split in its own order.

    Args:
        model: its mode is restored afterwards.
        split: images and labels.
        batch_size: images per forward pass.
        device: where to evaluate, and where the model is left; None: where it is.
    """
    place = torch.device(device) if device is not None else _device_of(model)
    model.to(place)
    meter = _Meter()
    with torch.no_grad(), _mode(model, training=False):
        for images, labels in split.batches(batch_size):
            logits, labels = logits_of(model(_placed(model, images, place))), labels.to(place)
            loss = F.cross_entropy(logits.float(), labels, reduction="sum").item()
            meter.add(loss, _hits(logits, labels), len(labels))
    return Accuracy(meter.top1, int(meter.hits), meter.total, meter.loss)


def recalibrate_batch_norm_(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Measure the running statistics of every batch norm anew, as plain averages over `batches`.

    After channels are gone, the statistics of the layers behind them describe activations that no
    longer occur. Weights, modes and momenta stay as they are, and dropout is off.

    Raises:
        ValueError: there is no batch.
    """
    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    place, has_batch = _device_of(model), False
    with torch.no_grad(), _mode(model, training=False):
        for norm in norms:
            norm.momentum = None  # a cumulative average, in the terms of torch
            norm.training = True
        try:
            for images, _ in batches:
                if not has_batch:
                    for norm in norms:
                        norm.reset_running_stats()
                has_batch = True
                model(_placed(model, images, place))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if not has_batch:
        raise ValueError("no batch to measure the statistics of")


def _has_numbers(model: nn.Module) -> bool:
    """Whether every parameter is finite."""
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@dataclass
class _Meter:
    """Sums over samples."""

    loss_sum: float = 0.0
    hits: float = 0
    total: int = 0

    def add(self, loss_sum: float, hits: float, count: int) -> None:
        self.loss_sum, self.hits, self.total = self.loss_sum + loss_sum, self.hits + hits, self.total + count

    @property
    def loss(self) -> float:
        return self.loss_sum / max(1, self.total)

    @property
    def top1(self) -> float:
        return self.hits / max(1, self.total)


def _hits(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(dim=1) == labels).sum().item())


def _device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def _placed(model: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Images where the model is, in its dtype and, where its weights are channels-last, in that order."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), images)
    return images.to(device, weight.dtype, memory_format=_order_of(model))


def _order_of(model: nn.Module) -> torch.memory_format:
    is_last = any(
        p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in model.parameters()
    )
    return torch.channels_last if is_last else torch.contiguous_format


def _laid_out_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A buffer of the optimiser in the memory order it had: its steps then round as they did."""
    if tensor.shape != parameter.shape:
        return tensor.clone()  # a count of steps
    return torch.empty_like(parameter, requires_grad=False).copy_(tensor)


@contextmanager
def _mode(model: nn.Module | None, *, training: bool) -> Iterator[None]:
    """Put a model into training or evaluation, and each of its modules back as it was."""
    before = {module: module.training for module in model.modules()} if model is not None else {}
    if model is not None:
        model.train(training)
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


@contextmanager
def _layout(model: nn.Module, channels_last: bool) -> Iterator[None]:
    """Keep a model's 4-d weights channels-last inside, and contiguous afterwards."""
    if not channels_last:
        yield
        return
    model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        model.to(memory_format=torch.contiguous_format)
