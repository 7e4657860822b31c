"""Data-parallel training on several processes: ranks, averaged gradients and synchronised batch norms.

Every process iterates over the same global batches and computes on its own part of each. Gradients are averaged before
a step and batch norms use the statistics of the global batch, so that all processes make the same step as one process
would on the whole batch (up to the order of sums). `torchrun` starts the processes and sets their ranks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from passdeploy.errors import PassDeployError, PeerError, UsageError, first_line

Result = TypeVar("Result")

TIMEOUT_S = 600.0  # a process that waits longer for the others gives up


@dataclass(frozen=True)
class Processes:
    """Rank of this process and number of all processes; with one process, no method communicates."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """True for the process that writes files and reports progress."""
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        """Index of this process's part of every batch, and the number of parts."""
        return self.rank, self.count

    def scale_loss(self, loss: Tensor, local_samples: int, global_samples: int) -> Tensor:
        """Scale the mean loss of a part so that the average over all processes is the mean of the global batch.

        Args:
            loss: mean over this process's part.
            local_samples: samples in that part.
            global_samples: samples in the global batch.
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
        """Combine means over the parts of a batch, `local_samples` samples here, into the mean over the batch."""
        return self.over_batch(value, local_samples)[1]

    def over_batch(self, loss: Tensor, local_samples: int) -> tuple[Tensor, Tensor]:
        """Combine the mean losses of the parts of a batch, `local_samples` samples here.

        Returns:
            This part's loss, scaled as by `scale_loss`, to differentiate; and the mean over the batch.
        """
        if self.count == 1:
            return loss, loss.detach()
        value = loss.detach()
        weighted, samples = self.average([value * local_samples, value.new_full((), float(local_samples))])
        return loss * (local_samples / samples), weighted / samples

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Average each tensor over all processes, in one all-reduce."""
        if self.count == 1:
            return list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _peer_errors():
            dist.all_reduce(flat)
        parts = (flat / self.count).split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def any(self, fact: bool) -> bool:
        """Tell all processes whether a fact holds in any of them."""
        if self.count == 1:
            return fact
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
        flag = torch.tensor(float(fact), device=device)
        with _peer_errors():
            dist.all_reduce(flag)
            return bool(flag.item())

    def first_only(self, work: Callable[[], Result]) -> Result:
        """Do something in the first process alone, and return its result in all of them.

        Raises:
            PassDeployError: the work did, in the first process; it is raised in all of them, which would else wait.
        """
        if self.count == 1:
            return work()
        outcome: Any = None
        if self.is_first:
            try:
                outcome = work()
            except PassDeployError as error:
                outcome = error
        outcome = self.broadcast_object(outcome)
        if isinstance(outcome, PassDeployError):
            raise outcome
        result: Result = outcome
        return result

    def broadcast_object(self, value: Any) -> Any:
        """Send the first process's `value` to all processes, and return it."""
        if self.count == 1:
            return value
        objects = [value if self.is_first else None]
        with _peer_errors():
            dist.broadcast_object_list(objects, src=0)
        return objects[0]

    def synchronised_batch_norm(self) -> Any:
        """Return a context in which batch norms in training mode use the statistics of the global batch."""
        return _SynchronisedBatchNorm() if self.count > 1 else nullcontext()


SINGLE_PROCESS = Processes()


@contextmanager
def process_group(device: torch.device, *, environment: Mapping[str, str] = os.environ) -> Iterator[Processes]:
    """Start the process group that torchrun's environment variables describe; without them, run as one process.

    Raises:
        PeerError: the others cannot be reached.
        UsageError: one GPU is asked for by its number, for several processes.
    """
    count = int(environment.get("WORLD_SIZE", "1"))
    if count == 1 or "MASTER_ADDR" not in environment:
        yield SINGLE_PROCESS
        return
    if ":" in str(device):
        raise UsageError(
            f"{device} is one GPU, for {count} processes.\nLeave --device out: each process takes its own."
        )
    if device.type == "cuda":
        torch.cuda.set_device(int(environment.get("LOCAL_RANK", "0")))
    backend, rank = "nccl" if device.type == "cuda" else "gloo", int(environment["RANK"])
    with _peer_errors(), _stdout_as_stderr():
        dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S), rank=rank, world_size=count)
    try:
        yield Processes(rank, count)
    finally:
        dist.destroy_process_group()


@contextmanager
def _stdout_as_stderr() -> Iterator[None]:
    """Send what libraries print to stdout to stderr: Gloo of older torch reports its connections, between our JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Turn a failed communication into an error that says that another process is gone."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        raise PeerError(
            f"another process of this training is gone or does not answer: {first_line(error, longest=120)}\n"
            "All processes stop. Look for the first error above, then start again with --resume."
        ) from error


class _SynchronisedBatchNorm(TorchFunctionMode):
    """Replacement of `F.batch_norm` in training by one with the statistics of the global batch."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Intercept every function of torch."""
        arguments = dict(zip(_BATCH_NORM_PARAMETERS, args, strict=False)) | dict(kwargs or {})
        if func is F.batch_norm and arguments.get("training"):
            return _synchronised_batch_norm(**arguments)
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
    """Compute `F.batch_norm` in training mode for a batch of which every process holds a part.

    As in torch, statistics of half-precision inputs are computed in float32, and the result has the input's dtype.
    """
    dims = [dim for dim in range(input.ndim) if dim != 1]
    shape = (1, -1, *[1] * (input.ndim - 2))
    wide = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
    count = wide.new_full((1,), input.numel() / input.size(1))
    sums = _sum_of_all(torch.cat([wide.sum(dims), count]))
    mean = sums[:-1] / sums[-1]
    centred = wide - mean.view(shape)
    variance = _sum_of_all(centred.square().sum(dims)) / sums[-1]
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.detach(), momentum)
        if running_var is not None:
            running_var.lerp_(variance.detach() * (sums[-1] / (sums[-1] - 1)), momentum)
    normal = centred * (variance + eps).rsqrt().view(shape)
    if weight is not None:
        normal = normal * weight.view(shape)
    return (normal if bias is None else normal + bias.view(shape)).to(input.dtype)


def _sum_of_all(values: Tensor) -> Tensor:
    return _AllReduceSum.apply(values)  # type: ignore[no-any-return]


class _AllReduceSum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        """Sum `values` over all processes."""
        total = values.clone()
        with _peer_errors():
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        """Sum the gradients over all processes."""
        total = gradients[0].contiguous().clone()
        with _peer_errors():
            dist.all_reduce(total)
        return total
