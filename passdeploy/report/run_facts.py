"""Everything that a report shows of a run, read from its folder and verified; nothing here needs torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passdeploy.errors import CorruptArtifact
from passdeploy.recipe import Recipe, parse_recipe
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.logs import METRICS
from passdeploy.runs.numbering import MANIFEST, run_option

SAMPLE = "sample.png"  # a test image, which the report shows the prompt on
PROMPT_KEY = "passdeploy.prompt"  # as in models/prompt.py, which imports torch
_SCORES = "scores."  # prefix of the tensors in scores.safetensors


@dataclass(frozen=True)
class Curve:
    """The values of one metric over the steps of a stage."""

    stage: str
    metric: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class RunFacts:
    """The results of a finished run."""

    path: Path
    recipe: Recipe
    recipe_text: str
    summary: Mapping[str, Any]
    plan: Mapping[str, Any]
    profile: Mapping[str, Any]  # empty before `passdeploy profile`
    exports: Mapping[str, Mapping[str, Any]]  # file that is there -> record; empty before `passdeploy export`
    bench: Mapping[str, Any]  # empty before `passdeploy bench`
    curves: tuple[Curve, ...]
    scores: Mapping[str, NDArray[np.float32]]  # group name -> (width,)
    prompt: NDArray[np.float32] | None  # (3, height, width), to add to normalised images; as the slim network has it
    sample: bytes | None = None  # the PNG of a test image; None where the run has none
    typed_path: Path | None = None  # by which commands name the run; None: as it is named beside the folder of all runs

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.path.name

    @property
    def shown_path(self) -> Path:
        """The folder as commands name it: as it was typed, or relative, beginning with the folder of all runs."""
        return self.typed_path or Path(self.path.parent.name) / self.path.name

    @property
    def run_option(self) -> str:
        """The option that names this run in a command."""
        return f"--run {quote(str(self.shown_path))}"

    @property
    def test_images(self) -> int | None:
        """Number of the images that accuracy was counted on; None where the run did not write it down."""
        images = (self.summary.get("images") or {}).get("test")
        return sum(images.values()) if images else None

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        """The measured latencies: those of `passdeploy profile`, before that those of `passdeploy prune`."""
        return list(self.profile.get("rows") or self.summary.get("latency") or ())

    def processor_of(self, row: Mapping[str, Any]) -> str | None:
        """Name the CPU or GPU that one of `rows` was measured on; None where that is not known."""
        environment = self.profile.get("environment") or self.summary.get("environment") or {}
        name, _, index = str(row.get("device")).partition(":")
        if name == "cpu":
            found = environment.get("cpu")
        elif gpus := environment.get("gpus"):  # of a profile: all that are visible
            found = gpus[int(index or 0)]["name"] if int(index or 0) < len(gpus) else None
        else:
            found = environment.get("gpu")  # of a run: the one that it was trained on
        return None if found is None else str(found)


def read_run(folder: RunFolder, typed_path: Path | None = None) -> RunFacts:
    """Read the results of a finished run.

    Args:
        folder: the run.
        typed_path: by which commands that are shown name the run; None: relative, from beside the folder of all runs.

    Raises:
        RunError: the run is not finished.
        CorruptArtifact: a file is not what was written.
    """
    text = folder.read_text("recipe.resolved.yaml")
    summary, plan = folder.read_json("summary.json"), folder.read_json("plan.json")
    if not isinstance(summary.get("slim"), dict) or "groups" not in plan:
        raise CorruptArtifact(f"{folder.path} has a summary or a plan without results: another version wrote it.")
    tensors = _read_scores(folder)
    exports = _read_if_there(folder, "export/artifacts.json", "export")
    return RunFacts(
        path=folder.path,
        recipe=parse_recipe(text, "recipe.resolved.yaml"),
        recipe_text=text,
        summary=summary,
        plan=plan,
        profile=_read_if_there(folder, "profile.json", "profile"),
        exports={name: record for name, record in exports.items() if (folder.path / "export" / name).exists()},
        bench=_read_if_there(folder, "bench.json", "bench"),
        curves=_read_curves(folder.verified_if_recorded(METRICS)),
        scores={name.removeprefix(_SCORES): one for name, one in tensors.items() if name.startswith(_SCORES)},
        prompt=_read_prompt(folder, tensors),
        sample=folder.verified(SAMPLE).read_bytes() if folder.has(SAMPLE) else None,
        typed_path=typed_path,
    )


def _read_if_there(folder: RunFolder, name: str, command: str) -> dict[str, Any]:
    """Read a JSON artifact; empty where the run has none, or a user has deleted it.

    Raises:
        CorruptArtifact: it was damaged; the message names the command that writes it.
    """
    if not folder.has(name) or not (folder.path / name).is_file():
        return {}
    try:
        content: dict[str, Any] = folder.read_json(name)
    except CorruptArtifact as error:
        raise CorruptArtifact(
            f"{folder.path / name} was damaged or edited: its SHA-256 is not the one in {MANIFEST}.\n"
            f"Put the original back, or write it anew: passdeploy {command}{run_option(folder.path)}"
        ) from error
    return content


def _read_scores(folder: RunFolder) -> dict[str, NDArray[np.float32]]:
    """Read the scores and the prompt of mask learning; empty where the run has none."""
    from safetensors.numpy import load_file

    if not folder.has("scores.safetensors"):
        return {}
    return dict(load_file(folder.verified("scores.safetensors")))


def _read_prompt(folder: RunFolder, learned: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32] | None:
    """Read the prompt of the slim network, which fine-tuning has trained further, or that of mask learning."""
    from safetensors import safe_open

    prompt = learned.get(PROMPT_KEY)
    name = "slim.safetensors"
    if prompt is not None and folder.has(name) and (folder.path / name).is_file():
        with safe_open(folder.verified(name), framework="numpy") as stream:
            if PROMPT_KEY in set(stream.keys()):
                prompt = stream.get_tensor(PROMPT_KEY)
    return None if prompt is None else prompt[0]


def _read_curves(path: Path) -> tuple[Curve, ...]:
    """Read the losses and budgets of every stage; of two lines for a step the later one is valid."""
    points: dict[tuple[str, str], dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a process that was killed
            continue
        for metric in ("loss", "budget"):
            if isinstance(value := row.get(metric), (int, float)):
                points.setdefault((str(row.get("stage")), metric), {})[int(row.get("step", 0))] = float(value)
    return tuple(
        Curve(stage, metric, *(tuple(column) for column in zip(*sorted(values.items()), strict=True)))
        for (stage, metric), values in points.items()
    )
