"""The command line of passdeploy: each command parses its options, calls the library and prints the result.

Results go to stdout (with `--json` one JSON object and nothing else), progress and warnings to stderr. Modules that
need torch are imported inside the commands, so that `passdeploy --help` answers at once.
"""

from __future__ import annotations

from pathlib import Path

import click

from passdeploy.cli_completion import complete_backends, complete_device, complete_precisions
from passdeploy.cli_execution import ExecutionOptions, execution_options
from passdeploy.cli_export import ExportRequest, check_engine, export_options
from passdeploy.cli_group import CommandGroup
from passdeploy.cli_numbers import MOST_THREADS, FiniteRange
from passdeploy.cli_options import (
    common_options,
    csv_rule,
    next_run_option,
    parse_batch_sizes,
    parse_batches,
    relative_to_cwd,
    run_folder_options,
    terminal_listener,
)
from passdeploy.cli_profile import ProfileInputs, profile_input_options
from passdeploy.cli_prune import prune
from passdeploy.cli_recipes import check, init, inspect, recipes
from passdeploy.cli_runs import compare, report, runs
from passdeploy.cli_typed import reject_ineffective, typed_command
from passdeploy.display.output import Output
from passdeploy.runtime.names import PRECISIONS
from passdeploy.runtime.versions import __version__


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="passdeploy")
def main() -> None:
    """Turn a trained vision model into a small, fast, checked engine.

    \b
      passdeploy prune --recipe mobilenetv2.yaml     learn which channels matter, cut them, fine-tune
      passdeploy export --trt                        write ONNX and a TensorRT engine, each checked
      passdeploy profile                             measure dense and slim, in milliseconds

    Exit codes: 0 done, 2 wrong usage or recipe, 3 a package, driver or device is missing, 4 a check failed (budget,
    accuracy, equality, parity), 5 bad data or a damaged file, 130 interrupted, 141 the output's reader has gone.
    """


@main.command(short_help="Write ONNX, and with --trt an engine, each checked.")
@run_folder_options
@export_options
@click.option(
    "--batch",
    default="1,8,32",
    show_default=True,
    callback=parse_batch_sizes,
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
        with terminal_listener(quiet) as listener:
            document = check_engine(request.check_engine, request.trust_engine, listener)
        loaded = f"{request.check_engine} loads: {document['census']['layers']}"
        step = typed_command("profile", str(request.check_engine), trust_engine=request.trust_engine)
        Output(as_json, quiet).show(document, loaded, next_step=step)
        return
    from passdeploy.display.exports import exports_table, preview_lines

    with terminal_listener(quiet) as listener:
        exported = request.run(run_dir, batch, dense, allow_code, listener)
    artifacts = [{"path": str(artifact.path), **artifact.to_json()} for artifact in exported.artifacts]
    of_run = next_run_option(run_dir, allow_code=allow_code)
    table = exports_table({"name": artifact.path.name, **artifact.to_json()} for artifact in exported.artifacts)
    Output(as_json, quiet).show(
        {"run": str(exported.run), "artifacts": artifacts, "previews": [dict(facts) for facts in exported.previews]},
        *(preview_lines(exported.previews) if request.dry_run else [table]),
        paths=[relative_to_cwd(artifact.path) for artifact in exported.artifacts],
        next_step=request.next_step(of_run, allow_code, exported.artifacts),
    )


@main.command(short_help="Measure dense and slim in turns on this machine.")
@run_folder_options
@click.option(
    "--backend",
    shell_complete=complete_backends,
    metavar="NAME,...",
    help="Backends: torch, compile, ort, ort-cuda, ort-trt, tensorrt, torch-trt. For a run, if left out: torch,ort; "
    "on a GPU torch,compile,ort-cuda and what was exported for TensorRT, as far as they run here.",
)
@click.option(
    "--batch",
    default="1,8",
    show_default=True,
    callback=parse_batches,
    help="Images per call; for --table and --sweep-round one number.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, MOST_THREADS),
    help="CPU threads; if left out OMP_NUM_THREADS, or all physical cores; for a latency table 1.",
)
@click.option(
    "--seconds",
    type=FiniteRange(min=0.1),
    default=4.0,
    show_default=True,
    help="For a run or FILEs: measure at least this long per backend and batch.",
)
@click.option(
    "--layers",
    is_flag=True,
    help="For a run: show the time by layer and by channel group, in the first backend that has it; latencies measured "
    "here with these options are taken from profile.json.",
)
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="With --layers: only the N slowest.")
@click.option(
    "--csv",
    "as_csv",
    is_flag=True,
    help="Print the rows as CSV on stdout: --csv > rows.csv (with --layers those of the layers).",
)
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
    reject_ineffective(((("top",), layers, "says how many layers are shown: add --layers."), csv_rule(as_json)))
    inputs.check(layers=layers)
    backends = tuple(part.strip() for part in backend.split(",")) if backend is not None else None
    setting = execution.setting()
    if inputs.are_given:
        with terminal_listener(quiet) as listener:
            result = inputs.measure(
                backends, batch, threads, seconds, allow_code, setting, execution.trust_engine, listener
            )
        rows = result.document["rows"] if as_csv else None
        Output(as_json, quiet).show(
            result.document, *result.parts, paths=result.paths, next_step=result.next_step, rows=rows
        )
        return
    from passdeploy.commands.profile_run import profile_run
    from passdeploy.display.tables import group_table, layer_table, summary_table
    from passdeploy.runs.load import summary_of

    with terminal_listener(quiet) as listener:
        document = profile_run(
            run_dir,
            backends=backends,
            batches=batch,
            threads=threads,
            setting=setting,
            seconds=seconds,
            layers=layers,
            fresh=inputs.fresh,
            trust_engine=execution.trust_engine,
            allow_code=allow_code,
            listener=listener,
        )
    written = relative_to_cwd(run_dir.resolve() / "profile.json")
    of_run = next_run_option(run_dir, allow_code=allow_code)
    tables = [summary_table(summary_of(run_dir), document["rows"])]
    if layers:
        place = f"{document['layers_of']['backend']}, batch {document['layers_of']['batch']}"
        tables = [layer_table(document["layers"], top, place), group_table(document["groups"], top), *tables]
    rows = document["layers"] if layers else document["rows"]
    Output(as_json, quiet).show(
        {"path": str(written), **document},
        *tables,
        paths=[written],
        next_step=f"open {written.with_name('report.html')} in a browser",
        or_step=f"passdeploy export --dense --trt{of_run}   # on the machine with the GPU",
        rows=rows if as_csv else None,
    )


