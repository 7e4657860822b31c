"""Exported files of a run: which are made again, what is recorded of them, and what goes into packages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from passdeploy.commands import export_reuse, export_run, prune
from passdeploy.commands.export_reuse import _is_current, fingerprint, mark_stale_
from passdeploy.commands.run_data import DATA
from passdeploy.errors import CorruptArtifact, DataError, ParityError, RunError, UsageError
from passdeploy.export import Artifact, EngineOptions, ExportSettings, Samples, exporter
from passdeploy.export.artifact import describe_artifact, file_stem
from passdeploy.export.packaging import Packaging
from passdeploy.export.trt_sidecar import write_sidecar
from passdeploy.recipe import Recipe
from passdeploy.report.write import write_report
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.load import load_network, recipe_of
from passdeploy.runtime.cuda_driver import Driver
from passdeploy.runtime.events import Event, StageFinished, Warned, silent
from tests.conftest import copy_run
from tests.export.nets import node, write_graph
from tests.short_measurements import shorten_measurements

SMALL = ExportSettings(batch=(1, 2, 4))
OTHER = replace(SMALL, batch=(1, 2, 2))


def export_quickly(
    model: object, samples: Samples, folder: Path, settings: ExportSettings, **options: Any
) -> Iterator[Artifact]:
    """Write a graph without weights, other bytes for other settings, in place of each ONNX file."""
    folder.mkdir(exist_ok=True)
    for precision in settings.precisions:
        path = folder / f"{file_stem(options['prefix'], precision)}.onnx"
        options["replacing"](path)
        shape = (f"up_to_{settings.batch[2]}", *samples.image_shape)
        write_graph(path, [node("Relu", "images")], shape=shape)
        parity = {"real_images": len(samples.images), "top1_agreement": 1.0}
        facts = {"batch": list(settings.batch), "input": list(shape), "parity": parity}
        graph = describe_artifact(path, kind="onnx", precision=precision, facts=facts)
        yield graph
        exporter._warn_of_outdated_engines(graph, options["listener"])


@pytest.fixture
def run(tiny_run: prune.RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a run whose exports take no time."""
    monkeypatch.setattr(export_run, "export_artifacts", export_quickly)
    return copy_run(tiny_run, tmp_path)


def records_of(run: Path) -> dict[str, Any]:
    records: dict[str, Any] = json.loads((run / "export" / "artifacts.json").read_text())
    return records


def add_engine(run: Path) -> None:
    """Write an engine, its sidecar and its record, as if it had been built from the ONNX file that is there."""
    path, records = run / "export" / "model.engine", records_of(run)
    path.write_bytes(b"native code")
    facts = {"flavour": "tensorrt", "onnx": "model.onnx", "onnx_sha256": records["model.onnx"]["sha256"]}
    engine = describe_artifact(path, kind="engine", precision="fp32", facts=facts)
    write_sidecar(engine)
    with RunFolder.open(run, write=True) as folder:
        folder.write_json("export/artifacts.json", {**records, "model.engine": engine.to_json()})


