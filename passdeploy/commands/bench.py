"""Every format and precision that this machine can export and run, in one table.

Each slim file is measured in turns with the dense network in fp32 in the same backend, so that a speed-up is what
pruning and precision bring together. What cannot be exported or run here is listed with the reason. The files are in a
folder of their own in the run, since they are made for other batch sizes than those that the user has exported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from passdeploy.commands.export_run import export_network, samples_of
from passdeploy.errors import PassDeployError
from passdeploy.export import Artifact, ExportSettings, Samples
from passdeploy.export.precision import parse_precisions
from passdeploy.export.torch_trt import PROGRAM_PRECISIONS
from passdeploy.export.torch_trt_release import load_torch_trt
from passdeploy.export.trt_api import Flavour
from passdeploy.profiling import Candidate, Setting, default_threads, profile_pair, read_environment
from passdeploy.report.write import renew_report
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.load import load_network, read_plan_document, summary_of
from passdeploy.runs.numbering import LATEST
from passdeploy.runtime.events import Listener, silent
from passdeploy.runtime.names import PRECISIONS

BENCH_FILES = "bench"  # folder of the measured files, in the run folder


@dataclass(frozen=True)
class _Bench:
    """A run that is measured, and what all its measurements share."""

    folder: RunFolder
    setting: Setting
    batch: int
    threads: int
    seconds: float
    allow_code: bool
    listener: Listener
    rows: list[dict[str, Any]]
    skipped: list[dict[str, str]]

    @cached_property
    def samples(self) -> Samples:
        """Images of the run's data, the same for every precision."""
        return samples_of(self.folder, ExportSettings(precisions=PRECISIONS), listener=self.listener)

    def attempt(self, format_name: str, precision: str, work: Callable[[], None]) -> None:
        """Do some work for a row of the table; if it cannot be done here, note the reason."""
        try:
            work()
        except PassDeployError as error:
            reason = " ".join(str(error).split())
            self.skipped.append({"format": format_name, "precision": precision, "reason": reason})

    def measure(self, backend: str, dense: Candidate, slim: Candidate, precision: str = "fp32") -> dict[str, Any]:
        """Measure a slim form in turns with a dense one; returns the slim row as in `profile.json`."""
        profile = profile_pair(
            dense,
            slim,
            image_shape=tuple(read_plan_document(self.folder)["image_shape"]),
            backends=(backend,),
            batches=(self.batch,),
            threads=self.threads,
            setting=Setting(self.setting.device, precision) if backend == "torch-trt" else self.setting,
            seconds=self.seconds,
            listener=self.listener,
        )
        row: dict[str, Any] = profile.to_json()["rows"][1]
        return row

    def add(self, format_name: str, precision: str, artifact: Artifact | None, row: dict[str, Any] | None) -> None:
        """Add a row of the table: what the file is like, and how fast it runs where that was measured."""
        parity = dict(artifact.facts.get("parity") or {}) if artifact is not None else {}
        summary = summary_of(self.folder.path)
        images = sum(((summary.get("images") or {}).get("test") or {}).values()) or None
        weights = self.folder.path / "slim.safetensors"
        self.rows.append(
            {
                "format": format_name,
                "precision": precision,
                "file": weights.name if artifact is None else f"{BENCH_FILES}/{artifact.path.name}",
                "size_bytes": weights.stat().st_size if artifact is None else artifact.size_bytes,
                "top1": summary["slim"]["top1"] if artifact is None else parity.get("top1"),
                "images": images if artifact is None else parity.get("real_images"),
                **{key: row[key] if row else None for key in ("median_ms", "ci95_rel", "speedup", "speedup_ci")},
                "notes": row["notes"] if row else ["built here, runs on a GPU"],
            }
        )


