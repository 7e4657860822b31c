"""Optimisers, the learning-rate schedule, and the moving average of weights (EMA).

The schedule is a linear warm-up, then a cosine to zero (Loshchilov and Hutter, arXiv:1608.03983).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from passdeploy.recipe import OptimizerSpec


@dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule: linear warm-up to the peak, then a cosine to zero.

    >>> [round(Schedule(1.0, warmup_steps=2, steps=6).lr_at(step), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """

    peak: float
    warmup_steps: int
    steps: int

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, spec: OptimizerSpec, *, is_fused: bool = False) -> torch.optim.Optimizer:
    """Make SGD with Nesterov momentum, or AdamW; norms, biases and other vectors have no weight decay.

    Args:
        model: its parameters that require a gradient are optimised.
        spec: kind and rates.
        is_fused: update in one kernel that itself skips a step whose gradients overflowed; with a loss scaler, the
            host would otherwise have to read in every step whether they did.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if spec.name == "adamw":
        return torch.optim.AdamW(groups, lr=spec.lr, betas=(spec.momentum, 0.999), fused=is_fused or None)
    sgd = torch.optim.SGD(
        groups, lr=spec.lr, momentum=spec.momentum, nesterov=spec.momentum > 0, fused=is_fused or None
    )
    if is_fused and spec.momentum:
        for parameter in trained:  # a first step that is skipped would leave torch's own buffer uninitialised
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    return sgd


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimiser, such as momentum, as tensors by `<number of the parameter>.<key>`."""
    return {
        f"{number}.{key}": value
        for number, parameter in enumerate(_optimised(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors_(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load what `optimizer_tensors` returned, into an optimiser of parameters of the same shapes."""
    parameters, is_fused = _optimised(optimizer), bool(optimizer.defaults.get("fused"))
    for name, tensor in tensors.items():
        number, key = name.split(".", 1)
        parameter = parameters[int(number)]
        optimizer.state[parameter][key] = _placed_like_parameter(parameter, tensor, is_fused)


def _optimised(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _placed_like_parameter(parameter: Tensor, tensor: Tensor, is_fused: bool) -> Tensor:
    """Copy an optimiser buffer into the memory order of its parameter, so that later steps round in the same way."""
    if tensor.shape != parameter.shape:  # a step counter, which only fused kernels read on the device
        return tensor.to(parameter.device, copy=True) if is_fused else tensor.clone()
    return torch.empty_like(parameter, requires_grad=False).copy_(tensor)


class WeightAverage:
    """Exponential moving average of a network's parameters and floating-point buffers.

    The decay is min(decay, (1 + n) / (10 + n)) at the n-th step, so that the first weights soon have no influence
    (as in TensorFlow's ExponentialMovingAverage with `num_updates`).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.tensors = {name: t.detach().clone() for name, t in model.state_dict().items() if t.is_floating_point()}

    @torch.no_grad()
    def update_(self, model: nn.Module) -> None:
        """Average the weights after one more training step in."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        state = model.state_dict()
        torch._foreach_lerp_([*self.tensors.values()], [state[name] for name in self.tensors], 1 - decay)

    def load_(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Load a saved average and the number of its steps."""
        self.steps = steps
        for name, average in self.tensors.items():
            average.copy_(tensors[name])
