"""Trackers get every step of a run, under the name of its stage, and are closed however the run ends."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from passdeploy.errors import MissingError, MissingExtra, UsageError
from passdeploy.runtime.events import StageFinished, Step, Warned
from passdeploy.runtime.trackers import require_trackers, tracking


class Calls:
    """Records every call of every method."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Calls:
            self.made.append((name, *arguments, *options.values()))
            return self

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
        *(("MlflowClient",), ("search_experiments", 1)),
        ("start_run", "digits-0001"),
        ("log_params", {"seed": 0}),
        ("log_metrics", {"learn.loss": 0.5}, 3),
        ("set_tag", "learn", "50 % of the MACs"),
        ("end_run", "KILLED"),
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


def test_a_tracker_that_fails_ends_nothing_but_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Lost(Calls):
        def log_metrics(self, *_: Any, **__: Any) -> None:
            raise ConnectionError("the server is gone\nand more")

    monkeypatch.setitem(sys.modules, "mlflow", Lost())  # type: ignore[arg-type]
    warned: list[object] = []
    with tracking(("mlflow",), tmp_path, "digits-0001", {}, tell=warned.append) as tell:
        for step in (1, 2):
            tell(Step("dense", step, 2, {"loss": 0.5}))
    assert warned == [Warned("MLflow gets nothing more of this run, which goes on: the server is gone")]


def test_a_place_that_mlflow_cannot_write_to_is_known_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Nowhere(Calls):
        def MlflowClient(self) -> None:
            raise ValueError("unsupported URI")

        def get_tracking_uri(self) -> str:
            return "sqlite:///mlflow.db"

    monkeypatch.setitem(sys.modules, "mlflow", Nowhere())  # type: ignore[arg-type]
    with pytest.raises(MissingError, match=r"sqlite:///mlflow\.db: unsupported URI\nSet MLFLOW_TRACKING_URI"):
        require_trackers(("mlflow",))


def test_a_tracker_that_nobody_knows_is_an_error_that_names_the_known_ones():
    with pytest.raises(UsageError, match=r"there is no tracker 'wandb'\.\nKnown: tensorboard, mlflow\."):
        require_trackers(("tensorboard", "wandb"))


def test_trackers_that_were_opened_are_closed_where_another_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Full(Calls):
        def log_params(self, _: Any) -> None:
            raise OSError("No space left on device")

    mlflow, writer = Full(), Calls()
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda place: writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with pytest.raises(MissingError, match="No space left"), tracking(("tensorboard", "mlflow"), tmp_path, "x", {}):
        pass
    assert writer.made == [("close",)]
    assert mlflow.made[-1] == ("end_run", "FAILED")


def test_a_run_that_mlflow_does_not_start_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Full(Calls):
        def start_run(self, **_: Any) -> None:
            raise OSError("No space left on device")

        def get_tracking_uri(self) -> str:
            return "file:///data/mlruns"

    monkeypatch.setitem(sys.modules, "mlflow", Full())  # type: ignore[arg-type]
    with (
        pytest.raises(MissingError, match="cannot start a run at file:///data/mlruns: No space left"),
        tracking(("mlflow",), tmp_path, "digits-0001", {}),
    ):
        pass


def test_a_tracker_that_cannot_be_closed_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Gone(Calls):
        def end_run(self, _: str) -> None:
            raise ConnectionError("the server is gone")

    monkeypatch.setitem(sys.modules, "mlflow", Gone())  # type: ignore[arg-type]
    warned: list[object] = []
    with tracking(("mlflow",), tmp_path, "digits-0001", {}, tell=warned.append):
        pass
    assert warned == [Warned("a tracker could not be closed: the server is gone")]
