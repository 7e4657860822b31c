"""Profile exported files, `.onnx`, `.engine` or `.pt2`: the latency of one, or the speed-up of one over another."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from passdeploy.errors import CorruptArtifact, MissingError, RunError, UsageError
from passdeploy.export.ort_session import open_session
from passdeploy.export.torch_trt_program import require_loadable
from passdeploy.export.torch_trt_release import load_torch_trt
from passdeploy.profiling.candidates import Candidate, make_runner
from passdeploy.profiling.environment import physical_cores
from passdeploy.profiling.execution import Setting
from passdeploy.profiling.file_batches import batches_that_run
from passdeploy.profiling.file_inputs import FileInputs, read_file_inputs
from passdeploy.profiling.inputs import shape_text
from passdeploy.profiling.pair import profile_pair
from passdeploy.profiling.program_file import has_tensorrt, holds_native_objects
from passdeploy.profiling.report import Profile
from passdeploy.profiling.runners import PROVIDERS, Runner
from passdeploy.runtime.devices import find_device
from passdeploy.runtime.events import Listener, Warned, silent
from passdeploy.runtime.onnx_examiner import OnnxExaminer

_BACKEND_OF_SUFFIX = {".onnx": "ort", ".engine": "tensorrt", ".pt2": "torch"}


def profile_files(
    paths: Sequence[Path],
    *,
    batches: Sequence[int] | None = None,
    backend: str | None = None,
    threads: int | None = None,
    setting: Setting | None = None,
    seconds: float = 4.0,
    image_size: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    trust_engine: bool = False,
    trusted: Collection[Path] = (),
    listener: Listener = silent,
) -> Profile:
    """Measure one file, or two in turns with the speed-up of the second over the first.

    Args:
        paths: one or two files of one kind.
        batches: images per call; None: 1 and 8, as far as the files take them.
        backend: `ort`, `ort-cuda` or `ort-trt` for an ONNX file; None takes the default for the kind of file: ONNX
            Runtime (CUDA where it starts), TensorRT, or PyTorch (Torch-TensorRT for a program with TensorRT inside).
        threads: CPU threads; None takes every physical core.
        setting: the device, which may be `auto`, and whether an engine is captured as a CUDA graph; not the precision,
            which is fixed in the files. None: the GPU, without one the CPU.
        seconds: at least this long per batch size.
        image_size: of the input in pixels, for a file that does not fix it.
        shapes: of inputs by their names, for files that fix them neither and take no images.
        trust_engine: load engines that have no sidecar, or that run code of their own.
        trusted: ONNX files among `paths` that are opened in this process at once; the others are first opened and run
            in one of their own, since native code may crash on them.
        listener: receives the progress events.

    Raises:
        UsageError: more than two files, two kinds, a batch or shape that a file does not take, or a size that it leaves
            open and that was not given.
        RunError: there is no such file.
        MissingError: a package, provider or GPU that is needed to run the file is missing.
        CorruptArtifact: a file is damaged, or not of the kind that its name says.
    """
    if not 1 <= len(paths) <= 2:
        raise UsageError(f"{len(paths)} files: give one, or two to compare.")
    for path in paths:
        if not path.is_file():
            raise RunError(f"there is no file {path}.\nWrite one with: passdeploy export --onnx")
    _require_known_engines(path for path in paths if path not in trusted and not trust_engine)
    foreign = [path for path in paths if path.suffix.lower() == ".onnx" and path not in trusted]
    with ExitStack() as open_files:
        examiners = [open_files.enter_context(OnnxExaminer())]
        if foreign and (provider := _gpu_provider(backend, (setting or Setting(device="auto")).device)) is not None:
            examiners.append(open_files.enter_context(OnnxExaminer(provider=provider)))
        for path in foreign:
            for examiner in examiners:
                examiner.open(path)
        setting = setting or Setting(device="auto")
        backend = _backend_of(paths, backend, setting.device, listener)
        setting = _setting_for_files(setting, backend, listener)
        if backend == "torch-trt":
            for path in paths:
                require_loadable(path)
            load_torch_trt()  # its operators must be known before a program that has them is opened
        inputs = [
            read_file_inputs(path, trust_engine=trust_engine).with_sizes(image_size, shapes or {}) for path in paths
        ]
        sample = _common_sample(paths, inputs)
        if batches is None and shapes:
            given = [shapes[tensor.name] for tensor in inputs[0].tensors if tensor.has_batch and tensor.name in shapes]
            batches = [given[0][0]] if given else None
        possible = [each.possible_batches(batches) for each in inputs]
        measured = [batch for batch in possible[0] if batch in possible[-1]] or possible[0]
        for path, each in zip(paths, inputs, strict=True):
            for batch in measured if path in foreign else ():
                for examiner in examiners:
                    examiner.run(path, each.shapes(batch))
    candidates = [_candidate(path, each, trust_engine) for path, each in zip(paths, inputs, strict=True)]
    if backend in ("ort", "ort-cuda", "torch"):  # the others take minutes to build

        def open_runner(candidate: Candidate) -> Runner:
            return make_runner(candidate, backend, threads or physical_cores(), setting)

        is_strict = batches is not None
        for candidate in candidates:
            measured = batches_that_run(candidate, measured, open_runner, is_strict=is_strict, listener=listener)
    return profile_pair(
        candidates[0],
        candidates[1] if len(candidates) > 1 else None,
        image_shape=sample,
        backends=(backend,),
        batches=measured,
        threads=threads,
        setting=setting,
        seconds=seconds,
        listener=listener,
    )


def _require_known_engines(paths: Iterable[Path]) -> None:
    """Raise CorruptArtifact if one of these programs holds an engine."""
    for path in paths:
        if path.suffix.lower() == ".pt2" and holds_native_objects(path):
            raise CorruptArtifact(
                f"{path.name} holds an engine, which is native code, and is no recorded file of a run.\n"
                "If you know where it comes from: --trust-engine"
            )


def _setting_for_files(setting: Setting, backend: str, listener: Listener) -> Setting:
    """Resolve the device of a setting; raise UsageError where it asks for what the files fix."""
    setting = setting.resolved((backend,), listener)
    if setting.precision != "fp32":
        raise UsageError("a file is in the precision that it was exported in: leave out --precision.")
    if setting.channels_last:
        raise UsageError("a file is in the memory format that it was exported in: leave out --channels-last.")
    setting.require_possible((backend,))
    return setting


def _common_sample(paths: Sequence[Path], inputs: Sequence[FileInputs]) -> tuple[int, ...]:
    """Return the shape of one sample of the first input, which two files must have in common."""
    samples = [each.sample_shape() for each in inputs]
    if len(set(samples)) > 1:
        raise UsageError(
            f"{paths[0].name} takes images of {shape_text(samples[0])}, {paths[1].name} of {shape_text(samples[1])}.\n"
            "Two files are compared on the same images: export one of them again."
        )
    return samples[0]


def _candidate(path: Path, inputs: FileInputs, trust_engine: bool) -> Candidate:
    kind = path.suffix.lower()
    if kind == ".engine":  # which converts images itself
        return Candidate(str(path), engine=path, trust_engine=trust_engine)
    onnx, program = (path, None) if kind == ".onnx" else (None, path)
    return Candidate(str(path), onnx=onnx, program=program, inputs=inputs.values, trust_engine=trust_engine)


def _backend_of(paths: Sequence[Path], asked: str | None, device: str, listener: Listener) -> str:
    """Choose the backend for these files and check it against the one asked for."""
    kinds = {path.suffix.lower() for path in paths}
    if unknown := sorted(kinds - set(_BACKEND_OF_SUFFIX)):
        raise UsageError(
            f"{unknown[0] or 'no ending'} is no kind of file that can be measured: {', '.join(_BACKEND_OF_SUFFIX)}."
        )
    defaults = {
        "torch-trt" if path.suffix.lower() == ".pt2" and has_tensorrt(path) else _BACKEND_OF_SUFFIX[path.suffix.lower()]
        for path in paths
    }
    if len(defaults) > 1:
        raise UsageError(
            f"{paths[0].name} and {paths[1].name} run in two different backends: a speed-up between them would\n"
            "say nothing about the networks. Compare files of one kind."
        )
    (backend,) = defaults
    if asked is None and backend == "ort" and find_device(device).type == "cuda":
        return "ort-cuda" if device != "auto" or _starts_with_cuda(paths[0], listener) else "ort"
    if asked is None or asked == backend:
        return backend
    if backend == "ort" and asked in ("ort-cuda", "ort-trt"):
        return asked
    raise UsageError(f"{paths[0].name} runs in {backend}, not in {asked}: leave out --backend.")


def _gpu_provider(backend: str | None, device: str) -> str | None:
    """Return the provider with which ONNX files of others are tried after that of the CPU; None: with no other."""
    if backend is None and find_device(device).type == "cuda":
        return PROVIDERS["ort-cuda"]
    return PROVIDERS[backend] if backend in ("ort-cuda", "ort-trt") else None


def _starts_with_cuda(path: Path, listener: Listener) -> bool:
    """Test whether ONNX Runtime opens a file with its CUDA provider; warn if it does not."""
    try:
        open_session(path, threads=1, provider=PROVIDERS["ort-cuda"])
    except MissingError as error:
        listener(Warned(f"{path.name} is measured on the CPU: {error}"))
        return False
    return True
