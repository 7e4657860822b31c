"""TensorBoard and MLflow as they are installed: what they were passed on can be read again."""

from __future__ import annotations

from pathlib import Path

import pytest

from passdeploy.commands.resume import leaves
from passdeploy.recipe import load_recipe
from passdeploy.runtime.events import StageFinished, Step
from passdeploy.runtime.trackers import tracking

# Both packages warn of themselves and of what they import.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_tensorboard_reads_what_was_written(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracking(("tensorboard",), tmp_path, "tiny-0001", {}) as tell:
        for step in (1, 2):
            tell(Step("dense", step, 2, {"loss": 1 / step, "lr": float("nan")}))
        tell(StageFinished("dense", "top-1 98.00 %", 1.0))
    written = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in written.Scalars("dense/loss")] == [(1, 1.0), (2, 0.5)]
    assert "dense/text_summary" in written.Tags()["tensors"]


def test_mlflow_reads_the_whole_recipe_and_how_a_run_ended(
    tmp_path: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
):
    mlflow = pytest.importorskip("mlflow", reason="extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())  # a folder that is there already has no experiment in it
    facts = dict(leaves(load_recipe(tiny_recipe, [f"prune.exclude={['a' * 500] * 20}"]).model_dump(mode="json")))
    assert len(facts) > 50
    with tracking(("mlflow",), tmp_path, "tiny-0001", facts) as tell:
        tell(Step("learn", 3, 10, {"loss": 0.5, "budget": float("nan")}))
        tell(StageFinished("learn", "50 % of the MACs", 1.0))
    with pytest.raises(KeyboardInterrupt), tracking(("mlflow",), tmp_path, "tiny-0002", {"seed": 0}):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="lost"), tracking(("mlflow",), tmp_path, "tiny-0003", {"seed": 0}):
        raise ValueError("lost")
    found = {run.info.run_name: run for run in mlflow.MlflowClient().search_runs(["0"])}
    assert {name: run.info.status for name, run in found.items()} == {
        "tiny-0001": "FINISHED",
        "tiny-0002": "KILLED",
        "tiny-0003": "FAILED",
    }
    first = found["tiny-0001"].data
    assert first.metrics == {"learn.loss": 0.5}
    assert first.params["prune.target.macs"] == "0.6"
    assert first.params.keys() == facts.keys()
    assert first.tags["learn"] == "50 % of the MACs"
