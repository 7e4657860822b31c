"""Tests of the adapter to the Trainer of Hugging Face, with a stand-in everywhere and with the real one where it is."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import passdeploy as pd
from passdeploy.errors import UsageError
from passdeploy.sparsity.settings import PassSettings
from passdeploy.trainers.hugging_face import predictions, prune_in_trainer
from tests.trainers.networks import Detector, batches, loss

SETTINGS = PassSettings(steps=3, prompt_kind="none", round_to=1)


class Model(Detector):
    """A network that returns a dictionary, and is called with the images by name."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        logits, others = super().forward(pixel_values)
        result = OrderedDict(logits=logits, hidden_states=tuple(others["maps"]))
        return result if labels is None else OrderedDict(loss=loss((logits, None), labels), **result)


class StandIn:
    """What the adapter uses of a Trainer, with a loss of its own, as subclasses have."""

    trained: list[nn.Module] = []  # noqa: RUF012

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def get_train_dataloader(self) -> list[dict[str, Any]]:
        return [{"pixel_values": images, "labels": [{"classes": labels}]} for images, labels in batches()]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        (labels,) = inputs.pop("labels")  # as label smoothing does
        return loss((model(**inputs)["logits"], None), labels["classes"])

    def train(self) -> None:
        StandIn.trained.append(self.model)


def test_a_model_is_pruned_with_the_data_and_the_loss_of_its_trainer():
    model = Model().eval()
    result = prune_in_trainer(model, StandIn, target={"macs": 0.3}, settings=SETTINGS)
    assert result.after.macs <= 0.3 * result.before.macs
    assert result.model.stem[0].out_channels < 16  # which hidden states would have protected
    assert StandIn.trained == [result.model]
    plain = pd.learn_masks(
        model, result.groups, batches(), lambda out, labels: loss((out["logits"], None), labels), settings=SETTINGS,
        budget={"macs": 0.3}, outputs=predictions,
    )  # fmt: skip
    assert result.losses == pytest.approx(plain.losses)


def test_without_finetune_the_slim_model_is_not_trained():
    StandIn.trained.clear()
    assert prune_in_trainer(Model().eval(), StandIn, settings=SETTINGS, finetune=False).plan.kept
    assert StandIn.trained == []


def test_something_else_than_a_trainer_is_refused():
    with pytest.raises(UsageError, match="make_trainer made a dict"):
        prune_in_trainer(Model(), lambda model: {})


def test_predictions_are_all_that_is_called_so():
    one, two = torch.ones(1), torch.ones(2)
    assert predictions({"logits": one, "pred_boxes": two, "last_hidden_state": one}) == [one, two]
    assert predictions({"class_queries_logits": two, "hidden_states": (one,)}) == [two]
    only: Mapping[str, Tensor] = {"last_hidden_state": one}
    assert predictions(only) is only
    assert predictions((one, two)) == (one, two)


REAL = """
import sys, torch, passdeploy as pd
from transformers import (DetrConfig, DetrForObjectDetection, ResNetConfig, Trainer, TrainingArguments, ViTConfig,
                          ViTForImageClassification)
from passdeploy.trainers.hugging_face import prune_in_trainer

torch.manual_seed(0)
vit = ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                          intermediate_size=64, image_size=32, num_labels=2)).eval()
backbone = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1] * 4, out_features=["stage4"])
detr = DetrForObjectDetection(DetrConfig(
    use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, backbone_config=backbone, d_model=32,
    encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
    decoder_ffn_dim=64, num_queries=5, num_labels=2)).eval()
box = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.3]])}
for model, label, target in ((vit, 1, 0.5), (detr, box, 0.7)):
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": label} for _ in range(8)]
    def collate(examples):
        labels = [one["labels"] for one in examples]
        images = torch.stack([one["pixel_values"] for one in examples])
        return {"pixel_values": images, "labels": labels if label is box else torch.tensor(labels)}
    def make_trainer(model):
        arguments = TrainingArguments(sys.argv[1], max_steps=2, per_device_train_batch_size=4, report_to=[],
                                      use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)
        return Trainer(model, arguments, train_dataset=data, data_collator=collate)
    result = prune_in_trainer(model, make_trainer, target={"macs": target}, steps=2)
    assert result.after.macs <= target * result.before.macs, result
    again = pd.rebuild(type(model)(model.config).eval(), result.save(sys.argv[1] + "/slim.safetensors"))
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(again(images).logits, result.model(images).logits)
    print(type(model).__name__, "done")
"""


def test_the_real_trainer_trains_slim_classifiers_and_detectors(tmp_path: Path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "ViTForImageClassification done" in done.stdout
    assert "DetrForObjectDetection done" in done.stdout
