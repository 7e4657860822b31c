"""Mutation score of what decides over right and wrong cuts: plans, slimming and the rules of operations.

The mutants of mutant_operators.py are drawn at random, of every file in proportion to how many it has. A mutant is
found if one of the tests that run its line fails, or has no end. The tests run from the quickest one on, for ten
seconds of processor time: what only a slower test would find counts as a survivor, as does what no test runs, and what
changes nothing that anybody could observe. So the score is a lower bound. Needs Linux.

    python -m benchmarks.reliability mutants [--count 300]
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from benchmarks.reliability.coverage import PACKAGES as TESTS
from benchmarks.reliability.mutant_forks import Forks, Verdict, require_clean
from benchmarks.reliability.mutant_operators import Mutant, mutants_of
from benchmarks.reliability.mutant_tests import record_tests
from benchmarks.reliability.tally import Tally

GOAL = 300
LEAST = 0.8  # of the mutants are to be found
ROOT = Path(__file__).parents[2]
PACKAGES = ("passdeploy/channels", "passdeploy/slimming", "passdeploy/tracing/rules")
LEFT_OUT = ("tests/slimming/test_mutations.py",)  # fails for any change, since it compares a list with the code


def measure(count: int = GOAL, seed: int = 0) -> Tally:
    """Draw mutants and try them; all survivors are in the facts."""
    began_s = perf_counter()
    folders = [*PACKAGES, *(test for tests in TESTS.values() for test in tests)]
    tests = record_tests(ROOT, PACKAGES, folders, LEFT_OUT)
    mutants = all_mutants(ROOT, PACKAGES)
    with Forks(ROOT, folders) as forks:
        require_clean(forks, tests)
        verdicts = [forks.examine(mutant, tests) for mutant in drawn(mutants, count, seed)]
    return tally_of(verdicts, sum(map(len, mutants.values())), began_s)


def tally_of(verdicts: Sequence[Verdict], total: int, began_s: float) -> Tally:
    """Count what the tests said; the row is good with `LEAST` of the mutants, whatever their package."""
    tally = Tally(least=LEAST, began_s=began_s)
    packages: dict[str, list[Verdict]] = {package: [] for package in PACKAGES}
    for verdict in verdicts:
        tally.outcomes[verdict.outcome] += 1
        packages[str(Path(verdict.mutant.file).parent)].append(verdict)
        if not verdict.is_found:
            tally.failures.append(f"{verdict.mutant} ({verdict.outcome})")
    tally.facts["score"] = round(tally.good / tally.trials, 4)
    tally.facts["packages"] = {
        package: {"mutants": len(own), "found": sum(verdict.is_found for verdict in own)}
        for package, own in packages.items()
    }
    tally.facts["all_mutants"] = total
    tally.facts["survivors"] = [verdict.to_json() for verdict in verdicts if not verdict.is_found]
    return tally


def all_mutants(root: Path, packages: Sequence[str]) -> dict[str, list[Mutant]]:
    """List the mutants of all files of some folders, by file."""
    files = [path for package in packages for path in sorted((root / package).glob("*.py"))]
    names = [path.relative_to(root).as_posix() for path in files]
    return {name: mutants_of((root / name).read_text(encoding="utf-8"), name) for name in names}


def drawn(mutants: dict[str, list[Mutant]], count: int, seed: int) -> list[Mutant]:
    """Draw mutants, of each file in proportion to how many it has."""
    total = sum(map(len, mutants.values()))
    exact = {file: min(count, total) * len(own) / total for file, own in mutants.items()}
    shares = {file: int(share) for file, share in exact.items()}
    rest = sorted(exact, key=lambda file: shares[file] - exact[file])[: min(count, total) - sum(shares.values())]
    chosen = []
    for file, own in mutants.items():
        shuffled = random.Random(f"{seed} {file}").sample(own, len(own))  # what is drawn first is so of any number
        chosen += shuffled[: shares[file] + (file in rest)]
    return chosen