def bench_run(
    run: Path | str = LATEST,
    *,
    precisions: Sequence[str] = PRECISIONS,
    batch: int = 1,
    threads: int | None = None,
    device: str = "auto",
    seconds: float = 2.0,
    allow_code: bool = False,
    listener: Listener = silent,
) -> dict[str, Any]:
    """Export a run in every format and precision that this machine can, measure each, and write `bench.json`.

    The files go into the folder `bench` of the run; those of `passdeploy export` stay as they are.

    Args:
        run: the run folder.
        precisions: of `PRECISIONS`.
        batch: images per call.
        threads: of the CPU; None: OMP_NUM_THREADS, or as many as there are physical cores.
        device: auto (the GPU where there is one), cpu, cuda or cuda:N.
        seconds: to measure each, at least.
        allow_code: let the recipe name a model factory, which runs its module's code.
        listener: receives progress events and warnings.

    Returns:
        The content of `bench.json`: `rows`, `skipped` with the reasons, `environment`, batch and threads.
    """
    parse_precisions(precisions)
    setting = Setting(device=device).resolved((), listener)
    threads = threads or default_threads()
    with RunFolder.open(Path(run), write=True) as folder:
        bench = _Bench(folder, setting, batch, threads, seconds, allow_code, listener, [], [])
        dense, slim = (
            Candidate(name, load_network(folder, name, allow_code), weights=f"{name}.safetensors")
            for name in ("dense", "slim")
        )
        bench.attempt(
            "PyTorch", "fp32", lambda: bench.add("PyTorch", "fp32", None, bench.measure("torch", dense, slim))
        )
        baseline = _export_baseline(bench)
        for precision in precisions:
            _bench_onnx(bench, precision, baseline)
        for precision in precisions:
            _bench_engine(bench, precision)
        for precision in precisions:
            if precision in PROGRAM_PRECISIONS:
                _bench_program(bench, precision)
        document = {
            "environment": read_environment(threads=threads),
            "batch": batch,
            "threads": threads,
            "device": setting.device,
            "rows": bench.rows,
            "skipped": bench.skipped,
        }
        folder.write_json("bench.json", document, kind="bench")
        renew_report(folder, listener)
        return document


def _batches(batch: int) -> tuple[int, int, int]:
    """Return the batch sizes that files are made for."""
    return 1, batch, max(32, batch)


def _export(bench: _Bench, name: str, settings: ExportSettings) -> list[Artifact]:
    return export_network(
        bench.folder, name, settings, bench.samples, bench.allow_code, bench.listener, home=BENCH_FILES
    )


def _export_baseline(bench: _Bench) -> Artifact | PassDeployError:
    """Export the dense network in fp32, which every ONNX file is measured against; return why, where that fails."""
    try:
        return _export(bench, "dense", ExportSettings(batch=_batches(bench.batch)))[0]
    except PassDeployError as error:
        return error


def _bench_onnx(bench: _Bench, precision: str, baseline: Artifact | PassDeployError) -> None:
    """Measure the ONNX file of a precision in ONNX Runtime."""
    backend = "ort-cuda" if bench.setting.device.startswith("cuda") else "ort"

    def work() -> None:
        if isinstance(baseline, PassDeployError):
            raise baseline
        settings = ExportSettings(precisions=(precision,), batch=_batches(bench.batch))
        artifact = _export(bench, "slim", settings)[0]
        pair = Candidate("dense", onnx=baseline.path), Candidate("slim", onnx=artifact.path)
        bench.add("ONNX Runtime", precision, artifact, bench.measure(backend, *pair))

    bench.attempt("ONNX Runtime", precision, work)


def _bench_engine(bench: _Bench, precision: str) -> None:
    """Build the engine of a precision, and measure it where there is a GPU; RTX engines are built without one."""
    has_gpu = bench.setting.device.startswith("cuda")

    def work() -> None:
        flavour: Flavour = "tensorrt" if has_gpu else "rtx"
        settings = ExportSettings(("onnx", "trt"), (precision,), _batches(bench.batch), flavour=flavour)
        engine = _export(bench, "slim", settings)[1]
        if not has_gpu:
            bench.add("TensorRT for RTX", precision, engine, None)
            return
        whole = ExportSettings(("onnx", "trt"), ("fp32",), _batches(bench.batch), flavour=flavour)
        pair = Candidate("dense", engine=_export(bench, "dense", whole)[1].path), Candidate("slim", engine=engine.path)
        bench.add("TensorRT", precision, engine, bench.measure("tensorrt", *pair))

    bench.attempt("TensorRT" if has_gpu else "TensorRT for RTX", precision, work)


def _bench_program(bench: _Bench, precision: str) -> None:
    """Compile the Torch-TensorRT program of a precision, and measure it in turns with the dense one in fp32."""

    def program(name: str, precision: str) -> Artifact:
        settings = ExportSettings(("torch-trt",), (precision,), _batches(bench.batch))
        return next(one for one in _export(bench, name, settings) if one.kind == "program")

    def work() -> None:
        load_torch_trt(None)  # before the exports, which take longer
        dense, slim = program("dense", "fp32"), program("slim", precision)
        pair = Candidate("dense", program=dense.path), Candidate("slim", program=slim.path)
        bench.add("Torch-TensorRT", precision, slim, bench.measure("torch-trt", *pair, precision))

    bench.attempt("Torch-TensorRT", precision, work)
