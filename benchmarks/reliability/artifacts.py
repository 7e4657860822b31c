"""Files of runs, bundles, engines and latency tables that are damaged, and then read by whatever reads them.

Each file is cut off, emptied, has one bit flipped, or is swapped with another file (of the same run, or of the same
name in another run). It must be refused in a short error. Records in the format of earlier versions, which have no
seal, are tried as well: those are read.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.reliability.tally import Tally, refusal_of
from benchmarks.reliability.tiny import shortened, two_layers, write_recipe
from passdeploy.commands.prune import run as prune
from passdeploy.errors import CorruptArtifact
from passdeploy.export import ExportSettings, Samples, export_artifacts
from passdeploy.export.artifact import describe_artifact
from passdeploy.export.bundle import _read_verified_manifest, write_bundle
from passdeploy.export.trt_sidecar import read_sidecar, write_sidecar
from passdeploy.latency.table import LatencyTable
from passdeploy.report.page import render_markdown
from passdeploy.report.run_facts import read_run
from passdeploy.runs.folder import MANIFEST, STATE, RunFolder
from passdeploy.runs.load import load, recipe_of
from passdeploy.runtime.sealed_json import SEAL
from tests.latency.fakes import FakeSampler, chain, table_of

GOAL = 5_000
Read = Callable[[], object]


def measure(count: int = GOAL, seed: int = 0) -> Tally:
    """Damage files `count` times."""
    tally = Tally()
    with TemporaryDirectory() as temporary, shortened():
        subjects = _subjects(Path(temporary))
        originals = {path: path.read_bytes() for path in subjects}
        paths = list(subjects)
        for path, read in subjects.items():  # what is whole is read
            if (outcome := refusal_of(read))[0] != "read":
                raise SystemExit(f"{path} cannot be read before it is damaged: {outcome}")
        for number in range(count):
            chance = random.Random(f"{seed} {number}")
            path = paths[number % len(paths)]
            kind, content = _damaged(path, originals, chance)
            trial = f"seed {seed}, number {number}: {path.name} {kind}"
            path.write_bytes(content)
            outcome, problem = refusal_of(subjects[path])
            if problem is None and kind == "older format":
                problem = None if outcome == "read" else "an older format is refused"
            elif problem is None and outcome != CorruptArtifact.__name__:
                problem = "it was read" if outcome == "read" else f"refused with {outcome}"
            tally.add(kind, problem, trial)
            path.write_bytes(originals[path])
    return tally


def _damaged(path: Path, originals: dict[Path, bytes], chance: random.Random) -> tuple[str, bytes]:
    """Damage a file; return how, and its new content."""
    content = originals[path]
    kinds = ["truncated", "truncated", "flipped", "flipped", "flipped", "swapped", "emptied"]
    if (older := _older(content)) is not None:
        kinds.append("older format")
    kind = chance.choice(kinds)
    if kind == "flipped":
        changed = bytearray(content)
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        return kind, bytes(changed)
    if kind == "swapped":
        return kind, chance.choice([other for other in originals.values() if other != content])
    if kind == "older format":
        assert older is not None
        return kind, older
    return kind, b"" if kind == "emptied" else content[: chance.randrange(len(content))]


def _older(content: bytes) -> bytes | None:
    """Return a record with a seal as version 1 wrote it, without one; None for any other file."""
    try:
        document = json.loads(content)
        document.pop(SEAL)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    document["format" if "format" in document else "version"] = 1
    return json.dumps(document, indent=2).encode()


def _subjects(folder: Path) -> dict[Path, Read]:
    """Make all kinds of files; return them with the functions that read them."""
    path = write_recipe(folder)
    for seed in (0, 1):
        prune(path, out=folder / "runs", overrides=[f"seed={seed}"], allow_code=True, device="cpu")
    return {
        **_files_of_run(folder / "runs" / "tiny-0001"),
        **_files_of_run(folder / "runs" / "tiny-0002"),
        **_checkpoint(folder),
        **_bundle(folder),
        **_engine(folder),
        **_table(folder),
    }


def _files_of_run(run: Path) -> dict[Path, Read]:
    def stages() -> object:
        return RunFolder.open(run).done_stages()

    def report() -> object:
        return render_markdown(read_run(RunFolder.open(run)))

    readers: dict[str, Read] = {
        MANIFEST: lambda: load(run, allow_code=True),
        STATE: stages,
        "recipe.resolved.yaml": lambda: recipe_of(RunFolder.open(run)),
        "dense.safetensors": lambda: load(run, "dense", allow_code=True),
        "slim.safetensors": lambda: load(run, allow_code=True),
        "plan.json": lambda: load(run, allow_code=True),
        **dict.fromkeys(("summary.json", "scores.safetensors", "sample.png", "metrics.jsonl"), report),
    }
    others = [name for name in RunFolder.open(run).manifest() if name not in readers]
    return {run / name: read for name, read in readers.items()} | {
        run / name: lambda name=name: RunFolder.open(run).verified(name)  # type: ignore[misc]
        for name in others
    }


def _checkpoint(folder: Path) -> dict[Path, Read]:
    with RunFolder.create(folder / "unfinished", "tiny") as run:
        run.checkpoint("dense").save({"w": torch.arange(8.0)}, {"epoch": 1})
        path = run.path
    (saved,) = (path / "checkpoints").iterdir()
    return {saved: lambda: RunFolder.open(path).checkpoint("dense").load()}


def _bundle(folder: Path) -> dict[Path, Read]:
    images = torch.rand(4, 3, 16, 16)
    samples, settings = Samples(images, images, (3, 16, 16), (0.5,) * 3, (0.25,) * 3), ExportSettings(batch=(1, 2, 4))
    artifacts = list(export_artifacts(two_layers(2).eval(), samples, folder / "export", settings))
    bundle = folder / "bundle"
    files = write_bundle(bundle, artifacts, settings, samples)
    return {artifact.path: lambda: _read_verified_manifest(bundle) for artifact in files}


def _engine(folder: Path) -> dict[Path, Read]:
    engine = folder / "model.engine"
    engine.write_bytes(random.Random(0).randbytes(500))
    write_sidecar(describe_artifact(engine, kind="engine", precision="fp16", facts={"tensorrt": "11.0"}))
    sidecar = folder / "model.engine.json"
    return dict.fromkeys((engine, sidecar), lambda: read_sidecar(engine))


def _table(folder: Path) -> dict[Path, Read]:
    path = folder / "table.json"
    table_of(FakeSampler(), chain()).save(path)
    return {path: lambda: LatencyTable.load(path)}
