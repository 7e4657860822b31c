"""Runs with 0, 1, 2 and 8 workers that decode images, and a repeated run: all must end with the same bits."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.reliability.forked import Forked, lent
from benchmarks.reliability.tally import Tally
from benchmarks.reliability.tiny import hashes_of, prune_arguments, write_recipe

GOAL = 20
WORKERS = (0, 8, 1, 2, 1)


def measure(count: int = GOAL, seed: int = 0, forked: Forked | None = None) -> Tally:
    """Compare `count` runs, five of each seed, with the first of their seed."""
    tally = Tally()
    with TemporaryDirectory() as temporary, lent(forked) as forked:
        folder = Path(temporary)
        recipe = write_recipe(folder)
        expected: dict[str, str] = {}
        for number in range(count):
            own_seed, workers = seed + number // len(WORKERS), WORKERS[number % len(WORKERS)]
            changes = [f"seed={own_seed}", f"data.workers={workers}", "train.augment=auto"]
            out = folder / f"run-{number}"
            options = [argument for change in changes for argument in ("--set", change)]
            command = forked.start(prune_arguments(recipe, out, *options), folder / "log")
            if (code := command.wait()) != 0:
                tally.add("failed", f"exit code {code}: {command.text[-300:]}", trial=f"seed {own_seed}")
                continue
            found = hashes_of(out / "latest")
            if number % len(WORKERS) == 0:
                expected = found
            problem = None if found == expected else "other bits"
            tally.add(f"{workers} workers", problem, trial=f"seed {own_seed}, {workers} workers")
    return tally
