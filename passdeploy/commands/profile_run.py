"""Measurement of the dense and the slim network of a run, in turns, in one or several backends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from passdeploy.commands.export_run import FILE_PREFIX, export_network, samples_of
from passdeploy.errors import CorruptArtifact, PassDeployError, RunError
from passdeploy.export import ExportSettings
from passdeploy.export.artifact import file_stem
from passdeploy.export.ort_session import require_provider
from passdeploy.export.torch_trt_program import program_path_for
from passdeploy.export.torch_trt_release import installed_flavour
from passdeploy.export.trt_api import FLAVOURS
from passdeploy.export.trt_sidecar import engine_path_for
from passdeploy.grouping.find import map_channels
from passdeploy.latency.measurement_context import UNKNOWN_CPU, MeasurementContext, block_of
from passdeploy.profiling import Candidate, Setting, default_threads, profile_pair
from passdeploy.profiling.execution import default_backends
from passdeploy.profiling.inputs import example_images
from passdeploy.profiling.layer_times import by_group, compare_layers
from passdeploy.profiling.layer_traces import first_traceable, trace_layers
from passdeploy.profiling.report import SkippedBackend
from passdeploy.profiling.runners import PROVIDERS, torch_threads
from passdeploy.report.write import renew_report
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.load import LATEST, load_network, read_plan_document
from passdeploy.runs.plan_file import replacements_from_json
from passdeploy.runtime.events import Listener, StageFinished, Warned, silent, stage
from passdeploy.runtime.versions import package_versions


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
        wanted = named or _default_backends(folder, setting)
        weights = {name: str(folder.manifest()[f"{name}.safetensors"]["sha256"]) for name in FILE_PREFIX}

        def circumstances() -> dict[str, Any]:
            return {backend: _circumstances(folder, backend, setting) for backend in wanted}

        asked: dict[str, Any] = {
            "backends": list(wanted),
            "batches": list(batches),
            "threads": threads,
            "seconds": seconds,
            "setting": asdict(setting),
            "weights": weights,
            "circumstances": circumstances(),
        }
        before = _earlier_profile(folder, weights, listener)
        is_measured = layers and not fresh and _includes(before.get("asked"), asked)
        if is_measured and before.get("layers_of") == _trace_of(before, asked):
            listener(StageFinished("profile", "latencies and layers of profile.json", 0.0, is_skipped=True))
            return before
        forms = _load_forms(folder, wanted, () if named else wanted, setting, allow_code, listener)
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
            if _is_still_true(before.get("layers_of"), folder):
                document |= {key: before[key] for key in ("layers", "groups", "layers_of")}
        if layers:
            of = _trace_of(document, asked)
            with stage("layers", f"{of['backend']}, batch {of['batch']}", listener):
                document |= _trace(folder, candidates, of["backend"], of["batch"], shape, threads, setting, allow_code)
            document["layers_of"] = of
        folder.write_json("profile.json", document, kind="profile")
        renew_report(folder)
        return document


def _earlier_profile(folder: RunFolder, weights: dict[str, str], listener: Listener) -> dict[str, Any]:
    """Return the run's profile if it is of these weights; otherwise nothing. A damaged one is warned of."""
    if not folder.has("profile.json") or not (folder.path / "profile.json").is_file():
        return {}
    try:
        document: dict[str, Any] = folder.read_json("profile.json")
    except CorruptArtifact:
        listener(Warned(f"{folder.path / 'profile.json'} was damaged or edited: it is not used, and is written anew."))
        return {}
    return document if document.get("asked", {}).get("weights") == weights else {}


def _circumstances(folder: RunFolder, backend: str, setting: Setting) -> dict[str, Any]:
    """Return what times depend on besides what was asked for: the processor, the software and the measured files."""
    here = MeasurementContext.here(backend=backend, threads=1, batch=1, image_shape=(), setting=setting)
    recorded = folder.manifest()
    files = (
        next((name for name in _file_names(backend, network, setting) if name in recorded), None)
        for network in FILE_PREFIX
    )
    hashes = {name: recorded[name]["sha256"] for name in files if name is not None}
    return {"processor": here.processor, "versions": package_versions(), "files": hashes}


