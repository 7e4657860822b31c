"""The networks of a run in the forms that backends measure: modules, ONNX files, engines, programs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch

from passdeploy.commands.export_run import FILE_PREFIX, export_network, samples_of
from passdeploy.errors import PassDeployError, RunError
from passdeploy.export import ExportSettings, Samples
from passdeploy.export.artifact import file_stem
from passdeploy.export.ort_session import require_provider
from passdeploy.export.torch_trt_program import program_path_for
from passdeploy.export.torch_trt_release import installed_flavour
from passdeploy.export.trt_api import FLAVOURS
from passdeploy.export.trt_sidecar import engine_path_for
from passdeploy.profiling import Candidate, Setting
from passdeploy.profiling.execution import default_backends
from passdeploy.profiling.report import SkippedBackend
from passdeploy.profiling.runners import PROVIDERS
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.load import load_network
from passdeploy.runs.numbering import run_option
from passdeploy.runtime.events import Listener, Warned


@dataclass(frozen=True)
class MeasuredForms:
    """The networks of a run in the forms that backends need, and the backends whose form is missing."""

    candidates: tuple[Candidate, ...]
    backends: tuple[str, ...]
    skipped: tuple[SkippedBackend, ...]


def backends_of_run(folder: RunFolder, setting: Setting) -> tuple[str, ...]:
    """Return the backends to measure a run in if none is named."""
    return default_backends(
        torch.device(setting.device),
        has_engine=any(map(folder.has, file_names("tensorrt", "slim", setting))),
        has_program=any(map(folder.has, file_names("torch-trt", "slim", setting))),
    )


def load_forms(
    folder: RunFolder,
    backends: Sequence[str],
    optional: Collection[str],
    setting: Setting,
    allow_code: bool,
    listener: Listener,
) -> MeasuredForms:
    """Load both networks in the forms that `backends` need.

    An optional backend whose form is missing, or that lacks an option of the setting, is left out.
    """
    candidates = tuple(Candidate(name, weights=f"{name}.safetensors") for name in FILE_PREFIX)
    load_samples = cache(partial(samples_of, folder, ExportSettings(), listener=listener))
    failed: dict[str, PassDeployError] = {}
    for backend in backends:
        try:
            setting.require_possible((backend,))
            candidates = tuple(
                _with_form(each, folder, backend, setting, allow_code, load_samples, listener) for each in candidates
            )
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
    return MeasuredForms(candidates, loaded, skipped)


def _with_form(
    candidate: Candidate,
    folder: RunFolder,
    backend: str,
    setting: Setting,
    allow_code: bool,
    load_samples: Callable[[], Samples],
    listener: Listener,
) -> Candidate:
    """Add the form that `backend` needs to a network of a run: a module, an ONNX file, an engine or a program."""
    name, names = candidate.name, file_names(backend, candidate.name, setting)
    if backend in ("torch", "compile") and candidate.module is None:
        return replace(candidate, module=load_network(folder, name, allow_code))
    if backend in PROVIDERS and candidate.onnx is None:
        if setting.precision == "fp32" and not folder.has(names[0]):
            if backend != "ort":
                require_provider(PROVIDERS[backend])  # before the export, which takes longer
            export_network(folder, name, ExportSettings(), load_samples(), allow_code, listener)
        return replace(candidate, onnx=_verified_file(folder, names, f"--onnx --precision {setting.precision}"))
    if backend == "tensorrt":
        return replace(candidate, engine=_verified_file(folder, names, f"--trt --precision {setting.precision}"))
    if backend == "torch-trt":
        return replace(candidate, program=_verified_file(folder, names, f"--torch-trt --precision {setting.precision}"))
    return candidate


def file_names(backend: str, network: str, setting: Setting) -> list[str]:
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
        f"{folder.path} has no {names[0]} to measure.\n"
        f"Write both networks: passdeploy export --dense {options}{run_option(folder.path)}"
    )
