"""Writes `recipe-reference.md` from the schema and `api.md` from the public names: `python docs/reference.py`."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def recipe_reference() -> str:
    """Describe every key of a recipe: name, kind, default and meaning, a table for each section."""
    from passdeploy.recipe import recipe_schema

    schema = recipe_schema()
    parts = [
        "# Keys of a recipe",
        "Made from the schema, which `passdeploy recipes schema` prints and `recipes/recipe.schema.json` holds. "
        "`--set a.b=c` changes a key for one run. Keys that are left out have the defaults below.",
    ]
    parts += _section("", schema, schema["$defs"])
    return "\n\n".join(parts) + "\n"


def _section(path: str, section: dict[str, Any], defs: dict[str, Any]) -> list[str]:
    """Write the table of a section, and those of the sections in it."""
    rows, below = ["| key | kind | default | meaning |", "|---|---|---|---|"], list[str]()
    for key, field in section["properties"].items():
        inner = next((defs[name] for name in _references(field) if "properties" in defs[name]), None)
        name = f"{path}.{key}" if path else key
        meaning = " ".join(str(field.get("description", "")).split()).replace("|", "\\|")
        if inner is None:
            rows.append(f"| `{key}` | {_kind(field, defs)} | `{json.dumps(field.get('default'))}` | {meaning} |")
            continue
        rows.append(f"| `{key}` | section | [below](#{name.replace('.', '').replace('_', '_')}) | {meaning} |")
        below += _section(name, inner, defs)
    return [f"## {path or 'recipe'}", "\n".join(rows), *below]


def _references(field: dict[str, Any]) -> list[str]:
    """List the definitions that a field refers to."""
    options = [field, *field.get("anyOf", ()), *field.get("allOf", ())]
    return [option["$ref"].rpartition("/")[2] for option in options if "$ref" in option]


def _kind(field: dict[str, Any], defs: dict[str, Any]) -> str:
    """Name what a value may be."""
    if names := _references(field):
        return " or ".join(_kind(defs[name], defs) for name in names)
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        return " or ".join(_kind(option, defs) for option in field["anyOf"])
    names = {"integer": "whole number", "string": "text", "boolean": "true or false", "array": "list", "null": "null"}
    return names.get(str(field.get("type")), str(field.get("type", "any")))


def api_reference() -> str:
    """Describe every public name: its signature and its docstring."""
    import passdeploy

    parts = ["# Python API", "`import passdeploy as pd`. The commands are a thin shell over these names."]
    for name in sorted(passdeploy.__all__, key=str.lower):
        value = getattr(passdeploy, name)
        if not callable(value):
            continue
        signature = re.sub(r"<function (\w+) at \w+>", r"\1", str(inspect.signature(value)).replace("'", ""))
        text = inspect.cleandoc(value.__doc__ or "")
        parts += [f"## {name}", f"```python\n{name}{signature}\n```", f"```text\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


PAGES = {"recipe-reference.md": recipe_reference, "api.md": api_reference}

if __name__ == "__main__":
    for page, write in PAGES.items():
        (HERE / page).write_text(write(), encoding="utf-8")
