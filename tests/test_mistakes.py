"""Mistakes of users, and the answers to them as snapshots: three lines at most, with the key, the place and the fix.

`UPDATE_MISTAKES=1 pytest tests/test_mistakes.py` writes the answers of today into mistakes.yaml, to be read first.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command_line import call_command
from tests.report.conftest import MakeRun, make_run  # noqa: F401 - a fixture

SNAPSHOTS = Path(__file__).parent / "mistakes.yaml"
MISTAKES: list[dict[str, Any]] = yaml.safe_load(SNAPSHOTS.read_text(encoding="utf-8"))
GOOD = "version: 1\nmodel: {name: passdeploy/resnet20_cifar}\ndata: {name: digits, image_size: 32}\n"
FILES = {
    "good.yaml": GOOD,
    "two.yaml": GOOD + "epochs: 3\nprune: {stepz: 3, target: {mac: 0.5}}\n",
    "twice.yaml": GOOD + "seed: 1\nseed: 2\n",
    "tab.yaml": GOOD + "prune:\n\tsteps: 3\n",
    "empty.yaml": "",
    "list.yaml": "- a\n- b\n",
    "nomodel.yaml": "data: {name: digits}\n",
    "notes.txt": "some text",
    "broken.onnx": "not an ONNX file",
    "broken.engine": "not an engine",
    "broken.safetensors": "not tensors",
}


@pytest.fixture
def project(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A folder with recipes, files that are not what they say, and runs that are damaged."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    lost = make_run("lost")
    (lost / "manifest.json").unlink()
    damaged = make_run("damaged")
    (damaged / "summary.json").write_text("{}")
    (tmp_path / "runs" / "link").symlink_to("../photos")
    (tmp_path / "photos" / "one" / "two").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def answer_to(command: str, project: Path) -> tuple[int, str]:
    """Return the exit code of a command and its error, without what depends on this machine."""
    called = call_command(*shlex.split(command))
    if called.exception is not None and not isinstance(called.exception, SystemExit):
        return 1, f"{type(called.exception).__name__}: {called.exception}"
    text = called.stderr.replace(str(project), "HERE")
    if text.rstrip().splitlines()[-1].startswith("Error: "):
        return called.exit_code, "Error: "  # click's own words, which differ from release to release
    found = re.search(r"^(error: |Error: )", text, re.MULTILINE)
    return called.exit_code, text[found.start() :].rstrip() if found else text.rstrip()


def test_mistakes_are_answered_in_three_lines_as_before(project: Path):
    answers: list[dict[str, Any]] = []
    for one in MISTAKES:
        exit_code, answer = answer_to(str(one["command"]), project)
        answers.append({"command": one["command"], "exit": exit_code, "answer": answer})
    if os.environ.get("UPDATE_MISTAKES"):
        text = yaml.safe_dump(answers, sort_keys=False, allow_unicode=True, width=1000, default_style=None)
        SNAPSHOTS.write_text(text, encoding="utf-8")
        return
    wrong = [
        one
        for one in answers
        if one["exit"] in (0, 1)
        or not str(one["answer"]).lower().startswith("error: ")
        or len(str(one["answer"]).splitlines()) > 3
    ]
    assert wrong == []
    assert answers == MISTAKES
    assert len(answers) >= 60


def test_a_full_disk_is_no_mistake_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import errno

    from passdeploy.errors import DiskFullError
    from passdeploy.runs import folder as module
    from passdeploy.runs.folder import RunFolder

    with RunFolder.create(tmp_path, "full") as folder:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(module, "write_atomically", full)
        with pytest.raises(DiskFullError, match="No space left on device") as caught:
            folder.mark_done("dense")
    assert caught.value.exit_code == 3
    assert len(str(caught.value).splitlines()) <= 3
