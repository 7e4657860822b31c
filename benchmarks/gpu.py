"""Check of everything that needs an NVIDIA GPU, each part in a process of its own, with a reason for what is left out.

    python -m benchmarks.gpu [--only NAME,...] [--minutes 20] [--out FOLDER]

The parts follow a user's way: `doctor`, `prune` of the demo recipe on the GPU, `export --trt` in every precision, each
engine compared with its PyTorch model, then what engines promise (open batch, CUDA graph, timing cache, refit, stripped
weights, compatible versions, sidecars, bundles), `profile` in every backend, Torch-TensorRT, and other benchmarks with
`--device cuda`. A part that crashes ends its own process only.

Writes `gpu.json` after every part, and `gpu.md`, into benchmarks/results/ or `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.gpu_engines import ENGINE_PARTS
from passdeploy.errors import MissingError
from passdeploy.runtime.files import write_atomically
from passdeploy.runtime.versions import package_versions

RESULTS = Path(__file__).parent / "results"
PRECISIONS = "fp32,fp16,bf16,int8"


@dataclass(frozen=True)
class Part:
    """One part of the check."""

    name: str
    seconds: float  # at most
    run: Callable[[Path], Mapping[str, Any]]  # in a folder that all parts share; returns JSON values


class Skipped(Exception):
    """What a part needs is not on this machine."""


def passdeploy(*arguments: str, cwd: Path, timeout: float = 300) -> Any:
    """Run a command with --json, and return what it prints.

    Raises:
        Skipped: it says that something is missing (exit code 3).
        RuntimeError: it fails in another way.
    """
    command = [sys.executable, "-m", "passdeploy", *arguments, "--json"]
    process = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)
    if process.returncode == 0:
        return json.loads(process.stdout)
    text = " ".join(process.stderr.split())[-600:]
    if process.returncode == 3:
        raise Skipped(text)
    raise RuntimeError(f"exit code {process.returncode}: {text}")


def doctor(work: Path) -> Mapping[str, Any]:
    return {"doctor": passdeploy("doctor", cwd=work)}


def prune(work: Path) -> Mapping[str, Any]:
    recipe = Path(__file__).parents[1] / "recipes" / "mobilenetv2.yaml"
    began = perf_counter()
    summary = passdeploy("prune", "--recipe", str(recipe), "--device", "cuda", cwd=work)
    return {"seconds": perf_counter() - began, "summary": _numbers(summary)}


def engines(*options: str) -> Callable[[Path], Mapping[str, Any]]:
    """Export the run as engines, each compared with the model on real images."""

    def part(work: Path) -> Mapping[str, Any]:
        began = perf_counter()
        passdeploy("export", "--trt", "--timing-cache", str(work / "timing.cache"), *options, cwd=work, timeout=600)
        seconds = perf_counter() - began
        records = json.loads((work / "runs" / "latest" / "export" / "artifacts.json").read_text())
        rows = {name: _engine_row(record) for name, record in records.items() if record["kind"] == "engine"}
        return {"export_seconds": seconds, "engines": rows}

    return part


def _engine_row(record: Mapping[str, Any]) -> dict[str, Any]:
    facts, parity = record["facts"], record["facts"]["parity"]
    return {
        "megabytes": record["size_bytes"] / 1e6,
        **{key: facts[key] for key in ("layers", "census", "build_seconds", "timing_cache_sha256")},
        **{key: parity[key] for key in ("max_rel_error", "max_rel_error_real", "top1_agreement", "top1", "ran")},
        "images": parity["real_images"],
    }


def profile(*options: str) -> Callable[[Path], Mapping[str, Any]]:
    def part(work: Path) -> Mapping[str, Any]:
        document = passdeploy("profile", "--seconds", "2", "--batch", "1,8,32", *options, cwd=work)
        return {"profile": document}

    return part


def torch_tensorrt(work: Path) -> Mapping[str, Any]:
    exported = passdeploy("export", "--dense", "--torch-trt", "--precision", "fp32,fp16", cwd=work)
    return {"exported": exported}


def bundle(work: Path) -> Mapping[str, Any]:
    """Write a bundle, build its engines from it, and load one."""
    passdeploy("export", "--trt", "--precision", "fp32,fp16", "--bundle", str(work / "bundle"), cwd=work)
    built = passdeploy("export", "--from-bundle", str(work / "bundle"), cwd=work)
    checked = passdeploy("export", "--check-engine", str(work / "bundle" / "model-fp16.engine"), cwd=work)
    return {"built": built, "checked": checked}


def script(module: str, *options: str) -> Callable[[Path], Mapping[str, Any]]:
    """Run another benchmark on the GPU; it writes JSON to `--out`."""

    def part(work: Path) -> Mapping[str, Any]:
        out = work / f"{module}.json"
        command = [sys.executable, "-m", f"benchmarks.{module}", "--device", "cuda", *options, "--out", str(out)]
        process = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        if not out.is_file():
            raise RuntimeError(" ".join((process.stderr or process.stdout).split())[-600:])
        return {"printed": process.stdout[-3000:], "result": json.loads(out.read_text())}

    return part


GPU = ("--device", "cuda", "--cuda-graph")
PARTS = (
    Part("doctor", 120, doctor),
    Part("prune", 150, prune),
    Part("engines", 420, engines("--precision", PRECISIONS)),
    Part("dense_engines", 240, engines("--dense", "--precision", "fp16")),
    Part("dense_engines_int8", 240, engines("--dense", "--precision", "int8")),
    *(Part(name, 150, run) for name, run in ENGINE_PARTS.items()),
    Part("bundle", 150, bundle),
    Part("profile_default", 120, profile("--layers")),
    Part("profile_fp16", 180, profile("--precision", "fp16", *GPU, "--backend", "torch,compile,tensorrt")),
    Part("profile_int8", 60, profile("--precision", "int8", *GPU, "--backend", "tensorrt")),
    Part("profile_engine_layers", 60, profile("--precision", "fp16", *GPU, "--backend", "tensorrt", "--layers")),
    Part("profile_ort_cuda", 90, profile("--backend", "ort-cuda", "--device", "cuda")),
    Part("profile_ort_trt", 120, profile("--backend", "ort-trt", "--device", "cuda")),
    Part("torch_trt", 240, torch_tensorrt),
    Part("profile_torch_trt", 120, profile("--precision", "fp16", "--device", "cuda", "--backend", "torch-trt")),
    Part("determinism", 240, script("determinism")),
    Part("mask_step", 240, script("mask_step")),
    Part("input_pipeline", 240, script("input_pipeline")),
    Part("gpu_table", 240, script("gpu_table")),
    Part("gpu_targets", 420, script("gpu_targets", "--seconds", "360")),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of parts, separated by commas: " + ", ".join(p.name for p in PARTS))
    parser.add_argument("--minutes", type=float, default=20, help="parts that do not fit are left out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, help="folder of the run and the engines; left out: a temporary one")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # the process of one part
    options = parser.parse_args()
    if options.part:
        return _run_here(options.part, options.work)
    asked = set(options.only.split(",")) if options.only else {part.name for part in PARTS}
    if unknown := asked - {part.name for part in PARTS}:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        work = (options.work or Path(folder)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        document = _run_parts([part for part in PARTS if part.name in asked], work, 60 * options.minutes, options.out)
    return 0 if all(part["state"] != "failed" for part in document["parts"].values()) else 1


def _run_parts(parts: list[Part], work: Path, budget: float, out: Path) -> dict[str, Any]:
    """Run each part in a process of its own, and write the results after each."""
    out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "python": platform.python_version(),
        "gpu": _gpu_name(),
        "versions": package_versions(),
        "parts": {},
    }
    began = perf_counter()
    for part in parts:
        left, start = budget - (perf_counter() - began), perf_counter()
        result = _in_a_process(part, work, left) if left > 20 else {"state": "skipped", "why": "no time was left"}
        document["parts"][part.name] = {**result, "seconds": round(perf_counter() - start, 1)}
        print(
            f"{part.name:24} {result['state']:8} {perf_counter() - start:6.1f} s  {result.get('why', '')}", flush=True
        )
        write_atomically(out / "gpu.json", json.dumps(document, indent=1) + "\n")
    write_atomically(out / "gpu.md", _table(document))
    return document


def _in_a_process(part: Part, work: Path, left: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part.name, "--work", str(work)]
    result_file = work / f".{part.name}.json"
    result_file.unlink(missing_ok=True)
    # In the mode of the checkout, so that `python -m passdeploy` finds the package from any folder.
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=min(part.seconds, left), env=environment, cwd=root
        )
    except subprocess.TimeoutExpired:
        return {"state": "failed", "why": f"not finished in {min(part.seconds, left):.0f} s"}
    if result_file.is_file():
        result: dict[str, Any] = json.loads(result_file.read_text())
        return result
    why = " ".join(process.stderr.split())[-600:]
    return {"state": "failed", "why": f"the process ended with {process.returncode}: {why}"}


def _run_here(name: str, work: Path) -> int:
    """Run one part in this process, and write its result beside the run."""
    part = next(part for part in PARTS if part.name == name)
    result: dict[str, Any]
    try:
        result = {"state": "done", **part.run(work)}
    except (Skipped, MissingError) as error:
        result = {"state": "skipped", "why": str(error)}
    except Exception as error:
        import traceback

        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        result = {"state": "failed", "why": " ".join(text.split())[-900:]}
    write_atomically(work / f".{name}.json", json.dumps(result, default=str))
    return 0


def _gpu_name() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor}), CUDA {torch.version.cuda}"


def _numbers(value: Any) -> Any:
    """Keep the numbers and short texts of a document, so that the results stay readable."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value[:8]]
    return value[:200] if isinstance(value, str) else value


def _table(document: Mapping[str, Any]) -> str:
    lines = [
        f"Made by `python -m benchmarks.gpu` on {document['gpu']}; "
        + ", ".join(f"{name} {version}" for name, version in document["versions"].items())
        + ".",
        "",
        "| part | state | seconds | |",
        "|---|---|---|---|",
    ]
    for name, part in document["parts"].items():
        lines.append(f"| {name} | {part['state']} | {part['seconds']:.0f} | {part.get('why', '')} |")
    rows = document["parts"].get("engines", {}).get("engines", {})
    if rows:
        lines += ["", "| engine | MB | error | top-1 agreement | images |", "|---|---|---|---|---|"]
        for name, row in rows.items():
            lines.append(
                f"| {name} | {row['megabytes']:.1f} | {row['max_rel_error']:.1e} | {row['top1_agreement']:.2%} | "
                f"{row['images']} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
