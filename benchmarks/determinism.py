"""Same seed, same device: are plan and weights the same bits, also after a kill and a resume, and what does it cost?

    python -m benchmarks.determinism --device cuda --out determinism.json

Each network is pruned on the digits four times: twice with `deterministic: true`, once killed (SIGKILL, at a random
step) and resumed, and once with `deterministic: false`. The SHA-256 of plan.json and slim.safetensors are compared.
Then a training step on a batch that stays on the device is timed with deterministic algorithms and without, in turns.
Takes under 3 minutes on a GPU; the exit code is 1 if the bits of the deterministic runs differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Any

import torch
import torch.nn.functional as F

from passdeploy.models.build import build_model
from passdeploy.profiling.environment import read_environment
from passdeploy.runtime.determinism import deterministic_algorithms, require_cublas_workspace_
from passdeploy.runtime.devices import find_device
from passdeploy.runtime.files import sha256_of

RECIPE = "mobilenetv2.yaml"
SHORT = ("train.epochs=2", "prune.steps=60", "finetune.epochs=2", "gates.top1_drop=null")
NETWORKS = {
    "mobilenet_v2": (),
    "resnet18": ("name=resnet18-digits", "model.name=torchvision/resnet18"),
}
FILES = ("plan.json", "slim.safetensors")
COSTS = {  # network -> batch and image size of the timed step; the last two on a GPU only
    "torchvision/mobilenet_v2": (64, 64),
    "torchvision/resnet18": (64, 64),
    "torchvision/resnet50": (64, 224),
    "torchvision/vgg11_bn": (64, 96),  # pools 3 x 3 values to 7 x 7, for which we have a kernel of our own
}
TURNS, STEPS_PER_TURN, WARM_UP_STEPS = 10, 8, 12
MIDDLE = (0.15, 0.85)  # share of all steps after which the run is killed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:N")
    parser.add_argument("--networks", default=",".join(NETWORKS), help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--jobs", type=int, help="runs at a time; a quarter of the cores, at most 4, if left out")
    parser.add_argument("--seed", type=int, default=0, help="of the moment at which a run is killed")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="change a key of the recipe")
    parser.add_argument("--only", choices=("runs", "costs"), help="one of the two parts; both, if left out")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    device = find_device(options.device)
    if device.type == "cuda":
        require_cublas_workspace_()
    jobs = options.jobs or max(1, min(4, (os.cpu_count() or 1) // 4))
    began = perf_counter()
    document: dict[str, Any] = {
        "device": str(device),
        "environment": read_environment(threads=torch.get_num_threads()),
        "networks": {},
    }
    for name in options.networks.split(",") if options.only != "costs" else ():
        overrides = (*NETWORKS[name], *SHORT, *options.overrides)
        document["networks"][name] = compare_runs(overrides, str(device), jobs, random.Random(f"{options.seed} {name}"))
        print_runs(name, document["networks"][name])
    document["costs"] = [
        time_step(name, *size, device)
        for index, (name, size) in enumerate(COSTS.items())
        if options.only != "runs" and (device.type == "cuda" or index < 2)
    ]
    for row in document["costs"]:
        print(
            f"{row['network']:<26} batch {row['batch']}, {row['image_size']} px: {row['deterministic_ms']:.2f} ms "
            f"a step, {row['free_ms']:.2f} ms with deterministic: false, {row['ratio']:.3f}x"
        )
    document["seconds"] = round(perf_counter() - began, 1)
    if options.out:
        options.out.write_text(json.dumps(document, indent=1))
    print(f"{document['seconds']:.0f} s in all")
    return 0 if all(network["is_equal"] for network in document["networks"].values()) else 1


def compare_runs(overrides: tuple[str, ...], device: str, jobs: int, chance: random.Random) -> dict[str, Any]:
    """Prune one network in several ways; return the hashes of each way and whether the deterministic ones agree."""
    with TemporaryDirectory() as temporary:
        out = Path(temporary)
        ways: dict[str, Callable[[], dict[str, Any]]] = {
            "first": lambda: finish(prune(overrides, out / "first", device)),
            "second": lambda: finish(prune(overrides, out / "second", device)),
            "deterministic: false": lambda: finish(prune((*overrides, "deterministic=false"), out / "free", device)),
        }
        with ThreadPoolExecutor(jobs) as pool:
            started = {name: pool.submit(run) for name, run in ways.items()}
            runs = {name: future.result() for name, future in started.items()}
        steps = len((out / "first" / "latest" / "metrics.jsonl").read_text().splitlines())
        runs["killed and resumed"] = kill_and_resume(overrides, out / "killed", device, steps, chance)
    hashes = [tuple(run[file] for file in FILES) for name, run in runs.items() if name != "deterministic: false"]
    return {"runs": runs, "is_equal": len(set(hashes)) == 1}


def prune(overrides: tuple[str, ...], out: Path, device: str, *, resume: bool = False) -> subprocess.Popen[bytes]:
    """Start `passdeploy prune` in a process of its own."""
    out.mkdir(exist_ok=True)
    changes = [argument for override in overrides for argument in ("--set", override)]
    command = [sys.executable, "-m", "passdeploy", "prune", "--recipe", RECIPE, "--out", str(out), "--device", device]
    log = (out / "log").open("ab")
    return subprocess.Popen([*command, *changes, *(["--resume"] if resume else [])], stdout=log, stderr=log)


def finish(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Wait for a run; return the hashes of its files and the seconds of its stages."""
    out = Path(process.args[process.args.index("--out") + 1])  # type: ignore[index, union-attr, arg-type]
    if process.wait() != 0:
        raise SystemExit((out / "log").read_text())
    summary = json.loads((out / "latest" / "summary.json").read_text())
    hashes = {file: sha256_of(out / "latest" / file) for file in FILES}
    return {**hashes, "seconds": summary["seconds"], "environment": summary["environment"], "slim": summary["slim"]}


