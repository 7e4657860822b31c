"""Forecast of the time that a run will take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from passdeploy.commands.forecast import forecast
from passdeploy.commands.prepare import Prepared, prepare
from passdeploy.display.check_report import run_time_line
from passdeploy.recipe import load_recipe

CPU = torch.device("cpu")


def prepared(recipe: Path, *overrides: str) -> Prepared:
    return prepare(load_recipe(recipe, overrides))


@pytest.fixture
def a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a step to take 0.1 s an image. The tiny recipe has 48 images to train and 16 to test, in batches of 16."""
    monkeypatch.setattr("passdeploy.commands.forecast._seconds_per_image", lambda *_: 0.1)


def test_stages_take_their_steps_times_what_a_step_takes(tiny_recipe: Path, a_tenth: None):
    test, with_teacher = 16 * 0.1 / 3, 4 / 3
    assert forecast(prepared(tiny_recipe), CPU) == pytest.approx(
        {"dense": test + 2 * 4.8, "learn": 6 * 1.6 * with_teacher, "finetune": 2 * test + 2 * 4.8 * with_teacher}
    )


def test_what_is_left_out_takes_no_time(tiny_recipe: Path, a_tenth: None, tmp_path: Path):
    whole = forecast(prepared(tiny_recipe), CPU)
    plain = forecast(prepared(tiny_recipe, "prune.method=magnitude", "finetune.distill=null"), CPU)
    assert plain["learn"] == 0
    assert plain["finetune"] == pytest.approx(whole["finetune"] - 2 * 4.8 / 3)
    larger = forecast(prepared(tiny_recipe, "prune.batch_size=32", "prune.distill=null"), CPU)
    assert larger["learn"] == pytest.approx(6 * 3.2)
    all_of_them = forecast(prepared(tiny_recipe, "prune.batch_size=1000", "prune.distill=null"), CPU)
    assert all_of_them["learn"] == pytest.approx(6 * 4.8)
    half_a_pass = forecast(prepared(tiny_recipe, "prune.epochs=0.5", "prune.batch_size=8", "prune.distill=null"), CPU)
    assert half_a_pass["learn"] == pytest.approx(2.4)


def test_the_steps_that_are_timed_leave_the_network_as_it_was(tiny_recipe: Path):
    ready = prepared(tiny_recipe)
    before = {name: tensor.clone() for name, tensor in ready.dense.state_dict().items()}
    random_state = torch.get_rng_state()
    assert all(0 < seconds < 60 for seconds in forecast(ready, CPU).values())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not ready.dense.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in ready.dense.state_dict().items())


def test_stages_of_less_than_a_second_are_not_named():
    line = run_time_line({"dense": 0.2, "learn": 75.0, "finetune": 45.0})
    assert line == "a run takes about 2 min 0 s here (mask learning 1 min 15 s, fine-tuning 45 s)"
