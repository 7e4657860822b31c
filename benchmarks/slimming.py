"""How much of the model zoos we slim, and whether exactly; beside torch-pruning.

    python benchmarks/slimming.py --zoo all

Every network runs in a process of its own, on one thread, with random weights. Half of the channels of every
prunable group go, chosen at random; what is left is compared with the masked network. torch-pruning cuts the same
share of the same network. Results are kept in a JSON file, and a run that was stopped goes on with what is missing.

What counts:

* `exact`: the outputs of the slim and of the masked network differ by at most 1e-5 of the largest output, in
  float32; or, where float32 itself is too coarse for a deep network without norms, by at most 1e-9 in float64.
* Cutting must have changed the outputs, else the comparison means nothing: a network whose outputs move by less
  than a hundred times the tolerance is `unjudged`. One of which nothing may be cut is `uncut`.
* Detectors: random weights rank all boxes alike, and rounding decides which survive. So the outputs of every head are
  compared instead, before boxes are chosen; those of the box heads on boxes that the masked network proposed.
* Times are CPU seconds of the one thread: what it would take on a machine that has nothing else to do. Of what takes
  less than some seconds the least of three is taken, theirs and ours: single ones differ by half here. The limit holds
  for finding groups and slimming; checks afterwards may take five times as long.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import platform
import random
import resource
import subprocess
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.slimming_report import ROUNDED, details, markdown, summary_table
from benchmarks.zoo import ZOOS, Entry, entries
from passdeploy import chance
from passdeploy.channels.groups import ChannelGroup, ChannelMap
from passdeploy.channels.mapping import map_channels
from passdeploy.counts import count
from passdeploy.files import write_atomically
from passdeploy.plan import Budget, Plan, choose_channels
from passdeploy.slimming import hidden_state, masked, numbers_after, relative_error, resize_, slim

SHARE = 0.5
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
MEMORY_GIB = 8.0
CHECKS_TAKE = 5  # times the limit
TIMED, TIMED_S = 3, 10.0  # how often work is timed, while it has taken less than so many CPU seconds in all

Say = Callable[[Mapping[str, Any]], None]
Result = TypeVar("Result")


# What a process does with one network


def measure_ours(entry: Entry, say: Say) -> None:
    """Cut the network with passdeploy and check what came out."""
    model, inputs = entry.build(), entry.inputs()
    dense = _outputs(model, inputs, entry)
    grads = [parameter.requires_grad for parameter in model.parameters()]
    say({"phase": "groups"})
    channels, groups_s = _timed(partial(map_channels, model, inputs))
    plan = halved(channels.groups, entry.key)
    say({**_described(channels, plan), "groups_s": groups_s, "phase": "slim"})
    smaller, slim_s = _timed(partial(slim, model, channels.groups, plan))
    say({"slim_s": slim_s, "phase": "compare"})

    reference = masked(model, channels.groups, plan)
    del model
    expected = _outputs(reference, inputs, entry)
    found = _outputs(smaller, inputs, entry, like=expected)
    verdict = _compare(expected, found, dense)
    if not any(len(plan.removed(group)) for group in channels.groups):
        verdict["status"] = "uncut"
    if verdict["status"] == "inexact":
        verdict["float32"] = verdict["rel_error"]
        reference, smaller, doubled = reference.double(), smaller.double(), _doubled(inputs)
        expected = _outputs(reference, doubled, entry)
        found = _outputs(smaller, doubled, entry, like=expected)
        finer = _compare(expected, found, dense)
        verdict |= {"float64": finer["rel_error"], "status": finer["status"]}
        smaller = smaller.float()
    say({**verdict, "phase": "count"})
    del reference, expected
    gc.collect()

    checks = {
        "counts": lambda: _check_counts(smaller, inputs, channels, plan, entry),
        "numbers": lambda: _check_numbers(smaller, grads),
        "trains": lambda: _check_training(smaller, entry),
        "rebuilds": lambda: _check_rebuilding(smaller, inputs, channels, plan, entry),
    }
    for name, check in checks.items():
        say({"phase": name})
        try:
            check()
            say({name: True})
        except Exception as error:
            say({name: _first_line(error)})
        gc.collect()


def _timed(work: Callable[..., Result], *prepare: Callable[[], Any]) -> tuple[Result, float]:
    """What work on what was prepared for it comes to, and the CPU seconds of the fastest time."""
    found: list[float] = []
    while len(found) < TIMED and sum(found) < TIMED_S:
        prepared = [make() for make in prepare]
        start = time.process_time()
        result = work(*prepared)
        found.append(time.process_time() - start)
    return result, min(found)


def halved(groups: Sequence[ChannelGroup], key: str) -> Plan:
    """Half of the channels of every group that may be cut, at random; never all of them."""
    draw = random.Random(chance.seed_of("plan", key))
    kept = {}
    for group in groups:
        if group.is_prunable:
            stay = max(1, round(group.width * (1 - SHARE)))
            kept[group.name] = tuple(sorted(draw.sample(range(group.width), stay)))
    return Plan(kept)


def _described(channels: ChannelMap, plan: Plan) -> dict[str, Any]:
    """What may be cut, what may not, and what the plan leaves."""
    whole = [group for group in channels.groups if not group.is_prunable]
    sizes = {group.name: group.width * group.span for group in channels.groups}
    outputs = sum(sizes[group.name] for group in whole if group.reason.startswith("the model's output"))
    removable = sum(sizes[group.name] for group in channels.prunable)
    reasons: Counter[str] = Counter()
    for group in whole:
        reasons[group.reason or "a single channel"] += sizes[group.name]
    widths = plan.widths()
    return {
        "groups": len(channels.groups),
        "protected": len(whole),
        "prunable_share": removable / max(1, sum(sizes.values()) - outputs),
        "reasons": reasons.most_common(5),
        "params": channels.costs.of("params"),
        "macs": channels.costs.of("macs"),
        "params_kept": channels.costs.of("params", widths) / max(1, channels.costs.of("params")),
        "macs_kept": channels.costs.of("macs", widths) / max(1, channels.costs.of("macs")),
    }


def _outputs(
    model: nn.Module, inputs: Sequence[Any], entry: Entry, *, like: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a network puts out in evaluation mode, by name; `like` are outputs to take fixed boxes from."""
    model.eval()
    with torch.no_grad():
        if entry.zoo != "detection":
            return {str(place): leaf for place, leaf in enumerate(tree_leaves(model(*inputs)))}
        return _detector_outputs(model, inputs[0], like)


