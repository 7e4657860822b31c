"""Tests of losses for which the user's own code runs the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import passdeploy as pd
from passdeploy.errors import TrainingError, UsageError
from passdeploy.sparsity.batch_loss import BatchLoss
from passdeploy.sparsity.mask import batch_statistics_only
from passdeploy.sparsity.settings import PassSettings

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0])
SETTINGS = PassSettings(steps=3, prompt_kind="none")


class LossInside(nn.Module):
    """A network that computes its own loss, in training mode only, as torchvision's detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(16, 3)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.features(images).mean((2, 3)))
        return {"loss": F.cross_entropy(logits, labels)} if self.training and labels is not None else logits


BATCHES = [{"images": IMAGES, "labels": LABELS}]
OWN = BatchLoss(lambda network, batch: network(**batch)["loss"])


def test_a_network_that_computes_its_own_loss_learns_what_it_does_outside():
    net = LossInside().eval()
    groups = pd.find_groups(net, IMAGES)
    inside = pd.learn_masks(net, groups, BATCHES, OWN, settings=SETTINGS, example_inputs=IMAGES[:1])
    outside = pd.learn_masks(net, groups, [(IMAGES, LABELS)], F.cross_entropy, settings=SETTINGS)
    assert inside.losses == pytest.approx(outside.losses)
    torch.testing.assert_close(inside.scores, outside.scores)
    assert inside.plan == outside.plan
    assert inside.prompt is None


def test_dropout_and_stored_statistics_stay_out_of_it():
    net = LossInside().eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    copied = batch_statistics_only(net, training=True)
    assert copied.training
    assert not copied.features[3].training
    copied(IMAGES)
    torch.testing.assert_close(dict(copied.state_dict()), {**before, "features.1.num_batches_tracked": torch.tensor(1)})


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda network, batch: 1.0, "returned float"),
        (lambda network, batch: network(batch["images"]), r"returned a tensor of shape \(4, 3\)\."),
        (lambda network, batch: torch.tensor(1.0), "without a gradient"),
    ],
)
def test_what_is_no_loss_is_an_error(function: Any, words: str):
    net = LossInside().eval()
    with pytest.raises(TrainingError, match=words):
        pd.learn_masks(
            net, pd.find_groups(net, IMAGES), BATCHES, BatchLoss(function), settings=SETTINGS, example_inputs=IMAGES
        )


def test_what_needs_images_and_targets_is_refused():
    net = LossInside().eval()
    groups = pd.find_groups(net, IMAGES)
    with pytest.raises(UsageError, match="Give example_inputs="):
        pd.learn_masks(net, groups, BATCHES, OWN, settings=SETTINGS)
    asking = PassSettings(steps=1, distill=0.5)
    with pytest.raises(UsageError, match=r"there is no prompt \(prompt_kind=.padding.\) and no distillation"):
        pd.learn_masks(net, groups, BATCHES, OWN, settings=asking, example_inputs=IMAGES)
