"""Tests of the whole road in one call, and of the files of slim networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import passdeploy as pd
from passdeploy.errors import BudgetError, CorruptArtifact, DataError, PlanError, TrainingError, UsageError
from passdeploy.latency import find_table
from passdeploy.latency.sampling import SamplingPlan
from passdeploy.runtime.events import StageFinished, Warned
from passdeploy.sparsity.settings import PassSettings
from tests.latency.fakes import SteadySampler
from tests.trainers.networks import Detector, batches, loss

SETTINGS = PassSettings(steps=4, prompt_kind="none", round_to=1)
BATCHES = batches()
IMAGES = BATCHES[0][0]


def train_(network: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    network.train()
    for step in range(steps):
        images, labels = BATCHES[step % len(BATCHES)]
        optimizer.zero_grad()
        loss(network(images), labels).backward()
        optimizer.step()


def pruned(network: nn.Module | None = None, **options: Any) -> pd.Pruned:
    options = {"outputs": 0, "settings": SETTINGS, **options}
    return pd.prune(network or Detector().eval(), BATCHES, loss, **options)


@pytest.mark.parametrize("kind", ["macs", "params", "channels"])
def test_one_call_goes_from_a_network_to_a_trained_slim_one(kind: str):
    dense = Detector().eval()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    seen: list[dict[str, torch.Tensor]] = []
    stages: list[str] = []

    def finetune(network: nn.Module) -> None:
        seen.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        train_(network)

    def listen(event: object) -> None:
        if isinstance(event, StageFinished):
            stages.append(event.stage)

    result = pruned(dense, target={kind: 0.5}, finetune=finetune, listener=listen)
    torch.testing.assert_close(dict(dense.state_dict()), before, rtol=0, atol=0)
    assert stages == ["groups", "learn", "slim", "finetune"]
    assert len(result.losses) == 4
    assert result.equivalence.max_rel_error < 1e-5
    if kind == "channels":
        assert sum(map(len, result.plan.kept.values())) <= 16
    else:
        assert getattr(result.after, kind) <= 0.5 * getattr(result.before, kind)
    assert result.after == pd.count(result.model, IMAGES[:2])
    assert not result.model.training
    trained = result.model.state_dict()
    assert any(not torch.equal(trained[name], tensor) for name, tensor in seen[0].items())
    assert not torch.equal(seen[0]["stem.1.running_mean"], torch.zeros_like(seen[0]["stem.1.running_mean"]))
    assert "equal to the masked network to" in str(result)


def test_without_the_choice_of_outputs_feature_maps_are_protected():
    with pytest.raises(BudgetError):
        pruned(outputs=None, target={"macs": 0.1})
    with pytest.raises(BudgetError, match=r"but the dense network has .*: nothing would be cut"):
        pruned(target={"macs": 10**12})
    result = pruned(target={"macs": 0.1})
    assert result.after.macs <= 0.1 * result.before.macs


@pytest.mark.parametrize(("round_to", "is_warned_of"), [(8, True), (1, False)])
def test_a_budget_that_is_hardly_spent_is_warned_of(round_to: int, is_warned_of: bool):
    heard: list[object] = []
    result = pruned(target={"macs": 0.45}, settings=replace(SETTINGS, round_to=round_to), listener=heard.append)
    assert (result.after.macs < 0.95 * 0.45 * result.before.macs) == is_warned_of
    assert any("settings.round_to than 8" in one.text for one in heard if isinstance(one, Warned)) == is_warned_of


def test_blocks_go_as_well_and_the_slim_network_is_rebuilt_without_them(tmp_path: Path):
    result = pruned(target={"macs": 0.05}, blocks=True)
    assert result.plan.skipped
    rebuilt = pd.rebuild(Detector().eval(), result.save(tmp_path / "slim.safetensors"))
    torch.testing.assert_close(rebuilt(IMAGES)[0], result.model(IMAGES)[0])


def test_a_trained_slim_network_is_saved_and_rebuilt_to_the_bit(tmp_path: Path):
    result = pruned(finetune=train_, save=tmp_path / "slim.safetensors")
    other = Detector().eval()
    kept = other.stem[0].weight.clone()
    rebuilt = pd.rebuild(other, tmp_path / "slim.safetensors")
    assert torch.equal(rebuilt(IMAGES)[0], result.model(IMAGES)[0])
    assert torch.equal(other.stem[0].weight, kept)
    assert rebuilt.stem[0].out_channels == result.model.stem[0].out_channels < 16
    assert pd.count(rebuilt, IMAGES[:2]) == result.after


def test_a_file_of_another_network_or_of_something_else_is_refused(tmp_path: Path):
    path = pruned().save(tmp_path / "slim.safetensors")
    with pytest.raises(PlanError, match=r"'head.bias' has the shape \[3\] there, and \[5\] in this Detector"):
        pd.rebuild(Detector(classes=5), path)
    with pytest.raises(PlanError, match="is of another network"):
        pd.rebuild(nn.Linear(2, 2), path)
    content = path.read_bytes()
    for damaged in (content[:50], b"", b"no tensors"):
        path.write_bytes(damaged)
        with pytest.raises(CorruptArtifact):
            pd.rebuild(Detector(), path)
    with pytest.raises(CorruptArtifact, match="cannot be read"):
        pd.rebuild(Detector(), tmp_path / "none.safetensors")
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(1)}, path)
    with pytest.raises(CorruptArtifact, match="holds tensors alone"):
        pd.rebuild(Detector(), path)


def test_the_slim_network_is_exported_with_the_outputs_that_count_and_measured(tmp_path: Path):
    result = pruned(
        export=tmp_path / "slim.onnx",
        profile={"seconds": 0.05, "iterations": 2, "threads": 1},
    )
    assert result.exported is not None
    assert result.exported.facts["max_rel_error"] < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "slim.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: IMAGES[:1].numpy()})
    np.testing.assert_allclose(logits, result.model(IMAGES[:1])[0].detach().numpy(), rtol=1e-3, atol=1e-5)
    assert result.profile is not None
    assert [(row.model, row.backend) for row in result.profile.rows] == [("dense", "torch"), ("slim", "torch")]


def test_a_network_may_be_returned_by_the_trainer_but_no_other_one():
    def copied(network: nn.Module) -> nn.Module:
        train_(network)
        return nn.DataParallel(network)

    assert isinstance(pruned(finetune=copied).model, Detector)
    with pytest.raises(TrainingError, match=r"'branch\.0\.bias' has the shape"):
        pruned(finetune=lambda network: Detector())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": {"macs": 0.5, "params": 0.5}}, "exactly one of macs, params"),
        ({"target": {"flops": 0.5}}, "exactly one of macs, params"),
        ({"target": {"macs": 0}}, "macs is a number above 0"),
        ({"target": {"macs": "half"}}, "macs is a number above 0"),
        ({"target": {"channels": 3}}, "channels is a share above 0 and up to 1"),
        ({"target": {"latency": 1.0}}, "latency is a share above 0 and below 1"),
        ({"target": {"macs": float("inf")}}, "macs is a number above 0"),
        ({"target": "macs"}, "exactly one of macs, params"),
        ({"target": {"macs": 0.5}, "measure": {"backend": "ort"}}, "but the target is macs"),
        ({"settings": PassSettings(steps=1)}, "prune learns no prompt"),
        ({"outputs": "boxes"}, "asks for 'boxes'"),
        ({"target": {"latency": 0.5}, "measure": {"backend": "abacus"}}, "measure: backend"),
        ({"example_inputs": (IMAGES, IMAGES), "export": "x.onnx"}, "only networks of one tensor of images"),
    ],
)
def test_mistakes_are_said_in_a_sentence(options: dict[str, Any], words: str):
    with pytest.raises(UsageError, match=words) as error:
        pruned(**options)
    assert len(str(error.value).splitlines()) <= 3


def test_batches_of_another_form_are_said():
    own = pd.BatchLoss(lambda network, batch: loss(network(batch["images"]), batch["labels"]))
    named = [{"images": images, "labels": labels} for images, labels in BATCHES]
    with pytest.raises(UsageError, match="this one is a dict"):
        pd.prune(Detector(), named, loss)
    with pytest.raises(UsageError, match="Give example_inputs="):
        pd.prune(Detector(), named, own)
    with pytest.raises(DataError, match="there is no batch"):
        pd.prune(Detector(), [], loss)
    result = pd.prune(Detector().eval(), named, own, outputs=0, settings=SETTINGS, example_inputs=IMAGES)
    assert result.after.macs <= 0.5 * result.before.macs


def test_a_latency_target_is_planned_for_by_a_table_and_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(find_table, "DEFAULT_SAMPLING", SamplingPlan(networks=4, repeats=1, seconds=0.0))
    monkeypatch.setattr(
        find_table, "make_sampler", lambda _, dense, channels, images, **setting: SteadySampler(channels)
    )
    monkeypatch.setattr("passdeploy.trainers.prune.meet_target", lambda target, scores, dense, progress: _half(scores))
    result = pruned(target={"latency": 0.9}, measure={"backend": "torch", "batch": 1, "threads": 1})
    assert result.latency == {"achieved": 0.5}
    assert result.after.macs < result.before.macs


def _half(scores: dict[str, torch.Tensor]) -> tuple[pd.Plan, dict[str, float]]:
    return pd.Plan({name: tuple(range(0, len(one), 2)) for name, one in scores.items()}), {"achieved": 0.5}
