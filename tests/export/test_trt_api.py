"""Tests of importing TensorRT: a missing package, driver or library, and unsupported releases, with stand-ins."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest

from passdeploy.errors import MissingError, UsageError
from passdeploy.export import load_trt, trt_api
from passdeploy.runtime import cuda_driver
from passdeploy.runtime.cuda_driver import Driver

GPU = Driver((13, 2), ("Imaginary GPU",))


def imported_as(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Make the import of TensorRT return `module`, or raise it if it is an exception."""

    def importing(name: str) -> Any:
        if isinstance(module, Exception):
            raise module
        return module

    monkeypatch.setattr(trt_api, "import_module", importing)


def refusal(flavour: Any = "tensorrt") -> str:
    with pytest.raises(MissingError) as caught:
        load_trt(flavour)
    assert caught.value.exit_code == 3
    assert str(caught.value).count("\n") < 3
    return str(caught.value)


class TestWhatIsMissing:
    @pytest.fixture(autouse=True)
    def a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda_driver, "probe_driver", lambda: GPU)

    def test_no_driver_is_found_before_tensorrt_is_touched(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(cuda_driver, "probe_driver", lambda: None)
        imported_as(monkeypatch, AssertionError("TensorRT was imported"))
        message = refusal()
        assert "--flavour rtx" in message
        assert "--bundle" in message

    def test_a_driver_without_a_visible_gpu(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(cuda_driver, "probe_driver", lambda: Driver((13, 0), ()))
        assert "CUDA_VISIBLE_DEVICES" in refusal()

    def test_a_driver_that_is_too_old(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(cuda_driver, "probe_driver", lambda: Driver((12, 8), ("Imaginary GPU",)))
        imported_as(monkeypatch, SimpleNamespace(__version__="11.4.0.106"))
        assert "runs CUDA up to 12.8; TensorRT 11.4.0.106 needs 13" in refusal()

    @pytest.mark.parametrize(("flavour", "extra"), [("tensorrt", "passdeploy[trt]"), ("rtx", "passdeploy[rtx]")])
    def test_not_installed_names_the_extra(self, flavour: str, extra: str, monkeypatch: pytest.MonkeyPatch):
        name = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx_bindings"}[flavour]
        imported_as(monkeypatch, ModuleNotFoundError(f"No module named {name!r}", name=name))
        assert extra in refusal(flavour)

    def test_bindings_without_their_libraries(self, monkeypatch: pytest.MonkeyPatch):
        text = "libnvinfer.so.11: cannot open shared object file: No such file or directory"
        imported_as(monkeypatch, ImportError(text))
        assert "libnvinfer.so.11" in refusal()

    @pytest.mark.parametrize(
        ("installed", "error", "words"),
        [
            (
                "tensorrt-cu12-bindings",
                ImportError("libnvinfer.so.10: cannot open shared object file"),
                "tensorrt-cu12-bindings 10.6 is installed without tensorrt-cu12-libs.",
            ),
            (
                "tensorrt-cu13-libs",
                ModuleNotFoundError("No module named 'tensorrt_bindings'", name="tensorrt_bindings"),
                "tensorrt-cu13-libs 10.6 is installed without tensorrt-cu13-bindings.",
            ),
            (  # on a Jetson, where the libraries come with the system
                "tensorrt",
                ImportError("libnvinfer.so.10: cannot open shared object file"),
                "LD_LIBRARY_PATH",
            ),
        ],
    )
    def test_one_half_without_the_other_is_named(
        self, installed: str, error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
    ):
        def version(name: str) -> str:
            if name != installed:
                raise PackageNotFoundError(name)
            return "10.6"

        monkeypatch.setattr(trt_api, "version", version)
        imported_as(monkeypatch, error)
        assert words in refusal()

    @pytest.mark.parametrize("version", ["10.2.0.19", "12.0.0.1"])
    def test_a_release_that_is_not_supported(self, version: str, monkeypatch: pytest.MonkeyPatch):
        imported_as(monkeypatch, SimpleNamespace(__version__=version))
        assert f"found TensorRT {version}, supported is >=10.3,<12" in refusal()

    def test_a_supported_release_is_handed_out(self, monkeypatch: pytest.MonkeyPatch):
        module = SimpleNamespace(__version__="10.16.1.11")
        imported_as(monkeypatch, module)
        assert load_trt("tensorrt") is module


def test_an_unknown_flavour_lists_the_known_ones():
    with pytest.raises(UsageError, match="there are tensorrt and rtx"):
        load_trt("vanilla")  # type: ignore[arg-type]


def test_the_driver_probe_answers_on_this_machine_without_raising():
    driver = cuda_driver.probe_driver()
    assert driver is None or driver.cuda > (0, 0)
