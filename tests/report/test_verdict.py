"""The verdict: deployed only what is measurably faster and as accurate as the recipe asks, as far as can be told."""

from __future__ import annotations

import pytest

from passdeploy.report.run_facts import read_run
from passdeploy.report.verdict import Verdict, judge
from passdeploy.runs.folder import RunFolder
from tests.report import conftest as report_conftest
from tests.report.conftest import NASTY, RECIPE, ROWS, MakeRun


def verdict_of(make_run: MakeRun, *rows: dict[str, object], **changes: object) -> Verdict:
    slim = [{**ROWS[1], **row} for row in rows or ({},)]
    run = make_run(profile={"rows": [ROWS[0], *slim], "environment": {}}, **changes)
    return judge(read_run(RunFolder.open(run)))


def test_a_network_that_is_faster_and_as_accurate_is_deployed(make_run: MakeRun):
    verdict = verdict_of(make_run)
    assert (verdict.mood, verdict.answer) == ("good", "Deploy it")
    assert [tile.value for tile in verdict.tiles] == ["2.00×", "−0.50 points", "−46.4 %", "−50.0 %"]
    assert verdict.todo[0].text == "Deploy the slim network of this run, which pd.load reads."
    assert verdict_of(make_run, exports=True).todo[0].text == "Deploy export/model.onnx."


@pytest.mark.parametrize(
    ("row", "changes", "mood", "reason"),
    [
        (
            {},
            {"slim": {"top1": 0.9}},
            "bad",
            "batch 8), but top-1 fell by 5.00 points, more than the 2 points",
        ),
        ({"speedup": 0.8, "speedup_ci": [0.7, 0.9]}, {}, "bad", "It is slower: 0.80 times as fast"),
        ({"speedup": 1.01, "speedup_ci": [0.9, 1.1]}, {}, "bad", "It is not measurably faster"),
        (
            {"speedup": 1.01, "speedup_ci": [0.9, 1.1], "notes": ["disturbed: other processes kept 1 cores busy"]},
            {},
            "unsure",
            "could not be told on a busy machine",
        ),
        (
            {},
            {"images": {"train": {NASTY: 50}, "test": {NASTY: 100}}},
            "unsure",
            "100 test images are too few to rule out that more than 2 points of top-1 are lost (−0.50 were counted)",
        ),
    ],
)
def test_what_is_worse_or_not_known_is_not_deployed(
    make_run: MakeRun, row: dict[str, object], changes: dict[str, object], mood: str, reason: str
):
    verdict = verdict_of(make_run, row, **changes)
    assert verdict.mood == mood
    assert reason in verdict.reason
    assert not any("Deploy" in one.text for one in verdict.todo)
    assert len(verdict.todo) == 1


def test_a_batch_for_which_it_is_faster_is_named_where_another_is_not(make_run: MakeRun):
    rows = ({"batch": 1, "speedup": 1.0, "speedup_ci": [0.98, 1.02]}, {"batch": 8})
    verdict = verdict_of(make_run, *rows)
    assert verdict.mood == "unsure"
    assert "not measurably faster (ONNX Runtime, fp32, batch 1; 2.00 with batch 8)" in verdict.reason
    assert "only where it runs with a batch for which it is faster" in verdict.todo[0].text
    assert verdict_of(make_run, rows[0], {**rows[0], "batch": 4}).mood == "bad"


@pytest.mark.parametrize("speedup", [0.7, 1.0])
def test_no_speed_up_in_a_short_measurement_of_pytorch_does_not_decide(speedup: float, make_run: MakeRun):
    rows = [
        {**row, "backend": "torch", "speedup": speedup, "speedup_ci": [speedup - 0.02, speedup + 0.02]} for row in ROWS
    ]
    verdict = judge(read_run(RunFolder.open(make_run(latency=rows))))
    assert verdict.mood == "unsure"
    assert verdict.todo[0].commands[0].startswith("passdeploy export --run runs/made-")


def test_a_file_that_was_deleted_is_not_deployed(make_run: MakeRun):
    run = make_run(exports=True, profile={"rows": ROWS, "environment": {}})
    (run / "export" / "model.onnx").unlink()
    facts = read_run(RunFolder.open(run))
    assert not facts.exports
    assert "model.onnx" not in judge(facts).todo[0].text


def test_a_speed_in_pytorch_alone_is_to_be_measured_in_what_is_deployed(make_run: MakeRun):
    run = make_run(latency=[{**row, "backend": "torch"} for row in ROWS])
    verdict = judge(read_run(RunFolder.open(run)))
    assert verdict.mood == "unsure"
    assert "What will be deployed was not measured" in verdict.sure[0]
    assert verdict.todo[0].commands[0].startswith("passdeploy export --run runs/made-")
    assert len(verdict.todo[0].commands) == 2
    nothing = judge(read_run(RunFolder.open(make_run(latency=[]))))
    assert (nothing.mood, nothing.tiles[0].value) == ("unsure", "not measured")
    assert nothing.todo[0].commands[0].startswith("passdeploy profile --run runs/")