def _detector_outputs(model: Any, images: list[Tensor], like: Mapping[str, Any] | None) -> dict[str, Any]:
    batch, _ = model.transform(images)
    features = model.backbone(batch.tensors)
    levels = list(features.values()) if isinstance(features, dict) else [features]
    found: dict[str, Any] = {}
    if not hasattr(model, "rpn"):
        for place, leaf in enumerate(tree_leaves(model.head(levels))):
            found[f"head.{place}"] = leaf
        return found
    for place, leaf in enumerate(tree_leaves(model.rpn.head(levels))):
        found[f"rpn.{place}"] = leaf
    boxes = like["boxes"] if like else model.rpn(batch, features)[0]
    boxes = [box.to(batch.tensors.dtype) for box in boxes]
    for kind in ("box", "mask", "keypoint"):
        if getattr(model.roi_heads, f"{kind}_roi_pool", None) is not None:
            pooled = getattr(model.roi_heads, f"{kind}_roi_pool")(features, boxes, batch.image_sizes)
            pooled = getattr(model.roi_heads, f"{kind}_head")(pooled)
            for place, leaf in enumerate(tree_leaves(getattr(model.roi_heads, f"{kind}_predictor")(pooled))):
                found[f"{kind}.{place}"] = leaf
    return {**found, "boxes": boxes}


def _compare(expected: Mapping[str, Any], found: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, Any]:
    """How far the slim network is from the masked one, and how far that is from the dense one."""
    tensors = {name: value for name, value in expected.items() if isinstance(value, Tensor) and name != "boxes"}
    if expected.keys() != found.keys():
        return {"status": "inexact", "rel_error": float("inf")}
    error = max(relative_error(value, found[name]) for name, value in tensors.items())
    dtype = next(iter(tensors.values())).dtype
    tolerance = TOLERANCE[dtype]
    is_finite = all(bool(value.isfinite().all()) for value in tensors.values())
    moved = max(_movement(dense[name], value) for name, value in tensors.items())
    status = "exact" if error <= tolerance else "inexact"
    if status == "exact" and (not is_finite or moved < 100 * TOLERANCE[torch.float32]):
        status = "unjudged"
    return {"status": status, "rel_error": error, "moved": moved}


def _movement(dense: Tensor, cut: Tensor) -> float:
    return relative_error(dense, cut) if dense.shape == cut.shape else float("inf")


def _doubled(inputs: Sequence[Any]) -> tuple[Any, ...]:
    moved: tuple[Any, ...] = tree_map(lambda leaf: leaf.double() if isinstance(leaf, Tensor) else leaf, tuple(inputs))
    return moved


