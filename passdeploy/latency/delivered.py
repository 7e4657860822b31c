"""Build the slim network of a plan as it is delivered (cut, with its prompt, exported), so that it can be timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from passdeploy.channels.groups import ChannelMap
from passdeploy.channels.plan import Plan
from passdeploy.export.onnx_graph import export_onnx
from passdeploy.export.precision import choose_opset
from passdeploy.export.trt_engine import EngineOptions, build_engine
from passdeploy.latency.cache_folder import timing_cache_path
from passdeploy.latency.deployed_precision import in_precision
from passdeploy.latency.measurement_context import MeasurementContext
from passdeploy.models.prompt import VisualPrompt, with_prompt
from passdeploy.profiling.candidates import Candidate, make_runner
from passdeploy.profiling.inputs import example_images
from passdeploy.profiling.interleaved import RunnerBuilder
from passdeploy.profiling.runners import Runner
from passdeploy.slimming.slim import slim


@contextmanager
def delivered_networks(
    context: MeasurementContext, dense: nn.Module, channels: ChannelMap, prompt: VisualPrompt | None
) -> Iterator[Callable[[Plan], RunnerBuilder]]:
    """Yield a function from a plan to a builder of its network as it is delivered.

    The function cuts `dense` with its weights, adds the prompt and exports the network where the backend needs a file;
    the builder that it returns loads the network, ready to be timed. The files are deleted when the context ends.
    """
    images = example_images(context.batch, context.image_shape)
    with TemporaryDirectory() as folder:

        def make(plan: Plan) -> RunnerBuilder:
            network = with_prompt(slim(dense, channels.groups, plan, channels.blocks), prompt).eval()
            graph, engine = Path(folder) / "slim.onnx", Path(folder) / "slim.engine"
            if context.backend in ("ort", "ort-cuda", "tensorrt"):
                _export(network, images, graph, context.precision)
            if context.backend == "tensorrt":
                options = EngineOptions(timing_cache=timing_cache_path(context.processor, context.version))
                build_engine(graph, engine, batch=(context.batch,) * 3, precision=context.precision, options=options)
            candidate = Candidate("slim", module=network, onnx=graph, engine=engine)

            def load() -> Runner:
                runner = make_runner(candidate, context.backend, context.threads, context.setting)
                runner.prepare(images)
                return runner

            return load

        yield make


def _export(network: nn.Module, images: Tensor, path: Path, precision: str) -> None:
    """Write a network as ONNX for the batch of `images`, in the precision."""
    import onnx

    batch = (len(images),) * 3
    export_onnx(network, images[:1], path, opset=choose_opset(precision, None), batch=batch)
    if precision != "fp32":
        path.write_bytes(in_precision(onnx.load(path), precision).SerializeToString())
