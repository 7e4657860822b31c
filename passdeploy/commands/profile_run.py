"""Measurement of the dense and the slim network of a run, in turns, in one or several backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from passdeploy.commands.export_run import FILE_PREFIX
from passdeploy.commands.measured_forms import backends_of_run, load_forms
from passdeploy.commands.profile_reuse import circumstances_of, earlier_profile, includes, is_still_true, trace_of
from passdeploy.grouping.find import map_channels
from passdeploy.latency.measurement_context import block_of
from passdeploy.profiling import Candidate, Setting, default_threads, profile_pair
from passdeploy.profiling.inputs import example_images
from passdeploy.profiling.layer_times import by_group, compare_layers
from passdeploy.profiling.layer_traces import first_traceable, trace_layers
from passdeploy.profiling.runners import torch_threads
from passdeploy.report.write import renew_report
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.load import load_network, read_plan_document
from passdeploy.runs.numbering import LATEST
from passdeploy.runs.plan_file import replacements_from_json
from passdeploy.runtime.events import Listener, StageFinished, silent, stage


def profile_run(
    run: Path | str = LATEST,
    *,
    backends: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8),
    threads: int | None = None,
    setting: Setting | None = None,
    seconds: float = 4.0,
    layers: bool = False,
    fresh: bool = False,
    trust_engine: bool = False,
    allow_code: bool = False,
    listener: Listener = silent,
) -> dict[str, Any]:
    """Measure the dense and the slim network of a run, in turns, on this machine, and write `profile.json`.

    Without a device, that is the GPU where there is one. ONNX files in fp32 are exported first if they are missing;
    files in another precision, engines and programs must exist. With `layers`, the document also has the time of each
    layer (`layers`) and of each channel group (`groups`), traced in the first backend that shows them, and at the first
    batch size.

    Args:
        run: the run folder.
        backends: see `profile_pair`; None: those of `default_backends` that run here, and the document says why the
            others are left out (`skipped`).
        batches: images per call.
        threads: of the CPU; None: OMP_NUM_THREADS, or as many as there are physical cores.
        setting: device, precision, memory format, CUDA graph; None: fp32 on the GPU, without one on the CPU. The device
            may be `auto`.
        seconds: to measure per backend and batch, at least.
        layers: trace the layers of both networks as well; the latencies, and the layers, are taken from
            `profile.json` where they were measured with these arguments (or for longer) on this machine, with the same
            versions and in the same files.
        fresh: with `layers`, measure again all the same.
        trust_engine: load engines that have no sidecar, or that run code of their own.
        allow_code: let the recipe name a model factory, which runs its module's code.
        listener: receives progress events and warnings.

    Returns:
        The content of `profile.json`.
    """
    named = tuple(backends) if backends else None
    setting = (setting or Setting(device="auto")).resolved(named or (), listener)
    if named:
        setting.require_possible(named)
        if layers:
            first_traceable(named)
    threads = threads or default_threads()
    with RunFolder.open(Path(run), write=True) as folder:
        shape = tuple(read_plan_document(folder)["image_shape"])
        wanted = named or backends_of_run(folder, setting)
        weights = {name: str(folder.record_of(f"{name}.safetensors")["sha256"]) for name in FILE_PREFIX}

        def circumstances() -> dict[str, Any]:
            return {backend: circumstances_of(folder, backend, setting) for backend in wanted}

        asked: dict[str, Any] = {
            "backends": list(wanted),
            "batches": list(batches),
            "threads": threads,
            "seconds": seconds,
            "setting": asdict(setting),
            "weights": weights,
            "circumstances": circumstances(),
        }
        before = earlier_profile(folder, weights, listener)
        is_measured = layers and not fresh and includes(before, asked)
        if is_measured and before.get("layers_of") == trace_of(before, asked):
            listener(StageFinished("profile", "latencies and layers of profile.json", 0.0, is_skipped=True))
            return before
        forms = load_forms(folder, wanted, () if named else wanted, setting, allow_code, listener)
        candidates = [replace(candidate, trust_engine=trust_engine) for candidate in forms.candidates]
        backends = forms.backends
        if layers:
            first_traceable(backends)  # before the measurement, which takes longer
        if is_measured:
            listener(StageFinished("profile", "latencies of profile.json", 0.0, is_skipped=True))
            document = before
        else:
            profile = profile_pair(
                *candidates,
                image_shape=shape,
                backends=backends,
                optional=() if named else backends,
                batches=batches,
                threads=threads,
                setting=setting,
                seconds=seconds,
                listener=listener,
            )
            document = profile.to_json()
            document["skipped"] = [*map(asdict, forms.skipped), *document["skipped"]]
            asked["circumstances"] = circumstances()  # with the files that were exported for it
            document["asked"] = asked
            if is_still_true(before.get("layers_of"), folder):
                document |= {key: before[key] for key in ("layers", "groups", "layers_of")}
        if layers:
            of = trace_of(document, asked)
            with stage("layers", f"{of['backend']}, batch {of['batch']}", listener):
                document |= _trace(folder, candidates, of["backend"], of["batch"], shape, threads, setting, allow_code)
            document["layers_of"] = of
        folder.write_json("profile.json", document, kind="profile")
        renew_report(folder, listener)
        return document


def _trace(
    folder: RunFolder,
    candidates: Sequence[Candidate],
    backend: str,
    batch: int,
    shape: tuple[int, ...],
    threads: int,
    setting: Setting,
    allow_code: bool,
) -> dict[str, Any]:
    """Time the layers of both networks; returns `layers` and `groups` of the document."""
    images = example_images(batch, shape)
    with torch_threads(threads):
        dense, slim = (
            trace_layers(candidate, backend, images, threads=threads, setting=setting) for candidate in candidates
        )
    channels = map_channels(load_network(folder, "dense", allow_code), images[:1])
    gone = [one.module for one in replacements_from_json(read_plan_document(folder))]
    changes = compare_layers(dense, slim, block=block_of(backend, setting), groups=channels.groups, gone=gone)
    return {"layers": [change.to_json() for change in changes], "groups": by_group(changes)}
