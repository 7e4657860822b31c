"""Commands on a finished run that are killed: `export`, `profile` and the making of a latency table.

What was published before must still be whole after SIGKILL: every file that the manifest names has its hash, and the
earlier profile and table can be read. The same command again must end well and leave what it leaves when nobody touches
it: the same exported files to the bit, and nothing half-written beside them.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep

from benchmarks.reliability.forked import Command, Forked
from benchmarks.reliability.tally import Tally
from benchmarks.reliability.tiny import prune_arguments, write_recipe
from passdeploy.errors import PassDeployError
from passdeploy.latency.table import LatencyTable
from passdeploy.runs.folder import RunFolder

GOAL = 60  # 20 of each command
_IMPORTED = ("onnx", "onnxruntime", "onnxscript", "passdeploy.commands.export_run", "passdeploy.commands.profile_run")
_DRAFT = ".*"  # names of what is not finished begin with a dot
_LOCK = ".lock"


@dataclass(frozen=True)
class _Place:
    """A folder with a finished run and the table that was made for its recipe."""

    folder: Path
    recipe: Path

    @property
    def run(self) -> Path:
        """The run."""
        return (self.folder / "runs" / "latest").resolve()

    @property
    def table(self) -> Path:
        """The latency table."""
        return self.folder / "table.json"

    def exporting(self, *options: str) -> list[str]:
        """Return the arguments of `passdeploy export`."""
        return ["export", "--run", str(self.run), "--onnx", "--dense", "--allow-code", *options]

    def profiling(self, *options: str) -> list[str]:
        """Return the arguments of `passdeploy profile`."""
        fast = ["--seconds", "0.1", "--threads", "1", "--device", "cpu", "--backend", "torch,ort"]
        return ["profile", "--run", str(self.run), "--allow-code", *fast, *options]

    def tabulating(self, *options: str) -> list[str]:
        """Return the arguments that make the table anew."""
        where = ["--table", str(self.table), "--recipe", str(self.recipe), "--allow-code", "--fresh"]
        return ["profile", *where, "--backend", "ort", "--threads", "1", "--device", "cpu", *options]

    def start(self, forked: Forked, arguments: list[str]) -> Command:
        """Start a command, with a cache of its own."""
        return forked.start(arguments, self.folder / "log", PASSDEPLOY_CACHE=str(self.folder / "cache"))


# the command that is killed: other batches than before, so that no file stays as it is
COMMANDS: dict[str, Callable[[_Place], list[str]]] = {
    "export": lambda place: place.exporting("--precision", "fp32,fp16,int8", "--batch", "1,2,8"),
    "profile": lambda place: place.profiling("--batch", "2,4"),
    "table": lambda place: place.tabulating("--batch", "4"),
}


def measure(count: int = GOAL, seed: int = 0) -> Tally:
    """Kill `count` commands, of each kind in turn."""
    tally = Tally()
    with TemporaryDirectory() as temporary, Forked(*_IMPORTED) as forked:
        whole = _Place(Path(temporary) / "whole", write_recipe(Path(temporary)))
        whole.folder.mkdir()
        for arguments in (
            prune_arguments(whole.recipe, whole.folder / "runs"),
            whole.exporting("--batch", "1,2,4"),
            whole.profiling("--batch", "1"),
            whole.tabulating("--batch", "2"),
        ):
            if (command := whole.start(forked, arguments)).wait() != 0:
                raise SystemExit(command.text)
        seconds: dict[str, float] = {}
        expected: dict[str, dict[str, str]] = {}
        for name, arguments_of in COMMANDS.items():
            place = _copy(whole, f"expected-{name}")
            began = perf_counter()
            if (command := place.start(forked, arguments_of(place))).wait() != 0:
                raise SystemExit(command.text)
            seconds[name], expected[name] = perf_counter() - began, _exported(place)
        for number in range(count):
            name = list(COMMANDS)[number % len(COMMANDS)]
            place = _copy(whole, f"killed-{number}")
            after_s = random.Random(f"{seed} {number}").uniform(0, seconds[name])
            problem, was_running = _try(forked, place, COMMANDS[name](place), after_s, expected[name])
            tally.add(name if was_running else f"{name}, at its end", problem, trial=f"seed {seed}, number {number}")
            shutil.rmtree(place.folder)
        tally.facts = {"seconds_of_a_command": {name: round(one, 2) for name, one in seconds.items()}}
    return tally


def _copy(place: _Place, name: str) -> _Place:
    """Copy a run; links into it, such as `latest`, lead into the copy since they are relative."""
    return _Place(
        Path(shutil.copytree(place.folder, place.folder.with_name(name), symlinks=True)),
        place.recipe,
    )


def _try(
    forked: Forked, place: _Place, arguments: list[str], after_s: float, expected: dict[str, str]
) -> tuple[str | None, bool]:
    """Kill a command and run it again; return what is wrong, and whether it was still running when it was killed."""
    command = place.start(forked, arguments)
    sleep(after_s)
    was_running = command.poll() is None
    command.signal(signal.SIGKILL)
    command.wait()
    if problem := _damage(place):
        return f"after SIGKILL: {problem}", was_running
    again = place.start(forked, arguments)
    if (code := again.wait()) != 0:
        return f"again: exit code {code}: {again.text[-300:]}", was_running
    if problem := _damage(place):
        return f"at the end: {problem}", was_running
    if (found := _exported(place)) != expected:
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        return f"other files than without a kill: {', '.join(differing)}", was_running
    left = [path.name for path in place.folder.rglob(_DRAFT) if path.name != _LOCK]
    return (f"left behind: {', '.join(left)}" if left else None), was_running


def _damage(place: _Place) -> str | None:
    """Say what of the published files is not whole."""
    try:
        run = RunFolder.open(place.run)
        for name in run.manifest():
            run.verified(name)
        json.loads((place.run / "profile.json").read_text())
        LatencyTable.load(place.table)
        for path in (place.folder / "cache").glob("*.json"):
            LatencyTable.load(path)
    except (PassDeployError, OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _exported(place: _Place) -> dict[str, str]:
    """Return the hashes of the exported files."""
    manifest = RunFolder.open(place.run).manifest()
    return {name: entry["sha256"] for name, entry in manifest.items() if name.startswith("export/")}
