"""Options of `passdeploy profile`, and the measurement of files, latency tables and sweeps of roundings.

The command itself is in cli.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from passdeploy.cli_completion import complete_recipe
from passdeploy.cli_typed import gathered, reject_ineffective, typed_command
from passdeploy.errors import UsageError, percent

if TYPE_CHECKING:
    from passdeploy.display.listing import Listing
    from passdeploy.display.progress import TerminalListener
    from passdeploy.profiling import Setting
    from passdeploy.runtime.events import Listener

_TIMING_OPTIONS = ("as_csv", "seconds", "trust_engine")


@dataclass(frozen=True)
class Measured:
    """The result of a measurement that is not of a run: the document of `--json`, and what is printed otherwise."""

    document: dict[str, Any]
    parts: tuple[Listing | str, ...]
    paths: tuple[str, ...] = ()
    next_step: str = ""


@dataclass(frozen=True)
class ProfileInputs:
    """The options of `passdeploy profile` that name files, or a network to measure a table of, as typed."""

    files: tuple[Path, ...]
    table: Path | None
    sweep: tuple[int, ...]
    share: float
    recipe: str | None
    model: str | None
    classes: int
    image_size: int | None
    shapes: dict[str, tuple[int, ...]]
    fresh: bool

    @property
    def are_given(self) -> bool:
        """True if files, a table or a sweep were named; otherwise a run is measured."""
        return bool(self.files) or self.wants_table

    @property
    def wants_table(self) -> bool:
        """True if a latency table is needed, for itself or for a sweep."""
        return self.table is not None or bool(self.sweep)

    def measure(
        self,
        backends: Sequence[str] | None,
        batches: Sequence[int],
        threads: int | None,
        seconds: float,
        allow_code: bool,
        setting: Setting,
        trust_engine: bool,
        listener: TerminalListener,
    ) -> Measured:
        """Measure the files, or the table and the sweep."""
        if self.files:
            return self._measure_files(backends, batches, threads, seconds, setting, trust_engine, listener)
        from passdeploy.display.tables import sweep_lines
        from passdeploy.display.units import milliseconds

        document = self._measure_table(backends or (), batches, threads, setting, allow_code, listener)
        lines = [
            f"{milliseconds(document['dense_ms'])} dense; the table is off by {percent(document['error']['median'])} "
            "in the median",
            *sweep_lines(document.get("sweep", ())),
        ]
        path = document.get("path")
        return Measured(document, tuple(lines), (path,) if path else (), self._planning_command(path, allow_code))

    def check(self, *, layers: bool) -> None:
        """Check that the options go together, and that none of those that were typed is without effect.

        Args:
            layers: whether `--layers` was typed.

        Raises:
            UsageError: they do not, or one is.
        """
        if self.files and self.wants_table:
            raise UsageError("a table is of a network, not of a file: give --recipe or --model, and no files.")
        if self.are_given and layers:
            raise UsageError("--layers lays two networks of a run side by side: give --run, and no files.")
        for path in self.files:
            if path.is_dir():
                command = typed_command("profile", "--run", str(path))
                raise UsageError(f"{path} is a folder.\nFor a run: {command}")
        has_sizes = bool(self.files) or self.model is not None
        reject_ineffective(
            (
                (("recipe", "model"), self.wants_table, "goes with --table or --sweep-round; a run is named by --run."),
                (("run_dir",), not self.are_given, "names a run: leave it out beside FILEs, --table or --sweep-round."),
                (("classes",), self.model is not None, "goes with --model."),
                (("image_size",), has_sizes, "goes with --model or FILEs; a run and a recipe know theirs."),
                (("shapes",), bool(self.files), "goes with FILEs."),
                (("share",), bool(self.sweep), "goes with --sweep-round."),
                (("fresh",), layers or self.wants_table, "goes with --layers, --table or --sweep-round."),
                (_TIMING_OPTIONS, not self.wants_table, "goes with a run or FILEs, not with --table or --sweep-round."),
            )
        )
        if self.wants_table and (self.recipe is None) == (self.model is None):
            raise UsageError(
                "say which network: --recipe FILE, or --model torchvision/resnet50.\n"
                "For example: passdeploy profile --table resnet50.json --model torchvision/resnet50 --batch 8"
            )
        if not 0 < self.share < 1:
            raise UsageError(f"--share {self.share:g} makes no sense: it is of the dense latency, between 0 and 1.")

    def _planning_command(self, table: str | None, allow_code: bool) -> str:
        """Return the command that plans by the table that was written; empty where none was."""
        if table is None:
            return ""
        words = ("prune", "--recipe", self.recipe or "RECIPE", "--set", f"prune.measure.table={table}")
        command = typed_command(*words, allow_code=allow_code)
        return f"{command}   # with prune.target a latency; on another machine with --force"

    def _measure_files(
        self,
        backends: Sequence[str] | None,
        batches: Sequence[int],
        threads: int | None,
        seconds: float,
        setting: Setting,
        trust_engine: bool,
        listener: TerminalListener,
    ) -> Measured:
        from passdeploy.display.tables import profile_table
        from passdeploy.profiling.profile_files import profile_files
        from passdeploy.runs.own_files import is_file_of_a_run

        if backends is not None and len(backends) != 1:
            raise UsageError("a file runs in one backend: give one, or leave out --backend.")
        batch_source = click.get_current_context().get_parameter_source("batch")
        document = profile_files(
            self.files,
            batches=None if batch_source is ParameterSource.DEFAULT else batches,
            backend=backends[0] if backends else None,
            threads=threads,
            setting=setting,
            seconds=seconds,
            image_size=self.image_size,
            shapes=self.shapes,
            trust_engine=trust_engine,
            trusted=[path for path in self.files if is_file_of_a_run(path)],
            listener=listener,
        ).to_json()
        return Measured(document, (profile_table(document["rows"]),), next_step="passdeploy profile   # for a run")

    def _measure_table(
        self,
        backends: Sequence[str],
        batches: Sequence[int],
        threads: int | None,
        setting: Setting,
        allow_code: bool,
        listener: Listener,
    ) -> dict[str, Any]:
        from passdeploy.commands.latency_table import measure_table, network_by_name, network_of_recipe
        from passdeploy.latency.resized_networks import require_table_support

        if len(backends) != 1 or len(batches) != 1:
            raise UsageError("a table is of one backend and one batch size: give --backend ort --batch 8, for example.")
        setting = setting.resolved(backends, listener)
        require_table_support(backends[0], setting)  # checked before the network is built, which takes longer
        network = (
            network_of_recipe(self.recipe, allow_code=allow_code)
            if self.recipe is not None
            else network_by_name(
                str(self.model), classes=self.classes, image_size=self.image_size or 224, allow_code=allow_code
            )
        )
        return measure_table(
            network,
            backend=backends[0],
            batch=batches[0],
            threads=threads or 1,
            setting=setting,
            path=self.table,
            sweep=self.sweep,
            share=self.share,
            fresh=self.fresh,
            listener=listener,
        )


def profile_input_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that name what is measured; the command gets them as one argument, `inputs`."""
    decorated = gathered(command, ProfileInputs, "inputs")
    for option in (
        click.option(
            "--fresh",
            is_flag=True,
            help="Measure again what the cache has (--table, --sweep-round), or what profile.json has (--layers).",
        ),
        click.option(
            "--shape",
            "shapes",
            multiple=True,
            callback=_parse_shapes,
            metavar="NAME=1x3x224x224",
            help="With FILEs: the whole shape of an input that they leave open, and that is no image.",
        ),
        click.option(
            "--image-size",
            type=click.IntRange(min=8),
            help="With --model or FILEs: height and width in pixels; for --model, 224 if left out.",
        ),
        click.option(
            "--classes", type=click.IntRange(min=1), default=1000, show_default=True, help="With --model: its outputs."
        ),
        click.option(
            "--model",
            metavar="NAME",
            help="With --table or --sweep-round: the network, such as torchvision/resnet50.",
        ),
        click.option(
            "--recipe",
            metavar="RECIPE",
            shell_complete=complete_recipe,
            help="With --table or --sweep-round: the network of a recipe.",
        ),
        click.option(
            "--share",
            type=float,
            default=0.5,
            show_default=True,
            help="With --sweep-round: the share of the dense latency to plan for.",
        ),
        click.option(
            "--sweep-round",
            "sweep",
            callback=_parse_multiples,
            metavar="1,8,16,32",
            help="Plan and measure the same latency with widths in multiples of each.",
        ),
        click.option(
            "--table",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="Measure how long layers take at which widths, and write it to FILE.",
        ),
        click.argument("files", nargs=-1, type=click.Path(path_type=Path), metavar="[FILE [FILE]]"),
    ):
        decorated = option(decorated)
    return decorated


def _parse_multiples(_: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Parse a list such as `1,8,16`; empty where the option is left out."""
    try:
        multiples = tuple(int(part) for part in value.split(",")) if value is not None else ()
    except ValueError:
        multiples = (0,)
    if multiples and min(multiples) < 1:
        raise click.BadParameter(f"{value!r} is not a list of positive whole numbers, such as 1,8,16")
    return multiples


def _parse_shapes(_: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Parse shapes such as `images=1x3x224x224`."""
    shapes = {}
    for value in values:
        name, _equals, sizes = value.rpartition("=")
        try:
            shapes[name] = tuple(int(size) for size in sizes.split("x"))
        except ValueError:
            shapes[name] = (0,)
        if not name or min(shapes[name]) < 1:
            raise click.BadParameter(f"{value!r} is no name and shape, such as images=1x3x224x224")
    return shapes
