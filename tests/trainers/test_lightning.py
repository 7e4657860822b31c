"""Tests with Lightning and segmentation_models_pytorch, where they are installed; no adapter is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

import passdeploy as pd
from passdeploy.sparsity.settings import PassSettings
from tests.trainers.networks import Detector, batches, loss

SETTINGS = PassSettings(steps=2, prompt_kind="none", round_to=1)
IMAGES = batches()[0][0]


@pytest.mark.filterwarnings("ignore")
def test_a_lightning_module_is_pruned_and_trained_by_its_trainer(tmp_path: Path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = Detector()

        def forward(self, images: Tensor) -> Any:
            return self.network(images)

        def training_step(self, batch: Any, index: int) -> Tensor:
            images, labels = batch
            return loss(self(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.05)

    data = DataLoader([(image, label) for images, labels in batches() for image, label in zip(images, labels)], 4)  # noqa: B905
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

    def fit(module: Any) -> None:
        trainer = lightning.Trainer(accelerator="cpu", enable_model_summary=False, default_root_dir=tmp_path, **options)
        trainer.fit(module, data)

    module = Module()
    fit(module)
    result = pd.prune(
        module.eval(),
        batches(),
        pd.BatchLoss(lambda network, batch: network.training_step(batch, 0)),
        target={"macs": 0.5},
        finetune=fit,
        outputs=0,
        example_inputs=IMAGES,
        settings=SETTINGS,
        save=tmp_path / "slim.safetensors",
    )
    assert result.after.macs <= 0.5 * result.before.macs
    rebuilt = pd.rebuild(Module().eval(), tmp_path / "slim.safetensors")
    assert torch.equal(rebuilt(IMAGES)[0], result.model(IMAGES)[0])


def test_a_network_of_segmentation_models_pytorch_is_pruned():
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    network = smp.Unet("resnet18", encoder_weights=None, classes=2).eval()
    data = [(torch.randn(2, 3, 64, 64), torch.randint(2, (2, 64, 64)))]
    result = pd.prune(network, data, F.cross_entropy, target={"macs": 0.5}, settings=SETTINGS)
    assert result.after.macs <= 0.5 * result.before.macs
    assert result.model(data[0][0]).shape == (2, 2, 64, 64)