@pytest.mark.parametrize(
    ("changed", "here", "torch_has_gpu", "is_current"),
    [
        ({}, "H100", True, True),
        ({}, "L4", True, False),  # another GPU
        ({"gpus": []}, "H100", True, False),
        ({"hardware_compatible": True}, "L4", True, True),
        ({"parity": None}, "H100", True, False),  # never compared, which is possible now
        ({"parity": None}, "H100", False, True),
        ({"flavour": "rtx", "parity": None, "gpus": []}, "H100", True, True),  # for any RTX GPU
    ],
)
def test_an_engine_is_used_again_where_it_was_built_and_compared(
    changed: dict[str, Any], here: str, torch_has_gpu: bool, is_current: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(export_reuse, "load_trt", lambda flavour: SimpleNamespace(__version__="11.4"))
    monkeypatch.setattr(export_reuse, "probe_driver", lambda: Driver((13, 2), (here,)))
    monkeypatch.setattr(export_reuse, "has_gpu_of_torch", lambda: torch_has_gpu)
    options = EngineOptions(hardware_compatible=changed.get("hardware_compatible", False))
    settings = replace(SMALL, engine=options, flavour=changed.get("flavour"))
    facts: dict[str, Any] = {"onnx_sha256": "x", "options": options.to_json(), "batch": [1, 2, 4], "tensorrt": "11.4"}
    facts |= {"gpus": changed.get("gpus", ["H100"])} | ({} if "parity" in changed else {"parity": {}})
    assert _is_current(facts, "x", settings) is is_current


def test_an_outdated_engine_is_warned_of_once(run: Path):
    heard: list[Event] = []

    def warnings(settings: ExportSettings) -> int:
        heard.clear()
        export_run.export_run(run, settings, listener=heard.append)
        return sum(isinstance(event, Warned) and "from an earlier model.onnx" in event.text for event in heard)

    assert warnings(SMALL) == 0
    add_engine(run)
    assert warnings(OTHER) == 1
    assert "stale" in records_of(run)["model.engine"]
    assert warnings(OTHER) == 1  # nothing was made, and it is still so


def test_files_that_are_gone_have_no_record(run: Path):
    export_run.export_run(run, replace(SMALL, precisions=("fp32", "fp16")))
    (run / "export" / "model-fp16.onnx").unlink()
    export_run.export_run(run, SMALL)
    assert set(records_of(run)) == {"model.onnx"}


def test_where_an_export_fails_what_it_has_outdated_is_marked(run: Path, monkeypatch: pytest.MonkeyPatch):
    export_run.export_run(run, SMALL)
    add_engine(run)

    def fail_after_the_first(*arguments: Any, **options: Any) -> Iterator[Artifact]:
        yield next(export_quickly(*arguments, **options))
        raise ParityError("model.engine differs")

    monkeypatch.setattr(export_run, "export_artifacts", fail_after_the_first)
    with pytest.raises(ParityError):
        export_run.export_run(run, OTHER)
    assert "stale" in records_of(run)["model.engine"]


def test_a_model_in_triton_is_named_after_a_run_that_was_renamed(run: Path, tmp_path: Path):
    run = run.rename(tmp_path / "final")
    export_run.export_run(run, SMALL, packaging=Packaging(triton=Path("export/triton")))
    assert (run / "export" / "triton" / "final" / "1" / "model.onnx").is_file()
    assert [path.name for path in (run / "export" / "triton").iterdir()] == ["final"]
    with RunFolder.open(run, write=True) as folder:
        mark_stale_(folder, {}, silent)
    assert [path.parent.name for path in run.rglob("STALE.txt")] == ["triton"]


def test_a_bundle_has_the_answers_of_the_networks_and_the_gates_of_the_recipe(run: Path):
    with RunFolder.open(run, write=True) as folder:
        recipe = recipe_of(folder)
        gates = recipe.gates.model_copy(update={"parity": 0.25})
        folder.write_text("recipe.resolved.yaml", recipe.model_copy(update={"gates": gates}).to_yaml(), kind="recipe")
    export_run.export_run(run, SMALL, dense=True, packaging=Packaging(bundle=Path("export/bundle")))
    manifest = json.loads((run / "export" / "bundle" / "manifest.json").read_text())
    assert [entry["limits"]["rel_error"] for entry in manifest["models"]] == [0.25, 0.25]
    recorded = safetensors.torch.load_file(run / "export" / "bundle" / "samples.safetensors")
    with RunFolder.open(run) as folder, torch.no_grad():
        for name, prefix in (("slim", "model"), ("dense", "dense")):
            expected = load_network(folder, name, False)(recorded["images"])
            torch.testing.assert_close(recorded[f"pytorch/{prefix}"], expected, rtol=1e-4, atol=1e-5)


def test_a_bundle_that_no_target_could_build_is_refused_before_anything_is_exported(run: Path):
    settings = replace(SMALL, flavour="rtx", engine=EngineOptions(refittable=True))
    with pytest.raises(UsageError, match="without --refittable"):
        export_run.export_run(run, settings, packaging=Packaging(bundle=Path("export/bundle")))
    assert not (run / "export").exists()


def warnings_of_export(run: Path) -> str:
    """Export a run, and return the warnings."""
    heard: list[Event] = []
    export_run.export_run(run, SMALL, listener=heard.append)
    return "\n".join(event.text for event in heard if isinstance(event, Warned))


def test_damaged_records_of_exported_files_are_warned_of_and_written_anew(run: Path):
    export_run.export_run(run, SMALL)
    (run / "export" / "artifacts.json").write_text("{}")
    assert "artifacts.json was damaged or edited: it is not used" in warnings_of_export(run)
    assert set(records_of(run)) == {"model.onnx"}
    assert warnings_of_export(run) == ""


def test_an_export_stays_where_the_report_cannot_be_renewed(run: Path):
    with RunFolder.open(run, write=True) as folder:
        folder.write_json("bench.json", {})
        (run / "bench.json").write_text("{")
        with pytest.raises(CorruptArtifact, match=r"bench\.json was damaged .*\n.* anew: passdeploy bench --run \S+$"):
            write_report(folder)
    assert "report of the run is still the one of before" in warnings_of_export(run)
    assert set(records_of(run)) == {"model.onnx"}


def test_an_export_needs_the_classes_of_the_run_and_warns_of_other_images(run: Path):
    def change(**changed: Any) -> None:
        with RunFolder.open(run, write=True) as folder:
            folder.write_json(DATA, {**folder.read_json(DATA), **changed})

    assert warnings_of_export(run) == ""
    change(test={"images": 99, "sha256": ""})
    assert "tiny-0001 was begun: 99 test images then, 16 now. Files are compared" in warnings_of_export(run)
    change(classes=["class1", "class0"])
    with pytest.raises(DataError, match="the classes are in another order"):
        export_run.export_run(run, SMALL)


def test_a_converted_file_is_made_again_where_the_images_have_changed():
    images = torch.zeros(1, 3, 4, 4)
    before, now = (Samples(images, images + change, (3, 4, 4), (0, 0, 0), (1, 1, 1)) for change in (0, 1))
    same = {
        each: fingerprint(SMALL, each, {}, before) == fingerprint(SMALL, each, {}, now) for each in ("fp32", "int8")
    }
    assert same == {"fp32": True, "int8": False}


def test_an_export_says_where_the_images_were(run: Path):
    with RunFolder.open(run, write=True) as folder:
        recipe = recipe_of(folder)
        data = recipe.data.model_copy(update={"root": "photos"})
        folder.write_text("recipe.resolved.yaml", recipe.model_copy(update={"data": data}).to_yaml(), kind="recipe")
    with pytest.raises(
        RunError, match=r"images of tiny-0001 are not here: data\.root 'photos' is not a folder here\.\n"
    ):
        export_run.export_run(run, SMALL)


def test_a_run_that_was_stopped_before_its_end_has_nothing_to_export(run: Path):
    with RunFolder.open(run, write=True) as folder:
        folder.remove("slim.safetensors")
        folder.remove("summary.json")
    with pytest.raises(
        RunError, match=r"has no slim\.safetensors: it is not there\.\n.* go on with: passdeploy prune .* --resume$"
    ):
        export_run.export_run(run, SMALL)


def test_a_converted_file_is_made_again_where_labels_or_packages_have_changed(monkeypatch: pytest.MonkeyPatch):
    images = torch.zeros(2, 3, 4, 4)
    first, other = (
        Samples(images, images, (3, 4, 4), (0, 0, 0), (1, 1, 1), torch.tensor(labels)) for labels in ([0, 1], [1, 0])
    )
    assert fingerprint(SMALL, "int8", {}, first) != fingerprint(SMALL, "int8", {}, other)
    before = fingerprint(SMALL, "int8", {}, first)
    monkeypatch.setattr(export_reuse, "package_versions", lambda: {"onnxruntime-gpu": "99.0"})
    assert fingerprint(SMALL, "int8", {}, first) != before


def test_an_engine_without_its_sidecar_is_built_again(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export_reuse, "_is_current", lambda *_: True)
    settings = replace(SMALL, kinds=("onnx", "trt"))
    export_run.export_run(run, SMALL)
    add_engine(run)
    with RunFolder.open(run, write=True) as folder:
        for name, kind in (("model.engine", "engine"), ("model.engine.json", "sidecar")):
            folder.record_existing(f"export/{name}", kind)

    def unchanged() -> list[Artifact] | None:
        with RunFolder.open(run) as folder:
            graph = records_of(run)["model.onnx"]
            return export_reuse.find_unchanged(
                folder, "export", records_of(run), "model", settings, "fp32", graph["made_from"], 0
            )

    assert [artifact.kind for artifact in unchanged() or ()] == ["onnx", "engine"]
    (run / "export" / "model.engine.json").unlink()
    assert unchanged() is None


def test_a_repository_that_serves_an_outdated_engine_is_marked(run: Path):
    export_run.export_run(run, SMALL)
    add_engine(run)
    served = run / "export" / "triton" / "tiny" / "1" / "model.plan"
    served.parent.mkdir(parents=True)
    served.write_bytes((run / "export" / "model.engine").read_bytes())
    with RunFolder.open(run, write=True) as folder:
        folder.record_existing("export/triton/tiny/1/model.plan", "triton")
    export_run.export_run(run, SMALL)
    assert not list(run.rglob("STALE.txt"))
    export_run.export_run(run, OTHER)
    assert [path.parent.name for path in run.rglob("STALE.txt")] == ["triton"]


OWN_CODE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 6 * 6, num_classes)

    def forward(self, images):
        return {"logits": self.head(self.conv(images).relu().flatten(1))}
