"""Load a recipe: find its file, read it, apply `--set` overrides, and check it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passdeploy.errors import RecipeError, clipped
from passdeploy.recipe.base import suggestion_for
from passdeploy.recipe.schema import Recipe
from passdeploy.recipe.strict_yaml import MAX_BYTES, Document, KeyPath, Mark, dotted, parse
from passdeploy.recipe.validation import validate_recipe

if TYPE_CHECKING:
    from importlib.abc import Traversable


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path_or_name: a file of the user, or the name of a shipped recipe; `.yaml` may be left out.
        overrides: `a.b=c`, later ones win; `c` is read as YAML, so `prune.target={macs: 0.4}` works.
            Setting one kind of `prune.target` replaces the kind that was there.

    Raises:
        RecipeError: no such file, not YAML, or an invalid key. The message has at most three lines, and names the key
            with its file and line.
    """
    path, shown = _locate(str(path_or_name))
    return parse_recipe(read_recipe_text(path, shown), shown, overrides, name=_run_name(path.name))


def parse_recipe(text: str, source: str, overrides: Sequence[str] = (), *, name: str = "run") -> Recipe:
    """Parse and check the recipe in `text`.

    Args:
        text: YAML.
        source: name of the text in errors.
        overrides: `a.b=c`, as for `load_recipe`.
        name: name of the run, if the text has no key `name`.

    Raises:
        RecipeError: not YAML, or an invalid key.
    """
    document = parse(text, source)
    if not isinstance(document.value, dict):
        raise RecipeError(f"{source} holds no recipe: at its top there must be keys such as 'model' and 'data'.")
    document.value.setdefault("name", name)
    return validate_recipe(_apply_overrides(document, overrides))


def shipped_recipes() -> list[str]:
    """List the names of the recipes that come with passdeploy, sorted, with their `.yaml`."""
    return sorted(entry.name for entry in _shipped())


def find_recipe(name: str) -> Traversable:
    """Find a recipe: a file of the user, else a shipped one (inside a wheel, beside the package in a checkout).

    Raises:
        RecipeError: neither exists; the message names the most similar shipped recipe.
    """
    return _locate(name)[0]


def _locate(name: str) -> tuple[Traversable, str]:
    """Find a recipe's file, and its name for error messages."""
    spellings = [name] if name.endswith((".yaml", ".yml")) else [name, f"{name}.yaml"]
    for spelling in spellings:
        if os.path.isfile(own := os.path.expanduser(spelling)):
            return Path(own), spelling
    for entry in _shipped():
        if entry.name in spellings:
            return entry, entry.name
    ours = suggestion_for(name, shipped_recipes())
    raise RecipeError(f"no recipe {clipped(name)!r}: not a file here, and not one of ours.\n{ours}")


def _shipped() -> list[Traversable]:
    """List the files of the shipped recipes: inside an installed package, or beside the package in a checkout."""
    folders: tuple[Traversable, ...] = (files("passdeploy") / "recipes", Path(__file__).parents[2] / "recipes")
    folder = next((folder for folder in folders if folder.is_dir()), None)
    return [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")] if folder else []


def _run_name(file_name: str) -> str:
    """Turn a file's name into a name for a run: `my nets.yaml` -> `my-nets`."""
    stem = file_name.removesuffix(".yaml").removesuffix(".yml")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:64] or "run"


def read_recipe_text(path: Traversable, shown: str) -> str:
    """Read the text of a recipe; raises a RecipeError, which names it as `shown`, where that cannot be done."""
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_BYTES + 1).decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{shown} is not text (UTF-8); a recipe is a YAML file.") from error
    except OSError as error:
        raise RecipeError(f"cannot read {shown}: {error.strerror}.") from error


def _apply_overrides(document: Document, overrides: Iterable[str]) -> Document:
    """Return a new document in which every `a.b=c` has replaced the value at its key."""
    value, marks = document.value, dict(document.marks)
    for override in overrides:
        mark = Mark(f"--set {clipped(override, 60)}")
        key, equals, text = override.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            raise RecipeError(f"{mark}: an override is key=value, for example --set prune.steps=200.")
        changed = parse(text, str(mark), has_lines=False)
        marks = {old: where for old, where in marks.items() if old[: len(path)] != path}
        marks |= {path[:depth]: mark for depth in range(1, len(path)) if path[:depth] not in marks}
        marks |= {(*path, *below): mark for below in changed.marks}
        value = _with_value_at(value, path, changed.value, path)
    _require_target_counts(document.value, value, marks)
    return Document(value, marks)


def _require_target_counts(before: Any, after: Any, marks: Mapping[KeyPath, Mark]) -> None:
    """Raise a RecipeError if an override changes the number in `target`, while `targets` stay, which replace it."""
    try:
        old, new, several = before["prune"].get("target"), after["prune"]["target"], before["prune"].get("targets")
        if (
            several
            and several == after["prune"].get("targets")
            and old != new
            and (old or {"macs": 0.5}).keys() == new.keys()
        ):
            mark = marks.get(("prune", "target", *new), "--set prune.target")
            raise RecipeError(
                f"{mark}: prune.targets is set, and its smallest takes the place of this number.\n"
                "Set prune.targets instead, or add --set prune.targets=[]."
            )
    except (KeyError, TypeError, AttributeError):  # no such section, or one that is refused by its own rule
        return


def _with_value_at(section: Any, path: Sequence[str], value: Any, whole: KeyPath) -> Any:
    """Copy `section` with the value at `path` replaced; sections that are missing or null are created."""
    if not path:
        return value
    if isinstance(section, list):
        raise RecipeError(f"--set {dotted(whole)}: a list is set as a whole, for example --set prune.exclude=[stem].")
    keys = dict(section) if isinstance(section, dict) else {}
    if whole[:2] == ("prune", "target") and len(whole) == 3 and len(path) == 1:
        keys = {}  # a target has one kind: the new one replaces the old
    return {**keys, path[0]: _with_value_at(keys.get(path[0]), path[1:], value, whole)}
