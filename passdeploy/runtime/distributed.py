"""One training on several processes: who I am among them, and what we tell each other.

Every process sees the same global batches and works on its own part of each. Gradients are averaged before a step and
batch norms share their statistics, so that all processes make the same step, which is the step that one process makes
on the whole batch (up to the order of sums). `torchrun` starts the processes and says who is who.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from passdeploy.errors import PeerError, first_line

TIMEOUT_S = 600.0  # how long a process waits for the others before it gives up


@dataclass(frozen=True)
class Processes:
    """This process among all; one process alone talks to nobody."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        """Which part of every batch is this process's, and of how many."""
        return self.rank, self.count

    def scale_loss(self, loss: Tensor, local_samples: int, global_samples: int) -> Tensor:
        """The mean loss of a part, scaled so that its average over all processes is the mean of the whole batch.

        Args:
            loss: mean over this process's part.
            mine: samples in it.
            whole: samples in the global batch.
        """
        return loss if self.count == 1 else loss * (local_samples * self.count / global_samples)

    def average_gradients_(self, parameters: Sequence[Tensor]) -> None:
        """Replace every gradient by its mean over all processes; a missing one counts as zero."""
        if self.count == 1 or not parameters:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter, mean in zip(parameters, self.average(gradients), strict=True):
            parameter.grad = mean

    def mean_over_batch(self, value: Tensor, local_samples: int) -> Tensor:
        """A mean over this process's part of a batch, `local_samples` samples, as the mean over the whole batch."""
        if self.count == 1:
            return value
        weighted, samples = self.average([value * local_samples, value.new_tensor([float(local_samples)])])
        return weighted / samples

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over all processes, in one message."""
        if self.count == 1:
            return list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _peer_errors():
            dist.all_reduce(flat)
        parts = (flat / self.count).split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def broadcast_object(self, value: Any) -> Any:
        """What the first process says, in all of them."""
        if self.count == 1:
            return value
        box = [value if self.is_first else None]
        with _peer_errors():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def synchronised_batch_norm(self) -> Any:
        """While this context lasts, batch norms in training use the statistics of the global batch."""
        return _SynchronisedBatchNorm() if self.count > 1 else nullcontext()


SINGLE_PROCESS = Processes()


@contextmanager
def process_group(device: torch.device, *, environment: Mapping[str, str] = os.environ) -> Iterator[Processes]:
    """Join the processes that `torchrun` started, as its environment variables say; alone without them.

    Raises:
        PeerError: the others cannot be reached.
    """
    count = int(environment.get("WORLD_SIZE", "1"))
    if count == 1 or "MASTER_ADDR" not in environment:
        yield SINGLE_PROCESS
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(environment.get("LOCAL_RANK", "0")))
    with _peer_errors():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=TIMEOUT_S),
            rank=int(environment["RANK"]), world_size=count,
        )  # fmt: skip
    try:
        yield Processes(int(environment["RANK"]), count)
    finally:
        dist.destroy_process_group()


@contextmanager
def _peer_errors() -> Iterator[None]:
    """A message that does not arrive means that a process is gone."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        raise PeerError(
            f"another process of this training is gone or does not answer: {first_line(error, longest=120)}\n"
            "All processes stop. Look for the first error above, then start again with --resume."
        ) from error


class _SynchronisedBatchNorm(TorchFunctionMode):
    """Batch norm with means and variances over the batches of all processes."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Any function of torch, on its way."""
        given = dict(zip(_BATCH_NORM_PARAMETERS, args, strict=False)) | dict(kwargs or {})
        if func is F.batch_norm and given.get("training"):
            return _synchronised_batch_norm(**given)
        return func(*args, **(kwargs or {}))


_BATCH_NORM_PARAMETERS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def _synchronised_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` in training, for a batch of which every process holds a part."""
    dims = [dim for dim in range(input.ndim) if dim != 1]
    along = (1, -1, *[1] * (input.ndim - 2))
    count = torch.tensor([input.numel() / input.size(1)], device=input.device)
    sums = _sum_of_all(torch.cat([input.sum(dims), count.to(input.dtype)]))
    mean = sums[:-1] / sums[-1]
    centred = input - mean.view(along)
    variance = _sum_of_all(centred.square().sum(dims)) / sums[-1]
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.detach(), momentum)
        if running_var is not None:
            running_var.lerp_(variance.detach() * (sums[-1] / (sums[-1] - 1)), momentum)
    normal = centred * (variance + eps).rsqrt().view(along)
    if weight is not None:
        normal = normal * weight.view(along)
    return normal if bias is None else normal + bias.view(along)


def _sum_of_all(values: Tensor) -> Tensor:
    return _AllReduceSum.apply(values)  # type: ignore[no-any-return]


class _AllReduceSum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        """Sum."""
        total = values.clone()
        with _peer_errors():
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        """Sum."""
        total = gradients[0].contiguous().clone()
        with _peer_errors():
            dist.all_reduce(total)
        return total
