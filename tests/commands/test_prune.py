"""`passdeploy prune` from a recipe to a run folder, and what export and profile do with that folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import onnx
import pytest
import torch
from safetensors.torch import load_file

import passdeploy
from passdeploy.commands import prepare, prune, stages
from passdeploy.commands.export_run import export_run
from passdeploy.commands.profile_run import profile_run
from passdeploy.data.splits import load_data
from passdeploy.errors import (
    AccuracyError,
    BudgetError,
    CorruptArtifact,
    DataError,
    DeviceMemoryError,
    MissingError,
    PlanError,
    RunError,
    TrainingError,
    UsageError,
)
from passdeploy.export import ExportSettings
from passdeploy.export.packaging import Packaging
from passdeploy.models.cifar_resnet import resnet20_cifar
from passdeploy.profiling import Setting
from passdeploy.recipe import load_recipe
from passdeploy.runs.folder import RunFolder
from passdeploy.runtime.events import Stage, StageFinished, StageStarted, Step, Warned
from passdeploy.training.evaluate import Accuracy, evaluate
from tests.conftest import write_image_folder

STAGES = ["dense", "learn", "slim", "finetune"]
RUN_FILES = {
    "checkpoints",
    "chosen.json",
    "data.json",
    "dense.safetensors",
    "hypernetwork.safetensors",
    "manifest.json",
    "metrics.jsonl",
    "plan.json",
    "recipe.resolved.yaml",
    "report.html",
    "report.md",
    "run.log",
    "sample.png",
    "scores.safetensors",
    "slim.safetensors",
    "state.json",
    "summary.json",
}


@pytest.fixture(scope="module")
def finished(tiny_run: prune.RunResult) -> prune.RunResult:
    return tiny_run


def test_the_summary_holds_what_the_design_promises(finished: prune.RunResult):
    summary = json.loads((finished.path / "summary.json").read_text())
    assert summary == finished.summary
    assert summary["recipe"] == "tiny"
    assert summary["model"] == "passdeploy/resnet8_cifar"
    assert summary["method"] == "pass"
    assert summary["seed"] == 0
    assert summary["dense"].keys() == {"top1", "params", "macs"}
    assert summary["slim"].keys() == {"top1", "top1_before_finetune", "params", "macs"}
    answers, images = summary["answers"], sum(summary["images"]["test"].values())
    change = summary["slim"]["top1"] - summary["dense"]["top1"]
    assert answers["became_right"] - answers["became_wrong"] == round(change * images)
    assert RunFolder.open(finished.path).result_of("dense")["images"] == images
    assert summary["budget"]["kind"] == "macs"
    assert summary["budget"]["requested"] == 0.6
    assert summary["budget"]["achieved"] == summary["slim"]["macs"] / summary["dense"]["macs"] <= 0.6
    assert 0 <= summary["equivalence"]["max_rel_error"] <= 1e-5
    assert summary["equivalence"]["input_shapes"][0] == [[8, 3, 16, 16]]
    assert list(summary["seconds"]) == STAGES
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0]
    assert [row["model"] for row in summary["latency"]] == ["dense", "slim"]
    assert summary["environment"]["deterministic"]
    assert {row["device"] for row in summary["latency"]} == {summary["environment"]["device"]}


def test_a_plan_that_skips_blocks_is_taken_over_rebuilt_resumed_and_exported(
    tiny_recipe: Path, finished: prune.RunResult, tmp_path: Path
):
    document = json.loads((finished.path / "plan.json").read_text())
    with RunFolder.create(tmp_path, "planned") as folder:
        folder.write_json("plan.json", document | {"skipped": ["layer1.0"]}, kind="plan")
    recipe = load_recipe(tiny_recipe, [f"prune.from_run={folder.path}", "prune.reuse=plan", "finetune.epochs=1"])
    result = prune.run(recipe, out=tmp_path / "runs")
    plan = json.loads((result.path / "plan.json").read_text())
    assert plan["skipped"] == ["layer1.0"]
    assert [values[:2] for values in plan["replaced"]] == [["layer1.0", "identity"]]
    assert result.summary["slim"]["params"] < finished.summary["slim"]["params"]
    assert not [group for group in result.summary["groups"] if group["name"].startswith("layer1.0.")]

    network = passdeploy.load(result.path)
    counted = passdeploy.count(network, torch.zeros(1, 3, 16, 16))
    assert counted.macs == result.summary["slim"]["macs"]
    dense = passdeploy.load(result.path, "dense").state_dict()
    gone = {name for name in dense if name.startswith("layer1.0.")}
    assert network.state_dict().keys() >= dense.keys() - gone
    assert not gone & network.state_dict().keys()

    again = prune.run(recipe, out=tmp_path / "runs", resume=True)
    assert again.summary["slim"] == result.summary["slim"]
    graph = export_run(result.path, ExportSettings(batch=(1, 1, 1))).artifacts[0]
    assert graph.facts["parity"]["max_rel_error"] <= 1e-4


def test_every_file_of_the_run_is_there_and_recorded(finished: prune.RunResult):
    files = {path.name for path in finished.path.iterdir() if not path.name.startswith(".")}
    assert files == RUN_FILES
    manifest = json.loads((finished.path / "manifest.json").read_text())["artifacts"]
    assert {"dense.safetensors", "slim.safetensors", "plan.json", "summary.json", "recipe.resolved.yaml"} <= set(
        manifest
    )
    assert (finished.path.parent / "latest").resolve() == finished.path.resolve()
    assert load_recipe(finished.path / "recipe.resolved.yaml").prune.steps == 6


def test_the_slim_network_loads_and_is_as_accurate_as_the_summary_says(finished: prune.RunResult):
    network = passdeploy.load(finished.path)
    assert not network.training
    data = load_data(load_recipe(finished.path / "recipe.resolved.yaml").data)
    assert evaluate(network, data.test, batch_size=16).top1 == finished.summary["slim"]["top1"]
    counted = passdeploy.count(network, torch.zeros(1, 3, 16, 16))
    assert counted.macs == finished.summary["slim"]["macs"]
    assert counted.params == finished.summary["slim"]["params"]  # without the prompt
    dense = passdeploy.load(finished.path, "dense")
    assert passdeploy.count(dense, torch.zeros(1, 3, 16, 16)).macs == finished.summary["dense"]["macs"]


def test_a_run_of_another_version_is_refused_in_words(finished: prune.RunResult, tmp_path: Path):
    copied = shutil.copytree(finished.path, tmp_path / "old")
    with RunFolder.open(copied, write=True) as folder:
        facts = folder.read_json("plan.json")
        del facts["numbers"]
        folder.write_json("plan.json", facts, kind="plan")
    with pytest.raises(CorruptArtifact, match=r"says nothing of numbers: another version of passdeploy wrote it"):
        passdeploy.load(copied)


def test_the_same_recipe_in_another_process_gives_the_same_plan_and_weights(
    finished: prune.RunResult, tiny_recipe: Path, tmp_path: Path
):
    short = "from tests.short_measurements import shorten_measurements; shorten_measurements(); "
    code = f"{short}from passdeploy.commands import prune; prune.run({str(tiny_recipe)!r}, out={str(tmp_path)!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
    for name in ("plan.json", "slim.safetensors", "dense.safetensors"):
        assert (tmp_path / "latest" / name).read_bytes() == (finished.path / name).read_bytes(), name


def test_stages_are_deterministic_unless_the_recipe_says_otherwise_and_measurements_are_not(
    finished: prune.RunResult, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: dict[str, bool] = {}

    def note(event: object) -> None:
        if isinstance(event, Step):
            seen[event.stage] = torch.are_deterministic_algorithms_enabled()

    weights = [f"model.weights={finished.path / 'dense.safetensors'}", "prune.steps=2", "finetune.epochs=1"]
    prune.run(tiny_recipe, out=tmp_path, overrides=weights, tell=note)
    assert seen == {"learn": True, "finetune": True, "profile": False}
    assert not torch.are_deterministic_algorithms_enabled()
    result = prune.run(tiny_recipe, out=tmp_path, overrides=[*weights, "deterministic=false"], tell=note)
    assert seen == {"learn": False, "finetune": False, "profile": False}
    assert not result.summary["environment"]["deterministic"]


@pytest.mark.parametrize(("steps", "where", "fitted"), [(3, "stage dense, after 3 steps", 16), (0, "stage dense", 2)])
def test_a_batch_that_does_not_fit_the_memory_is_named_with_its_stage_and_what_did(
    steps: int, where: str, fitted: int, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def exhausted(*_: object, stage: Stage, **__: object) -> None:
        if steps:
            stage.step(steps, 10)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(stages, "fit", exhausted)
    words = (
        rf"{where}: a batch of 16 images of 3 x 16 x 16 .*\n"
        rf"The largest batch that did fit: {fitted}\. Halve it: --set data\.batch_size=8"
    )
    with pytest.raises(DeviceMemoryError, match=words):
        prune.run(tiny_recipe, out=tmp_path)


def test_the_weights_learn_masks_at_a_rate_of_their_own(tiny_recipe: Path, tmp_path: Path):
    recipe = load_recipe(tiny_recipe, ["prune.weights_lr=1e20"])
    with pytest.raises(TrainingError, match="step"):
        prune.run(recipe, out=tmp_path)


def test_images_are_evaluated_in_batches_of_the_recipe(
    finished: prune.RunResult, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes: list[int] = []

    def recorded(*args: Any, batch_size: int, **settings: Any) -> Accuracy:
        sizes.append(batch_size)
        return evaluate(*args, batch_size=batch_size, **settings)

    monkeypatch.setattr(stages, "evaluate", recorded)
    dense = f"model.weights={finished.path / 'dense.safetensors'}"
    prune.run(tiny_recipe, out=tmp_path, overrides=[dense, "prune.steps=1", "finetune.epochs=0", "data.batch_size=3"])
    assert set(sizes) == {3}


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(
    stage: str, finished: prune.RunResult, tiny_recipe: Path, tmp_path: Path
):
    def interrupt(event: object) -> None:
        # in the second epoch of training, in the middle of learning, at the start of the rest
        if (isinstance(event, Step) and event.stage == stage and event.done == 5) or (
            isinstance(event, StageStarted) and event.stage == stage == "slim"
        ):
            raise KeyboardInterrupt

    recipe = load_recipe(tiny_recipe)
    with pytest.raises(KeyboardInterrupt):
        prune.run(recipe, out=tmp_path, tell=interrupt)
    ended: list[StageFinished] = []
    resumed = prune.run(
        recipe, out=tmp_path, resume=True, tell=lambda e: ended.append(e) if isinstance(e, StageFinished) else None
    )
    assert resumed.path.name == "tiny-0001"
    assert [event.stage for event in ended if event.is_skipped] == STAGES[: STAGES.index(stage)]
    for name in ("plan.json", "slim.safetensors"):
        assert (resumed.path / name).read_bytes() == (finished.path / name).read_bytes(), name


def test_a_finished_run_that_is_resumed_stays_as_it_is(finished: prune.RunResult, tiny_recipe: Path, tmp_path: Path):
    copy = Path(shutil.copytree(finished.path, tmp_path / "tiny-0001", ignore=shutil.ignore_patterns(".lock")))
    (tmp_path / "latest").symlink_to("tiny-0002")
    before = {
        name: (copy / name).read_bytes()
        for name in ("summary.json", "report.html", "profile.json")
        if (copy / name).exists()
    }
    heard: list[object] = []
    resumed = prune.run(tiny_recipe, out=tmp_path, resume=True, tell=heard.append)
    assert (resumed.path, resumed.summary) == (copy, finished.summary)
    assert before == {name: (copy / name).read_bytes() for name in before}
    assert os.readlink(tmp_path / "latest") == "tiny-0002"
    assert any("finished already" in event.text for event in heard if isinstance(event, Warned))


def test_resuming_needs_a_run_of_this_very_recipe(finished: prune.RunResult, tiny_recipe: Path):
    prepared = []
    for overrides, expected in (
        (["seed=1"], "tiny-0001 was made with another recipe: seed is 0 there, 1 here"),
        (["prune.steps=7", "train.ema=0.9"], "train.ema is null there, 0.9 here; prune.steps is 6 there, 7 here"),
        (["name=other"], "no run in .* is called other"),
    ):
        with pytest.raises(RunError, match=expected) as caught:
            prune.run(tiny_recipe, out=finished.path.parent, overrides=overrides, resume=True, tell=prepared.append)
        assert len(str(caught.value).splitlines()) <= 3
    with RunFolder.open(finished.path, write=True), pytest.raises(RunError, match="another process is writing"):
        prune.run(tiny_recipe, out=finished.path.parent, resume=True, tell=prepared.append)
    assert prepared == []  # all of it is known before anything is loaded


def test_a_place_that_cannot_hold_runs_is_known_before_anything_is_loaded(tiny_recipe: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file is a file"):
        prune.run(tiny_recipe, out=tmp_path / "file" / "runs", tell=lambda event: pytest.fail(str(event)))


def test_a_tracker_that_does_not_start_leaves_no_folder_behind(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Down(ModuleType):
        MlflowClient = MagicMock()

        def start_run(self, **_: object) -> None:
            raise ConnectionError("the server is down")

        def get_tracking_uri(self) -> str:
            return "http://nowhere"

    monkeypatch.setitem(sys.modules, "mlflow", Down("mlflow"))
    with pytest.raises(MissingError, match="cannot start a run at http://nowhere: the server is down"):
        prune.run(tiny_recipe, out=tmp_path / "runs", trackers=["mlflow"])
    assert not (tmp_path / "runs").exists()
    heard: list[object] = []
    with pytest.raises(UsageError, match="no tracker 'wandb'"):
        prune.run(tiny_recipe, out=tmp_path, trackers=["wandb"], tell=heard.append)
    assert not any(isinstance(event, StageStarted) for event in heard)


@pytest.fixture(scope="module")
def run_baseline(
    finished: prune.RunResult, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., prune.RunResult]:
    """Prune the same trained network by another method; the same arguments give the same run."""

    @cache
    def run(method: str, *overrides: str) -> prune.RunResult:
        weights = f"model.weights={finished.path / 'dense.safetensors'}"
        shared = [weights, "prune.target.params=0.6", "finetune.epochs=1"]
        out = tmp_path_factory.mktemp("baselines")
        return prune.run(tiny_recipe, out=out, overrides=[*shared, f"prune.method={method}", *overrides])

    return run


@pytest.mark.parametrize("method", ["random", "uniform", "magnitude", "bn_scale", "taylor", "growing"])
def test_every_baseline_runs_from_the_same_recipe(
    method: str, finished: prune.RunResult, run_baseline: Callable[..., prune.RunResult]
):
    result = run_baseline(method)
    assert result.summary["method"] == method
    assert result.summary["dense"]["top1"] == finished.summary["dense"]["top1"]
    assert result.summary["budget"]["kind"] == "params"
    assert result.summary["slim"]["params"] <= 0.6 * result.summary["dense"]["params"]


def test_weights_of_other_images_are_trained_with_a_new_head_before_anything_is_cut(
    finished: prune.RunResult, tiny_recipe: Path, tmp_path: Path
):
    weights = finished.path / "dense.safetensors"
    overrides = [f"model.weights={weights}", "finetune.epochs=0", "prune.steps=2"]
    old, new = (
        prune.run(tiny_recipe, out=tmp_path, overrides=[*overrides, f"model.new_head={new_head}"])
        for new_head in ("false", "true")
    )
    original, kept, trained = (load_file(path) for path in (weights, *(r.path / weights.name for r in (old, new))))
    assert all(torch.equal(original[name], kept[name]) for name in original)
    assert not any(torch.equal(original[name], trained[name]) for name in ("conv1.weight", "linear.weight"))


def test_growing_chooses_by_the_score_it_is_given(run_baseline: Callable[..., prune.RunResult]):
    plans = set()
    for grown, plain in (
        (run_baseline("growing"), run_baseline("taylor")),  # its default
        (run_baseline("growing", "prune.growing.score=l1"), run_baseline("magnitude")),
    ):
        assert (grown.path / "chosen.json").read_bytes() == (plain.path / "chosen.json").read_bytes()
        plans.add((grown.path / "chosen.json").read_bytes())
    assert len(plans) == 2


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["prune.target.macs=0.0001"], BudgetError),
        pytest.param(
            ["prune.target={latency: 0.5}", "prune.measure={backend: tensorrt}"],
            MissingError,
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU here"),
        ),
        (["data.root=/nowhere/at/all"], UsageError),
        (["model.name=passdeploy/resnet21_cifar"], UsageError),
        (["model.name=torchvision/vgg11_bn", "data.image_size=8", "prune.prompt.size=1"], UsageError),
        (["prune.exclude=['*']"], UsageError),
        (["prune.exclude=[layer3]"], UsageError),
        (["prune.target.macs=20000000"], BudgetError),
        (["prune.targets=[0.3, 0.30000001]"], UsageError),
    ],
)
def test_what_cannot_work_is_refused_before_a_folder_is_made(
    overrides: list[str], error: type[Exception], tiny_recipe: Path, tmp_path: Path
):
    with pytest.raises(error) as caught:
        prune.run(tiny_recipe, out=tmp_path / "runs", overrides=overrides)
    assert len(str(caught.value).splitlines()) <= 3
    assert not (tmp_path / "runs").exists()


def test_a_budget_that_is_hardly_spent_is_warned_of(finished: prune.RunResult, tiny_recipe: Path, tmp_path: Path):
    heard = list[str]()

    def note(event: object) -> None:
        if isinstance(event, Warned):
            heard.append(event.text)

    weights = f"model.weights={finished.path / 'dense.safetensors'}"
    few = [weights, "prune.steps=2", "finetune.epochs=0", "prune.round_to=64", "prune.target.macs=0.37"]
    achieved = prune.run(tiny_recipe, out=tmp_path, overrides=few, tell=note).summary["budget"]["achieved"]
    assert achieved < 0.95 * 0.37
    assert any("where 37.0 % were asked for" in text and "prune.round_to than 64" in text for text in heard), heard


def test_weights_that_learn_along_see_the_images_of_fine_tuning(
    finished: prune.RunResult, tiny_recipe: Path, tmp_path: Path
):
    few = [f"model.weights={finished.path / 'dense.safetensors'}", "prune.steps=2", "finetune.epochs=0"]
    plain, other_training, other_tuning = (
        (prune.run(tiny_recipe, out=tmp_path, overrides=[*few, *more]).path / "scores.safetensors").read_bytes()
        for more in ([], ["train.augment=none"], ["finetune.augment=none"])
    )
    assert plain == other_training
    assert plain != other_tuning


def test_one_class_or_a_damaged_image_is_bad_data(tiny_recipe: Path, tmp_path: Path):
    alone = write_image_folder(tmp_path / "alone", classes=1)
    with pytest.raises(DataError, match="only one class"):
        prune.run(tiny_recipe, out=tmp_path / "runs", overrides=[f"data.root={alone}"])
    damaged = write_image_folder(tmp_path / "damaged")
    (damaged / "train" / "class0" / "003.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"003\.png"):
        prune.run(tiny_recipe, out=tmp_path / "runs", overrides=[f"data.root={damaged}"])
    assert not (tmp_path / "runs").exists()


def test_a_head_that_does_not_fit_the_classes_is_refused(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(prepare, "build_model", lambda *_, **__: resnet20_cifar(num_classes=7))
    with pytest.raises(DataError, match=r"shape \(1, 7\), but the data has 2 classes"):
        prune.run(tiny_recipe, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_gate_on_accuracy_fails_the_command_and_keeps_the_run(
    finished: prune.RunResult, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real_evaluate, dense_class = stages.evaluate, type(passdeploy.load(finished.path, "dense"))

    def evaluate_slim_inverted(model: torch.nn.Module, *arguments: object, **options: object) -> object:
        """Evaluate the dense network as it is, and the slim one answering with the class it finds least likely."""
        network = model if isinstance(model, dense_class) else torch.nn.Sequential(model, torch.nn.Softmin(dim=1))
        return real_evaluate(network, *arguments, **options)

    monkeypatch.setattr(stages, "evaluate", evaluate_slim_inverted)
    weights = f"model.weights={finished.path / 'dense.safetensors'}"
    with pytest.raises(AccuracyError, match="lost"):
        prune.run(tiny_recipe, out=tmp_path, overrides=[weights, "gates.top1_drop=0.1"])
    assert (tmp_path / "latest" / "summary.json").is_file()


def test_export_and_profile_write_checked_files_into_the_run(finished: prune.RunResult):
    settings = ExportSettings(precisions=("fp32", "fp16"), batch=(1, 2, 4))
    packaging = Packaging(Path("export/triton"), Path("export/bundle"))
    exported = export_run(finished.path, settings, packaging=packaging)
    graph, half, *packages = exported.artifacts
    assert [graph.path.name, half.path.name] == ["model.onnx", "model-fp16.onnx"]
    assert graph.facts["parity"]["max_rel_error"] <= 1e-4
    assert half.facts["parity"]["real_images"] == 16
    assert {artifact.kind for artifact in packages} == {"triton", "bundle"}
    metadata = {entry.key: entry.value for entry in onnx.load(half.path).metadata_props}
    assert metadata["run"] == "tiny-0001"
    assert json.loads(metadata["classes"]) == ["class0", "class1"]
    weights = json.loads((finished.path / "manifest.json").read_text())["artifacts"]["slim.safetensors"]
    assert json.loads(metadata["sha256"])["slim.safetensors"] == weights["sha256"]
    shutil.rmtree(finished.path / "export")  # a second export makes it again
    assert export_run(finished.path, ExportSettings(batch=(1, 2, 4))).artifacts[0].path.is_file()
    with pytest.raises(UsageError, match="visual prompt of 16 pixels"):
        export_run(finished.path, settings, image_size=32)
    document = profile_run(finished.path, batches=(2,), setting=Setting(device="cpu"), seconds=0.2)
    assert {(row["model"], row["backend"]) for row in document["rows"]} == {
        (model, backend) for model in ("dense", "slim") for backend in ("torch", "ort")
    }
    manifest = json.loads((finished.path / "manifest.json").read_text())["artifacts"]
    assert {"export/model.onnx", "export/dense.onnx", "export/artifacts.json", "profile.json"} <= set(manifest)
    assert {"export/bundle/manifest.json", "export/triton/tiny-fp16/config.pbtxt"} <= set(manifest)


def test_only_what_changed_is_exported_again(finished: prune.RunResult, tmp_path: Path):
    copied = shutil.copytree(finished.path, tmp_path / "copy", ignore=shutil.ignore_patterns(".lock", "export"))
    settings = ExportSettings(batch=(1, 2, 4))
    packaging = Packaging(bundle=Path("export/bundle"))
    first = export_run(copied, settings, packaging=packaging).artifacts
    events: list[object] = []

    def made(settings: ExportSettings) -> list[str]:
        events.clear()
        assert all(one.path.is_file() for one in export_run(copied, settings, listener=events.append).artifacts)
        return [event.text for event in events if isinstance(event, StageStarted) and event.stage == "export"]

    assert made(settings) == []
    assert export_run(copied, settings).artifacts == first[:1]
    assert made(replace(settings, precisions=("fp32", "fp16"))) == ["model-fp16.onnx"]
    (copied / "export" / "model.onnx").unlink()
    assert made(settings) == ["model.onnx"]
    assert not (copied / "export" / "bundle" / "STALE.txt").exists()  # the same bytes
    assert made(replace(settings, takes_pixels=True)) == ["model-pixels.onnx"]
    assert made(replace(settings, batch=(1, 2, 2))) == ["model.onnx"]
    assert (copied / "export" / "bundle" / "STALE.txt").exists()
    assert any(isinstance(event, Warned) and "STALE.txt" in event.text for event in events)
    export_run(copied, replace(settings, batch=(1, 2, 2)), packaging=packaging)
    assert not (copied / "export" / "bundle" / "STALE.txt").exists()


def test_an_engine_of_an_earlier_file_is_marked(finished: prune.RunResult, tmp_path: Path):
    copied = shutil.copytree(finished.path, tmp_path / "copy", ignore=shutil.ignore_patterns(".lock", "export"))
    export_run(copied, ExportSettings(batch=(1, 2, 4)))
    with RunFolder.open(copied, write=True) as folder:
        records = folder.read_json("export/artifacts.json")
        facts = {"onnx": "model.onnx", "onnx_sha256": "of an earlier file"}
        engine = {"kind": "engine", "precision": "fp32", "size_bytes": 1, "sha256": "x", "facts": facts}
        records["model.engine"] = engine
        (copied / "export" / "model.engine").write_bytes(b"native code")
        folder.write_json("export/artifacts.json", records)
    export_run(copied, ExportSettings(batch=(1, 2, 4)))
    records = json.loads((copied / "export" / "artifacts.json").read_text())
    assert records["model.engine"]["stale"] == "built from an earlier model.onnx: build it again with --trt"
    assert "stale" not in records["model.onnx"]


def test_a_file_that_was_changed_is_not_used(finished: prune.RunResult, tmp_path: Path):
    copy = shutil.copytree(finished.path, tmp_path / "copy", ignore=shutil.ignore_patterns(".lock"))
    with (copy / "slim.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x07")
    with pytest.raises(CorruptArtifact, match=r"slim\.safetensors is not the file that was written"):
        passdeploy.load(copy)


def test_a_plan_is_taken_over_for_other_data(finished: prune.RunResult, tiny_recipe: Path, tmp_path: Path):
    other = write_image_folder(tmp_path / "other", classes=3)
    overrides = [f"data.root={other}", f"prune.from_run={finished.path}", "train.epochs=1", "finetune.epochs=1"]
    result = prune.run(tiny_recipe, out=tmp_path / "runs", overrides=overrides)
    plans = [json.loads((path / "plan.json").read_text())["groups"] for path in (finished.path, result.path)]
    assert plans[0] == plans[1]
    assert result.summary["slim"]["macs"] < result.summary["dense"]["macs"]
    assert f"The plan is that of {finished.path.name}" in (result.path / "report.md").read_text()
    assert f"pruned by the plan of {finished.path.name}" in (result.path / "report.html").read_text()


def test_a_hypernetwork_is_taken_over_and_without_steps_gives_the_scores_it_had(
    finished: prune.RunResult, tiny_recipe: Path, tmp_path: Path
):
    weights = f"model.weights={finished.path / 'dense.safetensors'}"
    overrides = [
        weights,
        f"prune.from_run={finished.path}",
        "prune.reuse=hypernetwork",
        "prune.steps=0",
        "prune.prompt.kind=padding",
        "finetune.epochs=0",
    ]
    result = prune.run(tiny_recipe, out=tmp_path, overrides=overrides)
    with RunFolder.open(finished.path) as old, RunFolder.open(result.path) as new:
        trained, reused = (folder.read_tensors("hypernetwork.safetensors") for folder in (old, new))
    assert all(torch.equal(reused[name], tensor) for name, tensor in trained.items())


def test_what_cannot_be_taken_over_is_refused(finished: prune.RunResult, tiny_recipe: Path, tmp_path: Path):
    from_run = f"prune.from_run={finished.path}"
    for overrides, error in (
        ([f"prune.from_run={tmp_path / 'nowhere'}"], RunError),
        ([from_run, "model.name=torchvision/mobilenet_v2"], PlanError),
        ([from_run, "prune.reuse=hypernetwork", "prune.method=taylor"], RunError),
        ([from_run, "model.name=passdeploy/resnet20_cifar"], RunError),  # which has all groups of the plan, and more
        ([from_run, "prune.reuse=hypernetwork", "prune.hypernet.hidden=9"], RunError),
        ([from_run, "prune.reuse=hypernetwork", "prune.hypernet.kind=none"], RunError),
        ([from_run, "prune.reuse=hypernetwork", "model.name=passdeploy/resnet20_cifar"], RunError),
    ):
        with pytest.raises(error) as caught:
            prune.run(tiny_recipe, out=tmp_path / "runs", overrides=overrides)
        assert len(str(caught.value).splitlines()) <= 3
    assert not (tmp_path / "runs").exists()  # nothing was trained before


def test_accuracy_is_reported_with_and_without_the_prompt(finished: prune.RunResult):
    prompt = finished.summary["prompt"]
    assert prompt["keep"] is True
    assert prompt["top1_with"] == finished.summary["slim"]["top1"]
    assert 0 <= prompt["top1_without"] <= 1
    assert prompt["before_finetune"]["top1_with"] == finished.summary["slim"]["top1_before_finetune"]