def test_what_is_deployed_comes_before_what_was_trained_in(make_run: MakeRun):
    rows = ({"backend": "torch", "speedup": 3.0}, {"speedup": 1.5, "batch": 1}, {"speedup": 1.4})
    assert "1.50 times as fast (ONNX Runtime, fp32, batch 1; 1.40 with batch 8)" in verdict_of(make_run, *rows).reason
    unsure = (*rows[:2], {"speedup": 1.4, "speedup_ci": [0.9, 2.2]})
    assert "(ONNX Runtime, fp32, batch 1; not measurably faster with batch 8)" in verdict_of(make_run, *unsure).reason
    asked = {"kind": "latency", "requested": 0.5, "achieved": 0.5, "backend": "torch", "batch": 8}
    assert "3.00 times as fast (PyTorch" in verdict_of(make_run, *rows, budget=asked).reason
    of_precisions = ({"speedup": 1.2}, {"speedup": 2.5, "precision": "int8"})
    int8 = {**asked, "backend": "ort", "precision": "int8", "threads": 1}
    assert "2.50 times as fast (ONNX Runtime, int8" in verdict_of(make_run, *of_precisions, budget=int8).reason


def test_a_small_change_is_not_taken_for_a_true_one(make_run: MakeRun):
    images = {"train": {NASTY: 50}, "test": {NASTY: 2000}}
    worse = verdict_of(make_run, images=images, slim={"top1": 0.949})
    assert "top-1 fell by 0.10 points on 2,000 test images, which may be chance" in worse.reason
    assert (worse.tiles[1].mood, worse.mood) == ("neutral", "good")
    better = verdict_of(make_run, images=images, slim={"top1": 0.951})
    assert "no loss of accuracy shows on 2,000 test images (+0.10 points)" in better.reason


def test_accuracy_is_told_in_images_with_what_the_recipe_allows(make_run: MakeRun):
    images = {"train": {NASTY: 50}, "test": {NASTY: 2000}}
    answers = {"became_right": 3, "became_wrong": 5}
    verdict, paired = (
        verdict_of(make_run, images=images, slim={"top1": 0.949}, **known) for known in ({}, {"answers": answers})
    )
    assert "dense 1,900 and slim 1,898 of 2,000 test images right. Other images" in verdict.sure[1]
    assert "of 2,000 test images right (3 became right, 5 wrong). Other images like these" in paired.sure[1]
    assert "The recipe allows a loss of 2 points (gates.top1_drop)." in paired.sure[1]
    assert "95 % interval −1.47 to +1.27" in verdict.tiles[1].detail
    assert "95 % interval −0.41 to +0.21" in paired.tiles[1].detail


def test_few_images_are_too_few_where_the_recipe_sets_no_limit_too(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report_conftest, "RECIPE", RECIPE + "gates: {top1_drop: null}\n")
    verdict = verdict_of(make_run, images={"train": {NASTY: 50}, "test": {NASTY: 16}}, slim={"top1": 0.95})
    assert verdict.mood == "unsure"
    assert "16 test images are too few to rule out that more than 5 points of top-1 are lost" in verdict.reason
    assert verdict.tiles[1].mood == "neutral"
    lost = verdict_of(make_run, slim={"top1": 0.75})
    assert lost.mood == "bad"
    assert "fell by 20.00 points, more than the 5 points that are held bearable, for want of a limit" in lost.reason


def test_a_stale_file_is_not_deployed_and_noise_is_not_called_images(make_run: MakeRun):
    run = make_run(exports=True, profile={"rows": ROWS, "environment": {}})
    with RunFolder.open(run, write=True) as folder:
        records = folder.read_json("export/artifacts.json")
        records["model.onnx"]["stale"] = "built from an earlier file"
        records["model.onnx"]["facts"]["parity"]["real_images"] = 0
        folder.write_json("export/artifacts.json", records)
    verdict = judge(read_run(RunFolder.open(run)))
    assert verdict.todo[0].text == "Deploy the slim network of this run, which pd.load reads."
    assert any("compared with PyTorch on noise alone, not on images;" in text for text in verdict.sure)


def test_a_speed_on_a_gpu_names_it(make_run: MakeRun):
    rows = [{**row, "backend": "tensorrt", "device": "cuda:1"} for row in ROWS]
    profile = {"rows": rows, "environment": {"gpus": [{"name": "Small GPU"}, {"name": "Large GPU"}]}}
    assert "(95 % interval), on Large GPU." in judge(read_run(RunFolder.open(make_run(profile=profile)))).sure[0]


def test_a_speed_that_could_not_be_told_is_not_called_none(make_run: MakeRun):
    disturbed = {"speedup": 1.01, "speedup_ci": [0.9, 1.1], "notes": ["disturbed: other processes kept 1 cores busy"]}
    verdict = verdict_of(make_run, disturbed)
    assert (verdict.tiles[0].value, verdict.tiles[0].mood) == ("not known", "neutral")
    assert "passdeploy profile --seconds 20" in verdict.todo[0].lines
