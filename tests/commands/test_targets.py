"""Several budgets from one mask learning (`prune.targets`): one run each, which go on from snapshots."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from passdeploy.channels.plan import Plan
from passdeploy.cli_prune import _show_several
from passdeploy.commands import prune
from passdeploy.commands.forecast import _left_after
from passdeploy.display.output import Output
from passdeploy.errors import AccuracyError, RecipeError, RunError, UsageError
from passdeploy.recipe import PruneSpec, Recipe, load_recipe
from passdeploy.runs.folder import RunFolder
from passdeploy.runtime.events import Step
from tests.command_line import call_command

FILES = ("plan.json", "slim.safetensors", "dense.safetensors", "scores.safetensors")


@pytest.fixture(scope="module")
def several(tiny_run: prune.RunResult, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> prune.RunResult:
    """Runs for 60, 75 and 90 % of the multiply-adds; `tiny_run` is the one for 60 % alone."""
    weights = f"model.weights={tiny_run.path / 'dense.safetensors'}"
    out = tmp_path_factory.mktemp("several")
    return prune.run(tiny_recipe, out=out, overrides=[weights, "prune.targets=[0.75, 0.6, 0.9]"])


def kept(result: prune.RunResult) -> dict[str, set[int]]:
    plan = Plan.from_json(json.loads((result.path / "chosen.json").read_text()))
    return {name: set(channels) for name, channels in plan.kept.items()}


def test_every_budget_has_a_run_of_its_own_that_meets_it(several: prune.RunResult):
    runs = [*several.larger, several]
    assert [run.summary["budget"]["requested"] for run in runs] == [0.9, 0.75, 0.6]
    achieved = [run.summary["budget"]["achieved"] for run in runs]
    assert 0.9 >= achieved[0] > 0.75 >= achieved[1] > 0.6 >= achieved[2]
    assert [run.path.name for run in runs] == ["tiny-0002", "tiny-0003", "tiny-0001"]
    for run in runs:
        assert run.summary["equivalence"]["max_rel_error"] <= 1e-5
        assert run.summary["dense"] == several.summary["dense"]
    assert list(several.summary["seconds"]) == list(several.larger[0].summary["seconds"])


def test_learning_for_several_budgets_is_learning_for_the_smallest(several: prune.RunResult, tiny_run: prune.RunResult):
    for name in FILES:
        assert (several.path / name).read_bytes() == (tiny_run.path / name).read_bytes(), name


def test_what_a_larger_budget_keeps_includes_what_a_smaller_one_keeps(several: prune.RunResult):
    runs = [*several.larger, several]
    for larger, smaller in pairwise(runs):
        more, less = kept(larger), kept(smaller)
        assert all(less.get(name, channels) <= channels for name, channels in more.items())
        assert more != less


def test_larger_networks_start_with_the_weights_of_their_snapshot(several: prune.RunResult):
    dense = load_file(several.path / "dense.safetensors")
    first, later = (load_file(several.path / "snapshots" / f"{share}.safetensors") for share in (0.9, 0.75))
    name = "layer3.0.conv1.weight"
    assert torch.equal(first[f"weights.{name}"], dense[name])  # passed before the first step
    assert not torch.equal(later[f"weights.{name}"], dense[name])  # trained along until the budget passed
    facts = [json.loads((several.path / "snapshots" / f"{share}.json").read_text()) for share in (0.9, 0.75)]
    assert [each["step"] for each in facts] == [0, 1]
    assert facts[0]["epochs_left"] == (6 - facts[0]["step"]) * 16 / 48  # in batches of 16 of the 48 images
    recipes = [load_recipe(run.path / "recipe.resolved.yaml") for run in several.larger]
    assert [recipe.finetune.epochs for recipe in recipes] == [2 + round(each["epochs_left"]) for each in facts]
    assert all(recipe.prune.reuse == "snapshot" and recipe.prune.targets == () for recipe in recipes)
    assert [run.summary["snapshot"] for run in several.larger] == [{"run": "tiny-0001", "steps": n} for n in (0, 1)]
    assert "snapshot" not in several.summary
    report = (several.larger[1].path / "report.md").read_text()
    assert "the slim one had 1 step of choosing in tiny-0001 and " in " ".join(report.split())


def test_runs_that_are_interrupted_twice_go_on_with_the_same_bits(
    several: prune.RunResult, tiny_run: prune.RunResult, tiny_recipe: Path, tmp_path: Path
):
    weights = f"model.weights={tiny_run.path / 'dense.safetensors'}"
    recipe = load_recipe(tiny_recipe, [weights, "prune.targets=[0.75, 0.6, 0.9]"])
    # in mask learning, after both snapshots; in the second run, after the six steps of fine-tuning of the first
    for stage, number, runs in (("learn", 4, 1), ("finetune", 6 + 2, 2)):
        steps = 0

        def interrupt(event: object, stage: str = stage, number: int = number) -> None:
            nonlocal steps
            steps += isinstance(event, Step) and event.stage == stage
            if steps == number:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prune.run(recipe, out=tmp_path, resume=runs > 1, tell=interrupt)
        assert len(list(tmp_path.glob("tiny-*"))) == runs
    resumed = prune.run(recipe, out=tmp_path, resume=True)
    assert [run.path.name for run in (resumed, *resumed.larger)] == ["tiny-0001", "tiny-0002", "tiny-0003"]
    for ours, theirs in zip((resumed, *resumed.larger), (several, *several.larger), strict=True):
        for name in FILES:
            assert (ours.path / name).read_bytes() == (theirs.path / name).read_bytes(), (ours.path.name, name)


def test_a_snapshot_belongs_to_its_network_and_images(several: prune.RunResult, tiny_recipe: Path, tmp_path: Path):
    weights = f"model.weights={load_recipe(several.path / 'recipe.resolved.yaml').model.weights}"
    source = [weights, f"prune.from_run={several.path}", "prune.reuse=snapshot"]
    for overrides, says in (
        (["prune.target.macs=0.5"], r"has no snapshot of mask learning for this target; it has: 0\.75, 0\.9"),
        (["prune.target.params=0.9"], r"has no snapshot"),
        (["prune.target.macs=0.9", "model.weights=null"], "made with another model"),
        (["prune.target.macs=0.9", "data.image_size=24"], r"made with another data\.image_size"),
    ):
        with pytest.raises(RunError, match=says) as caught:
            prune.run(tiny_recipe, out=tmp_path / "runs", overrides=[*source, *overrides])
        assert len(str(caught.value).splitlines()) <= 3
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["prune.targets=[0.5]", "prune.method=taylor"], "method taylor learns none"),
        (["prune.targets=[0.5]", "prune.anneal=0"], "a budget that does not shrink passes no other one"),
        (["prune.targets=[0.5]", "prune.steps=0"], "a budget that does not shrink passes no other one"),
        (["prune.targets=[0.5]", "prune.from_run=x"], "from_run takes that of a run"),
        (["prune.targets=[0.5]", "prune.target.latency_ms=5"], r"prune\.target is latency_ms"),
        (["prune.targets=[0.5, 1.5]"], r"prune\.targets\[1\]: found 1\.5"),
        (["prune.targets=0.5"], r"prune\.targets: found 0\.5, expected a list"),
    ],
)
def test_targets_that_cannot_be_met_together_are_refused(overrides: list[str], says: str, tiny_recipe: Path):
    with pytest.raises(RecipeError, match=says) as caught:
        load_recipe(tiny_recipe, overrides)
    assert len(str(caught.value).splitlines()) <= 3


def test_the_smallest_target_takes_the_place_of_the_number_in_target(tiny_recipe: Path):
    def target(*overrides: str) -> Recipe:
        return load_recipe(tiny_recipe, ["prune.targets=[0.5, 0.3, 0.15]", *overrides])

    assert target().prune.target.model_dump() == {"macs": 0.15}
    assert target("prune.target.latency=0.9").prune.target.model_dump() == {"latency": 0.15}
    assert target("prune.target.macs=300000").prune.larger_targets == (0.5, 0.3)


def test_a_number_that_would_do_nothing_beside_the_targets_of_a_recipe_is_refused(tiny_recipe: Path, tmp_path: Path):
    several = tmp_path / "several.yaml"
    several.write_text(load_recipe(tiny_recipe, ["prune.targets=[0.5, 0.3]"]).to_yaml())
    with pytest.raises(RecipeError, match=r"--set prune\.target\.macs=0\.4: prune\.targets is set"):
        load_recipe(several, ["prune.target.macs=0.4"])
    assert load_recipe(several, ["prune.target.macs=0.4", "prune.targets=[]"]).prune.target.value == 0.4
    assert load_recipe(several, ["prune.target.latency=0.4"]).prune.target.model_dump() == {"latency": 0.3}


def test_several_processes_are_told_to_make_the_runs_one_by_one(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="without torchrun"):
        prune.run(tiny_recipe, out=tmp_path, overrides=["prune.targets=[0.9, 0.6]"])


def test_the_command_lays_the_runs_side_by_side(
    several: prune.RunResult,
    tiny_run: prune.RunResult,
    tiny_recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    _show_several(Output(), {}, several, allow_code=False)
    printed = capsys.readouterr()
    assert all(name in printed.out for name in ("tiny-0001", "tiny-0002", "tiny-0003"))
    assert "passdeploy compare" in printed.err

    changes = [f"model.weights={tiny_run.path / 'dense.safetensors'}", "prune.targets=[0.9, 0.6]", "finetune.epochs=0"]
    options = [part for change in changes for part in ("--set", change)]
    called = call_command("prune", "--recipe", tiny_recipe, *options, "--out", tmp_path, "--json")
    assert called.exit_code == 0, called.output
    document = json.loads(called.stdout)
    assert [document["run"], document["larger"][0]["run"]] == [str(tmp_path / f"tiny-000{n}") for n in (1, 2)]
    assert document["larger"][0]["summary"]["budget"]["requested"] == 0.9


def test_a_forecast_counts_the_fine_tuning_of_every_run():
    prune_section = PruneSpec(targets=(0.5, 0.125))
    assert _left_after(prune_section, 0.999999) == pytest.approx(1, abs=1e-3)
    assert _left_after(prune_section, 0.125) == pytest.approx(0.5)
    assert 0.5 < _left_after(prune_section, 0.5) < 1


def test_a_gate_names_the_run_that_failed(tiny_recipe: Path, tmp_path: Path):
    result = prune.RunResult(tmp_path / "tiny-0007", {"dense": {"top1": 0.9}, "slim": {"top1": 0.5}})
    recipe = load_recipe(tiny_recipe, ["gates.top1_drop=0.1"])
    with pytest.raises(AccuracyError, match=r"tiny-0007 lost 40\.00 points of top-1.*\nAll runs are kept") as caught:
        prune._check_accuracy(recipe, result, is_one_of_several=True)
    assert caught.value.facts == {"run": str(tmp_path / "tiny-0007")}


def test_runs_of_snapshots_are_read_without_their_source(several: prune.RunResult):
    with RunFolder.open(several.larger[0].path) as folder:
        assert not [name for name in folder.manifest() if name.startswith("snapshots/")]
