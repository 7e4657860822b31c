"""Training loop for dense training and for fine-tuning, on one device or on several processes with one device each.

Every step is a function of (seed, epoch, step) and the weights alone, so training that was interrupted
and resumed from its checkpoint, in the middle of an epoch or not, ends with the same bits as training that was not.

Nothing is read back from a GPU between reports (`deferred.py`), so that it always has steps queued.

The loop reports to a `Stage` and saves through a `Checkpoint`. It prints nothing, opens no files, and
restores the state of the global random generators and the model's mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from passdeploy.data.splits import ImageData
from passdeploy.errors import MissingError, TrainingError, first_line
from passdeploy.models.modes import evaluating
from passdeploy.runtime.distributed import SINGLE_PROCESS, Processes
from passdeploy.runtime.events import Stage, silent
from passdeploy.runtime.seeds import seeded_global_generators
from passdeploy.training.deferred import DeferredScalars, StepReport, steps_per_report
from passdeploy.training.losses import TrainingLoss, logits_of
from passdeploy.training.mixing import Mixing
from passdeploy.training.optimizers import Schedule, WeightAverage, make_optimizer
from passdeploy.training.placement import channels_last_inside, placed_like
from passdeploy.training.saving import Checkpoint, saving
from passdeploy.training.state import FitResult, TrainState
from passdeploy.training.step import divergence, gradient_step_

if TYPE_CHECKING:
    from passdeploy.recipe import TrainSpec


def fit(
    model: nn.Module,
    data: ImageData,
    spec: TrainSpec,
    *,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    stage: Stage | None = None,
    teacher: nn.Module | None = None,
    checkpoint: Checkpoint | None = None,
    clip_norm: float | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> FitResult:
    """Train `model` in place on `data.train`.

    Parameters that do not require a gradient stay as they are. A last batch that is not full is left
    out of its epoch: batch norms need more than a few images.

    Args:
        model: moved to `device`, and left there; images take its dtype.
        data: the training images; `data.test` is not used.
        spec: epochs, optimiser, schedule, smoothing, mixing, averaging, precision, distillation.
        batch_size: images per step, of all processes together; all of them, if there are fewer.
        seed: key of the order, the augmentation, the mixing and dropout.
        device: where to train.
        stage: hears of every step: loss, top1 of its batch, lr; with a GPU of several steps at once, later.
        teacher: of `spec.distill`, on the same device; unused without it.
        checkpoint: loaded once at the start; saved after each epoch, after a minute of work in an epoch, and before
            SIGINT or SIGTERM ends the program.
        clip_norm: largest norm of all gradients together; larger ones are scaled down to it. None: no clipping.
        processes: that train together, each on its part of every batch.

    Raises:
        TrainingError: the loss or a weight is not finite; the checkpoint before it stays.
        RunError: the checkpoint was made with other settings.
        MissingError: `spec.compile` is set, and torch.compile does not work here.
    """
    device, stage = torch.device(device), stage or Stage("train", silent)
    model.to(device)
    batch_size = min(batch_size, len(data.train))
    steps_per_epoch = len(data.train) // batch_size
    steps = spec.epochs * steps_per_epoch
    warmup_steps = min(round(spec.warmup_epochs * steps_per_epoch), steps // 2)  # the rate falls, even in one epoch
    schedule = Schedule(spec.optimizer.lr, warmup_steps, steps)
    settings = {
        "spec": spec.model_dump(mode="json"),
        "batch_size": batch_size,
        "seed": seed,
        "clip_norm": clip_norm,
        "images": len(data.train),
    }
    with (
        evaluating(model, training=True),
        nullcontext() if teacher is None else evaluating(teacher),
        channels_last_inside(model, spec.channels_last),
        saving(checkpoint, processes) as saves,
    ):
        # after the change of memory order, which the buffers of a fused optimiser must have as well
        state = TrainState(
            model,
            make_optimizer(model, spec.optimizer, is_fused=spec.precision == "fp16" and device.type == "cuda"),
            settings,
            scaler=torch.amp.GradScaler(device.type) if spec.precision == "fp16" else None,
            average=WeightAverage(model, spec.ema) if spec.ema else None,
        )
        train_step = _TrainStep(state, spec, teacher, batch_size, clip_norm, processes)
        saved = checkpoint.load() if checkpoint else None
        if saved:
            state.load_state_dict(*saved)
        resumed_at = state.epoch
        progress = _Progress(spec, schedule, stage, batch_size, state)
        progress.saved_steps = resumed_at * steps_per_epoch + state.step
        for epoch in range(resumed_at, spec.epochs):
            before = epoch * steps_per_epoch
            batches = data.train.batches(
                batch_size,
                epoch=epoch,
                seed=seed,
                augment=spec.random_changes,
                drop_last=True,
                part=processes.part,
                device=device,
                first=state.step,
            )
            deferred = DeferredScalars(every=steps_per_report(device))
            for step, (images, labels) in enumerate(batches, start=before + state.step):
                images, labels = placed_like(model, images, device), labels.to(device)
                key = seed, epoch, step, processes.rank
                with seeded_global_generators("step", *key, device=device):
                    loss, scalars = train_step.forward(images, labels, key=key)
                    # before the update: a loss that is read at once and not finite leaves the weights as they are
                    progress.hear(deferred.add(step, **scalars, lr=schedule.lr_at(step)))
                    train_step.update_(loss, schedule.lr_at(step))
                state.step += 1
                if saves.is_wanted(deferred):
                    progress.hear(deferred.flush())
                    if saves.save(state):
                        progress.saved_steps = step + 1
            progress.hear(deferred.flush())
            # A weight that is not finite shows in the next loss; the last step of an epoch has none before saving.
            last_step = before + steps_per_epoch - 1
            progress.require_finite(divergence(0.0, model.parameters()), last_step)
            state.end_epoch_(schedule.lr_at(last_step))
            saves.agree()
            if checkpoint and saves.save(state):
                progress.saved_steps = last_step + 1
        state.optimizer.zero_grad()
        if state.average:
            model.load_state_dict(state.average.tensors, strict=False)  # batch norms' counters are not averaged
    return FitResult(tuple(state.history), resumed_at)


class _Progress:
    """Reports of the steps, checked, averaged over their epoch, and passed on to the stage."""

    def __init__(self, spec: TrainSpec, schedule: Schedule, stage: Stage, batch_size: int, state: TrainState) -> None:
        self.spec, self.schedule, self.stage, self.batch_size, self.state = spec, schedule, stage, batch_size, state
        self.saved_steps = 0  # of which a checkpoint has the result

    def hear(self, reports: Iterable[StepReport]) -> None:
        """Pass reports on; raise a TrainingError at the first whose loss is not finite."""
        for report in reports:
            loss, top1 = report.values["loss"], report.values["top1"]
            self.require_finite(divergence(loss), report.step)
            self.state.meter.add(loss * self.batch_size, top1 * self.batch_size, self.batch_size)
            self.stage.step(report.step + 1, self.schedule.steps, **report.values)

    def require_finite(self, problem: str | None, step: int) -> None:
        """Raise a TrainingError if there is a problem."""
        if problem:
            kept = f" The state after step {self.saved_steps} is kept." if self.saved_steps else ""
            raise TrainingError(
                f"training diverged: {problem} at step {step + 1} of {self.schedule.steps}, "
                f"with a learning rate of {self.schedule.lr_at(step):.3g}.{kept}\n"
                f"Lower optimizer.lr (now {self.spec.optimizer.lr:g}) or raise warmup_epochs."
            )


class _TrainStep:
    """One training step: mixing, forward pass, loss, gradient step and weight average as the recipe sets them."""

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
        self.training_loss = TrainingLoss(spec.label_smoothing, teacher if distill else None, distill)
        self.mixing = Mixing(spec.mixup, spec.cutmix)
        self.state, self.batch_size, self.clip_norm, self.processes = state, batch_size, clip_norm, processes
        self.precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(spec.precision)
        self.is_compiled = spec.compile
        self.forward_pass: Callable[[Tensor], Any] = torch.compile(state.model) if spec.compile else state.model
        self.trained = [parameter for parameter in state.model.parameters() if parameter.requires_grad]

    def forward(
        self, images: Tensor, labels: Tensor, *, key: tuple[str | int, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to differentiate, and loss and top-1 accuracy of the whole batch, still on the device."""
        self.state.optimizer.zero_grad()
        with self.processes.synchronised_batch_norm(), self._autocast(images.device):
            images, targets = self.mixing.mix(images, labels, *key)
            with _compile_errors(self.is_compiled):
                logits = logits_of(self.forward_pass(images))
            loss = self.training_loss.loss(logits.float(), images, targets)
        top1 = (logits.detach().argmax(dim=1) == labels).float().mean()
        loss, top1 = (self.processes.scale_loss(value, len(labels), self.batch_size) for value in (loss, top1))
        mean_loss, mean_top1 = self.processes.average([loss.detach(), top1])
        return loss, {"loss": mean_loss, "top1": mean_top1}

    def update_(self, loss: Tensor, lr: float) -> None:
        """Differentiate the loss and update the weights and their average."""
        optimizer = self.state.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        gradient_step_(
            loss,
            {optimizer: self.trained},
            self.processes,
            scaler=self.state.scaler,
            change_gradients_=self._clip_gradients_,
        )
        if self.state.average:
            self.state.average.update_(self.state.model)

    def _clip_gradients_(self) -> None:
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, self.clip_norm)

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, self.precision) if self.precision else nullcontext()


@contextmanager
def _compile_errors(is_compiled: bool) -> Iterator[None]:
    """Turn errors of torch.compile, which compiles in a network's first forward pass, into a MissingError."""
    try:
        yield
    except Exception as error:
        if not is_compiled or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise MissingError(
            f"torch.compile does not work here: {first_line(error, longest=120)}\n"
            "Install a C++ compiler, or set compile: false."
        ) from error
