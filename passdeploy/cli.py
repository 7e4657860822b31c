"""The command line of passdeploy: each command parses its options, calls the library and prints the result.

Results go to stdout (with `--json` one JSON object and nothing else), progress and warnings to stderr. Modules that
need torch are imported inside the commands, so that `passdeploy --help` answers at once.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from passdeploy.cli_export import ExportRequest, check_engine, export_options
from passdeploy.cli_profile import ExecutionOptions, ProfileInputs, execution_options, profile_input_options
from passdeploy.display.output import Output
from passdeploy.errors import PassDeployError, RunError, UsageError
from passdeploy.runtime.versions import __version__

if TYPE_CHECKING:
    from passdeploy.display.progress import TerminalListener

INTERRUPTED = 130  # exit code after Ctrl-C, as shells use it


class CommandGroup(click.Group):
    """A click group that prints a `PassDeployError` as a few lines on stderr; other exceptions keep their traceback."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **options: Any) -> Any:
        """Run a command and exit the process: 0, the `exit_code` of the error, or 130 after Ctrl-C."""
        arguments = list(sys.argv[1:] if args is None else args)
        # cuBLAS reads this when CUDA starts; see runtime/determinism.py, whose import would take seconds here
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        try:
            code = super().main(arguments, **{**options, "standalone_mode": False, "obj": {"arguments": arguments}})
        except PassDeployError as error:
            if "--debug" in arguments:
                traceback.print_exc()
            _print_error(str(error), type(error).__name__, error.exit_code, arguments)
            code = error.exit_code
        except click.ClickException as error:
            if "--json" in arguments:
                _print_error(error.format_message(), "UsageError", error.exit_code, arguments)
            else:
                error.show()
            code = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            click.echo("interrupted", err=True)
            code = INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)


def _print_error(message: str, kind: str, exit_code: int, arguments: Sequence[str]) -> None:
    """Print an error on stderr and, with `--json` among the arguments, as a JSON object on stdout."""
    click.echo(f"error: {message}", err=True)
    if "--json" in arguments:
        click.echo(json.dumps({"error": {"kind": kind, "message": message, "exit_code": exit_code}}))


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
        click.option("--recipe", "recipe_option", metavar="RECIPE", help="A file, or the name of a recipe we ship."),
        click.argument("recipe_argument", metavar="[RECIPE]", required=False),
    ):
        command = parameter(command)
    return command


def _store_force(context: click.Context, _: click.Parameter, is_forced: bool) -> None:
    """Store the value of `--force` in click's context, for `_with_force`."""
    context.obj = {**(context.obj or {}), "force": is_forced}


def _with_force(overrides: tuple[str, ...]) -> tuple[str, ...]:
    """Append the recipe key that `--force` sets to the overrides of `--set`."""
    is_forced = (click.get_current_context().obj or {}).get("force", False)
    return (*overrides, "prune.measure.force=true") if is_forced else overrides


def _recipe_name(option: str | None, argument: str | None) -> str:
    """Return the recipe, which must be given exactly once."""
    if (option is None) == (argument is None):
        raise click.UsageError("give one recipe: --recipe FILE, or just FILE. `passdeploy recipes` lists ours.")
    return option or argument or ""


