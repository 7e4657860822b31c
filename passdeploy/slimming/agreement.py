"""Run two networks on the same inputs, and compare what they answer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from passdeploy.errors import EquivalenceError, first_line
from passdeploy.models.chosen_outputs import OutputChoice, choose_outputs
from passdeploy.models.input_sizes import shapes_of
from passdeploy.models.modes import evaluating, unfused_attention
from passdeploy.models.outputs import comparable_in
from passdeploy.models.wrappers import calling_eagerly
from passdeploy.slimming.parts import error_by_part, has_faint_parts
from passdeploy.slimming.replay import DecisionLog

REPORT = "This is a defect of passdeploy: please report the model. `prune.exclude` can leave layers alone."


@dataclass(frozen=True)
class Agreement:
    """The outputs of two networks on the same inputs."""

    error: float  # the largest relative error of an output, or of what was decided by
    expected: list[Tensor]
    found: list[Tensor]

    @property
    def error_of_parts(self) -> float:
        """The largest error of a part of an output, divided by the magnitude of that part; 0 where none is faint."""
        outputs = zip(self.expected, self.found, strict=True)
        return max((error_by_part(one, two) for one, two in outputs if has_faint_parts(one)), default=0.0)


@dataclass(frozen=True)
class SameInputs:
    """Inputs on which networks are run, and the outputs that are looked at."""

    arguments: Sequence[Any]
    choice: OutputChoice | None  # of the outputs; None: all

    @property
    def shapes_text(self) -> str:
        """The shapes of the inputs in words, such as `8x3x64x64`."""
        return ", ".join("x".join(map(str, shape)) for shape in shapes_of(self.arguments)) or "the example"

    def compare(self, reference: nn.Module, network: nn.Module) -> Agreement:
        """Run two networks and compare their outputs."""
        decisions = DecisionLog()
        expected = self.outputs_of(reference, decisions.recording())
        if not expected:
            raise EquivalenceError(
                "the network returns nothing that can be compared: no tensor, no array and no number.\n"
                "Let it return what counts, or verify a network around it that does."
            )
        try:
            found = self.outputs_of(network, decisions.replaying())
        except EquivalenceError:
            raise
        except Exception as error:  # any kind: the code meets sizes that it does not know
            raise EquivalenceError(
                f"the slim network does not run on inputs of shape {self.shapes_text}: {first_line(error)}\n" + REPORT
            ) from error
        return Agreement(max(largest_error(expected, found), decisions.error), expected, found)

    def outputs_of(self, network: nn.Module, deciding: AbstractContextManager[None] | None = None) -> list[Tensor]:
        """Run a network and list what can be compared of its outputs."""
        with (
            torch.no_grad(),
            evaluating(network),
            calling_eagerly(network),
            unfused_attention(),
            deciding or nullcontext(),
        ):
            return comparable_in(choose_outputs(network(*copied(self.arguments)), self.choice))


def copied(arguments: Sequence[Any]) -> list[Any]:
    """Copy the tensors among arguments: some networks change their inputs in place."""
    copies: list[Any] = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, list(arguments))
    return copies


def largest_error(expected: Sequence[Tensor], found: Sequence[Tensor], *, least: float = 0.0) -> float:
    """Return the largest `relative_error` of several outputs; infinite if there are more of one than of the other.

    Args:
        expected: the outputs of one network.
        found: those of the other.
        least: an output whose magnitude is below this share of the largest one counts as that large.
    """
    if len(expected) != len(found):
        return float("inf")
    floats = (output for output in expected if least and output.numel() and output.is_floating_point())
    floor = least * max((float(output.abs().max()) for output in floats), default=0.0)
    return max((relative_error(*pair, floor=floor) for pair in zip(expected, found, strict=True)), default=0.0)


def relative_error(expected: Tensor, found: Tensor, *, floor: float = 0.0) -> float:
    """Divide the largest difference by the largest magnitude; infinite where shapes differ or a value is not finite.

    Args:
        expected: what one network answers.
        found: what the other does.
        floor: a magnitude below this one counts as this.
    """
    if expected.shape != found.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    wide = torch.complex128 if expected.is_complex() or found.is_complex() else torch.float64
    before, after = expected.to(wide), found.to(wide)
    error = float((before - after).abs().max() / before.abs().max().clamp_min(max(floor, 1e-30)))
    return error if error == error else float("inf")


def are_finite(outputs: Sequence[Tensor]) -> bool:
    """True if all values of all outputs are finite."""
    return all(bool(output.isfinite().all()) for output in outputs)


def have_finite_numbers(outputs: Sequence[Tensor]) -> bool:
    """True if every output that is not empty has a finite number."""
    return all(bool(output.isfinite().any()) or not output.numel() for output in outputs)