@main.command(short_help="Export and measure every format and precision, in a table.")
@run_folder_options
@click.option(
    "--precision",
    default=",".join(PRECISIONS),
    show_default=True,
    shell_complete=complete_precisions,
    metavar="P,P,...",
    help="Precisions to try.",
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images per call.")
@click.option(
    "--threads",
    type=click.IntRange(1, MOST_THREADS),
    help="CPU threads; if left out OMP_NUM_THREADS, or all physical cores.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    shell_complete=complete_device,
    help="auto (the GPU where there is one), cpu or cuda:N.",
)
@click.option(
    "--seconds", type=FiniteRange(min=0.1), default=2.0, show_default=True, help="Measure each at least this long."
)
@click.option("--csv", "as_csv", is_flag=True, help="Print the rows as CSV on stdout: --csv > rows.csv.")
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
    """Export and measure a run in every format and precision that this machine can, in one table.

    The files are in bench/ of the run; those of `passdeploy export` stay as they are.
    """
    reject_ineffective((csv_rule(as_json),))
    from passdeploy.commands.bench import bench_run
    from passdeploy.display.bench_table import bench_table

    with terminal_listener(quiet) as listener:
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
    written = relative_to_cwd(run_dir.resolve() / "bench.json")
    Output(as_json, quiet).show(
        {"path": str(written), **document},
        bench_table(document),
        paths=[written],
        next_step=f"passdeploy report{next_run_option(run_dir)}",
        rows=document["rows"] if as_csv else None,
    )


@main.command(short_help="Show GPUs, backends that start, commands that can run.")
@common_options
def doctor(as_json: bool, quiet: bool) -> None:
    """Show the packages and GPUs of this machine, which backends start, and which commands can run here."""
    from passdeploy.commands.doctor import examine
    from passdeploy.display.doctor_facts import doctor_facts

    found = examine()
    Output(as_json, quiet).show(found, doctor_facts(found), next_step="passdeploy recipes")


for command in (check, compare, init, inspect, prune, recipes, report, runs):
    main.add_command(command)
