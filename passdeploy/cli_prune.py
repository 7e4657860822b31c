"""The command that makes runs: `passdeploy prune`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from passdeploy.cli_completion import complete_device
from passdeploy.cli_options import (
    common_options,
    load_typed_recipe,
    next_run_option,
    recipe_name,
    recipe_options,
    relative_to_cwd,
    terminal_listener,
)
from passdeploy.cli_typed import typed_command
from passdeploy.display.output import Output

if TYPE_CHECKING:
    from passdeploy.commands.prune import RunResult


@click.command(short_help="Learn which channels matter, cut them, fine-tune.")
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
@click.option(
    "--device",
    default="auto",
    show_default=True,
    shell_complete=complete_device,
    help="auto, cpu, cuda or cuda:N.",
)
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
    recipe = load_typed_recipe(recipe_name(recipe_option, recipe_argument), overrides)

    from passdeploy.commands.prune import run
    from passdeploy.commands.published import with_published_input
    from passdeploy.commands.resume import can_be_resumed
    from passdeploy.display.changes import widths_table
    from passdeploy.display.tables import summary_table

    is_first = os.environ.get("RANK", "0") == "0"  # under torchrun only the first process prints
    try:
        with terminal_listener(quiet or not is_first) as listener:
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
    path, document = relative_to_cwd(result.path), {"run": str(result.path), "summary": result.summary}
    if result.larger:
        _show_several(Output(as_json, quiet), document, result, allow_code)
        return
    changes, of_run = widths_table(result.summary), next_run_option(path, allow_code=allow_code)
    Output(as_json, quiet).show(
        document,
        *([changes] if changes else []),
        summary_table(result.summary, result.summary["latency"]),
        paths=[path],
        next_step=f"passdeploy export --onnx{of_run}   # add --trt for a TensorRT engine",
    )


def _show_several(output: Output, document: dict[str, Any], result: RunResult, allow_code: bool) -> None:
    """Print the runs of several targets side by side."""
    from passdeploy.report.comparison import compare as compare_runs
    from passdeploy.report.run_facts import read_run
    from passdeploy.runs.folder import RunFolder

    runs = [result, *result.larger]
    paths = [relative_to_cwd(each.path) for each in runs]
    step = typed_command("export", "--onnx", "--run", str(paths[-1]), allow_code=allow_code)
    larger = [{"run": str(each.path), "summary": each.summary} for each in result.larger]
    output.show(
        {**document, "larger": larger},
        compare_runs([read_run(RunFolder.open(each.path)) for each in runs]).table(),
        paths=paths,
        next_step=f"{step}   # or another of them",
        or_step=typed_command("compare", *map(str, paths)),
    )


def _resuming_command(is_resumable: bool) -> str:
    """Return the command line that was typed, with `--resume` where there is a run to go on with."""
    arguments = list((click.get_current_context().find_root().obj or {}).get("arguments", sys.argv[1:]))
    if is_resumable and "--resume" not in arguments:
        arguments.append("--resume")
    return shlex.join(["passdeploy", *arguments])
