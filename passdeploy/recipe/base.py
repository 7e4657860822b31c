"""What every section of a recipe is made of."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from passdeploy.recipe.strict_yaml import KeyPath


def _share_or_count(value: int | float) -> int | float:
    if 0 < value < 1:
        return value
    if value > 1 and float(value).is_integer():
        return int(value)  # 3e8 is a fine way to write a count
    raise ValueError("is neither a share of the dense model (between 0 and 1) nor a count (above 1).")


FilePath = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
Share = Annotated[float, Field(gt=0, lt=1)]  # of the dense model
ShareOrCount = Annotated[int | float, AfterValidator(_share_or_count)]


class Section(BaseModel):
    """Closed (an unknown key is an error), frozen, and without silent conversions: `"8"` is not 8."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class KeyConflict(ValueError):
    """Two keys that are each fine and do not go together; `path` is the one to change."""

    def __init__(self, path: KeyPath, message: str) -> None:
        super().__init__(message)
        self.path = path


def suggestion_for(wrong: str, choices: Iterable[str]) -> str:
    """One line: the nearest choice, and all of them."""
    choices = list(choices)
    close = difflib.get_close_matches(wrong, choices, n=1, cutoff=0.6)
    guess = f"Did you mean {close[0]!r}? " if close else ""
    return f"{guess}Known: {', '.join(choices)}."
