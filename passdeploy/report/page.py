"""The page of one run: what its template shows, as HTML and as Markdown."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from passdeploy.display.bench_table import bench_table
from passdeploy.display.changes import widths_table
from passdeploy.display.listing import Listing
from passdeploy.display.tables import group_table, summary_table
from passdeploy.display.units import quantity, three_digits
from passdeploy.report.page_parts import style_sheet, templates
from passdeploy.report.run_facts import RunFacts
from passdeploy.report.sections import (
    COUNTED,
    about_numbers,
    classes_grid,
    environment_of,
    exports_of,
    sections_of,
    summary_with_groups,
)
from passdeploy.report.verdict import Todo, judge


def render_html(facts: RunFacts) -> str:
    """Write the report of a run as one HTML page that needs nothing else."""
    template = templates().get_template("run.html.j2")
    return _without_blank_lines(template.render(style=style_sheet(), **_content(facts)))


def render_markdown(facts: RunFacts) -> str:
    """Write the report of a run as Markdown, without its charts."""
    verdict, summary = judge(facts), facts.summary
    parts = [f"# {facts.name}", f"**{verdict.answer}.** {verdict.reason}"]
    parts += ["\n".join(f"- {tile.label}: {tile.value} ({tile.detail})" for tile in verdict.tiles)]
    parts += ["## What to do", "\n".join(map(_todo_line, verdict.todo))]
    parts += ["## How sure", "\n".join(f"- {_plain(text)}" for text in verdict.sure)]
    parts += ["## Dense against slim", about_numbers(facts), summary_table(summary, facts.rows).markdown()]
    changes = widths_table(summary_with_groups(facts), None)
    if changes is not None:
        parts += ["## What was cut", replace(changes, title="").markdown()]
    if layers := facts.profile.get("groups"):
        parts += ["## Time by channel group", group_table(layers).markdown()]
    if facts.exports:
        parts += ["## Exported files", exports_of(facts).markdown()]
    if facts.bench:
        parts += ["## Every format and precision", bench_table(facts.bench).markdown()]
    if classes := classes_grid(facts):
        parts += [
            "## Images",
            Listing(classes.headings, tuple(tuple(map(str, row)) for row in classes.rows)).markdown(),
        ]
    parts += ["## Environment", environment_of(facts).markdown()]
    parts += ["## How to reproduce", "```sh\n" + "\n".join(_commands(facts)) + "\n```"]
    parts += ["The recipe, with every default:", f"```yaml\n{facts.recipe_text.rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _content(facts: RunFacts) -> dict[str, Any]:
    """Collect what the template shows."""
    verdict = judge(facts)
    return {
        "title": f"{facts.name}: {facts.summary['model']}",
        "facts": facts,
        "verdict": verdict,
        "subtitle": _subtitle(facts),
        "sections": sections_of(facts),
        "commands": _commands(facts),
    }


def _subtitle(facts: RunFacts) -> str:
    what = f"{facts.summary['model']} on {facts.recipe.data.name}"
    if facts.recipe.prune.takes_plan:
        return f"{what}, pruned by the plan of {Path(str(facts.recipe.prune.from_run)).name}"
    kind, value = facts.recipe.prune.target.kind, facts.recipe.prune.target.value
    if kind == "latency_ms":
        asked = f"{three_digits(value)} ms"
    else:
        asked = f"{100 * value:.3g} % of the {COUNTED[kind]}" if value <= 1 else f"{quantity(value)} {COUNTED[kind]}"
    return f"{what}, pruned by {facts.summary['method']} to {asked}"


def _commands(facts: RunFacts) -> list[str]:
    """Return the commands that make the same run again."""
    versions = facts.summary.get("versions") or {}
    pins = [f"{name}=={versions[name]}" for name in ("passdeploy", "torch", "torchvision") if versions.get(name)]
    recipe = quote(str(facts.shown_path / "recipe.resolved.yaml"))
    device = (facts.summary.get("environment") or {}).get("device", "auto")
    allowed = " --allow-code" if ":" in facts.recipe.model.name else ""
    return [f"pip install {' '.join(pins)}", f"passdeploy prune --recipe {recipe} --device {device}{allowed}"]


def _todo_line(todo: Todo) -> str:
    """Write what to do as an item of a list in Markdown."""
    return f"- {todo.text} {', then '.join(f'`{command}`' for command in todo.commands)}".rstrip()


def _plain(text: str) -> str:
    return text.replace("\n", " ")


def _without_blank_lines(text: str) -> str:
    return re.sub(r"\n\s*\n", "\n", text)
