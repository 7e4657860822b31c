"""The commands: parse, call, print.

Results go to stdout (with `--json` one JSON object and nothing else), all that happens on the way to stderr. Whatever
needs torch is imported inside a command, so that `passdeploy --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from passdeploy.cli_export import ExportRequest, check_engine, export_options
from passdeploy.cli_profile import How, Subjects, run_options, subject_options
from passdeploy.errors import PassDeployError, UsageError
from passdeploy.runtime.versions import __version__

if TYPE_CHECKING:
    from passdeploy.display.progress import TerminalListener

Command = TypeVar("Command", bound=Callable[..., Any])
INTERRUPTED = 130


class Commands(click.Group):
    """Turns our errors into a few lines on stderr and their exit code; a bug keeps its traceback."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **options: Any) -> Any:
        """Run, and exit the process with the code of what happened."""
        arguments = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(arguments, **{**options, "standalone_mode": False})
        except PassDeployError as error:
            if "--debug" in arguments:
                traceback.print_exc()
            _complain(str(error), type(error).__name__, error.exit_code, arguments)
            code = error.exit_code
        except click.ClickException as error:
            if "--json" in arguments:
                _complain(error.format_message(), "UsageError", error.exit_code, arguments)
            else:
                error.show()
            code = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            click.echo("interrupted", err=True)
            code = INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str, kind: str, exit_code: int, arguments: Sequence[str]) -> None:
    click.echo(f"error: {message}", err=True)
    if "--json" in arguments:
        click.echo(json.dumps({"error": {"kind": kind, "message": message, "exit_code": exit_code}}))


def common(command: Command) -> Command:
    """The options that every command takes."""
    for option in (
        click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks of expected errors too."),
        click.option("--quiet", is_flag=True, help="Say nothing on the way."),
        click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, everything else on stderr."),
    ):
        command = option(command)
    return command