def _parse_batch_sizes(_: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Parse a list such as `1,8,32`."""
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"{value!r} is not a list of positive whole numbers, such as 1,8,32")
    return numbers


def _terminal_listener(quiet: bool) -> TerminalListener:
    from passdeploy.display.progress import TerminalListener

    return TerminalListener(quiet=quiet)


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="passdeploy")
def main() -> None:
    """Turn a trained vision model into a small, fast, checked engine.

    \b
      passdeploy prune --recipe mobilenetv2.yaml     learn which channels matter, cut them, fine-tune
      passdeploy export --trt                        write ONNX and a TensorRT engine, each checked
      passdeploy profile                             measure dense and slim, in milliseconds

    Exit codes: 0 done, 2 wrong usage or recipe, 3 a package, driver or device is missing, 4 a check failed (budget,
    accuracy, equality, parity), 5 bad data or a damaged file, 130 interrupted.
    """


@main.command()
@recipe_options
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="The folder of all runs."
)
@click.option("--resume", is_flag=True, help="Continue the newest run of exactly this recipe.")
@click.option(
    "--track",
    "trackers",
    multiple=True,
    type=click.Choice(["tensorboard", "mlflow"]),
    help="Pass the metrics on; metrics.jsonl is always written.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@common_options
def prune(
    recipe_argument: str | None,
    recipe_option: str | None,
    overrides: tuple[str, ...],
    allow_code: bool,
    out: Path,
    resume: bool,
    trackers: tuple[str, ...],
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Learn which channels matter, cut them exactly, fine-tune, and write a run folder."""
    from passdeploy.recipe import load_recipe

    recipe = load_recipe(_recipe_name(recipe_option, recipe_argument), _with_force(overrides))

    from passdeploy.commands.prune import run
    from passdeploy.commands.published import with_published_input
    from passdeploy.commands.resume import can_be_resumed
    from passdeploy.display.changes import widths_table
    from passdeploy.display.tables import summary_table

    is_first = os.environ.get("RANK", "0") == "0"  # under torchrun only the first process prints
    try:
        with _terminal_listener(quiet or not is_first) as listener:
            result = run(
                recipe,
                out=out,
                device=device,
                resume=resume,
                allow_code=allow_code,
                trackers=trackers,
                tell=listener,
            )
    except KeyboardInterrupt:
        if is_first:
            click.echo(f"go on with: {_resuming_command(can_be_resumed(out, with_published_input(recipe)))}", err=True)
        raise
    if not result.is_first:
        return
    path = _relative_to_cwd(result.path)
    changes = widths_table(result.summary)
    Output(as_json, quiet).show(
        {"run": str(result.path), "summary": result.summary},
        *([changes] if changes else []),
        summary_table(result.summary, result.summary["latency"]),
        paths=[path],
        next_step=f"passdeploy export --onnx{_run_option(path)}   (--trt for a TensorRT engine)",
    )


@main.command()
@run_folder_options
@export_options
@click.option(
    "--batch",
    default="1,8,32",
    show_default=True,
    callback=_parse_batch_sizes,
    metavar="MIN,OPT,MAX",
    help="Batch sizes the artifacts are made for.",
)
@click.option("--dense", is_flag=True, help="Export the dense network of the run too.")
@common_options
def export(
    run_dir: Path,
    allow_code: bool,
    request: ExportRequest,
    batch: tuple[int, ...],
    dense: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write ONNX and, with --trt, engines of a run's slim network or of any model, each checked against PyTorch."""
    request.reject_ineffective_options()
    if request.check_engine is not None:
        document = check_engine(request.check_engine, request.trust_engine)
        loaded = f"{request.check_engine} loads: {document['census']['layers']}"
        Output(as_json, quiet).show(document, loaded, next_step="passdeploy profile")
        return
    from passdeploy.display.exports import exports_table, preview_lines

    with _terminal_listener(quiet) as listener:
        exported = request.run(run_dir, batch, dense, allow_code, listener)
    artifacts = [{"path": str(artifact.path), **artifact.to_json()} for artifact in exported.artifacts]
    table = exports_table({"name": artifact.path.name, **artifact.to_json()} for artifact in exported.artifacts)
    Output(as_json, quiet).show(
        {"run": str(exported.run), "artifacts": artifacts, "previews": [dict(facts) for facts in exported.previews]},
        *(preview_lines(exported.previews) if request.dry_run else [table]),
        paths=[_relative_to_cwd(artifact.path) for artifact in exported.artifacts],
        next_step=request.next_step(_run_option(run_dir)),
    )


@main.command()
@run_folder_options
@click.option(
    "--backend",
    metavar="NAME,...",
    help="Backends: torch, compile, ort, ort-cuda, ort-trt, tensorrt, torch-trt. For a run, if left out: torch,ort; "
    "on a GPU torch,compile,ort-cuda and what was exported for TensorRT, as far as they run here.",
)
@click.option("--batch", default="1,8", show_default=True, callback=_parse_batch_sizes, help="Images per call.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; all physical cores if left out.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.1),
    default=4.0,
    show_default=True,
    help="Measure at least this long per backend and batch.",
)
@click.option(
    "--layers",
    is_flag=True,
    help="For a run: show the time by layer and by channel group, in the first backend; latencies that were measured "
    "with these options are taken from profile.json.",
)
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="With --layers: only the N slowest.")
@click.option("--csv", "as_csv", is_flag=True, help="Print the rows as CSV (with --layers those of the layers).")
@execution_options
@profile_input_options
@common_options
def profile(
    run_dir: Path,
    allow_code: bool,
    inputs: ProfileInputs,
    execution: ExecutionOptions,
    layers: bool,
    top: int | None,
    as_csv: bool,
    backend: str | None,
    batch: tuple[int, ...],
    threads: int | None,
    seconds: float,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure dense and slim of a run in turns on this machine, with intervals; or one or two FILEs; or a table."""
    backends = tuple(part.strip() for part in backend.split(",")) if backend else None
    if top is not None and not layers:
        raise UsageError("--top says how many layers are shown: add --layers.")
    if inputs.are_given:
        if layers:
            raise UsageError("--layers lays two networks of a run side by side: give --run, and no files.")
        with _terminal_listener(quiet) as listener:
            result = inputs.measure(backends, batch, threads, seconds, allow_code, execution, listener)
        rows = result.document.get("rows", []) if as_csv else None
        Output(as_json, quiet).show(
            result.document, *result.parts, paths=result.paths, next_step=result.next_step, rows=rows
        )
        return
    from passdeploy.commands.profile_run import profile_run
    from passdeploy.display.tables import group_table, layer_table, summary_table
    from passdeploy.runs.load import summary_of

    with _terminal_listener(quiet) as listener:
        document = profile_run(
            run_dir,
            backends=backends,
            batches=batch,
            threads=threads,
            setting=execution.setting(),
            seconds=seconds,
            layers=layers,
            fresh=inputs.fresh,
            trust_engine=execution.trust_engine,
            allow_code=allow_code,
            listener=listener,
        )
    written = _relative_to_cwd(run_dir.resolve() / "profile.json")
    tables = [summary_table(summary_of(run_dir), document["rows"])]
    if layers:
        tables = [layer_table(document["layers"], top), group_table(document["groups"], top), *tables]
    rows = document["layers"] if layers else document["rows"]
    Output(as_json, quiet).show(
        {"path": str(written), **document},
        *tables,
        paths=[written],
        next_step="passdeploy prune with another prune.target, or passdeploy export --trt on the machine it is for",
        rows=rows if as_csv else None,
    )


@main.command()
@run_folder_options
@click.option(
    "--precision", default="fp32,fp16,bf16,int8,fp8", show_default=True, metavar="P,P,...", help="Precisions to try."
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images per call.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; all physical cores if left out.")
@click.option("--device", default="auto", show_default=True, help="auto (the GPU where there is one), cpu or cuda:N.")
@click.option(
    "--seconds", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Measure each at least this long."
)
@click.option("--csv", "as_csv", is_flag=True, help="Print the rows as CSV.")
@common_options
def bench(
    run_dir: Path,
    allow_code: bool,
    precision: str,
    batch: int,
    threads: int | None,
    device: str,
    seconds: float,
    as_csv: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Export and measure a run in every format and precision that this machine can, in one table."""
    from passdeploy.commands.bench import bench_run
    from passdeploy.display.bench_table import bench_table

    with _terminal_listener(quiet) as listener:
        document = bench_run(
            run_dir,
            precisions=tuple(part.strip() for part in precision.split(",")),
            batch=batch,
            threads=threads,
            device=device,
            seconds=seconds,
            allow_code=allow_code,
            listener=listener,
        )
    written = _relative_to_cwd(run_dir.resolve() / "bench.json")
    Output(as_json, quiet).show(
        {"path": str(written), **document},
        bench_table(document),
        paths=[written],
        next_step=f"passdeploy report{_run_option(run_dir)}",
        rows=document["rows"] if as_csv else None,
    )


@main.command()
@run_option
@common_options
def report(run_dir: Path, as_json: bool, quiet: bool) -> None:
    """Write the report of a run: one HTML page that needs nothing else, and the same as Markdown."""
    from passdeploy.report.run_facts import read_run
    from passdeploy.report.verdict import judge
    from passdeploy.report.write import write_report
    from passdeploy.runs.folder import RunFolder

    with RunFolder.open(run_dir, write=True) as folder:
        paths = [_relative_to_cwd(path) for path in write_report(folder)]
        verdict = judge(read_run(folder))
    Output(as_json, quiet).show(
        {"html": str(paths[0]), "markdown": str(paths[1]), "verdict": verdict.mood, "answer": verdict.sentence},
        f"{verdict.answer}. {verdict.reason}",
        paths=paths,
        next_step=f"open {paths[0]} in a browser; passdeploy compare, to lay several runs side by side",
    )


@main.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path), metavar="[RUN]...")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("comparison.html"),
    show_default=True,
    help="The page to write.",
)
@common_options
def compare(runs: tuple[Path, ...], out: Path, as_json: bool, quiet: bool) -> None:
    """Lay runs side by side: accuracy over latency and multiply-adds. Without RUN: every finished run in `runs`."""
    from passdeploy.commands.list_runs import finished_runs
    from passdeploy.report.comparison import compare as compare_runs
    from passdeploy.report.comparison import render_comparison
    from passdeploy.report.run_facts import read_run
    from passdeploy.runs.folder import RunFolder
    from passdeploy.runtime.files import write_for_user

    facts = [read_run(RunFolder.open(path)) for path in runs] if runs else finished_runs(Path("runs"))
    comparison = compare_runs(facts)
    write_for_user(out, render_comparison(comparison))
    Output(as_json, quiet).show(
        {"path": str(out), **comparison.to_json()},
        comparison.table(),
        paths=[out],
        next_step=f"open {out} in a browser",
    )


