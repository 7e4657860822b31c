"""Tests of which Torch-TensorRT is taken, and of the one clear error for each that is not."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from passdeploy.commands import doctor
from passdeploy.errors import CorruptArtifact, MissingError
from passdeploy.export import torch_trt_program, torch_trt_release, trt_api
from passdeploy.export.torch_trt_program import program_path_for, read_label, require_loadable
from passdeploy.export.torch_trt_release import VERSION_MATRIX, installed_flavour, load_torch_trt
from passdeploy.runtime import cuda_driver
from passdeploy.runtime.cuda_driver import Driver

WHOLE = {
    "torch": "2.14.1+cu130",
    "torch-tensorrt": "2.14.0",
    "tensorrt-cu13-bindings": "11.1",
    "tensorrt-cu13-libs": "11.1",
}


def without(*names: str) -> dict[str, str]:
    return {name: version for name, version in WHOLE.items() if name not in names}


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "probe_driver", lambda: Driver((13, 2), ("Imaginary GPU",)))


def install(monkeypatch: pytest.MonkeyPatch, packages: Mapping[str, str], module: Any = None) -> None:
    def importing(name: str) -> Any:
        if isinstance(module, BaseException):
            raise module
        assert module is not None, "it was imported"
        return module

    for place in (torch_trt_release, torch_trt_program, doctor):
        monkeypatch.setattr(place, "package_versions", lambda: packages)
    monkeypatch.setattr(torch_trt_release, "import_module", importing)

    def version(name: str) -> str:
        if name not in packages:
            raise PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(trt_api, "version", version)


def refusal(flavour: Any = None) -> str:
    with pytest.raises(MissingError) as caught:
        load_torch_trt(flavour)
    assert caught.value.exit_code == 3
    assert str(caught.value).count("\n") < 3
    return str(caught.value)


def test_without_a_driver_it_is_not_even_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_driver, "probe_driver", lambda: None)
    install(monkeypatch, WHOLE)
    assert "passdeploy export --torch-trt" in refusal()


def test_the_flavour_is_that_of_the_package(monkeypatch: pytest.MonkeyPatch):
    module = object()
    install(monkeypatch, WHOLE, module)
    assert load_torch_trt() == (module, "tensorrt")
    assert doctor._installed_torch_tensorrt() == "Torch-TensorRT 2.14.0"
    install(monkeypatch, {"torch": "2.14.1", "torch-tensorrt-rtx": "2.14.0"}, module)
    assert load_torch_trt() == load_torch_trt("rtx") == (module, "rtx")
    assert doctor._installed_torch_tensorrt() == "Torch-TensorRT for RTX 2.14.0"
    install(monkeypatch, {"torch": "2.14.1"})
    assert installed_flavour() is None
    assert doctor._installed_torch_tensorrt() == "none"


@pytest.mark.parametrize(
    ("packages", "flavour", "words"),
    [
        ({"torch": "2.14.0"}, None, "Torch-TensorRT is not installed.\n"),
        ({"torch": "2.14.0"}, "rtx", "passdeploy[torch-trt-rtx]"),
        (WHOLE, "rtx", "asked was Torch-TensorRT for RTX, installed is Torch-TensorRT 2.14.0."),
        (WHOLE | {"torch-tensorrt-rtx": "2.14.0"}, None, "torch-tensorrt and torch-tensorrt-rtx are both installed"),
        (
            WHOLE | {"torch": "2.15.0"},
            None,
            "torch 2.15.0 and torch-tensorrt 2.14.0 were not made for each other.\n"
            "For torch 2.15: no torch-tensorrt is made for it; torch-tensorrt 2.14 takes torch 2.14.\n",
        ),
        (
            WHOLE | {"torch": "2.12.1"},
            None,
            "For torch 2.12: torch-tensorrt 2.12, tensorrt 10.16; torch-tensorrt 2.14 takes torch 2.14.\n",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_the_import(
    packages: dict[str, str], flavour: Any, words: str, monkeypatch: pytest.MonkeyPatch
):
    install(monkeypatch, packages)
    assert words in refusal(flavour)


@pytest.mark.parametrize(
    ("packages", "error", "words"),
    [
        (
            WHOLE,
            OSError("libtorchtrt.so: undefined symbol"),
            "does not load: libtorchtrt.so: undefined symbol\nHere: torch 2.14.1",
        ),
        (
            WHOLE,
            RuntimeError("Found no NVIDIA driver"),
            "Made for each other: torch 2.14, torch-tensorrt 2.14, tensorrt 11.1.",
        ),
        (
            without("tensorrt-cu13-libs"),
            Exception("import error when try to import _TensorRTProxyModule"),
            "does not load: tensorrt-cu13-bindings 11.1 is installed without tensorrt-cu13-libs.",
        ),
        (
            without("tensorrt-cu13-bindings"),
            ModuleNotFoundError("No module named 'tensorrt'"),
            "does not load: tensorrt-cu13-libs 11.1 is installed without tensorrt-cu13-bindings.",
        ),
    ],
)
def test_whatever_its_import_raises_is_explained(
    packages: dict[str, str], error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
):
    install(monkeypatch, packages, error)
    assert words in refusal()


def test_the_matrix_has_every_pair_from_torch_2_10_on():
    assert [row["torch"] for row in VERSION_MATRIX] == ["2.14", "2.13", "2.12", "2.11", "2.10"]
    assert VERSION_MATRIX[3] == {
        "torch": "2.11",
        "torch-tensorrt": "2.11",
        "tensorrt": "10.15",
        "torch-tensorrt-rtx": "2.11",
        "tensorrt-rtx": "1.3",
    }
    assert "torch-tensorrt-rtx" not in VERSION_MATRIX[-1]


def labelled(path: Path, label: Mapping[str, Any] | None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/archive_format", "pt2")
        if label is not None:
            archive.writestr("model/extra/passdeploy.json", json.dumps(label))
    return path


def test_a_program_is_loaded_with_what_compiled_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch, WHOLE)
    ours = {"flavour": "tensorrt", "versions": {"torch-tensorrt": "2.14.0"}}
    path = labelled(tmp_path / "model.pt2", ours)
    assert read_label(path) == ours
    require_loadable(path)
    require_loadable(labelled(tmp_path / "torch.pt2", None))  # a program of PyTorch, or of another tool
    install(monkeypatch, {"torch": "2.13.0", "torch-tensorrt": "2.13.0"})
    with pytest.raises(MissingError, match=r"with Torch-TensorRT 2\.14\.0; installed is Torch-TensorRT 2\.13\.0"):
        require_loadable(path)
    install(monkeypatch, {"torch": "2.14.0", "torch-tensorrt-rtx": "2.14.0"})
    with pytest.raises(MissingError, match=r"installed is Torch-TensorRT for RTX 2\.14\.0\.\n.*export --torch-trt"):
        require_loadable(path)
    (tmp_path / "cut.pt2").write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CorruptArtifact, match=r"cut\.pt2 is not a program"):
        require_loadable(tmp_path / "cut.pt2")


def test_the_flavours_have_files_of_their_own():
    assert program_path_for(Path("x"), "model-fp16", "tensorrt").name == "model-fp16.pt2"
    assert program_path_for(Path("x"), "model-fp16", "rtx").name == "model-fp16-rtx.pt2"
