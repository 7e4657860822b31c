"""Trackers get every step of a run, under the name of its stage, and are closed however the run ends."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from passdeploy.errors import MissingExtra
from passdeploy.runtime.events import StageFinished, Step
from passdeploy.runtime.trackers import tracking


class Calls:
    """Records every call of every method."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> None:
            self.made.append((name, *arguments, *options.values()))

        return call


def test_mlflow_gets_parameters_metrics_and_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = Calls()
    monkeypatch.setitem(sys.modules, "mlflow", calls)  # type: ignore[arg-type]

    def fail() -> None:
        with tracking(("mlflow",), tmp_path, "digits-0001", {"seed": 0}) as tell:
            tell(Step("learn", 3, 10, {"loss": 0.5, "budget": float("nan")}))
            tell(StageFinished("learn", "50 % of the MACs", 1.0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert calls.made == [
        ("start_run", "digits-0001"),
        ("log_params", {"seed": 0}),
        ("log_metrics", {"learn.loss": 0.5}, 3),
        ("set_tag", "learn", "50 % of the MACs"),
        ("end_run",),
    ]


def test_tensorboard_writes_into_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls, places = Calls(), list[str]()
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda place: (places.append(place), calls)[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with tracking(("tensorboard",), tmp_path, "digits-0001", {}) as tell:
        tell(Step("dense", 1, 10, {"loss": 0.5}))
    assert places == [str(tmp_path / "tensorboard")]
    assert calls.made == [("add_scalar", "dense/loss", 0.5, 1), ("close",)]


def test_a_tracker_that_is_not_installed_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)  # type: ignore[arg-type]
    with pytest.raises(MissingExtra, match=r"passdeploy\[mlflow\]"), tracking(("mlflow",), tmp_path, "x", {}):
        pass
    with tracking((), tmp_path, "x", {}) as tell:
        tell(Step("dense", 1, 10, {"loss": 0.5}))
