"""Base class of the sections of a recipe, field types, and the suggestion for a misspelt name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from passdeploy.recipe.strict_yaml import KeyPath

_LARGEST_COUNT = 2**53  # beyond it a float does not hold every integer, and no network is that large


def _share_or_count(value: int | float) -> int | float:
    if 0 < value < 1:
        return value
    if value > _LARGEST_COUNT:
        raise ValueError(f"is larger than any network: a count is at most {_LARGEST_COUNT:,}.")
    if value > 1 and float(value).is_integer():
        return int(value)  # a count may be written as 3e8
    raise ValueError("is neither a share of the dense model (between 0 and 1) nor a count (above 1).")


def _file_path(value: str) -> str:
    if "\0" in value:
        raise ValueError("has a null character, which no file name can have.")
    return os.path.expanduser(value)


FilePath = Annotated[str, Field(min_length=1), AfterValidator(_file_path)]
Share = Annotated[float, Field(gt=0, lt=1)]  # of the dense model
ShareOrCount = Annotated[int | float, AfterValidator(_share_or_count)]


class Section(BaseModel):
    """A section of a recipe: unknown keys are errors, values are frozen and never converted (`"8"` is not 8)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class KeyConflict(ValueError):
    """Two keys that are valid alone and contradict each other; `path` is the one to change."""

    def __init__(self, path: KeyPath, message: str) -> None:
        super().__init__(message)
        self.path = path


def suggestion_for(wrong: str, choices: Iterable[str]) -> str:
    """Write one line with the choice most similar to `wrong`, and all choices."""
    choices = list(choices)
    close = difflib.get_close_matches(wrong, choices, n=1, cutoff=0.6)
    guess = f"Did you mean {close[0]!r}? " if close else ""
    return f"{guess}Known: {', '.join(choices)}."
