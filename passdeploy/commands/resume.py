"""Checks before a run is prepared: the run that `--resume` continues, or the place for a new one. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from passdeploy.errors import CorruptArtifact, PassDeployError, RunError, UsageError
from passdeploy.recipe import Recipe, parse_recipe
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.numbering import list_runs
from passdeploy.runtime.files import require_writable

_MOST_KEYS = 3  # that an error names


def find_run_to_resume(out: Path, recipe: Recipe) -> Path:
    """Find the newest run in `out` that was made with this recipe, and check that nobody else is writing to it.

    Runs whose recipe is damaged are left out; they are named where no other run is found.

    Raises:
        RunError: there is none, and the message names the keys that differ; or another process is writing to it.
        CorruptArtifact: the only runs of this name are damaged.
    """
    found = [path for path in list_runs(out) if path.name.rpartition("-")[0] == recipe.name]
    texts, damaged = _recipe_texts(found)
    named = [path for path, text in texts.items() if text]
    for path in reversed(named):
        if texts[path] == recipe.to_yaml():
            RunFolder.open(path, write=True).close()
            return path
    if damaged and not texts:
        raise list(damaged.values())[-1]
    unread = f"Damaged, and not looked at: {', '.join(path.name for path in damaged)}.\n" if damaged else ""
    if texts and not named:
        raise RunError(
            f"{list(texts)[-1]} was stopped before it had begun, so there is nothing to resume.\n{unread}"
            "Leave --resume out."
        )
    if not named:
        raise RunError(
            f"no run in {out} is called {recipe.name}, so there is nothing to resume.\n"
            "Give the same recipe, --set options and --out as before, or leave --resume out."
        )
    raise RunError(
        f"{named[-1]} was made with another recipe: {_differences(texts[named[-1]], recipe)}.\n{unread}"
        "Give the same recipe and --set options as before, or leave --resume out."
    )


def can_be_resumed(out: Path, recipe: Recipe) -> bool:
    """Test whether `--resume` would find a run of this recipe."""
    try:
        find_run_to_resume(out, recipe)
    except PassDeployError:
        return False
    return True


def require_room_for_runs(out: Path) -> None:
    """Check that run folders can be made in `out`, which need not exist yet.

    Raises:
        RunError: they cannot.
    """
    try:
        require_writable(out)
    except UsageError as error:
        reason = str(error).splitlines()[0].rpartition(": ")[2]
        raise RunError(f"cannot make a run folder in {out}: {reason}\nChoose another place with --out DIR.") from error


def _recipe_texts(runs: Iterable[Path]) -> tuple[dict[Path, str], dict[Path, CorruptArtifact]]:
    """Read the recipes of runs, empty for those that have none yet; and the errors of those that are damaged."""
    texts: dict[Path, str] = {}
    damaged: dict[Path, CorruptArtifact] = {}
    for path in runs:
        try:
            folder = RunFolder.open(path)
            texts[path] = folder.read_text("recipe.resolved.yaml") if folder.has("recipe.resolved.yaml") else ""
        except CorruptArtifact as error:
            damaged[path] = error
    return texts, damaged


def _differences(text: str, recipe: Recipe) -> str:
    """Name the keys in which a run's recipe differs: `prune.steps is 300 there, 200 here`."""
    try:
        there = dict(leaves(parse_recipe(text, "recipe.resolved.yaml").model_dump(mode="json")))
    except PassDeployError:
        return "it was written by another version of passdeploy"
    here = dict(leaves(recipe.model_dump(mode="json")))
    differing = [key for key in dict.fromkeys([*there, *here]) if there.get(key) != here.get(key)]
    if not differing:
        return "it was written by another version of passdeploy"
    shown = [f"{key} is {_shown(there.get(key))} there, {_shown(here.get(key))} here" for key in differing[:_MOST_KEYS]]
    more = len(differing) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of a recipe with its value: `prune.steps`, 300."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