def _check_counts(smaller: nn.Module, inputs: Sequence[Any], channels: ChannelMap, plan: Plan, entry: Entry) -> None:
    """The slim network costs what the cost model said it would."""
    counted, widths = count(smaller, inputs), plan.widths()
    for kind in ("params", "macs"):
        if kind == "macs" and entry.zoo == "detection":
            continue  # the number of boxes, and with it the work, depends on the weights
        said, is_now = channels.costs.of(kind, widths), getattr(counted, kind)
        if said != is_now:
            raise ValueError(f"{is_now:,} {kind}, but {said:,} were predicted")


def _check_numbers(smaller: nn.Module, grads: Sequence[bool]) -> None:
    """The modules say of themselves what their weights say, and learn or not as before."""
    if [parameter.requires_grad for parameter in smaller.parameters()] != list(grads):
        raise ValueError("requires_grad changed")
    for name, module in smaller.named_modules():
        for attribute, said in _numbers(module):
            if getattr(module, attribute) != said:
                raise ValueError(f"{name}.{attribute} is {getattr(module, attribute)}, but its weight says {said}")


def _numbers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    shape = tuple(weight.shape)
    if isinstance(module, nn.modules.conv._ConvNd):
        first, second = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
        yield first, shape[0]
        yield second, shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        yield "out_features", shape[0]
        yield "in_features", shape[1]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        yield "num_features", shape[0]
    elif isinstance(module, nn.GroupNorm):
        yield "num_channels", shape[0]
    elif isinstance(module, nn.LayerNorm):
        yield "normalized_shape", shape


def _check_training(smaller: nn.Module, entry: Entry) -> None:
    """A deep copy of the slim network takes one step, if the dense network can take one."""
    try:
        _train_one_step(deepcopy(smaller), entry)
    except Exception:
        try:
            _train_one_step(entry.build(), entry)
        except Exception:
            return  # the dense network cannot either
        raise


