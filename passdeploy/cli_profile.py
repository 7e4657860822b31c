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
    from torch import nn

    from passdeploy.channels.groups import ChannelMap
    from passdeploy.events import Listener
    from passdeploy.profiling import Setting
    from passdeploy.terminal import TerminalListener

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
        from passdeploy.devices import find_device
        from passdeploy.profiling import Setting

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
            from passdeploy.profiling.artifacts import profile_files
            from passdeploy.terminal import latency_table

            if backends is not None and len(backends) != 1:
                raise UsageError("a file runs in one backend: give one, or leave out --backend.")
            found = profile_files(
                self.files, batches=batches, backend=backends[0] if backends else None, threads=threads,
                setting=how.setting(), seconds=seconds, image_size=self.image_size, trust_engine=how.trust_engine,
                tell=listener,
            ).to_json()  # fmt: skip
            listener.console.print(latency_table(found["rows"]))
            return found, [*map(str, self.files), "next: passdeploy profile, for a run"]
        found = self.make_tables(backends or (), batches, threads, how.setting(), allow_code, listener)
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

    def network(self, allow_code: bool) -> tuple[nn.Module, ChannelMap, tuple[int, ...]]:
        """The network, its groups, and the shape of an image."""
        import torch

        from passdeploy.channels.mapping import map_channels
        from passdeploy.models import build_model

        if self.recipe is not None:
            from passdeploy.data import load_data
            from passdeploy.recipe import load_recipe

            recipe = load_recipe(self.recipe)
            data = load_data(recipe.data)
            dense = build_model(
                recipe.model.name, num_classes=data.num_classes, weights=recipe.model.weights,
                new_head=recipe.model.new_head, allow_code=allow_code,
                seed=recipe.seed,
            )  # fmt: skip
            prune, shape = recipe.prune, tuple(data.image_shape)
            channels = map_channels(dense.eval(), torch.zeros(1, *shape), include=prune.include, exclude=prune.exclude)
            return dense, channels, shape
        size = self.image_size or 224
        dense = build_model(str(self.model), num_classes=self.classes, allow_code=allow_code).eval()
        return dense, map_channels(dense, torch.zeros(1, 3, size, size)), (3, size, size)

    def make_tables(
        self,
        backends: Sequence[str],
        batches: Sequence[int],
        threads: int | None,
        setting: Setting,
        allow_code: bool,
        tell: Listener,
    ) -> dict[str, Any]:
        """Measure a network's table, or take it from the cache, and write it; with a sweep, plan and measure by it."""
        from time import perf_counter

        from passdeploy.latency import target
        from passdeploy.latency.meeting import Meeting, Request
        from passdeploy.latency.networks import require_table
        from passdeploy.latency.place import Place
        from passdeploy.latency.target import example_images, find_table, sweep_round
        from passdeploy.sparsity.baselines import magnitude_scores

        if len(backends) != 1 or len(batches) != 1:
            raise UsageError("a table is of one backend and one batch size: give --backend ort --batch 8, for example.")
        require_table(backends[0], setting)
        threads = threads or 1
        dense, channels, shape = self.network(allow_code)
        place = Place.here(backend=backends[0], threads=threads, batch=batches[0], image_shape=shape, setting=setting)
        images = example_images(batches[0], shape)
        began = perf_counter()
        table = find_table(place, dense, channels, images, fresh=self.fresh, tell=tell)
        document: dict[str, Any] = {
            "place": table.to_json()["place"], "dense_ms": table.dense_ms, "seconds": round(perf_counter() - began, 2),
            "error": {"median": table.error[0], "largest": table.error[1]},
            "layers": len({node.layer for node in table.nodes}), "networks": len(table.looks),
        }  # fmt: skip
        if self.table is not None:
            table.save(self.table)
            document["path"] = str(self.table)
        if self.sweep:
            scores = magnitude_scores(dense, channels.groups, norm="l2")
            with target.prober_at(place, dense, channels, images) as prober:
                document["sweep"] = sweep_round(
                    self.sweep,
                    lambda step: Meeting(
                        prober, channels, table, round_to=step, threads=threads, seconds=target.SECONDS,
                        device=setting.device_of(place.backend),
                    ),
                    scores, Request(share=self.share),
                )  # fmt: skip
        return document


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


def sweep_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a sweep found, a line each, the best last."""
    lines, met = [], [row for row in rows if "refused" not in row]
    for row in rows:
        if "refused" in row:
            lines.append(f"multiples of {row['round_to']:>3}: {row['refused']}")
        else:
            lines.append(
                f"multiples of {row['round_to']:>3}: {row['slim_ms']:.3g} ms ({row['achieved']:.1%} of dense), "
                f"keeps {row['kept']:.1%} of the score"
            )
    if met:
        best = max(met, key=lambda row: row["kept"])
        lines.append(f"best: prune.round_to={best['round_to']}, which keeps the most in that time")
    return lines
