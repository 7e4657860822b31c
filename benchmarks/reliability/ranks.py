"""Two processes that train together (gloo): one is killed, the other ends with one clear error, and resume works.

They are killed once both have joined. A process whose peer never comes waits for it, up to `distributed.TIMEOUT_S`.
"""

from __future__ import annotations

import random
import signal
import socket
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep

from benchmarks.reliability.forked import Command, Forked, lent
from benchmarks.reliability.tally import Tally, problem_of_text
from benchmarks.reliability.tiny import can_go_on, hashes_of, prune_arguments, write_recipe

GOAL = 20
MOST_S = 60.0  # until the other process has noticed


def measure(count: int = GOAL, seed: int = 0, forked: Forked | None = None) -> Tally:
    """Kill one of two processes `count` times."""
    tally = Tally()
    with TemporaryDirectory() as temporary, lent(forked) as forked:
        folder = Path(temporary)
        recipe = write_recipe(folder)
        whole = folder / "whole"
        commands = _start(forked, recipe, whole)
        _wait_until_joined(whole, commands)
        began = perf_counter()
        if any(command.wait() for command in commands):
            raise SystemExit((folder / "whole-0.log").read_text())
        seconds = perf_counter() - began
        expected = hashes_of(whole / "latest")
        number = 0
        while tally.trials < count:
            chance = random.Random(f"{seed} {number}")
            out = folder / f"killed-{number}"
            pair = _start(forked, recipe, out)
            _wait_until_joined(out, pair)
            sleep(chance.uniform(0, 0.9) * seconds)
            victim = chance.randrange(2)
            number += 1
            if pair[victim].poll() is not None:
                continue  # too late
            pair[victim].signal(signal.SIGKILL)
            tally.add(f"rank {victim} killed", _outcome(forked, recipe, out, pair, victim, expected), f"seed {seed}")
    return tally


def _start(forked: Forked, recipe: Path, out: Path, *options: str) -> list[Command]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [
        forked.start(
            prune_arguments(recipe, out, *options),
            out.with_name(f"{out.name}-{rank}.log"),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in (0, 1)
    ]


def _wait_until_joined(out: Path, pair: list[Command]) -> None:
    """Wait until the first process has made its run folder, which it does after the other one has joined."""
    while not can_go_on(out) and all(command.poll() is None for command in pair):
        sleep(0.01)


def _outcome(
    forked: Forked, recipe: Path, out: Path, pair: list[Command], victim: int, expected: dict[str, str]
) -> str | None:
    pair[victim].wait()
    other = pair[1 - victim]
    began = perf_counter()
    while (code := other.poll()) is None and perf_counter() - began < MOST_S:
        sleep(0.05)
    if code is None:
        other.signal(signal.SIGKILL)
        other.wait()
        return f"the other process runs on after {MOST_S:.0f} s"
    if code not in (0, 3):  # it may have been done
        return f"the other process ended with {code}: {other.text[-300:]}"
    if "Traceback" in other.text:
        return f"a traceback: {other.text[-300:]}"
    errors = other.text[other.text.find("error: ") :].strip()
    if code == 3 and (problem := problem_of_text(errors)):
        return problem
    can_resume = can_go_on(out)
    again = _start(forked, recipe, out, *(["--resume"] if can_resume else []))
    if any(codes := [command.wait() for command in again]):
        return f"afterwards exit codes {codes}: {again[0].text[-300:]}"
    return None if hashes_of(out / "latest") == expected else "other bits after --resume"
