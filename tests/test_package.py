"""The package as a user gets it: imports without optional packages, the wheel, and the commands of the README."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib.metadata import metadata
from pathlib import Path

import pytest

import passdeploy

ROOT = Path(__file__).parents[1]


def test_every_public_name_can_be_had():
    for name in passdeploy.__all__:
        assert getattr(passdeploy, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = passdeploy.nothing


def test_a_public_name_stays_what_it_is_whatever_is_imported():
    code = (
        "import passdeploy.slimming.slim, passdeploy.runs.folder, passdeploy.channels.plan\n"
        "import passdeploy.tracing.counts, passdeploy.commands.prune\n"
        "import passdeploy as pd\n"
        "print([n for n in pd.__all__ if n != '__version__' and not callable(getattr(pd, n))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_loaders_can_be_imported_from_their_folders():
    from passdeploy.data import load_data
    from passdeploy.models import build_model

    assert load_data.__module__ == "passdeploy.data.splits"
    assert build_model.__module__ == "passdeploy.models.build"
    with pytest.raises(ImportError, match="nothing"):
        from passdeploy.data import nothing  # noqa: F401


def test_the_core_works_without_any_optional_package():
    code = (
        "import sys\n"
        "for name in 'tensorrt tensorrt_rtx_bindings torch_tensorrt onnx onnxruntime timm sklearn'.split():\n"
        "    sys.modules[name] = None\n"
        "import torch, passdeploy as pd\n"
        "net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 2, 1))\n"
        "groups = pd.find_groups(net, torch.zeros(1, 3, 4, 4))\n"
        "print(pd.slim(net, groups, pd.Plan({'0': (1, 2)}))[0].out_channels)\n"
        "from passdeploy.cli import main\n"
        "main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("2\n")
    assert "Usage:" in done.stdout


def test_the_wheel_holds_the_package_and_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from hatchling.build import build_wheel

    monkeypatch.chdir(ROOT)
    wheel = tmp_path / build_wheel(str(tmp_path))
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"passdeploy/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert {"passdeploy/cli.py", "passdeploy/py.typed", *recipes} <= names
    assert {"passdeploy/recipes/recipe.schema.json", "passdeploy/report/templates/run.html.j2"} <= names
    assert all(name.startswith(("passdeploy/", "passdeploy-")) for name in names)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "from passdeploy import recipe; print(recipe.__file__, recipe.load_recipe('mobilenetv2').name)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
    )
    assert done.stdout.split()[0].startswith(str(tmp_path / "site"))
    assert done.stdout.split()[-1] == "mobilenetv2-digits"


def test_make_demo_runs_the_commands_of_the_readme():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    shown = re.findall(r"^    (passdeploy .*)$", readme, re.MULTILINE)
    run = re.findall(r"^\t\$\(BIN\)/(passdeploy .*)$", makefile, re.MULTILINE)
    assert shown == run
    assert len(run) == 3


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_an_image_is_built_from_what_there_is(name: str):
    text, ignored = (ROOT / name).read_text(), (ROOT / ".dockerignore").read_text().split()
    copied = [source for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for source in line.split()[:-1]]
    assert "passdeploy" in copied
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    extras = metadata("passdeploy").get_all("Provides-Extra") or []
    installed = re.findall(r'"\.\[(.*)\]"', text)
    assert len(installed) == 1
    assert set(installed[0].split(",")) <= set(extras)
