"""Measure the networks of a run: dense and slim, interleaved, in the backends asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from passdeploy.commands.export_run import FILE_PREFIX, export_network, samples_of
from passdeploy.errors import RunError
from passdeploy.export import ExportSettings
from passdeploy.export.artifact import file_stem
from passdeploy.export.trt_api import FLAVOURS
from passdeploy.export.trt_sidecar import engine_path_for
from passdeploy.grouping.find import map_channels
from passdeploy.latency.hardware import block_of
from passdeploy.profiling import Candidate, Setting, physical_cores, profile_pair
from passdeploy.profiling.inputs import example_images
from passdeploy.profiling.layer_times import by_group, compare_layers
from passdeploy.profiling.layer_traces import layers_of, require_traceable
from passdeploy.profiling.runners import PROVIDERS, torch_threads
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.load import LATEST, read_plan_document, load_network
from passdeploy.runtime.events import Listener, silent


def profile_run(
    run: Path | str = LATEST,
    *,
    backends: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8),
    threads: int | None = None,
    setting: Setting | None = None,
    seconds: float = 4.0,
    layers: bool = False,
    trust_engine: bool = False,
    allow_code: bool = False,
    tell: Listener = silent,
) -> dict[str, Any]:
    """Measure the dense and the slim network of a run, in turns, on this machine; writes `profile.json`.

    Networks that ONNX Runtime needs in fp32 and that were not exported yet are exported first; files in another
    precision, engines and programs must be there. With `layers`, the document also says where the time goes, for the
    first backend and batch size: `layers`, and `groups`, the same by channel group.

    Args:
        run: the run folder.
        backends: see `profile_pair`; None: PyTorch, and on a CPU ONNX Runtime.
        batches: images per call.
        threads: of the CPU; None takes every physical core.
        setting: device, precision, layout, CUDA graph.
        seconds: at least this long per backend and batch.
        layers: look into both networks as well.
        trust_engine: load engines that have no sidecar, or that run code of their own.
        allow_code: let the recipe name a model factory, which runs its module's code.
        tell: hears what happens.

    Returns:
        The content of `profile.json`.
    """
    setting = setting or Setting()
    backends = backends or (("torch", "ort") if setting.device == "cpu" else ("torch",))
    setting.require_possible(backends)
    if layers:
        require_traceable(backends[0])
    with RunFolder.open(Path(run), write=True) as folder:
        shape = tuple(read_plan_document(folder)["image_shape"])
        candidates = [
            replace(_subject(folder, name, backends, setting, allow_code, tell), trust_engine=trust_engine)
            for name in FILE_PREFIX
        ]
        profile = profile_pair(
            *candidates, image_shape=shape, backends=backends, batches=batches, threads=threads, setting=setting,
            seconds=seconds, tell=tell,
        )  # fmt: skip
        document = profile.to_json()
        if layers:
            images = example_images(batches[0], shape)
            with torch_threads(threads or physical_cores()):
                dense, slim = (
                    layers_of(candidate, backends[0], images, threads=threads or physical_cores(), setting=setting)
                    for candidate in candidates
                )
            channels = map_channels(load_network(folder, "dense", allow_code), images[:1])
            changes = compare_layers(dense, slim, block=block_of(backends[0], setting), groups=channels.groups)
            document["layers"] = [change.to_json() for change in changes]
            document["groups"] = by_group(changes)
        folder.write_json("profile.json", document, kind="profile")
        return document


def _subject(
    folder: RunFolder, name: str, backends: Sequence[str], setting: Setting, allow_code: bool, tell: Listener
) -> Candidate:
    """A network of a run, in the forms that `backends` need."""
    wanted, files = set(backends), file_stem(FILE_PREFIX[name], setting.precision)
    module = load_network(folder, name, allow_code) if {"torch", "compile"} & wanted else None
    found = Candidate(name, module=module, weights=f"{name}.safetensors")
    if wanted & set(PROVIDERS):
        onnx = f"export/{files}.onnx"
        if setting.precision == "fp32" and not folder.has(onnx):
            settings = ExportSettings()
            export_network(folder, name, settings, samples_of(folder, settings), allow_code, tell)
        found = replace(found, onnx=_exported(folder, (onnx,), f"--onnx --precision {setting.precision}"))
    if "tensorrt" in wanted:
        graph = Path("export") / f"{files}.onnx"
        engines = [engine_path_for(graph, flavour).as_posix() for flavour in FLAVOURS]
        found = replace(found, engine=_exported(folder, engines, f"--trt --precision {setting.precision}"))
    if "torch-trt" in wanted:
        program = f"export/{files}.pt2"
        found = replace(found, program=_exported(folder, (program,), f"--torch-trt --precision {setting.precision}"))
    return found


def _exported(folder: RunFolder, names: Sequence[str], options: str) -> Path:
    """The first of these files that the run has, verified."""
    for name in names:
        if folder.has(name):
            return folder.verified(name)
    raise RunError(
        f"{folder.path} has no {names[0]} to measure.\nWrite both networks: passdeploy export --dense {options}"
    )
