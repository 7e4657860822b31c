"""What a shell completes: recipes, backends, precisions and devices, without importing torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from passdeploy.cli import main


def completed(*words: str) -> list[str]:
    """Return what the shell offers for the last of these words."""
    found = ShellComplete(main, {}, "passdeploy", "_PASSDEPLOY_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return [one.value for one in found if one.type == "plain"]


def test_recipes_are_completed_ours_and_those_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mobile-mine.yaml").write_text("")
    expected = ["mobile-mine.yaml", "mobilenetv2.yaml"]
    for words in (("prune", "--recipe"), ("prune",), ("check",), ("recipes", "show"), ("profile", "--recipe")):
        assert completed(*words, "mobile")[:2] == expected, words
    assert completed("prune", "/nowhere/m") == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("profile", "--backend", "ort-"), ["ort-cuda", "ort-trt"]),
        (("profile", "--backend", "torch,t"), ["torch,tensorrt", "torch,torch-trt"]),
        (("bench", "--precision", "fp32,"), [f"fp32,{name}" for name in ("fp16", "bf16", "int8", "fp8")]),
        (("export", "--precision", "b"), ["bf16"]),
        (("profile", "--precision", "i"), ["int8"]),
        (("prune", "--device", "c"), ["cpu", "cuda"]),
        (("prune", "--track", "m"), ["mlflow"]),
    ],
)
def test_names_in_lists_are_completed(words: tuple[str, ...], expected: list[str]):
    assert completed(*words) == expected


def test_a_shell_gets_them_without_torch():
    code = (
        "import sys; from passdeploy.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    typed = {"COMP_WORDS": "passdeploy prune resnet20", "COMP_CWORD": "2", "_PASSDEPLOY_COMPLETE": "bash_complete"}
    environment = {**os.environ, **typed}
    command = [sys.executable, "-c", f"import sys; sys.argv[0] = 'passdeploy'\n{code}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert any(line.startswith("plain,resnet20") for line in done.stdout.splitlines()), done.stdout + done.stderr
    assert done.stderr.strip().endswith("False")
