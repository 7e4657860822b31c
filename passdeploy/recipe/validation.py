"""Check a recipe, and explain the first error: the key, its file and line, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from passdeploy.errors import RecipeError, clipped, enumerated
from passdeploy.recipe.base import KeyConflict, suggestion_for
from passdeploy.recipe.schema import Recipe
from passdeploy.recipe.strict_yaml import Document, KeyPath, Mark, dotted, dump

_MOST_OTHERS = 5  # keys that are named beside the one that is explained


def validate_recipe(document: Document) -> Recipe:
    """Check the recipe in a document.

    Raises:
        RecipeError: a key or a value is invalid; the message has at most three lines.
    """
    try:
        return Recipe.model_validate(document.value)
    except ValidationError as error:
        raise RecipeError(_error_message(error.errors(), document)) from error


def _error_message(errors: Sequence[ErrorDetails], document: Document) -> str:
    """Explain the first error in at most three lines, and name the other keys with errors."""
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")  # a misspelt key explains a missing one
    path = _key_path(first, document.value)
    alike = [error for error in errors if _key_path(error, document.value) == path]
    others = list(dict.fromkeys(_key_path(error, document.value) for error in errors))
    others.remove(path)
    message = f"{_mark_of(path, document)}: {_sentence_about(path, alike, document.value)}"
    if others and message.count("\n") < 2:
        shown = enumerated([dotted(other) or "the recipe" for other in others], most=_MOST_OTHERS)
        message += f"\nWrong too: {shown}."
    return message


def _key_path(error: ErrorDetails, value: Any) -> KeyPath:
    """Find the key that an error is about: the error's location without pydantic's names for members of a union."""
    reason = error.get("ctx", {}).get("error")
    if isinstance(reason, KeyConflict):
        return reason.path
    if error["type"] == "missing":
        return error["loc"]
    path: KeyPath = ()
    for part in error["loc"]:
        known = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if not known:
            break
        path, value = (*path, part), value[part]
    return path


def _mark_of(path: KeyPath, document: Document) -> Mark:
    """Find the file and line of a key; for a missing key, those of the nearest section around it."""
    return next(document.marks[path[:depth]] for depth in range(len(path), -1, -1) if path[:depth] in document.marks)


def _sentence_about(path: KeyPath, errors: Sequence[ErrorDetails], value: Any) -> str:
    """Explain the errors that pydantic found in one key; a second line says what to do."""
    key, kind, message = dotted(path), errors[0]["type"], errors[0]["msg"]
    if kind == "extra_forbidden":
        return f"unknown key '{key}'.\n{_nearest_key(path)}"
    if kind == "missing":
        return f"the key '{key}' is missing; {_example_of(path)}"
    if kind == "value_error":
        return f"{key}: {message.removeprefix('Value error, ')}"
    found = _value_at(value, path)
    if kind == "model_type":
        known = ", ".join(_known_keys(path))
        return f"{key}: found {_value_text(found)}, where keys are expected.\nKnown here: {known}."
    if kind == "string_pattern_mismatch":
        return f"{key}: {_value_text(found)} cannot name a folder; use letters, digits, dot, dash and underscore."
    if kind == "literal_error" and len(errors) == 1:
        return f"{key}: {_value_text(found)} is not known.\n{suggestion_for(str(found), _choices(path))}"
    wanted = dict.fromkeys(error["msg"].removeprefix("Input should be ") for error in errors)
    if _PLAIN_WORDS["a valid number"] in (plain := [_PLAIN_WORDS.get(text, text) for text in wanted]):
        plain = [text for text in plain if text != _PLAIN_WORDS["a valid integer"]]
    return f"{key}: found {_value_text(found)}, expected {' or '.join(plain)}."


_PLAIN_WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid tuple": "a list",
    "a valid string": "text",
    "a valid boolean": "true or false",
}


def _nearest_key(path: KeyPath) -> str:
    """Suggest a key for an unknown one: the same word elsewhere, a similar word here, or all keys of the section."""
    word, section = str(path[-1]), path[:-1]
    elsewhere = sorted(_paths_ending_in(word), key=lambda path: path[: len(section)] != section)
    if elsewhere:
        return f"Did you mean '{dotted(elsewhere[0])}'?"
    known = _known_keys(section)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"Did you mean '{dotted((*section, close[0]))}'?"
    return f"Known here: {', '.join(known)}."


def _example_of(path: KeyPath) -> str:
    example = {"model": "torchvision/mobilenet_v2", "data": "digits"}[str(path[0])]  # the two keys without a default
    return f"for example `{path[0]}: {{name: {example}}}`."


def _value_text(value: Any) -> str:
    names = {"dict": "a section of keys", "list": "a list"}
    if value is None:
        return "nothing (null)"
    return names.get(type(value).__name__) or clipped(repr(value) if isinstance(value, str) else dump(value).split()[0])


def _value_at(value: Any, path: KeyPath) -> Any:
    for part in path:
        value = value[part]
    return value


def _section_at(path: KeyPath) -> type[BaseModel]:
    """Find the class of an existing section."""
    section: type[BaseModel] = Recipe
    for part in path:
        section = _sections(section)[str(part)]
    return section


def _sections(section: type[BaseModel]) -> Mapping[str, type[BaseModel]]:
    """List the sections directly inside a section, by key."""
    below: dict[str, type[BaseModel]] = {}
    for key, field in section.model_fields.items():
        members = (field.annotation, *get_args(field.annotation))
        for kind in members:
            # Python 3.10 takes `list[str]` for a type, but not for one with subclasses.
            if get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, BaseModel):
                below[key] = kind
    return below


def _known_keys(path: KeyPath) -> list[str]:
    return list(_section_at(path).model_fields)


def _choices(path: KeyPath) -> list[str]:
    annotation = _section_at(path[:-1]).model_fields[str(path[-1])].annotation
    return [str(choice) for choice in get_args(annotation)]


def _paths_ending_in(key: str, section: type[BaseModel] = Recipe, path: KeyPath = ()) -> list[KeyPath]:
    """List every path that ends in `key`: a user who writes `steps` at the top means `prune.steps`."""
    paths: list[KeyPath] = [(*path, key)] if key in section.model_fields else []
    for name, below in _sections(section).items():
        paths += _paths_ending_in(key, below, (*path, name))
    return paths
