"""Options and small parts that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from passdeploy.cli_completion import complete_recipe
from passdeploy.cli_typed import Rule, flag_of, typed_options
from passdeploy.errors import UsageError

if TYPE_CHECKING:
    from passdeploy.display.progress import TerminalListener
    from passdeploy.recipe import Recipe


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


def _store_force(context: click.Context, _: click.Parameter, was_typed: bool) -> None:
    """Store the value of `--force` in click's context, for `is_forced`."""
    context.obj = {**(context.obj or {}), "force": was_typed}


def is_forced() -> bool:
    """Test whether `--force` was typed."""
    return bool((click.get_current_context().obj or {}).get("force", False))


def load_typed_recipe(name: str, overrides: tuple[str, ...]) -> Recipe:
    """Load a recipe with the keys that `--set` and `--force` change.

    Raises:
        RecipeError: the recipe is not there, or has wrong keys.
        UsageError: `--force` was typed, and there is no latency table that it could be about.
    """
    from passdeploy.recipe import load_recipe

    if not is_forced():
        return load_recipe(name, overrides)
    recipe = load_recipe(name, (*overrides, "prune.measure.force=true"))
    if recipe.prune.measure.table is None:
        raise UsageError(
            "--force is for a latency table of another machine, and prune.measure.table names none.\n"
            "Leave it out: a new run never replaces an earlier one."
        )
    return recipe


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


def parse_batches(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Parse a list such as `1,8`, in which a number that is there twice counts once."""
    return tuple(dict.fromkeys(parse_batch_sizes(context, parameter, value)))


def csv_rule(as_json: bool) -> Rule:
    """Return the rule that `--csv` does not go with `--json`."""
    return ("as_csv",), not as_json, "and --json both say what is printed: leave one of them out."


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


def next_run_option(run_dir: Path, *, allow_code: bool = False) -> str:
    """Return the options to show in the next command: `--run` unless `runs/latest` is that run, and `--allow-code`."""
    from passdeploy.runs.numbering import run_option

    return run_option(run_dir) + (" --allow-code" if allow_code else "")


def list_or_pass_on(context: click.Context, listing: click.Command) -> None:
    """Do what a group of commands does: list, where it was typed alone; else pass its options on to the command.

    Raises:
        UsageError: the command has no such option.
    """
    name = context.invoked_subcommand
    if name is None:
        context.invoke(listing, **context.params)
        return
    assert isinstance(context.command, click.Group)
    typed, known = typed_options(), {parameter.name for parameter in context.command.commands[name].params}
    if foreign := typed - known:
        raise UsageError(f"{flag_of(min(foreign))} goes with `{context.info_name} {listing.name}`, not with {name}.")
    context.default_map = {name: {option: context.params[option] for option in typed}}