def _train_one_step(model: nn.Module, entry: Entry) -> None:
    model.train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    leaves = [leaf for leaf in tree_leaves(model(*entry.training_inputs())) if isinstance(leaf, Tensor)]
    loss = sum(leaf.float().square().mean() for leaf in leaves if leaf.is_floating_point())
    assert isinstance(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    moved = [bool((old != new).any()) for old, new in zip(before, model.parameters(), strict=True)]
    if not any(moved):
        raise ValueError("no parameter moved")


def _check_rebuilding(
    smaller: nn.Module, inputs: Sequence[Any], channels: ChannelMap, plan: Plan, entry: Entry
) -> None:
    """Factory, plan and tensors give the same network back, bit for bit."""
    tensors = {**smaller.state_dict(), **hidden_state(smaller, channels.groups)}
    state = {name: tensor.clone() for name, tensor in tensors.items()}
    expected = _outputs(smaller, inputs, entry)
    again = entry.build()
    resize_(again, state, numbers_after(channels.groups, plan))
    for name, value in _outputs(again, inputs, entry, like=expected).items():
        if isinstance(value, Tensor) and not torch.equal(value, expected[name]):
            raise ValueError(f"output {name} differs by {relative_error(expected[name], value):.1e}")


def _prune_(network: nn.Module, example: Tensor, kept: Sequence[nn.Module], **options: Any) -> None:
    """Let torch-pruning cut `SHARE` of all layers but those that are kept."""
    import torch_pruning as tp

    pruner = tp.pruner.MetaPruner(
        network,
        example,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=SHARE,
        ignored_layers=list(kept),
        **options,
    )
    pruner.step()


def measure_torch_pruning(entry: Entry, say: Say) -> None:
    """Cut the same share of the same network with torch-pruning."""

    model, inputs = entry.build(), entry.inputs()
    if entry.zoo == "detection":  # its tracer takes tensors only: the backbone
        model, inputs = model.backbone, (inputs[0][0][None],)
    with torch.no_grad():
        shapes = [leaf.shape for leaf in tree_leaves(model(*inputs))]
    params = sum(parameter.numel() for parameter in model.parameters())
    last = [
        module
        for module in model.modules()
        if getattr(module, "out_features", getattr(module, "out_channels", None)) == entry.classes
    ]
    say({"phase": "slim"})

    names = [name for name, module in model.named_modules() if any(module is one for one in last)]

    def cut(network: nn.Module) -> nn.Module:
        _prune_(network, inputs[0], [network.get_submodule(name) for name in names], global_pruning=False)
        return network

    model, slim_s = _timed(cut, partial(deepcopy, model))
    say({"slim_s": slim_s, "phase": "compare"})
    with torch.no_grad():
        found = [leaf.shape for leaf in tree_leaves(model(*inputs))]
    left = sum(parameter.numel() for parameter in model.parameters())
    if found != shapes:
        raise ValueError(f"output shapes {[tuple(s) for s in found][:3]} were {[tuple(s) for s in shapes][:3]}")
    say({"params_kept": left / params, "status": "ok" if left < params else "nothing cut"})


def measure_rounding(entry: Entry, say: Say) -> None:
    """Layers that stay whole when half of the multiply-adds go and widths are multiples of 8."""
    model, inputs = entry.build(), entry.inputs()
    say({"phase": "slim"})
    channels = map_channels(model, inputs)
    scores = {
        group.name: torch.rand(group.width, generator=chance.generator("round", entry.key, group.name))
        for group in channels.prunable
    }
    budget = Budget.of("macs", SHARE, channels.costs)
    plan = choose_channels(scores, channels.groups, channels.costs, budget, round_to=8, allocation="uniform")
    smaller = slim(model, channels.groups, plan)
    touched = {slot.layer for group in channels.prunable for slot in group.slots}
    widths = [
        size
        for module in smaller.modules()
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        for size in module.weight.shape[:1]
    ]
    layers, uncut = _uncut(model, smaller, touched)
    say(
        {
            "layers": layers,
            "uncut": uncut,
            "odd_widths": sum(width % 8 != 0 for width in widths),
            "macs_kept": channels.costs.of("macs", plan.widths()) / channels.costs.of("macs"),
            "status": "ok",
        }
    )


def measure_rounding_torch_pruning(entry: Entry, say: Say) -> None:
    """The same with torch-pruning, which rounds each group's width."""

    model, inputs = entry.build(), entry.inputs()
    dense = deepcopy(model)
    last = [module for module in model.modules() if getattr(module, "out_features", None) == entry.classes]
    say({"phase": "slim"})
    _prune_(model, inputs[0], last, round_to=8)
    layers, uncut = _uncut(dense, model, None)
    say({"layers": layers, "uncut": uncut, "status": "ok"})


def _uncut(dense: nn.Module, smaller: nn.Module, touched: set[str] | None) -> tuple[int, list[str]]:
    """How many convolutions and linear layers there are, and those whose weights kept their shape."""
    after = dict(smaller.named_modules())
    names = [
        name
        for name, module in dense.named_modules()
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and (touched is None or name in touched)
    ]
    modules = dict(dense.named_modules())
    return len(names), [name for name in names if modules[name].weight.shape == after[name].weight.shape]  # type: ignore[union-attr]


MEASURES: dict[str, Callable[[Entry, Say], None]] = {
    "ours": measure_ours,
    "torch_pruning": measure_torch_pruning,
    "ours_rounded": measure_rounding,
    "torch_pruning_rounded": measure_rounding_torch_pruning,
}


def _first_line(error: BaseException) -> str:
    """The error and the line of code that raised it, short."""
    lines = str(error).strip().splitlines() or [""]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" [{Path(frames[-1].filename).name}:{frames[-1].lineno}]" if frames else ""
    return f"{type(error).__name__}: {lines[0][:160]}{where}"


def _child(side: str, entry: Entry, pipe: Connection) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    try:
        MEASURES[side](entry, pipe.send)
    except BaseException as error:
        is_memory = isinstance(error, MemoryError) or "allocate memory" in str(error)
        pipe.send({"status": "memory" if is_memory else "error", "error": _first_line(error)})
    pipe.send({"phase": "done", "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20})


# What the parent does: one process for each network, watched


@dataclass
class Job:
    """One network in one process."""

    entry: Entry
    side: str
    process: BaseProcess
    pipe: Connection
    limit_s: float
    phase_began_s: float
    result: dict[str, Any]

    @classmethod
    def start(cls, entry: Entry, side: str, limit_s: float) -> Job:
        """Fork from a process that has torch in memory already, and run nothing else there."""
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(side, entry, theirs), daemon=True)
        process.start()
        theirs.close()
        return cls(entry, side, process, ours, limit_s, 0.0, {"phase": "build"})

    def listen(self) -> bool:
        """Take in what the process says; whether it goes on."""
        try:
            while self.pipe.poll():
                said = dict(self.pipe.recv())
                if said.get("phase") not in (None, "slim"):  # groups and slimming share one limit
                    self.phase_began_s = _cpu_s(self.process.pid)
                self.result |= said
        except EOFError:
            self.process.join(5)
            if self.result["phase"] != "done":
                self._failed("error", f"the process died with code {self.process.exitcode}")
            self.result.pop("phase")
            return False
        if _cpu_s(self.process.pid) - self.phase_began_s > self._allowed_s:
            return self._stop("timeout", f"no result after {self._allowed_s:.0f} s")
        if (held := _resident_gib(self.process.pid)) > MEMORY_GIB:
            return self._stop("memory", f"{held:.1f} GiB")
        return True

    @property
    def _allowed_s(self) -> float:
        return self.limit_s * (1 if self.result["phase"] in ("groups", "slim") else CHECKS_TAKE)

    def _stop(self, status: str, why: str) -> bool:
        self.process.kill()
        self.process.join()
        self._failed(status, why)
        self.result.pop("phase")
        return False

    def _failed(self, status: str, why: str) -> None:
        phase = self.result["phase"]
        if "status" in self.result:  # cut and compared already: only a check failed
            self.result[phase] = f"{status}: {why}"
        else:
            self.result |= {"status": status, "error": f"{why} ({phase})"}


def _cpu_s(pid: int | None) -> float:
    """Seconds of the CPU that a process of one thread has had: what it would take on a machine of its own."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0  # gone
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_gib(pid: int | None) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0  # gone, or a system that does not say: then there is no limit
    return pages * resource.getpagesize() / 2**30


def run_all(jobs: Sequence[tuple[Entry, str]], *, workers: int, limit_s: float) -> Iterator[Job]:
    """Run every (network, side); yields each as it ends."""
    waiting, running = list(jobs), list[Job]()
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(Job.start(*waiting.pop(0), limit_s))
        wait([job.pipe for job in running], timeout=0.2)
        for job in list(running):
            if not job.listen():
                running.remove(job)
                yield job


# Tables


# The command


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--zoo", type=click.Choice([*ZOOS, "all"]), default="all", show_default=True)
@click.option("--only", "pattern", default="*", help="Networks whose name matches, as in a shell.")
@click.option("--ours-only", is_flag=True, help="Leave torch-pruning out.")
@click.option("--workers", default=1, show_default=True, help="Networks at a time.")
@click.option("--limit-s", default=60.0, show_default=True, help="CPU seconds for groups and slimming of one network.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path(__file__).parent / "results" / "slimming.json",
    help="Where results are kept.",
)
@click.option("--fresh", is_flag=True, help="Measure again what the file has already.")
def main(zoo: str, pattern: str, ours_only: bool, workers: int, limit_s: float, out: Path, fresh: bool) -> None:
    """See the module's text."""
    console = Console(width=max(Console().width, 180))
    document: dict[str, Any] = {"models": {}, "rounded": {}}
    if out.exists():
        document = json.loads(out.read_text())
    sides = ["ours"] if ours_only else ["ours", "torch_pruning"]
    chosen = [entry for entry in entries(zoo) if fnmatchcase(entry.name, pattern)]
    jobs = [
        (entry, side)
        for entry in chosen
        for side in sides
        if fresh or side not in document["models"].get(entry.key, {})
    ]
    for entry in chosen:
        if entry.zoo == "torchvision" and entry.name in ROUNDED:
            past = document["rounded"].get(entry.key, {})
            jobs += [(entry, f"{side}_rounded") for side in sides if fresh or f"{side}_rounded" not in past]
    commit = _commit()
    document["environment"] = _environment() | {"limit_s": limit_s, "workers": workers}

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "torchvision", "timm"])
    for number, job in enumerate(run_all(jobs, workers=workers, limit_s=limit_s), start=1):
        table = document["rounded" if job.side.endswith("_rounded") else "models"]
        table.setdefault(job.entry.key, {})[job.side] = job.result | {"commit": commit}
        write_atomically(out, json.dumps(document, indent=1) + "\n")
        error = job.result.get("rel_error")
        said = job.result.get("error") or ("" if error is None else f"{error:.1e}")
        console.print(
            f"{number}/{len(jobs)} {job.entry.key} {job.side} {job.result.get('status')} {said}", markup=False
        )
    shown = {entry.key: document["models"][entry.key] for entry in chosen if entry.key in document["models"]}
    console.print(details(shown))
    console.print(summary_table(document["models"], document["rounded"]))
    write_atomically(out.with_suffix(".md"), markdown(document))
    console.print(f"wrote {out}")


def _commit() -> str:
    """What is checked out here; a plus where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _environment() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("torch", "torchvision", "timm", "torch-pruning"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return {"versions": found, "threads": 1}


if __name__ == "__main__":
    main()
