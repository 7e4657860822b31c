"""Trace the channels of a network: on the meta device first, with values where its code needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.errors import ModelError, PassDeployError, first_line
from passdeploy.models.chosen_outputs import OutputChoice
from passdeploy.models.cloning import deep_copy
from passdeploy.models.input_sizes import takes
from passdeploy.models.modes import evaluating, outside_inference_mode
from passdeploy.models.positional import positional
from passdeploy.models.wrappers import calling_eagerly, unwrapped
from passdeploy.tracing.idle_layers import idle_layers, protect_twins_of_idle_, protect_widths_of_idle_
from passdeploy.tracing.meta_model import MetaModel
from passdeploy.tracing.rules import find_rule
from passdeploy.tracing.trace import DimChoiceKey, Trace
from passdeploy.tracing.tracer import ChannelTracer


@outside_inference_mode()
def trace_channels(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    choose: Mapping[DimChoiceKey, int] | None = None,
    meta_model: MetaModel | None = None,
    outputs: OutputChoice | None = None,
) -> Trace:
    """Run `model` in evaluation mode and record which channels belong together; the model is left as it was.

    Where parameters stay unused, a second pass in training mode looks for heads that run only then.

    Args:
        model: any network; its weights are read, never written.
        example_inputs: one tensor, or a sequence of positional arguments. Sizes that the network's code branches on
            should be as in use; the batch may be 1.
        choose: key of a choice (in `Trace.choices`) -> index of the option to take instead of the first.
        meta_model: the meta-device copy of the model and these inputs, if there is one already.
        outputs: those of the model's outputs that count (see `choose_outputs`); None: all.

    Raises:
        ModelError: the network runs, but not where its channels are followed.
        Exception: whatever its own code raises.
    """
    model = unwrapped(model)
    inputs = positional(example_inputs)
    try:
        meta_model = meta_model or MetaModel.of(model, inputs)
        return _run_tracer(meta_model.model, meta_model.inputs, choose or {}, is_meta=True, outputs=outputs)
    except Exception:  # the network needs values, or is broken; then the run with values raises
        # It may count its calls or keep what it computed, so a copy runs.
        try:
            return _run_tracer(deep_copy(model), inputs, choose or {}, is_meta=False, outputs=outputs)
        except PassDeployError:
            raise
        except Exception as error:
            if not takes(deep_copy(model), inputs):
                raise  # of the network's own code
            raise ModelError(
                f"the network runs, but its channels cannot be followed: {type(error).__name__}: {first_line(error)}.\n"
                "It does something with tensors that has no rule, such as nested tensors or torch.cond."
            ) from error


def _run_tracer(
    model: nn.Module,
    inputs: Sequence[Any],
    choose: Mapping[DimChoiceKey, int],
    *,
    is_meta: bool,
    outputs: OutputChoice | None,
) -> Trace:
    tracer = ChannelTracer(model, find_rule, choose, is_meta=is_meta, outputs=outputs)
    with torch.no_grad(), calling_eagerly(model):
        with tracer.tracking_modules(model), evaluating(model):
            tracer.run_forward(model, inputs)
            tracer.protect_kept(model)
        if tracer.has_unused_parameters(model):
            with tracer.tracking_modules(model):
                tracer.run_training_forward(model, inputs)
            protect_twins_of_idle_(model, tracer.trace, tracer.used_parameters)
            tracer.trace.idle_layers = idle_layers(model, tracer.used_parameters)
            if tracer.has_left:
                protect_widths_of_idle_(model, tracer.trace)
    if tracer.has_left:
        tracer.protect_unread()
    return tracer.trace
