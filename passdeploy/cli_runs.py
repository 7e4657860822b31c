"""The commands that read finished runs: `passdeploy report`, `compare` and `runs`."""

from __future__ import annotations

from pathlib import Path

import click

from passdeploy.cli_options import common_options, list_or_pass_on, next_run_option, relative_to_cwd, run_option
from passdeploy.cli_typed import typed_command
from passdeploy.display.output import Output
from passdeploy.errors import RunError

_out_option = click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="The folder of all runs."
)


@click.command(short_help="Write the report of a run: one HTML page, and Markdown.")
@run_option
@common_options
def report(run_dir: Path, as_json: bool, quiet: bool) -> None:
    """Write the report of a run: one HTML page that needs nothing else, and the same as Markdown."""
    from passdeploy.report.run_facts import read_run
    from passdeploy.report.verdict import judge
    from passdeploy.report.write import write_report
    from passdeploy.runs.folder import RunFolder

    with RunFolder.open(run_dir, write=True) as folder:
        paths = [relative_to_cwd(path) for path in write_report(folder)]
        verdict = judge(read_run(folder, relative_to_cwd(folder.path)))
    Output(as_json, quiet).show(
        {"html": str(paths[0]), "markdown": str(paths[1]), "verdict": verdict.mood, "answer": verdict.sentence},
        verdict.sentence,
        *(todo.lines for todo in verdict.todo),
        paths=paths,
        next_step=f"open {paths[0]} in a browser",
        or_step="passdeploy compare   # lays several runs side by side",
    )


@click.command(short_help="Lay runs side by side: accuracy over latency and MACs.")
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

    opened = (RunFolder.open(path) for path in runs)
    once = {run.path: run for run in opened}  # `runs/*` names the newest by its link, too
    facts = [read_run(run) for run in once.values()] if once else finished_runs(Path("runs"))
    comparison = compare_runs(facts)
    write_for_user(out, render_comparison(comparison))
    Output(as_json, quiet).show(
        {"path": str(out), **comparison.to_json()},
        comparison.table(),
        paths=[out],
        next_step=f"open {out} in a browser",
    )


@click.group(invoke_without_command=True)
@_out_option
@common_options
@click.pass_context
def runs(context: click.Context, /, **_: object) -> None:
    """List the runs of a folder, and show one of them."""
    list_or_pass_on(context, list_all_runs)


@runs.command("list")
@_out_option
@common_options
def list_all_runs(out: Path, as_json: bool, quiet: bool) -> None:
    """List every run with its state, accuracy and speed-up, the newest last."""
    from passdeploy.commands.list_runs import find_runs, runs_table

    found = find_runs(out)
    if not found:
        raise RunError(f"there are no runs in {out}.\nMake one: passdeploy prune --recipe mobilenetv2.yaml")
    finished = [run["name"] for run in found if run["state"] == "finished"]
    step = typed_command("runs", "show", str(out / finished[-1])) if finished else ""
    Output(as_json, quiet).show({"runs": found}, runs_table(found), next_step=step)


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

    folder = RunFolder.open(run_dir)
    facts = read_run(folder, relative_to_cwd(folder.path))
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
        "\n".join([verdict.sentence, *(todo.lines for todo in verdict.todo), ""]),
        *([changes] if changes else []),
        summary_table(facts.summary, facts.rows),
        *([exports_table({"name": name, **record} for name, record in exports.items())] if exports else []),
        next_step=f"passdeploy report{next_run_option(run_dir)}",
    )
