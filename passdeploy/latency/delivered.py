"""The slim network of a plan, built and exported as it will be delivered, so that it can be timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Plan
from passdeploy.export.onnx_graph import export_onnx
from passdeploy.latency.hardware import MeasurementContext
from passdeploy.models.prompt import VisualPrompt, with_prompt
from passdeploy.profiling.candidates import Candidate, make_runner
from passdeploy.profiling.inputs import example_images
from passdeploy.profiling.interleaved import RunnerBuilder
from passdeploy.profiling.runners import Runner
from passdeploy.slimming.slim import slim


@contextmanager
def as_used(
    context: MeasurementContext, dense: nn.Module, channels: ChannelMap, prompt: VisualPrompt | None
) -> Iterator[Callable[[Plan], RunnerBuilder]]:
    """What makes the network of a plan as it will be delivered (cut with its weights, behind its prompt, exported).

    It returns what loads that network, ready to be timed.

    Files are gone when the context ends.
    """
    images = example_images(context.batch, context.image_shape)
    with TemporaryDirectory() as folder:

        def make(plan: Plan) -> RunnerBuilder:
            network = with_prompt(slim(dense, channels.groups, plan), prompt).eval()
            path = Path(folder) / "slim.onnx"
            if context.backend == "ort":
                export_onnx(network, images[:1], path, batch=(context.batch,) * 3)
            candidate = Candidate("slim", module=network, onnx=path)

            def load() -> Runner:
                runner = make_runner(candidate, context.backend, context.threads, context.setting)
                runner.prepare(images)
                return runner

            return load

        yield make
