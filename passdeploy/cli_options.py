"""Options and small parts that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from passdeploy.cli_completion import complete_recipe

if TYPE_CHECKING:
    from passdeploy.display.progress import TerminalListener


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that every command takes: `--json`, `--quiet` and `--debug`."""
    for option in (
        click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks of expected errors too."),
        click.option(
            "--quiet", is_flag=True, help="No progress and no next step; where files are written, only their paths."
        ),
        click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, everything else on stderr."),
    ):
        command = option(command)
    return command


run_option = click.option(
    "--run",
    "run_dir",
    type=click.Path(path_type=Path),
    default=Path("runs/latest"),
    show_default=True,
    help="The run folder.",
)


def run_folder_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--run`, and `--allow-code` for the run's model."""
    for option in (
        click.option("--allow-code", is_flag=True, help="Import the model's module, where a recipe names one."),
        run_option,
    ):
        command = option(command)
    return command


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add a recipe, as an argument or an option, and the options that change it: `--set`, `--force`, `--allow-code`."""
    for parameter in (
        click.option("--allow-code", is_flag=True, help="Import the model's module, where the recipe names one."),
        click.option(
            "--force",
            is_flag=True,
            callback=_store_force,
            expose_value=False,
            help="Use a latency table of another machine; plans are then not measured.",
        ),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the recipe."),
        click.option(
            "--recipe",
            "recipe_option",
            metavar="RECIPE",
            shell_complete=complete_recipe,
            help="A file, or the name of a recipe we ship.",
        ),
        click.argument("recipe_argument", metavar="[RECIPE]", required=False, shell_complete=complete_recipe),
    ):
        command = parameter(command)
    return command


def _store_force(context: click.Context, _: click.Parameter, is_forced: bool) -> None:
    """Store the value of `--force` in click's context, for `with_force`."""
    context.obj = {**(context.obj or {}), "force": is_forced}


def with_force(overrides: tuple[str, ...]) -> tuple[str, ...]:
    """Append the recipe key that `--force` sets to the overrides of `--set`."""
    is_forced = (click.get_current_context().obj or {}).get("force", False)
    return (*overrides, "prune.measure.force=true") if is_forced else overrides


def recipe_name(option: str | None, argument: str | None) -> str:
    """Return the recipe, which must be given exactly once."""
    if (option is None) == (argument is None):
        raise click.UsageError("give one recipe: --recipe FILE, or just FILE. `passdeploy recipes` lists ours.")
    return option or argument or ""


def parse_batch_sizes(_: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Parse a list such as `1,8,32`."""
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"{value!r} is not a list of positive whole numbers, such as 1,8,32")
    return numbers


def terminal_listener(quiet: bool) -> TerminalListener:
    """Return a listener that shows progress on stderr, but not with `--quiet`."""
    from passdeploy.display.progress import TerminalListener

    return TerminalListener(quiet=quiet)


def relative_to_cwd(path: Path) -> Path:
    """Return a path relative to the working folder, or as it is where it lies outside."""
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path


def next_run_option(run_dir: Path) -> str:
    """Return the `--run` option to show in the next command; empty where `runs/latest` is that run."""
    latest = Path("runs/latest")
    return "" if run_dir == latest or run_dir.resolve() == latest.resolve() else f" --run {run_dir}"
