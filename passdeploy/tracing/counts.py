"""Counts of a network: parameters, and multiply-adds (MACs) of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from passdeploy.models.prompt import without_prompt
from passdeploy.tracing.trace_channels import trace_channels


@dataclass(frozen=True)
class Counts:
    """Sizes of a network; one multiply-add counts once (FLOPs are about twice the MACs)."""

    params: int
    macs: int


def count(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> Counts:
    """Count the parameters of `model`, each shared one once, and its multiply-adds on `example_inputs`.

    Convolutions, linear layers and matrix products are counted as they run, functional calls included; additions,
    normalisations and activations are not. For numbers per image use a batch of one. The visual prompt in front of a
    network that `load` returned is left out, as in `summary.json`.
    """
    trace = trace_channels(without_prompt(model), example_inputs)
    return Counts(sum(trace.parameters.values()), sum(one.macs for one in trace.op_macs))