"""


def test_a_network_of_ones_own_that_returns_a_dictionary_is_exported_and_anew_when_its_code_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("onnxruntime", reason="extra cpu is not installed")
    shorten_measurements(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code = tmp_path / "net_of_ones_own.py"
    code.write_text(OWN_CODE)
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "name": "own",
            "model": {"name": "net_of_ones_own:Net"},
            "data": {"name": "digits", "image_size": 8},
            "train": {"epochs": 0},
            "finetune": {"epochs": 0},
            "prune": {"method": "magnitude", "round_to": 1, "prompt": {"kind": "none"}},
            "gates": {"top1_drop": None},
        }
    )
    path = prune.run(recipe, out=tmp_path / "runs", allow_code=True).path
    heard: list[Event] = []

    def taken_over(**options: Any) -> bool:
        heard.clear()
        export_run.export_run(path, SMALL, allow_code=True, listener=heard.append, **options)
        return any(isinstance(event, StageFinished) and event.is_skipped for event in heard)

    assert not taken_over()
    assert records_of(path)["model.onnx"]["facts"]["parity"]["top1_agreement"] == 1.0
    assert taken_over()
    code.write_text(OWN_CODE.replace(".relu()", ".relu6()"))
    assert not taken_over()
    with pytest.raises(UsageError, match=r"cannot take images of 9 x 9 pixels: .*\nLeave --image-size out\.$"):
        taken_over(image_size=9)
