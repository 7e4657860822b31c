"""Measurement of the dense and the slim network of a run, in turns, in one or several backends."""

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
from passdeploy.latency.measurement_context import block_of
from passdeploy.profiling import Candidate, Setting, physical_cores, profile_pair
from passdeploy.profiling.inputs import example_images
from passdeploy.profiling.layer_times import by_group, compare_layers
from passdeploy.profiling.layer_traces import require_traceable, trace_layers
from passdeploy.profiling.runners import PROVIDERS, torch_threads
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.load import LATEST, load_network, read_plan_document
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
    listener: Listener = silent,
) -> dict[str, Any]:
    """Measure the dense and the slim network of a run, in turns, on this machine, and write `profile.json`.

    The ONNX files in fp32 are exported first if they are missing; files in another precision, engines and programs
    must exist. With `layers`, the document also has the time of each layer (`layers`) and of each channel group
    (`groups`), traced in the first backend at the first batch size.

    Args:
        run: the run folder.
        backends: see `profile_pair`; None: PyTorch, and on a CPU ONNX Runtime.
        batches: images per call.
        threads: of the CPU; None: as many as there are physical cores.
        setting: device, precision, memory format, CUDA graph; None: fp32 on the CPU.
        seconds: to measure per backend and batch, at least.
        layers: trace the layers of both networks as well.
        trust_engine: load engines that have no sidecar, or that run code of their own.
        allow_code: let the recipe name a model factory, which runs its module's code.
        listener: receives progress events and warnings.

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
            replace(_candidate(folder, name, backends, setting, allow_code, listener), trust_engine=trust_engine)
            for name in FILE_PREFIX
        ]
        profile = profile_pair(
            *candidates,
            image_shape=shape,
            backends=backends,
            batches=batches,
            threads=threads,
            setting=setting,
            seconds=seconds,
            listener=listener,
        )
        document = profile.to_json()
        if layers:
            images = example_images(batches[0], shape)
            with torch_threads(threads or physical_cores()):
                dense, slim = (
                    trace_layers(candidate, backends[0], images, threads=threads or physical_cores(), setting=setting)
                    for candidate in candidates
                )
            channels = map_channels(load_network(folder, "dense", allow_code), images[:1])
            changes = compare_layers(dense, slim, block=block_of(backends[0], setting), groups=channels.groups)
            document["layers"] = [change.to_json() for change in changes]
            document["groups"] = by_group(changes)
        folder.write_json("profile.json", document, kind="profile")
        return document


def _candidate(
    folder: RunFolder, name: str, backends: Sequence[str], setting: Setting, allow_code: bool, listener: Listener
) -> Candidate:
    """Load a network of a run in the forms that `backends` need: a module, an ONNX file, an engine, a program."""
    wanted, files = set(backends), file_stem(FILE_PREFIX[name], setting.precision)
    module = load_network(folder, name, allow_code) if {"torch", "compile"} & wanted else None
    candidate = Candidate(name, module=module, weights=f"{name}.safetensors")
    if wanted & set(PROVIDERS):
        onnx = f"export/{files}.onnx"
        if setting.precision == "fp32" and not folder.has(onnx):
            settings = ExportSettings()
            export_network(folder, name, settings, samples_of(folder, settings), allow_code, listener)
        file = _verified_file(folder, (onnx,), f"--onnx --precision {setting.precision}")
        candidate = replace(candidate, onnx=file)
    if "tensorrt" in wanted:
        graph = Path("export") / f"{files}.onnx"
        engines = [engine_path_for(graph, flavour).as_posix() for flavour in FLAVOURS]
        file = _verified_file(folder, engines, f"--trt --precision {setting.precision}")
        candidate = replace(candidate, engine=file)
    if "torch-trt" in wanted:
        program = f"export/{files}.pt2"
        file = _verified_file(folder, (program,), f"--torch-trt --precision {setting.precision}")
        candidate = replace(candidate, program=file)
    return candidate


def _verified_file(folder: RunFolder, names: Sequence[str], options: str) -> Path:
    """Return the path of the first of these files that the run has, after checking its hash.

    Raises:
        RunError: the run has none of them; the message names the export command with `options`.
    """
    for name in names:
        if folder.has(name):
            return folder.verified(name)
    raise RunError(
        f"{folder.path} has no {names[0]} to measure.\nWrite both networks: passdeploy export --dense {options}"
    )