@main.group(invoke_without_command=True)
@click.pass_context
def runs(context: click.Context) -> None:
    """List the runs of a folder, and show one of them."""
    if context.invoked_subcommand is None:
        context.invoke(list_all_runs)


@runs.command("list")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="The folder of all runs."
)
@common_options
def list_all_runs(out: Path = Path("runs"), as_json: bool = False, quiet: bool = False) -> None:
    """List every run with its state, accuracy and speed-up, the newest last."""
    from passdeploy.commands.list_runs import find_runs, runs_table

    found = find_runs(out)
    if not found:
        raise RunError(f"there are no runs in {out}.\nMake one: passdeploy prune --recipe mobilenetv2.yaml")
    Output(as_json, quiet).show({"runs": found}, runs_table(found), next_step=f"passdeploy runs show {out}/NAME")


@runs.command("show")
@click.argument("run_dir", type=click.Path(path_type=Path), default=Path("runs/latest"), metavar="[RUN]")
@common_options
def show_run(run_dir: Path, as_json: bool, quiet: bool) -> None:
    """Show the results of a run: its verdict, sizes, latencies, widths and exported files."""
    from passdeploy.display.changes import widths_table
    from passdeploy.display.exports import exports_table
    from passdeploy.display.tables import summary_table
    from passdeploy.report.run_facts import read_run
    from passdeploy.report.verdict import judge
    from passdeploy.runs.folder import RunFolder

    facts = read_run(RunFolder.open(run_dir))
    verdict, changes = judge(facts), widths_table(facts.summary)
    exports = {name: dict(record) for name, record in facts.exports.items()}
    Output(as_json, quiet).show(
        {
            "run": str(facts.path),
            "verdict": verdict.mood,
            "answer": verdict.sentence,
            "summary": facts.summary,
            "profile": facts.profile,
            "exports": exports,
        },
        f"{verdict.answer}. {verdict.reason}\n",
        *([changes] if changes else []),
        summary_table(facts.summary, facts.rows),
        *([exports_table({"name": name, **record} for name, record in exports.items())] if exports else []),
        next_step=f"passdeploy report{_run_option(run_dir)}",
    )


