"""What `passdeploy profile` measures besides a run: files, latency tables, roundings; the command is in cli.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from passdeploy.errors import UsageError

if TYPE_CHECKING:
    from passdeploy.display.progress import TerminalListener
    from passdeploy.profiling import Setting
    from passdeploy.runtime.events import Listener

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class How:
    """How networks are run: the options of that, as they were given."""

    device: str
    precision: str
    channels_last: bool
    cuda_graph: bool
    trust_engine: bool

    def setting(self) -> Setting:
        """For measuring; the device is one that is here."""
        from passdeploy.profiling import Setting
        from passdeploy.runtime.devices import find_device

        device = str(find_device(self.device))
        return Setting(device, self.precision, self.channels_last, self.cuda_graph)


@dataclass(frozen=True)
class Subjects:
    """What is measured that is not a run."""

    files: tuple[Path, ...]
    table: Path | None
    sweep: tuple[int, ...]
    share: float
    recipe: str | None
    model: str | None
    classes: int
    image_size: int | None
    fresh: bool

    @property
    def are_given(self) -> bool:
        """Whether anything but a run is to be measured."""
        return bool(self.files) or self.is_network

    @property
    def is_network(self) -> bool:
        """Whether a table or a sweep is asked for."""
        return self.table is not None or bool(self.sweep)

    def carry_out(
        self,
        backends: Sequence[str] | None,
        batches: Sequence[int],
        threads: int | None,
        seconds: float,
        allow_code: bool,
        how: How,
        listener: TerminalListener,
    ) -> tuple[dict[str, Any], list[str]]:
        """Measure; the document, and what the command says at its end."""
        self.check()
        if self.files:
            from passdeploy.display.tables import latency_table
            from passdeploy.profiling.profile_files import profile_files

            if backends is not None and len(backends) != 1:
                raise UsageError("a file runs in one backend: give one, or leave out --backend.")
            found = profile_files(
                self.files, batches=batches, backend=backends[0] if backends else None, threads=threads,
                setting=how.setting(), seconds=seconds, image_size=self.image_size, trust_engine=how.trust_engine,
                tell=listener,
            ).to_json()  # fmt: skip
            listener.console.print(latency_table(found["rows"]))
            return found, [*map(str, self.files), "next: passdeploy profile, for a run"]
        from passdeploy.display.tables import sweep_lines

        found = self._measure_table(backends or (), batches, threads, how.setting(), allow_code, listener)
        lines = [
            f"{found['dense_ms']:.3g} ms dense; the table is off by {found['error']['median']:.1%} in the median",
            *sweep_lines(found.get("sweep", ())),
        ]
        if "path" in found:
            lines += [found["path"], f"next: passdeploy prune --set prune.measure.table={found['path']}"]
        return found, lines

    def check(self) -> None:
        """Raise UsageError unless what is given goes together."""
        if self.files and self.is_network:
            raise UsageError("a table is of a network, not of a file: give --recipe or --model, and no files.")
        if self.is_network and (self.recipe is None) == (self.model is None):
            raise UsageError(
                "say which network: --recipe FILE, or --model torchvision/resnet50.\n"
                "For example: passdeploy profile --table resnet50.json --model torchvision/resnet50 --batch 8"
            )
        if not 0 < self.share < 1:
            raise UsageError(f"--share {self.share:g} makes no sense: it is of the dense latency, between 0 and 1.")

    def _measure_table(
        self,
        backends: Sequence[str],
        batches: Sequence[int],
        threads: int | None,
        setting: Setting,
        allow_code: bool,
        tell: Listener,
    ) -> dict[str, Any]:
        from passdeploy.commands.latency_table import measure_table, network_by_name, network_of_recipe
        from passdeploy.latency.resized_networks import require_table

        if len(backends) != 1 or len(batches) != 1:
            raise UsageError("a table is of one backend and one batch size: give --backend ort --batch 8, for example.")
        require_table(backends[0], setting)  # before a network is built
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
            tell=tell,
        )


def run_options(command: Command) -> Command:
    """The options that say how networks are run; the command gets them as one `How`."""

    @wraps(command)
    def wrapped(**given: Any) -> Any:
        how = How(**{name: given.pop(name) for name in How.__dataclass_fields__})
        return command(how=how, **given)

    result: Any = wrapped
    for option in (
        click.option("--trust-engine", is_flag=True, help="Run engines without a sidecar; they are native code."),
        click.option("--cuda-graph", is_flag=True, help="One launch for a whole network (torch, compile, tensorrt)."),
        click.option("--channels-last", is_flag=True, help="Memory format of images and weights (torch, compile)."),
        click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16", "int8", "fp8"]), default="fp32",
                     show_default=True, help="torch and compile convert the network; of a run's files those in it."),
        click.option("--device", default="cpu", show_default=True, help="Of torch and compile: cpu, cuda or cuda:N."),
    ):  # fmt: skip
        result = option(result)
    return result  # type: ignore[no-any-return]


def subject_options(command: Command) -> Command:
    """The options that name what is measured; the command gets them as one `Subjects`."""

    @wraps(command)
    def wrapped(**given: Any) -> Any:
        names = ("files", "table", "sweep", "share", "recipe", "model", "classes", "image_size", "fresh")
        subjects = Subjects(**{name: given.pop(name) for name in names})
        return command(subjects=subjects, **given)

    result: Any = wrapped
    for option in (
        click.option("--fresh", is_flag=True, help="Measure a table even if it is in the cache."),
        click.option("--image-size", type=click.IntRange(min=8), help="Pixels, both ways; 224 with --model."),
        click.option("--classes", type=click.IntRange(min=1), default=1000, show_default=True,
                     help="Outputs, with --model."),
        click.option("--model", metavar="NAME", help="With --table or --sweep-round: the network, such as "
                     "torchvision/resnet50."),
        click.option("--recipe", metavar="RECIPE", help="With --table or --sweep-round: the network of a recipe."),
        click.option("--share", type=float, default=0.5, show_default=True, help="What --sweep-round plans for."),
        click.option("--sweep-round", "sweep", callback=_steps, metavar="1,8,16,32",
                     help="Plan and measure the same latency with widths in multiples of each."),
        click.option("--table", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
                     help="Measure how long layers take at which widths, and write it to FILE."),
        click.argument("files", nargs=-1, type=click.Path(path_type=Path), metavar="[FILE [FILE]]"),
    ):  # fmt: skip
        result = option(result)
    return result  # type: ignore[no-any-return]


def _steps(_: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    try:
        steps = tuple(int(part) for part in value.split(",")) if value else ()
    except ValueError:
        steps = (0,)
    if steps and min(steps) < 1:
        raise click.BadParameter(f"{value!r} is not a list of positive whole numbers, such as 1,8,16")
    return steps
