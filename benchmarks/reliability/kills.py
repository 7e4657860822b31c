"""Runs that are killed at random moments and resumed: the result must be that of a run that nobody touched, to the bit.

Two signals out of three are SIGKILL, the others SIGTERM and SIGINT, after which the run must end by itself within ten
seconds, say how to go on, and leave a state to go on from. A run is killed up to three times before it is let be. Every
other kill is aimed at mask learning: it waits until a step has been saved.
"""

from __future__ import annotations

import json
import random
import signal
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep

from benchmarks.reliability.forked import Forked, lent
from benchmarks.reliability.tally import Tally
from benchmarks.reliability.tiny import can_go_on, hashes_of, prune_arguments, write_recipe
from passdeploy.errors import PassDeployError
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.numbering import list_runs

GOAL = 200
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL, signal.SIGINT)
MOST_S = 10.0  # until a process has ended after SIGTERM or SIGINT


def measure(count: int = GOAL, seed: int = 0, forked: Forked | None = None) -> Tally:
    """Kill `count` runs, each up to three times, and let them end."""
    tally = Tally()
    with TemporaryDirectory() as temporary, lent(forked) as forked:
        folder = Path(temporary)
        recipe = write_recipe(folder)
        seconds, expected = _whole_run(forked, recipe, folder / "whole")
        stages: dict[str, int] = {}
        from_steps = 0
        for number in range(count):
            chance = random.Random(f"{seed} {number}")
            out, problems, kills = folder / f"killed-{number}", [], []
            for kill_number in range(chance.randint(1, 3)):
                kills.append(SIGNALS[(number + kill_number) % len(SIGNALS)])
                is_aimed, after_s = (number + kill_number) % 2 == 0, chance.uniform(0, seconds)
                problem, where = _kill(forked, recipe, out, kills[-1], after_s, is_aimed)
                from_steps += _goes_on_from_a_step(out)
                stages[where] = stages.get(where, 0) + 1
                problems.append(problem)
            problems.append(_resume(forked, recipe, out, expected))
            outcome = " ".join(sorted({kill.name for kill in kills}))
            problem = "; ".join(filter(None, problems)) or None
            tally.add(outcome, problem, trial=f"seed {seed}, run {number}")
        tally.facts = {
            "killed_in": dict(sorted(stages.items())),
            "went_on_from_a_step_of_learning": from_steps,
            "seconds_of_a_run": round(seconds, 2),
        }
    return tally


def _whole_run(forked: Forked, recipe: Path, out: Path) -> tuple[float, tuple[dict[str, str], str]]:
    """Run the recipe twice in peace; return the seconds of the second run and its results."""
    for number in (1, 2):
        began = perf_counter()
        command = forked.start(prune_arguments(recipe, out), out.with_name(f"whole-{number}.log"))
        if command.wait() != 0:
            raise SystemExit(command.text)
    return perf_counter() - began, _results(out)


def _kill(
    forked: Forked, recipe: Path, out: Path, kill: signal.Signals, after_s: float, is_aimed: bool
) -> tuple[str | None, str]:
    """Start or resume a run and kill it; return what is wrong afterwards, and the stage in which it was.

    Args:
        forked: that starts it.
        recipe: of the run.
        out: where it writes.
        kill: signal.
        after_s: seconds until then.
        is_aimed: instead, kill it as soon as it has saved a step of mask learning, or another one.
    """
    options = ["--resume"] if can_go_on(out) else []
    before = _saved_steps(out)
    command = forked.start(prune_arguments(recipe, out, *options), out.with_name(f"{out.name}.log"))
    if is_aimed:
        while _saved_steps(out) <= before and command.poll() is None:
            sleep(0.002)
    else:
        sleep(after_s)
    was_running = command.poll() is None
    command.signal(kill)
    began = perf_counter()
    code = command.wait()
    where = _stage_of(out) if was_running else "the end"
    if not was_running:
        return (None if code == 0 else f"exit code {code}: {command.text[-300:]}"), where
    if kill is signal.SIGKILL:
        return None, where
    if (took := perf_counter() - began) > MOST_S:
        return f"{kill.name}: it ran on for {took:.1f} s", where
    if "Traceback" in command.text:
        return f"{kill.name}: {command.text[-500:]}", where
    is_early = code == -kill and (where == "before" or not command.text)  # before it listens
    if code not in (0, 130) and not is_early:
        return f"{kill.name}: exit code {code}", where
    if code == 130 and where != "before" and "go on with: passdeploy prune" not in command.text:
        return f"{kill.name}: it does not say how to go on: {command.text[-300:]}", where
    return None, where


def _resume(forked: Forked, recipe: Path, out: Path, expected: tuple[dict[str, str], str]) -> str | None:
    """Let a run end, and compare its results."""
    options = ["--resume"] if can_go_on(out) else []
    command = forked.start(prune_arguments(recipe, out, *options), out.with_name(f"{out.name}.log"))
    if (code := command.wait()) != 0:
        return f"--resume ended with {code}: {command.text[-500:]}"
    if options and (runs := len(list(out.glob("tiny-*")))) != 1 and not _was_killed_while_it_was_made(out):
        return f"{runs} runs in {out.name}"
    if (found := _results(out)) != expected:
        differing = [name for name in expected[0] if found[0][name] != expected[0][name]] or ["summary.json"]
        return f"other bits in {', '.join(differing)}"
    return None


def _was_killed_while_it_was_made(out: Path) -> bool:
    return any(not (run / "recipe.resolved.yaml").is_file() for run in out.glob("tiny-*"))


def _saved_steps(out: Path) -> set[str]:
    """List the saved states of mask learning."""
    return {path.name for path in out.glob("tiny-*/checkpoints/learn-*.safetensors")}


def _goes_on_from_a_step(out: Path) -> bool:
    """Test whether mask learning has begun, is not finished, and will go on from a step."""
    for run in list_runs(out):
        with suppress(PassDeployError):
            folder = RunFolder.open(run)
            return not folder.is_done("learn") and folder.checkpoint("learn").load() is not None
    return False


def _stage_of(out: Path) -> str:
    """Name the stage that was going on: the one that `run.log` says has started."""
    logs = sorted(out.glob("tiny-*/run.log"))
    lines = logs[-1].read_text().splitlines() if logs else []
    if not lines:
        return "before"
    name = lines[-1].split(" ", 1)[1].split(":")[0]
    return name if ": started" in lines[-1] else f"after {name}"


def _results(out: Path) -> tuple[dict[str, str], str]:
    """Return the hashes of the results, and the summary without its seconds."""
    run = (out / "latest").resolve()
    summary = json.loads((run / "summary.json").read_text())
    summary.pop("seconds", None)
    return hashes_of(run), json.dumps(summary, sort_keys=True)
