"""The exceptions of passdeploy, with their exit codes, and helpers for messages.

    PassDeployError
    ├── UsageError 2        the command line or the recipe
    │   ├── RecipeError     a key, a value, a file that a recipe names
    │   ├── ModelError      a model that cannot be built as asked
    │   ├── PlanError       a plan that does not fit its network
    │   └── RunError        no such run, or a run that cannot go on
    ├── MissingError 3      something that this machine lacks: a package, a driver, a GPU
    │   ├── MissingExtra
    │   ├── DiskFullError
    │   ├── DeviceMemoryError      a batch that does not fit into the device's memory
    │   ├── NondeterministicError  an operation without a deterministic kernel on this device
    │   └── PeerError       another process of the same training
    ├── GateError 4         a check that failed
    │   ├── EquivalenceError, ExportError, ParityError, AccuracyError, BudgetError, TrainingError
    └── DataError 5         bad data, or a file that is not what it says
        ├── WeightsError
        └── CorruptArtifact

A message has at most three lines: what was asked, what was found, what to do. The library raises; only the command
line prints and exits. A path in a recipe that does not exist is an error of usage (2); a file that exists and has the
wrong content is an error of data (5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType

UNKNOWN = "–"  # in place of a number


class PassDeployError(Exception):
    """Base class of all exceptions that passdeploy raises on purpose."""

    exit_code = 1
    facts: Mapping[str, str] = {}  # what `--json` prints beside the message


class UsageError(PassDeployError):
    """A request on the command line or in the recipe that cannot be carried out."""

    exit_code = 2


class RecipeError(UsageError):
    """A wrong key, a wrong value or a missing file in a recipe."""


class ModelError(UsageError):
    """A model that is unknown or cannot be built as asked."""


class PlanError(UsageError):
    """A plan that does not fit the network it is applied to."""


class RunError(UsageError):
    """A run that does not exist, or cannot be continued."""


class MissingError(PassDeployError):
    """A missing part of the environment: a package, a driver, a device."""

    exit_code = 3


class MissingExtra(MissingError):
    """An optional package that is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(
            f"this needs the package {module!r}, which is not installed here.\n"
            f"Install it with: pip install 'passdeploy[{extra}]'"
        )
        self.module, self.extra = module, extra


class DiskFullError(MissingError):
    """A disk, or a quota, without room for a result."""


class DeviceMemoryError(MissingError):
    """A batch that does not fit into the memory of a device."""


class NondeterministicError(MissingError):
    """An operation that has no deterministic kernel on a device."""


class PeerError(MissingError):
    """A process of the same training that is gone, or cannot be reached."""


class GateError(PassDeployError):
    """A check that failed."""

    exit_code = 4


class EquivalenceError(GateError):
    """A slim network with other outputs than the masked one."""


class ExportError(GateError):
    """A network that an exporter or an engine builder cannot handle as asked."""


class ParityError(GateError):
    """An exported artifact with other outputs than the PyTorch model."""


class AccuracyError(GateError):
    """A slim network that lost more accuracy than the recipe allows; `facts` has the `run`, which is kept."""

    def __init__(self, message: str, *, run: str | None = None) -> None:
        super().__init__(message)
        self.facts = {} if run is None else {"run": run}


class BudgetError(GateError):
    """A budget that cannot be met."""


class TrainingError(GateError):
    """A training that diverged, or whose result cannot be used: a loss or a weight is not finite, a shape is wrong."""


class DataError(PassDeployError):
    """Bad data, or a file with other content than it should have."""

    exit_code = 5


class WeightsError(DataError):
    """A weights file that does not fit its network."""


class CorruptArtifact(DataError):
    """A file of a run that was damaged or changed after it was written."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package, or say which extra provides it.

    >>> require("json", extra="none").__name__
    'json'
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise  # installed, but one of its own imports is missing: show that traceback
        raise MissingExtra(module, extra) from error


def first_line(error: BaseException, *, longest: int | None = 300) -> str:
    """Give the first line of an exception's text, cut to `longest` characters; the name of its class if it has none."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:longest]


def clipped(value: object, limit: int = 80) -> str:
    """Write any value as one line of at most `limit` printable characters, for error messages."""
    text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(value))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def enumerated(names: Sequence[str], most: int = 3) -> str:
    """List names in a sentence, at most so many of them.

    >>> enumerated(["a", "b"]), enumerated(["a", "b", "c", "d", "e"])
    ('a, b', 'a, b, c and 2 more')
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def percent(share: float | None, digits: int = 1) -> str:
    """Format a fraction in percent.

    >>> percent(0.4567), percent(None)
    ('45.7 %', '–')
    """
    return UNKNOWN if share is None else f"{100 * share:.{digits}f} %"