def kill_and_resume(
    overrides: tuple[str, ...], out: Path, device: str, steps: int, chance: random.Random
) -> dict[str, Any]:
    """Kill a run after a random one of its steps and resume it."""
    last = round(chance.uniform(*MIDDLE) * steps)
    process = prune(overrides, out, device)
    lines: list[str] = []
    while len(lines) < last and process.poll() is None:
        sleep(0.01)
        lines = [line for metrics in out.glob("*/metrics.jsonl") for line in metrics.read_text().splitlines()]
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise SystemExit(f"the run ended before it could be killed:\n{(out / 'log').read_text()}")
    stage, done = (json.loads(lines[-1])[key] for key in ("stage", "step"))
    return {**finish(prune(overrides, out, device, resume=True)), "killed_at": f"step {done} of {stage}"}


def print_runs(name: str, document: dict[str, Any]) -> None:
    for way, run in document["runs"].items():
        at = f", killed at {run['killed_at']}" if "killed_at" in run else ""
        seconds = sum(run["seconds"].values())
        hashes = "  ".join(f"{file} {run[file][:16]}" for file in FILES)
        print(f"{name:<14} {way:<22} {hashes}  top-1 {run['slim']['top1']:.4f}, {seconds:.1f} s{at}")
    print(f"{name:<14} {'the same bits' if document['is_equal'] else 'DIFFERENT BITS'} with deterministic: true")


def time_step(name: str, batch: int, image_size: int, device: torch.device) -> dict[str, Any]:
    """Time a training step on one batch that stays on the device, deterministic and not, in turns."""
    network = build_model(name, num_classes=10).to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9)
    images = torch.randn(batch, 3, image_size, image_size, device=device)
    labels = torch.randint(0, 10, (batch,), device=device)

    def steps(count: int) -> float:
        """Return the milliseconds of a step."""
        began = perf_counter()
        for _ in range(count):
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (perf_counter() - began) / count * 1e3

    def timed(is_deterministic: bool, count: int) -> float:
        with deterministic_algorithms(is_deterministic, device, network=network):
            return steps(count)

    count, turns = (STEPS_PER_TURN, TURNS) if device.type == "cuda" else (1, 5)
    for is_deterministic in (True, False):
        timed(is_deterministic, WARM_UP_STEPS if device.type == "cuda" else 1)
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(turns):
        for is_deterministic in (turn % 2 == 0, turn % 2 != 0):
            times[is_deterministic].append(timed(is_deterministic, count))
    deterministic_ms, free_ms = median(times[True]), median(times[False])
    return {
        "network": name,
        "batch": batch,
        "image_size": image_size,
        "deterministic_ms": deterministic_ms,
        "free_ms": free_ms,
        "ratio": deterministic_ms / free_ms,
    }


if __name__ == "__main__":
    sys.exit(main())
