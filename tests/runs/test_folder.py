"""Run folders: files are complete or absent, recorded in the manifest, and written by one process."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from passdeploy.errors import CorruptArtifact, RunError
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.numbering import list_runs
from passdeploy.runs.own_files import is_file_of_a_run
from passdeploy.runtime.events import StageFinished, StageStarted, Step, Warned
from passdeploy.runtime.files import sha256_of
from passdeploy.runtime.sealed_json import sealed


@pytest.fixture
def run(tmp_path: Path):
    with RunFolder.create(tmp_path / "runs", "digits") as run:
        yield run


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_runs_are_numbered_and_latest_points_at_the_newest(tmp_path: Path):
    for expected in ("digits-0001", "digits-0002"):
        with RunFolder.create(tmp_path, "digits") as run:
            assert run.path.name == expected
    with RunFolder.create(tmp_path, "other") as run:
        assert run.path.name == "other-0001"
        assert not (tmp_path / "latest").exists()  # it has no slim network yet
        run.become_latest()
    RunFolder.create(tmp_path, "interrupted").close()
    assert os.readlink(tmp_path / "latest") == "other-0001"
    assert RunFolder.open(tmp_path / "latest").path == run.path.resolve()
    names = [path.name for path in list_runs(tmp_path)]
    assert names == ["digits-0001", "digits-0002", "interrupted-0001", "other-0001"]


def test_runs_created_at_the_same_time_get_folders_of_their_own(tmp_path: Path):
    def create(_: int) -> str:
        with RunFolder.create(tmp_path, "digits") as run:
            return run.path.name

    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(create, range(16)))
    assert sorted(names) == [f"digits-{number:04d}" for number in range(1, 17)]


def test_a_discarded_run_leaves_everything_as_it_was(tmp_path: Path):
    first = RunFolder.create(tmp_path / "runs", "digits")
    first.become_latest()
    first.close()
    second = RunFolder.create(tmp_path / "runs", "digits")
    second.write_json("plan.json", {})
    second.discard()
    assert names_in(tmp_path / "runs") == {"digits-0001", "latest"}
    assert os.readlink(tmp_path / "runs" / "latest") == "digits-0001"


def test_discarding_the_only_run_removes_the_folder_that_it_made(tmp_path: Path):
    RunFolder.create(tmp_path / "runs", "digits").discard()
    assert not (tmp_path / "runs").exists()
    (tmp_path / "mine").mkdir()
    RunFolder.create(tmp_path / "mine", "digits").discard()
    assert names_in(tmp_path / "mine") == set()


def test_a_place_that_cannot_hold_runs_is_named(tmp_path: Path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match=r"cannot make a run folder in .*runs"):
        RunFolder.create(tmp_path / "runs", "digits")


def test_what_is_written_is_read_back_and_recorded(run: RunFolder):
    tensors = {"weight": torch.randn(2, 3), "count": torch.tensor(7), "tied": torch.ones(4)[1:]}
    tensors["twin"] = tensors["tied"]
    run.write_tensors("slim.safetensors", tensors, {"model": "tiny", "classes": "3"})
    run.write_json("plan.json", {"groups": {"stem": [1, 2]}}, kind="plan")
    run.write_text("recipe.resolved.yaml", "näme: x\n")
    loaded = run.read_tensors("slim.safetensors")
    assert {name: (t.dtype, t.tolist()) for name, t in loaded.items()} == {
        name: (t.dtype, t.tolist()) for name, t in tensors.items()
    }
    assert run.read_metadata("slim.safetensors") == {"classes": "3", "model": "tiny"}
    assert run.read_json("plan.json") == {"groups": {"stem": [1, 2]}}
    assert run.read_text("recipe.resolved.yaml") == "näme: x\n"
    entry = json.loads((run.path / "manifest.json").read_text())["artifacts"]["plan.json"]
    assert entry["size_bytes"] == (run.path / "plan.json").stat().st_size
    assert (len(entry["sha256"]), entry["kind"]) == (64, "plan")
    assert {"passdeploy", "torch"} <= set(entry["versions"])


def test_the_same_tensors_give_the_same_bytes(run: RunFolder):
    tensors = {"b": torch.zeros(3), "a": torch.ones(1, dtype=torch.float16)}
    contents = {
        run.write_tensors("t.safetensors", tensors, dict.fromkeys(keys, "x")).read_bytes()
        for keys in ("abcdefgh", "hgfedcba", "abcdefgh")
    }
    assert len(contents) == 1


@pytest.mark.parametrize("damage", ["changed", "shortened", "gone"])
def test_a_damaged_artifact_is_named_on_load(run: RunFolder, damage: str):
    path = run.write_tensors("slim.safetensors", {"w": torch.ones(64)})
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-1] + b"\x01" if damage == "changed" else content[:-1])
    with pytest.raises(CorruptArtifact, match=r"slim\.safetensors") as caught:
        run.read_tensors("slim.safetensors")
    assert caught.value.exit_code == 5
    assert str(caught.value).count("\n") <= 2


def test_an_artifact_that_was_never_written_says_so(run: RunFolder):
    with pytest.raises(RunError, match=r"no plan\.json: it is not there"):
        run.read_json("plan.json")
    (run.path / "plan.json").write_text("{}")
    with pytest.raises(RunError, match=r"no plan\.json: it is not recorded"):
        run.read_json("plan.json")


def test_a_writer_that_fails_leaves_the_old_artifact_and_no_draft(run: RunFolder):
    run.write_text("export/model.onnx", "old")

    def fail() -> None:
        with run.adding("export/model.onnx", "onnx") as draft:
            assert draft.suffix == ".onnx"
            draft.write_text("half")
            raise RuntimeError("the exporter gave up")

    with pytest.raises(RuntimeError, match="gave up"):
        fail()
    assert names_in(run.path / "export") == {"model.onnx"}
    assert run.read_text("export/model.onnx") == "old"
    with run.adding("export/model.onnx", "onnx", versions={"onnx": "1"}) as draft:
        draft.write_text("new")
    assert run.read_text("export/model.onnx") == "new"
    assert run.manifest()["export/model.onnx"]["versions"]["onnx"] == "1"


def test_a_process_killed_at_any_write_leaves_nothing_that_seems_damaged(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
):
    """Stop before the nth rename while a recorded artifact is replaced, for every n."""
    rename = Path.replace
    for survived in range(4):
        run.write_text("plan.json", "old")
        renames = iter(range(survived))

        def rename_or_die(path: Path, target: Path, renames=renames) -> Path:
            if next(renames, None) is None:
                raise KeyboardInterrupt
            return rename(path, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", rename_or_die)
            try:
                run.write_text("plan.json", "new")
                assert survived == 3  # without the record, the file, with the record
            except KeyboardInterrupt:
                pass
        if run.has("plan.json"):
            assert run.read_text("plan.json") == ("new" if survived == 3 else "old")
        else:
            assert survived in (1, 2)


def test_a_number_that_json_lacks_is_refused_before_anything_is_written(run: RunFolder):
    with pytest.raises(ValueError, match="JSON"):
        run.write_json("summary.json", {"top1": float("nan")})
    assert not (run.path / "summary.json").exists()


@pytest.mark.parametrize("name", ["../outside.json", "/etc/passwd", ""])
def test_nothing_is_written_outside_of_the_run(run: RunFolder, name: str):
    with pytest.raises(ValueError, match="inside a run"):
        run.write_text(name, "x")


def test_a_run_has_one_writer_and_any_number_of_readers(run: RunFolder):
    run.write_text("note.txt", "x")
    with pytest.raises(RunError, match=rf"another process is writing .*: PID {os.getpid()} on "):
        RunFolder.open(run.path, write=True)
    reader = RunFolder.open(run.path)
    assert reader.read_text("note.txt") == "x"
    with pytest.raises(RunError, match="opened for reading"):
        reader.write_text("note.txt", "y")
    run.close()
    with RunFolder.open(run.path, write=True) as writer:
        writer.write_text("note.txt", "y")
    assert reader.read_text("note.txt") == "y"


def test_the_lock_and_the_drafts_of_a_killed_process_are_no_obstacle(tmp_path: Path):
    script = (
        "import os, sys; from pathlib import Path; from passdeploy.runs.folder import RunFolder\n"
        "run = RunFolder.create(Path(sys.argv[1]), 'digits'); run.mark_done('dense')\n"
        "with run.adding('export/model.onnx', 'onnx') as draft: draft.write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == 9
    folder = tmp_path / "digits-0001"
    assert len(names_in(folder / "export")) == 1
    with RunFolder.open(tmp_path / "digits-0001", write=True) as run:
        assert names_in(folder / "export") == set()
        assert run.is_done("dense")


def test_a_run_that_is_not_there_names_those_that_are(tmp_path: Path):
    with pytest.raises(RunError, match="Make one with `passdeploy prune"):
        RunFolder.open(tmp_path / "runs" / "latest")
    RunFolder.create(tmp_path, "digits").close()
    with pytest.raises(RunError, match=r"there is no run at .*digit-1\.\nRuns in .*: digits-0001\."):
        RunFolder.open(tmp_path / "digit-1")
    (tmp_path / "dangling").symlink_to("digits-0009")
    with pytest.raises(RunError, match="points at 'digits-0009'"):
        RunFolder.open(tmp_path / "dangling")
    (tmp_path / "link").symlink_to("notes")
    (tmp_path / "notes").mkdir()
    with pytest.raises(RunError, match=r"points at 'notes', which holds no manifest\.json"):
        RunFolder.open(tmp_path / "link")
    with pytest.raises(RunError, match=r"no run in .* is finished"):
        RunFolder.open(tmp_path / "latest")
    with pytest.raises(RunError, match=r"holds no manifest\.json"):
        RunFolder.open(tmp_path / "notes")


def test_finished_stages_and_their_results_outlive_the_process(run: RunFolder):
    run.mark_done("dense", {"top1": 0.97})
    run.mark_done("plan")
    run.close()
    with RunFolder.open(run.path, write=True) as again:
        assert (again.is_done("dense"), again.is_done("finetune")) == (True, False)
        assert again.result_of("dense") == {"top1": 0.97}
        assert again.done_stages() == ("dense", "plan")
        with pytest.raises(KeyError):
            again.result_of("finetune")


def test_a_state_that_cannot_be_read_is_named(run: RunFolder):
    run.mark_done("dense")
    (run.path / "state.json").write_text('{"stages": {')
    with pytest.raises(CorruptArtifact, match=r"state\.json"):
        run.is_done("dense")


def test_a_checkpoint_keeps_its_newest_state_until_the_stage_is_done(run: RunFolder):
    checkpoint = run.checkpoint("fine tune")
    assert checkpoint.load() is None
    for epoch in (1, 2):
        checkpoint.save({"w": torch.full((2,), float(epoch))}, {"epoch": epoch, "lr": 0.1})
    tensors, facts = run.checkpoint("fine tune").load()
    assert (tensors["w"].tolist(), facts) == ([2, 2], {"epoch": 2, "lr": 0.1})
    assert len(names_in(run.path / "checkpoints")) == 1
    assert run.checkpoint("fine").load() is None  # a stage of its own
    run.mark_done("fine tune")
    assert names_in(run.path / "checkpoints") == set()
    assert run.manifest() == {}


def test_steps_go_to_metrics_and_stages_to_the_log(run: RunFolder):
    for listen in (run.metrics_listener(), run.log_listener()):
        listen(StageStarted("dense", "8 epochs"))
        listen(Step("dense", 1, 2, {"loss": 0.5}))
        listen(Step("dense", 2, 2, {"loss": float("inf")}))
        listen(Warned("careful"))
        listen(StageFinished("dense", "top-1 97 %", 1.25))
        listen(StageFinished("plan", "", 0.0, is_skipped=True))
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"stage": "dense", "step": 1, "total": 2, "loss": 0.5},
        {"stage": "dense", "step": 2, "total": 2, "loss": None},
    ]
    log = (run.path / "run.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in log] == [
        "dense: started, 8 epochs",
        "warning: careful",
        "dense: finished in 1.2 s, top-1 97 %",
        "plan: taken over from before",
    ]


def test_a_line_that_was_cut_off_is_dropped_when_the_run_goes_on(run: RunFolder):
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    run.metrics_listener()(Step("dense", 2, 2))
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_reading_runs_does_not_import_torch():
    script = "import sys, passdeploy.runs.folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_an_edited_manifest_says_what_is_still_as_it_was_written(run: RunFolder):
    run.write_text("kept.txt", "kept")
    run.write_text("changed.txt", "changed")
    manifest = run.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace(sha256_of(run / "changed.txt"), "0" * 64))
    with pytest.raises(CorruptArtifact, match=r"was damaged or edited\.\nStill as they were written: kept\.txt\.\n"):
        run.read_text("kept.txt")


def test_the_state_of_another_run_is_found_out(run: RunFolder, tmp_path: Path):
    run.mark_done("dense", {"top1": 0.9})
    with RunFolder.create(tmp_path / "others", "tiny") as other:
        other.mark_done("dense", {"top1": 0.1})
    shutil.copy(other.path / "state.json", run.path / "state.json")
    with pytest.raises(CorruptArtifact, match=r"state\.json is that of another run\.\nPut the original back"):
        run.is_done("dense")


def test_a_run_of_an_earlier_version_goes_on(run: RunFolder):
    run.mark_done("dense")
    for name in ("manifest.json", "state.json"):  # sealed, and without what they have in common today
        content = json.loads((run.path / name).read_text())
        (run.path / name).write_text(sealed({key: content[key] for key in content if key not in ("run", "seal")}))
    run.mark_done("learn")
    run.write_text("note.txt", "x")
    assert run.done_stages() == ("dense", "learn")


def test_a_manifest_of_the_first_version_has_no_seal(run: RunFolder):
    run.write_text("note.txt", "x")
    content = {"version": 1, "artifacts": json.loads((run.path / "manifest.json").read_text())["artifacts"]}
    (run.path / "manifest.json").write_text(json.dumps(content))
    assert run.read_text("note.txt") == "x"


def test_a_manifest_names_no_file_outside_of_its_run(run: RunFolder):
    run.write_text("note.txt", "x")
    text = (run.path / "manifest.json").read_text().replace('"note.txt"', '"../note.txt"')
    content = {key: value for key, value in json.loads(text).items() if key != "seal"}
    (run.path / "manifest.json").write_text(sealed(content))
    with pytest.raises(CorruptArtifact, match=r"manifest\.json cannot be read"):
        run.content()


def test_logs_are_recorded_at_the_end_and_not_while_they_grow(run: RunFolder):
    listen = run.metrics_listener()
    listen(Step("dense", 1, 2, {"loss": 1.0}))
    run.record_logs()
    assert run.has("metrics.jsonl")
    listen(Step("dense", 2, 2, {"loss": 0.5}))
    assert not run.has("metrics.jsonl")
    assert len(run.verified_if_recorded("metrics.jsonl").read_text().splitlines()) == 2


def test_a_file_of_a_run_is_known_by_its_record(run: RunFolder, tmp_path: Path):
    path = run.write_text("export/model.onnx", "graph")
    assert is_file_of_a_run(path)
    path.write_text("other graph")
    assert not is_file_of_a_run(path)
    (tmp_path / "model.onnx").write_text("graph")
    assert not is_file_of_a_run(tmp_path / "model.onnx")
