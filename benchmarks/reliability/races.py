"""Two processes that go on with one run at the same moment: one does, the other names it, and the result is whole.

In every other trial the two start runs of their own in one folder instead: both must end, each in a run of its own.
"""

from __future__ import annotations

import signal
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.reliability.forked import Forked, lent
from benchmarks.reliability.tally import Tally
from benchmarks.reliability.tiny import can_go_on, hashes_of, prune_arguments, write_recipe

GOAL = 100


def measure(count: int = GOAL, seed: int = 0, forked: Forked | None = None) -> Tally:
    """Let `count` pairs race."""
    tally = Tally()
    with TemporaryDirectory() as temporary, lent(forked) as forked:
        folder = Path(temporary)
        recipe = write_recipe(folder)
        whole = forked.start(prune_arguments(recipe, folder / "whole"), folder / "whole.log")
        if whole.wait() != 0:
            raise SystemExit(whole.text)
        expected = hashes_of(folder / "whole" / "latest")
        for number in range(seed, seed + count):
            out = folder / f"race-{number}"
            kind = "one run" if number % 2 == 0 else "one folder"
            problem = _race(forked, recipe, out, expected, resume=number % 2 == 0)
            tally.add(kind, problem, trial=f"number {number}")
    return tally


def _race(forked: Forked, recipe: Path, out: Path, expected: dict[str, str], *, resume: bool) -> str | None:
    if resume:  # a run that has only begun
        first = forked.start(prune_arguments(recipe, out), out.with_name(f"{out.name}-0.log"))
        while not can_go_on(out) and first.poll() is None:
            pass
        first.signal(signal.SIGKILL)
        first.wait()
    options = ["--resume"] if resume else []
    pair = [
        forked.start(prune_arguments(recipe, out, *options), out.with_name(f"{out.name}-{one}.log")) for one in (1, 2)
    ]
    codes = [command.wait() for command in pair]
    if any("Traceback" in command.text for command in pair):
        return "a traceback"
    runs = [run for run in out.iterdir() if run.is_dir() and not run.is_symlink()]
    if not resume and (codes != [0, 0] or len(runs) != 2):
        return f"exit codes {codes}, {len(runs)} runs"
    if resume:
        if sorted(codes) == [0, 2]:
            winner, loser = (pair[0], pair[1]) if codes[0] == 0 else (pair[1], pair[0])
            if f"another process is writing to the run {runs[0]}: PID {winner.pid} on" not in loser.text:
                return f"the second does not name the first: {loser.text[-300:]}"
        elif codes != [0, 0]:  # the second may have come when the first was done
            return f"exit codes {codes}: {pair[0].text[-200:]} {pair[1].text[-200:]}"
    differing = [run.name for run in runs if hashes_of(run) != expected]
    return f"other bits in {', '.join(differing)}" if differing else None
