"""Tables of `benchmarks.torch_trt`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMS = ("open batch", "fixed batch", "slim open batch", "built", "slim built")
LARGEST_DIFFERENCE = 1e-5


def markdown(document: Mapping[str, Any]) -> str:
    """Write the summary, every network that is not whole, the engines that were built, and what has not been run."""
    jobs: Mapping[str, Any] = document["jobs"]
    versions = document.get("versions", {})
    missing = [key for key in document["all_jobs"] if key not in jobs]
    lines = [
        "# Networks through Torch-TensorRT for RTX, without a GPU",
        "",
        f"`python -m benchmarks.torch_trt`, torch {versions.get('torch')}, torch-tensorrt-rtx "
        f"{versions.get('torch-tensorrt-rtx')}, timm {versions.get('timm')}. *Whole* is one engine with nothing left "
        "in PyTorch. A dry run lowers and partitions as a build does. *Difference* is the largest, relative to the "
        "largest output, between the network and the graph after all lowering, on the CPU. Random weights.",
        "",
        "| | networks | run | whole, fp32 | whole, fp16 | difference at most |",
        "|---|---|---|---|---|---|",
    ]
    for form in FORMS:
        keys = [key for key in document["all_jobs"] if form_of(key) == form]
        found = {key: jobs[key] for key in keys if key in jobs}
        counts = {name: sum(is_whole(job.get(name)) for job in found.values()) for name in ("fp32", "fp16")}
        shown = ["-" if form.endswith("built") else str(counts["fp32"]), str(counts["fp16"])]
        lines.append(f"| {form} | {len(keys)} | {len(found)} | {' | '.join(shown)} | {largest(found, form)} |")
    lines += ["", "## Not whole", ""]
    for key, job in jobs.items():
        for precision in ("fp32", "fp16"):
            if (problem := problem_of(job, precision)) is not None:
                lines.append(f"- {key}, {precision}: {problem}")
    if lines[-1] == "":
        lines.append("None of those that were run.")
    infinite = [key for key, job in jobs.items() if job.get("fp16", {}).get("difference") == float("inf")]
    if infinite:
        lines += ["", "## Not finite in fp16", ""]
        lines.append("With random weights, whose activations grow from block to block: " + ", ".join(infinite) + ".")
    lines += ["", "## Engines", "", "| network | multiply-adds | weights, MB | engine, MB | as the dry run |"]
    lines += ["|---|---|---|---|---|"]
    for key, job in jobs.items():
        engine = job.get("fp16", {})
        if form_of(key).endswith("built") and "engine_bytes" in engine:
            weights = sum(engine["census"]["weights"].values()) / 1e6
            size = " + ".join(f"{count / 1e6:.1f}" for count in engine["engine_bytes"])
            share = f"{job['macs']:.0%}" if "macs" in job else "100%"
            same = "yes" if engine["is_as_dry_run"] else "no"
            lines.append(f"| {key} (fp16) | {share} | {weights:.1f} | {size} | {same} |")
    lines += ["", "## Not run", ""]
    lines.append(", ".join(missing) + "." if missing else "Nothing: all were run.")
    return "\n".join(lines) + "\n"


def form_of(key: str) -> str:
    """Return what was done with a network: the part of the job's name behind the network's."""
    return key.split(", ", 1)[1]


def is_whole(result: Mapping[str, Any] | None) -> bool:
    """Test whether a network became one engine."""
    return result is not None and result.get("engines") == 1 and not result["torch_operations"]


def largest(jobs: Mapping[str, Any], form: str) -> str:
    """Return the largest difference in float32 among these jobs."""
    precision = "fp16" if form.endswith("built") else "fp32"
    differences = [job[precision]["difference"] for job in jobs.values() if "difference" in job.get(precision, {})]
    if not differences:
        return "-"
    return f"{max(differences):.0e}" + (" (fp16)" if precision == "fp16" else "")


def problem_of(job: Mapping[str, Any], precision: str) -> str | None:
    """Say why a network is not whole in a precision, or differs; None if it is and does not, or was not asked for."""
    if "error" in job:
        return str(job["error"])
    result = job.get(precision)
    if result is None:
        return None
    if "error" in result:
        return str(result["error"])
    if not is_whole(result):
        return f"{result['engines']} engines, in PyTorch: {', '.join(result['torch_lines'])}"
    if precision == "fp32" and not result["difference"] <= LARGEST_DIFFERENCE:
        return f"differs by {result['difference']:.1e}"
    return None