def _are_same(then: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Test whether circumstances are those of before; a processor that is not known is another one."""
    return then == now and now["processor"] != UNKNOWN_CPU


def _includes(measured: dict[str, Any] | None, asked: dict[str, Any]) -> bool:
    """True if a profile has at least the backends, batches and seconds that are asked for, and all else is the same."""
    if measured is None or not measured.keys() >= asked.keys():
        return False
    return (
        all(set(asked[key]) <= set(measured[key]) for key in ("backends", "batches"))
        and asked["seconds"] <= measured["seconds"]
        and all(asked[key] == measured[key] for key in ("threads", "setting", "weights"))
        and all(_are_same(measured["circumstances"].get(name), now) for name, now in asked["circumstances"].items())
    )


def _trace_of(document: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Return what the layers of a profile are traced in: its first backend that can be, and the first batch.

    Raises:
        UsageError: none of the backends that it measured can be traced.
    """
    measured = {row["backend"] for row in document["rows"]}
    backend = first_traceable([name for name in asked["backends"] if name in measured])
    common = {key: asked[key] for key in ("threads", "setting")}
    return {"backend": backend, "batch": asked["batches"][0], **common, **asked["circumstances"][backend]}


def _is_still_true(trace: dict[str, Any] | None, folder: RunFolder) -> bool:
    """Test whether layers were traced on this machine, with this software and in the files of now."""
    if trace is None or "processor" not in trace:  # an earlier version did not say it
        return False
    now = _circumstances(folder, trace["backend"], Setting(**trace["setting"]))
    return _are_same({key: trace.get(key) for key in now}, now)


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


@dataclass(frozen=True)
class _Forms:
    """The networks of a run in the forms that backends need, and the backends whose form is missing."""

    candidates: tuple[Candidate, ...]
    backends: tuple[str, ...]
    skipped: tuple[SkippedBackend, ...]


def _default_backends(folder: RunFolder, setting: Setting) -> tuple[str, ...]:
    """Return the backends to measure a run in if none is named."""
    return default_backends(
        torch.device(setting.device),
        has_engine=any(map(folder.has, _file_names("tensorrt", "slim", setting))),
        has_program=any(map(folder.has, _file_names("torch-trt", "slim", setting))),
    )


def _load_forms(
    folder: RunFolder,
    backends: Sequence[str],
    optional: Collection[str],
    setting: Setting,
    allow_code: bool,
    listener: Listener,
) -> _Forms:
    """Load both networks in the forms that `backends` need.

    An optional backend whose form is missing, or that lacks an option of the setting, is left out.
    """
    candidates = tuple(Candidate(name, weights=f"{name}.safetensors") for name in FILE_PREFIX)
    failed: dict[str, PassDeployError] = {}
    for backend in backends:
        try:
            setting.require_possible((backend,))
            candidates = tuple(_with_form(each, folder, backend, setting, allow_code, listener) for each in candidates)
        except PassDeployError as error:
            if backend not in optional:
                raise
            failed[backend] = error
    loaded = tuple(backend for backend in backends if backend not in failed)
    if not loaded:
        raise next(iter(failed.values()))
    skipped = tuple(SkippedBackend.of(backend, error) for backend, error in failed.items())
    for each in skipped:
        listener(Warned(each.in_words))
    return _Forms(candidates, loaded, skipped)


def _with_form(
    candidate: Candidate, folder: RunFolder, backend: str, setting: Setting, allow_code: bool, listener: Listener
) -> Candidate:
    """Add the form that `backend` needs to a network of a run: a module, an ONNX file, an engine or a program."""
    name, names = candidate.name, _file_names(backend, candidate.name, setting)
    if backend in ("torch", "compile") and candidate.module is None:
        return replace(candidate, module=load_network(folder, name, allow_code))
    if backend in PROVIDERS and candidate.onnx is None:
        if setting.precision == "fp32" and not folder.has(names[0]):
            if backend != "ort":
                require_provider(PROVIDERS[backend])  # before the export, which takes longer
            settings = ExportSettings()
            export_network(folder, name, settings, samples_of(folder, settings), allow_code, listener)
        return replace(candidate, onnx=_verified_file(folder, names, f"--onnx --precision {setting.precision}"))
    if backend == "tensorrt":
        return replace(candidate, engine=_verified_file(folder, names, f"--trt --precision {setting.precision}"))
    if backend == "torch-trt":
        return replace(candidate, program=_verified_file(folder, names, f"--torch-trt --precision {setting.precision}"))
    return candidate


def _file_names(backend: str, network: str, setting: Setting) -> list[str]:
    """Return the names that the file of a network may have in a run; none for a backend that runs the module.

    An engine has one for each flavour of TensorRT; a program is of the Torch-TensorRT that is installed.
    """
    files = file_stem(FILE_PREFIX[network], setting.precision)
    if backend in PROVIDERS:
        return [f"export/{files}.onnx"]
    if backend == "tensorrt":
        return [engine_path_for(Path("export") / f"{files}.onnx", flavour).as_posix() for flavour in FLAVOURS]
    if backend == "torch-trt":
        return [program_path_for(Path("export"), files, installed_flavour() or "tensorrt").as_posix()]
    return []


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
