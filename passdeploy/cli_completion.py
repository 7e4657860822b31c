"""Completion of names in the shell: recipes, backends, precisions and devices. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from glob import escape
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from passdeploy.runtime.names import BACKENDS, PRECISIONS

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def complete_recipe(_: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the recipes that we ship and the YAML files whose names begin so; where there are none, any file."""
    from passdeploy.recipe import shipped_recipes

    names = [name for name in shipped_recipes() if name.startswith(incomplete)]
    if not incomplete.startswith(("/", "~", "..")):
        names = [*(str(path) for path in sorted(Path().glob(f"{escape(incomplete)}*.yaml"))), *names]
    # First for bash, which falls back on files where no name follows.
    return [CompletionItem(incomplete, type="file"), *(CompletionItem(name) for name in dict.fromkeys(names))]


def complete_list(names: Sequence[str]) -> Complete:
    """Return a completion of the last name of a list with commas, such as `torch,o`; none is offered twice."""

    def complete(_: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        left = [name for name in names if name not in before.split(",")]
        return [CompletionItem(f"{before}{comma}{name}") for name in left if name.startswith(last)]

    return complete


complete_backends = complete_list(BACKENDS)
complete_precisions = complete_list(PRECISIONS)


def complete_device(_: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the devices whose names begin so."""
    return [CompletionItem(name) for name in ("auto", "cpu", "cuda") if name.startswith(incomplete)]
