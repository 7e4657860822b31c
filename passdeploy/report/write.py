"""Writing of the report into its run: `report.html` and `report.md`."""

from __future__ import annotations

from pathlib import Path

from passdeploy.errors import CorruptArtifact
from passdeploy.report.page import render_html, render_markdown
from passdeploy.report.run_facts import read_run
from passdeploy.runs.folder import RunFolder
from passdeploy.runtime.events import Listener, Warned, silent

HTML, MARKDOWN = "report.html", "report.md"


def write_report(folder: RunFolder) -> tuple[Path, Path]:
    """Write the report of a finished run into its folder, as HTML and as Markdown, and return both paths.

    Raises:
        RunError: the run is not finished, or was opened for reading.
        CorruptArtifact: a file of the run is not what was written.
    """
    facts = read_run(folder)
    return (
        folder.write_text(HTML, render_html(facts), kind="report"),
        folder.write_text(MARKDOWN, render_markdown(facts), kind="report"),
    )


def renew_report(folder: RunFolder, listener: Listener = silent) -> None:
    """Write the report anew where the run is finished, after something was added to it.

    Where a file that it shows was damaged, that is warned of: what was added stays.
    """
    if not folder.has("summary.json"):
        return
    try:
        write_report(folder)
    except CorruptArtifact as error:
        listener(Warned(f"the report of the run is still the one of before: {error}"))