@main.command()
@recipe_options
@common_options
def check(
    recipe_argument: str | None,
    recipe_option: str | None,
    overrides: tuple[str, ...],
    allow_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Load the model and data of a recipe, find its channel groups and forecast the run time, without training."""
    from passdeploy.recipe import load_recipe

    name = _recipe_name(recipe_option, recipe_argument)
    recipe = load_recipe(name, _with_force(overrides))

    from passdeploy.commands.describe import describe, describe_run
    from passdeploy.commands.forecast import forecast
    from passdeploy.commands.prepare import prepare
    from passdeploy.display.check_report import groups_table, latency_lines, run_time_line
    from passdeploy.runtime.devices import find_device

    with _terminal_listener(quiet) as listener:
        prepared = prepare(recipe, allow_code=allow_code, listener=listener)
        document = {
            "recipe": recipe.name,
            **describe_run(prepared),
            **describe(prepared.channels, round_to=prepared.round_to),
            "seconds": forecast(prepared, find_device()),
        }
    contents = prepared.data.contents
    lines = [
        *(contents.lines if contents is not None else ()),
        f"input: {prepared.data.image_shape[-1]} pixels, {prepared.data.preprocessing.text}",
        *document["words"],
        *latency_lines(document["latency"]),
        run_time_line(document["seconds"]),
    ]
    Output(as_json, quiet).show(document, groups_table(document), *lines, next_step=f"passdeploy prune --recipe {name}")


@main.command()
@click.argument("model")
@click.option("--weights", help="pretrained, or a .safetensors, .pt or .pth file.")
@click.option("--classes", type=click.IntRange(min=1), default=1000, show_default=True, help="Outputs of the network.")
@click.option(
    "--image-size", type=click.IntRange(min=8), default=224, show_default=True, help="Height and width in pixels."
)
@click.option(
    "--round-to", type=click.IntRange(min=1), default=8, show_default=True, help="Round widths to multiples of this."
)
@click.option("--allow-code", is_flag=True, help="Import the module of pkg.mod:factory.")
@common_options
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
    """Show the channel groups and blocks of MODEL: torchvision/NAME, timm/NAME, passdeploy/NAME or pkg.mod:factory."""
    from passdeploy.commands.describe import describe, inspect_model
    from passdeploy.display.check_report import blocks_table, groups_table

    with _terminal_listener(quiet):
        channels = inspect_model(
            model, num_classes=classes, image_size=image_size, weights=weights, allow_code=allow_code
        )
        document = {"model": model, "image_size": image_size, **describe(channels, round_to=round_to)}
    Output(as_json, quiet).show(
        document,
        groups_table(document),
        *([blocks] if (blocks := blocks_table(document)) else []),
        *document["words"],
        next_step="passdeploy recipes, for a recipe to start from",
    )


@main.command()
@click.option("--model", required=True, help="torchvision/NAME, timm/NAME, passdeploy/NAME or pkg.mod:factory.")
@click.option("--data", required=True, help="A folder with a folder of images per class, or the name of a data set.")
@click.option("--root", help="The folder of the data set that --data names.")
@click.option("--weights", help="pretrained, none, or a .safetensors file. Left out: pretrained where there are some.")
@click.option("--image-size", type=click.IntRange(min=8), help="Height and width in pixels; left out: the network's.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("recipe.yaml"),
    show_default=True,
    help="The recipe to write.",
)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@click.option("--allow-code", is_flag=True, help="Import the module of pkg.mod:factory.")
@common_options
def init(
    model: str,
    data: str,
    root: str | None,
    weights: str | None,
    image_size: int | None,
    out: Path,
    force: bool,
    allow_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a commented recipe for a network and your images."""
    from passdeploy.commands.init import write_recipe

    new = write_recipe(
        model,
        data,
        out,
        root=root,
        weights=weights,
        image_size=image_size,
        allow_code=allow_code,
        overwrite=force,
    )
    Output(as_json, quiet).show(
        {"recipe": str(new.path), "schema": str(new.schema), "classes": list(new.contents.train)},
        *new.contents.lines,
        paths=[new.path, new.schema],
        next_step=f"passdeploy check --recipe {new.path}",
    )


@main.group(invoke_without_command=True)
@click.pass_context
def recipes(context: click.Context) -> None:
    """List and show the recipes that come with passdeploy, and describe the keys of a recipe."""
    if context.invoked_subcommand is None:
        context.invoke(list_recipes)


@recipes.command("list")
@common_options
def list_recipes(as_json: bool = False, quiet: bool = False) -> None:
    """List the recipes: model, data set, image size, target, and the images that training goes through."""
    from passdeploy.commands.list_recipes import describe_recipes, recipes_table

    found = describe_recipes()
    Output(as_json, quiet).show(
        {"recipes": [recipe["file"] for recipe in found], "details": found},
        recipes_table(found),
        next_step="passdeploy recipes show mobilenetv2.yaml, or passdeploy init for one of your own",
    )


@recipes.command("show")
@click.argument("name")
@common_options
def show_recipe(name: str, as_json: bool, quiet: bool) -> None:
    """Print a recipe, to copy and change."""
    from passdeploy.recipe import SCHEMA_FILE, find_recipe

    found = find_recipe(name)
    text = found.read_text(encoding="utf-8")
    if isinstance(found, Path):  # a copy lies elsewhere, and still finds the schema
        schema = found.with_name(SCHEMA_FILE)
        text = text.replace(f"$schema={SCHEMA_FILE}", f"$schema={schema}") if schema.is_file() else text
    Output(as_json, quiet).show({"name": name, "text": text}, text.rstrip("\n"))


@recipes.command("schema")
@common_options
def show_schema(as_json: bool, quiet: bool) -> None:
    """Print the JSON Schema of recipes: every key with its default and meaning."""
    from passdeploy.recipe import recipe_schema

    Output(as_json=True).show(recipe_schema())


@main.command()
@common_options
def doctor(as_json: bool, quiet: bool) -> None:
    """Show the packages and GPUs of this machine, which backends start, and which commands can run here."""
    from passdeploy.commands.doctor import examine
    from passdeploy.display.gpus import gpu_lines

    report = examine()
    Output(as_json, quiet).show(
        report,
        *(f"{name:<28} {version}" for name, version in report["versions"].items()),
        *(gpu_lines(report["gpus"]) or [f"{'GPU':<28} none"]),
        *(
            f"{f'backend {name}':<28} {'starts on ' + start['device'] if start['ok'] else 'no: ' + start['why']}"
            for name, start in report["starts"].items()
        ),
        *(f"{name:<28} {'yes' if check['ok'] else 'no: ' + check['why']}" for name, check in report["can"].items()),
        f"{'Torch-TensorRT':<28} {report['torch_tensorrt_installed']}",
        *(
            f"{'made for each other':<28} {', '.join(f'{name} {release}' for name, release in row.items())}"
            for row in report["torch_tensorrt"]
        ),
        next_step="passdeploy recipes",
    )


def _resuming_command(is_resumable: bool) -> str:
    """Return the command line that was typed, with `--resume` where there is a run to go on with."""
    arguments = list((click.get_current_context().find_root().obj or {}).get("arguments", sys.argv[1:]))
    if is_resumable and "--resume" not in arguments:
        arguments.append("--resume")
    return shlex.join(["passdeploy", *arguments])


def _relative_to_cwd(path: Path) -> Path:
    """Return a path relative to the working folder, or as it is where it lies outside."""
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path


def _run_option(run_dir: Path) -> str:
    """Return the `--run` option to show in the next command; empty where `runs/latest` is that run."""
    latest = Path("runs/latest")
    return "" if run_dir == latest or run_dir.resolve() == latest.resolve() else f" --run {run_dir}"