def takes_run(command: Command) -> Command:
    """The options that say which run, and whether its model's code may be imported."""
    for option in (
        click.option("--allow-code", is_flag=True, help="Import the model's module, where a recipe names one."),
        click.option(
            "--run", "run_dir", type=click.Path(path_type=Path), default=Path("runs/latest"), show_default=True,
            help="The run folder.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def takes_recipe(command: Command) -> Command:
    """A recipe, as an option or by itself, and what to change in it."""
    for parameter in (
        click.option("--allow-code", is_flag=True, help="Import the model's module, where the recipe names one."),
        click.option("--force", is_flag=True, callback=_forced, expose_value=False,
                     help="Use a latency table of another machine; plans are then not measured."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the recipe."),
        click.option("--recipe", "recipe_option", metavar="RECIPE", help="A file, or the name of a recipe we ship."),
        click.argument("recipe_argument", metavar="[RECIPE]", required=False),
    ):  # fmt: skip
        command = parameter(command)
    return command


def _forced(context: click.Context, _: click.Parameter, is_forced: bool) -> None:
    context.obj = {"force": is_forced}


def _overrides(given: tuple[str, ...]) -> tuple[str, ...]:
    """What `--set` and `--force` change in a recipe."""
    is_forced = (click.get_current_context().obj or {}).get("force", False)
    return (*given, "prune.measure.force=true") if is_forced else given


def _recipe_of(option: str | None, argument: str | None) -> str:
    if (option is None) == (argument is None):
        raise click.UsageError("give one recipe: --recipe FILE, or just FILE. `passdeploy recipes` lists ours.")
    return option or argument or ""


def _numbers(_: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"{value!r} is not a list of positive whole numbers, such as 1,8,32")
    return numbers


def _listener(quiet: bool) -> TerminalListener:
    from passdeploy.display.progress import TerminalListener

    return TerminalListener(quiet=quiet)


def _finish(document: dict[str, Any], as_json: bool, *lines: str) -> None:
    """The last words of a command: the document, or the path it wrote and what to type next."""
    click.echo(json.dumps(document, indent=2) if as_json else "\n".join(lines))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="passdeploy")
def main() -> None:
    """From a trained vision model to a small, fast, checked engine.

    \b
      passdeploy prune --recipe mobilenetv2.yaml     learn which channels matter, cut them, fine-tune
      passdeploy export --trt                        ONNX and a TensorRT engine, each checked
      passdeploy profile                             what that bought, in milliseconds

    Exit codes: 0 done, 2 usage or recipe, 3 something of this machine is missing, 4 a promise was checked and
    not kept, 5 bad data or a damaged file, 130 interrupted.
    """


@main.command()
@takes_recipe
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Where runs are.")
@click.option("--resume", is_flag=True, help="Go on with the newest run of this very recipe.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@common
def prune(
    recipe_argument: str | None,
    recipe_option: str | None,
    overrides: tuple[str, ...],
    allow_code: bool,
    out: Path,
    resume: bool,
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Learn which channels matter, cut them exactly, fine-tune, and write a run folder."""
    from passdeploy.recipe import load_recipe

    recipe = load_recipe(_recipe_of(recipe_option, recipe_argument), _overrides(overrides))

    from passdeploy.commands.prune import run
    from passdeploy.display.tables import closing_table

    speaks = os.environ.get("RANK", "0") == "0"  # under torchrun, one process for all
    with _listener(quiet or not speaks) as listener:
        result = run(recipe, out=out, device=device, resume=resume, allow_code=allow_code, tell=listener)
        if not result.is_first:
            return
        listener.console.print(closing_table(result.summary, result.summary["latency"]))
    path = _shown(result.path)
    where = "" if path == Path("runs") / result.path.name else f" --run {path}"
    _finish(
        {"run": str(result.path), "summary": result.summary},
        as_json,
        f"{path}",
        f"next: passdeploy export --onnx{where}   (--trt for a TensorRT engine)",
    )


@main.command()
@takes_run
@export_options
@click.option("--batch", default="1,8,32", show_default=True, callback=_numbers, metavar="MIN,OPT,MAX",
              help="Batch sizes the artifacts are made for.")  # fmt: skip
@click.option("--dense", is_flag=True, help="Export the dense network of the run too.")
@common
def export(
    run_dir: Path,
    allow_code: bool,
    wanted: ExportRequest,
    batch: tuple[int, ...],
    dense: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write ONNX and, with --trt, engines of a run's slim network or of any model, each checked against PyTorch."""
    wanted.require_sense()
    if wanted.check_engine is not None:
        found = check_engine(wanted.check_engine, wanted.trust_engine)
        _finish(found, as_json, f"{wanted.check_engine} loads: {found['census']['layers']}", "next: passdeploy profile")
        return
    with _listener(quiet) as listener:
        exported = wanted.carry_out(run_dir, batch, dense, allow_code, listener)
    shown = [f"{_shown(artifact.path)}  {artifact.size_bytes / 1e6:.1f} MB" for artifact in exported.artifacts]
    _finish(
        {
            "run": str(exported.run),
            "artifacts": [{"path": str(artifact.path), **artifact.to_json()} for artifact in exported.artifacts],
        },
        as_json,
        *shown,
        f"next: {wanted.next_step(_run_option(run_dir))}",
    )


@main.command()
@takes_run
@click.option("--backend", metavar="NAME,...",
              help="What runs the networks: torch, compile, ort, ort-cuda, ort-trt, tensorrt, torch-trt. For a run: "
              "torch,ort if left out, torch on a GPU.")  # fmt: skip
@click.option("--batch", default="1,8", show_default=True, callback=_numbers, help="Images per call.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; all physical cores if left out.")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=4.0, show_default=True,
              help="At least this long per backend and batch.")  # fmt: skip
@click.option(
    "--layers", is_flag=True, help="Of a run: where the time goes, by layer and by group, in the first backend."
)
@run_options
@subject_options
@common
def profile(
    run_dir: Path,
    allow_code: bool,
    subjects: Subjects,
    how: How,
    layers: bool,
    backend: str | None,
    batch: tuple[int, ...],
    threads: int | None,
    seconds: float,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure dense and slim of a run in turns on this machine, with intervals; or one or two FILEs; or a table."""
    backends = tuple(part.strip() for part in backend.split(",")) if backend else None
    if subjects.are_given:
        if layers:
            raise UsageError("--layers lays two networks of a run side by side: give --run, and no files.")
        with _listener(quiet) as listener:
            found, lines = subjects.carry_out(backends, batch, threads, seconds, allow_code, how, listener)
        _finish(found, as_json, *lines)
        return
    from passdeploy.commands.profile_run import profile_run
    from passdeploy.display.tables import closing_table, group_table, layer_table
    from passdeploy.runs.load import summary_of

    with _listener(quiet) as listener:
        document = profile_run(
            run_dir, backends=backends, batches=batch, threads=threads, setting=how.setting(), seconds=seconds,
            layers=layers, trust_engine=how.trust_engine, allow_code=allow_code, tell=listener,
        )  # fmt: skip
        listener.console.print(closing_table(summary_of(run_dir), document["rows"]))
        if layers:
            listener.console.print(layer_table(document["layers"]))
            listener.console.print(group_table(document["groups"]))
    written = _shown(run_dir.resolve() / "profile.json")
    _finish(
        {"path": str(written), **document},
        as_json,
        str(written),
        "next: passdeploy prune with another prune.target, or passdeploy export --trt on the machine it is for",
    )


@main.command()
@takes_recipe
@common
def check(
    recipe_argument: str | None,
    recipe_option: str | None,
    overrides: tuple[str, ...],
    allow_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Load all that a recipe names, follow its channels, and train nothing."""
    from passdeploy.recipe import load_recipe

    name = _recipe_of(recipe_option, recipe_argument)
    recipe = load_recipe(name, _overrides(overrides))

    from passdeploy.commands.describe import describe, describe_run
    from passdeploy.commands.forecast import forecast
    from passdeploy.commands.prepare import prepare
    from passdeploy.display.check_report import latency_words, table, time_words
    from passdeploy.runtime.devices import find_device

    with _listener(quiet) as listener:
        prepared = prepare(recipe, allow_code=allow_code, tell=listener)
        document = {
            "recipe": recipe.name,
            **describe_run(prepared),
            **describe(prepared.channels, round_to=prepared.round_to),
            "seconds": forecast(prepared, find_device()),
        }
        if not as_json:
            listener.console.print(table(document))
    words = [*document["words"], *latency_words(document["latency"]), time_words(document["seconds"])]
    _finish(document, as_json, *words, f"next: passdeploy prune --recipe {name}")


@main.command()
@click.argument("model")
@click.option("--weights", help="pretrained, or a .safetensors file.")
@click.option("--classes", type=click.IntRange(min=1), default=1000, show_default=True, help="Outputs of the network.")
@click.option("--image-size", type=click.IntRange(min=1), default=224, show_default=True, help="Pixels, both ways.")
@click.option(
    "--round-to", type=click.IntRange(min=1), default=8, show_default=True, help="Widths are multiples of it."
)
@click.option("--allow-code", is_flag=True, help="Import the module of pkg.mod:factory.")
@common
def inspect(
    model: str,
    weights: str | None,
    classes: int,
    image_size: int,
    round_to: int,
    allow_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show the channel groups of MODEL: torchvision/NAME, timm/NAME, passdeploy/NAME or pkg.mod:factory."""
    from passdeploy.commands.describe import describe, inspect_model
    from passdeploy.display.check_report import table

    with _listener(quiet) as listener:
        channels = inspect_model(
            model, num_classes=classes, image_size=image_size, weights=weights, allow_code=allow_code
        )
        document = {"model": model, "image_size": image_size, **describe(channels, round_to=round_to)}
        if not as_json:
            listener.console.print(table(document))
    _finish(document, as_json, *document["words"], "next: passdeploy recipes, for a recipe to start from")


@main.group(invoke_without_command=True)
@click.pass_context
def recipes(context: click.Context) -> None:
    """The recipes that come with passdeploy: list, show NAME, schema."""
    if context.invoked_subcommand is None:
        context.invoke(list_recipes)


@recipes.command("list")
@common
def list_recipes(as_json: bool = False, quiet: bool = False) -> None:
    """Name them."""
    from passdeploy.recipe import shipped_recipes

    names = shipped_recipes()
    _finish({"recipes": names}, as_json, *names, "next: passdeploy recipes show mobilenetv2.yaml")


@recipes.command("show")
@click.argument("name")
@common
def show_recipe(name: str, as_json: bool, quiet: bool) -> None:
    """Print one, to copy and change."""
    from passdeploy.recipe import find_recipe

    text = find_recipe(name).read_text(encoding="utf-8")
    _finish({"name": name, "text": text}, as_json, text.rstrip("\n"))


@recipes.command("schema")
@common
def show_schema(as_json: bool, quiet: bool) -> None:
    """Print the JSON Schema of recipes: every key, its default and what it means."""
    from passdeploy.recipe import recipe_schema

    _finish(recipe_schema(), True)


@main.command()
@common
def doctor(as_json: bool, quiet: bool) -> None:
    """Say what this machine can do: devices, packages, and what is missing for which command."""
    from passdeploy.commands.doctor import examine

    report = examine()
    _finish(
        report,
        as_json,
        *(f"{name:<28} {found}" for name, found in report["versions"].items()),
        *(f"{name:<28} {'yes' if found['ok'] else 'no: ' + found['why']}" for name, found in report["can"].items()),
        *(
            f"{'made for each other':<28} {', '.join(f'{name} {release}' for name, release in row.items())}"
            for row in report["torch_tensorrt"]
        ),
    )


def _shown(path: Path) -> Path:
    """A path as a user in this folder would type it."""
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path


def _run_option(run_dir: Path) -> str:
    return "" if run_dir == Path("runs/latest") else f" --run {run_dir}"
