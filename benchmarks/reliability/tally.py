"""The result of a row: how many trials there were, what they ended with, and those that ended as they must not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from passdeploy.errors import PassDeployError
from tests.command_line import Called, call_command

EXIT_CODES = {0, 2, 3, 4, 5, 130}
MOST_LINES = 3  # of an error
_MOST_SHOWN = 20  # failures that are written down


@dataclass
class Tally:
    """Counts of the trials of one row."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # further figures of the row
    least: float = 1.0  # share of the trials that must be good
    began_s: float = field(default_factory=perf_counter)

    @property
    def trials(self) -> int:
        """Number of trials."""
        return self.outcomes.total()

    @property
    def good(self) -> int:
        """Number of trials that ended as they should."""
        return self.trials - len(self.failures)

    @property
    def is_good(self) -> bool:
        """True if as many trials as there must be are good."""
        return self.good >= self.least * self.trials

    def add(self, outcome: str, problem: str | None = None, trial: str = "") -> None:
        """Count a trial; a problem makes it a failure, and `trial` says how to see it again."""
        self.outcomes[outcome if problem is None else "failed"] += 1
        if problem is not None:
            self.failures.append(f"{trial}: {problem}" if trial else problem)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values for the results."""
        return {
            "trials": self.trials,
            "good": self.good,
            **({"least": self.least} if self.least < 1 else {}),
            "outcomes": dict(self.outcomes.most_common()),
            "failures": self.failures[:_MOST_SHOWN],
            "seconds": round(perf_counter() - self.began_s, 1),
            **self.facts,
        }


def answer_to(*arguments: object) -> tuple[str, str | None]:
    """Call the command line in this process; return what it ended with, and what is wrong with the answer."""
    called = call_command(*arguments)
    return f"exit {called.exit_code}", problem_of(called)


def problem_of(called: Called) -> str | None:
    """Say what is wrong with a command's answer; None if it is a result, or an error of at most three lines."""
    if called.exception is not None and not isinstance(called.exception, SystemExit):
        return f"{type(called.exception).__name__}: {called.exception}"[:300]
    if called.exit_code not in EXIT_CODES:
        return f"exit code {called.exit_code}"
    if "Traceback" in called.output:
        return "a traceback"
    if called.exit_code == 0:
        return None
    lines = called.stderr.strip().splitlines()
    starts = [number for number, line in enumerate(lines) if line.lower().startswith("error: ")]
    if not starts:
        return f"exit code {called.exit_code} without an error"
    return problem_of_text("\n".join(lines[starts[-1] :]))


def problem_of_text(text: str) -> str | None:
    """Say what is wrong with the text of an error; None if it is three lines at most of characters that print."""
    lines = text.split("\n")
    if len(lines) > MOST_LINES:
        return f"an error of {len(lines)} lines"
    if any(not character.isprintable() for line in lines for character in line):
        return "an error with characters that do not print"
    return None


def refusal_of(read: Callable[[], object]) -> tuple[str, str | None]:
    """Call a function of the library; return `read` or the error's class, and what is wrong with its error."""
    try:
        read()
    except PassDeployError as error:
        return type(error).__name__, problem_of_text(str(error))
    except Exception as error:  # the trial is to find these
        return "crash", f"{type(error).__name__}: {error}"[:300]
    return "read", None
