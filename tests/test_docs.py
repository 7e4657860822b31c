"""The documentation: it builds without warnings, its references are of today, and its commands exist or run."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from passdeploy.cli import main
from tests.command_line import call_command

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>[^>]+) -->\n)?```sh\n(?P<text>.*?)```", re.DOTALL)


def reference_module() -> object:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs-material is not installed (extra docs)")
def test_the_site_builds_without_a_warning(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "index.html").is_file()


@pytest.mark.parametrize("page", ["recipe-reference.md", "api.md"])
def test_references_are_made_from_the_code_of_today(page: str):
    written = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert written == reference_module().PAGES[page](), "python docs/reference.py"  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_names_exists(page: Path):
    for name, options in re.findall(r"(?<!import )passdeploy ([a-z]+)((?: --[a-z-]+)*)", page.read_text()):
        command = main.commands.get(name)
        assert command is not None, name
        known = {one for parameter in command.params if isinstance(parameter, click.Option) for one in parameter.opts}
        known |= {one for parameter in command.params for one in parameter.secondary_opts}
        assert set(options.split()) <= known | {"--help"}, (name, options)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_commands_runs_or_says_what_it_needs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for block in _BLOCK.finditer(page.read_text()):
        if block["needs"]:
            continue
        for line in block["text"].strip().splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "passdeploy", f"{line}: say what it needs, <!-- needs: ... -->"
            assert call_command(*arguments).exit_code == 0, line


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
