"""Networks as people bring them: what would break after the training began is said before it, in a sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from passdeploy.commands.try_training import try_training
from passdeploy.data.splits import ImageData, load_data
from passdeploy.errors import ModelError, PassDeployError
from passdeploy.models.diagnosis import require_own_weights
from passdeploy.recipe import DataSpec, Recipe
from passdeploy.runtime.events import Warned
from tests.command_line import call_command


class Small(nn.Module):
    def __init__(self, num_classes: int = 2, inputs: int = 3) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(inputs, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.norm(self.first(x)))))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x).mean((2, 3)))


class Dictionary(Small):
    def forward(self, x: Tensor) -> Any:
        return {"features": self.features(x), "logits": super().forward(x)}


class NoLogits(Small):
    def forward(self, x: Tensor) -> Any:
        return {"features": self.features(x), "scores": super().forward(x)}


class Stored(Small):
    """Reads what a hook stored in the instance that the hook closes over."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__(num_classes)
        self.seen: dict[str, Tensor] = {}
        self.second.register_forward_hook(lambda _, __, output: self.seen.__setitem__("features", output))

    def forward(self, x: Tensor) -> Tensor:
        self.features(x)
        return self.head(self.seen["features"].mean((2, 3)))


class WantsLabels(Small):
    def forward(self, x: Tensor, labels: Any = None) -> Tensor:
        return F.cross_entropy(super().forward(x), labels) if self.training else super().forward(x)


class Views(Small):
    """Counts on contiguous memory."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return self.head(features.view(len(x), -1)[:, :8] + features.mean((2, 3)))


class OneAtATime(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).reshape(1, 8, 64).mean(2))


class OneAnswer(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(0, keepdim=True)


class Probabilities(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


class Integers(Small):
    """Has an operation that half precision lacks."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x).mean((2, 3))
        if features.dtype != torch.float32:
            raise TypeError("float32 only")
        return self.head(features)


def _with_nan_(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.constant_(module.bias, float("nan"))


def frozen(num_classes: int = 2) -> nn.Module:
    return Small(num_classes).requires_grad_(False)


def masked(num_classes: int = 2) -> nn.Module:
    network = Small(num_classes)
    torch_prune.l1_unstructured(network.second, "weight", 0.5)  # type: ignore[no-untyped-call]
    return network


def old_weight_norm(num_classes: int = 2) -> nn.Module:
    network = Small(num_classes)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(network.second)
    return network


def no_statistics(num_classes: int = 2) -> nn.Module:
    network = Small(num_classes)
    network.norm = nn.BatchNorm2d(8, track_running_stats=False)
    return network


@pytest.fixture(scope="module")
def data() -> ImageData:
    data = load_data(DataSpec(name="digits", image_size=8))
    return ImageData("two", ("a", "b"), (3, 8, 8), data.mean, data.std, data.train, data.test)


def attempt(network: nn.Module, data: ImageData, *, batch_size: int = 64, **train: Any) -> list[str]:
    recipe = Recipe.model_validate(
        {"model": {"name": "mine:net"}, "train": train, "finetune": {"epochs": 0}, "version": 1}
        | {"data": {"name": "digits", "batch_size": batch_size}}
    )
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(3)
    state, told = torch.get_rng_state(), list[Any]()
    try_training(network.eval(), recipe, data, is_trained=False, device="cpu", listener=told.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in network.parameters())
    return [event.text for event in told if isinstance(event, Warned)]


class OneValue(Small):
    """Normalises one value per image and channel, which batches of one image cannot train."""

    def forward(self, x: Tensor) -> Any:
        return self.head(self.norm(self.first(x).mean((2, 3), keepdim=True)).flatten(1))


def test_batches_of_one_image_are_tried_as_such(data: ImageData):
    torch.manual_seed(0)
    assert attempt(OneValue(), data) == attempt(Small(), data, batch_size=1) == []
    with pytest.raises(
        ModelError, match=r"more than 1 value per channel.*\nIt works with two images: set data\.batch_size"
    ):
        attempt(OneValue(), data, batch_size=1)


@pytest.mark.parametrize("network", [Small, Dictionary, Stored])
@pytest.mark.parametrize("train", [{}, {"precision": "bf16"}, {"channels_last": False}])
def test_networks_that_can_be_trained_pass_and_are_left_as_they_were(
    data: ImageData, network: type[nn.Module], train: dict[str, Any]
):
    torch.manual_seed(0)
    assert attempt(network(), data, **train) == []


@pytest.mark.parametrize(
    ("make", "train", "message"),
    [
        (NoLogits, {}, "dict of features, scores, in which no tensor is called 'logits'"),
        (WantsLabels, {}, r"mine:net cannot be trained \(train, channels-last, fp32\)"),
        (Views, {}, r"view.*\nIt works with train: \{channels_last: false\}"),
        (Integers, {"precision": "bf16"}, r"float32 only\.\nIt works with train: \{precision: fp32\}"),
        (OneAtATime, {}, "takes one image, but not two at once"),
        (lambda: Small().requires_grad_(True).apply(_with_nan_), {}, "answers with NaN"),
        (frozen, {}, r"frozen \(requires_grad is False\), so train could not"),
        (lambda: Small(3), {}, r"in training mode it answers with shape \(2, 3\)"),
        (OneAnswer, {}, r"shape \(1, 2\) for one image and \(1, 2\) for two"),
    ],
)
def test_networks_that_cannot_be_trained_are_refused_with_advice(
    data: ImageData, make: Callable[[], nn.Module], train: dict[str, Any], message: str
):
    torch.manual_seed(0)
    with pytest.raises(PassDeployError, match=message) as caught:
        attempt(make(), data, **train)
    assert str(caught.value).count("\n") <= 2


@pytest.mark.parametrize(
    ("make", "message"), [(no_statistics, "a sample alone and in a batch .* as norm does"), (Probabilities, "logits")]
)
def test_answers_that_surprise_are_warned_of(data: ImageData, make: Callable[[], nn.Module], message: str):
    torch.manual_seed(0)
    (text,) = attempt(make(), data)
    assert message.partition(" .* ")[0] in text
    assert message.rpartition(" .* ")[2] in text


@pytest.mark.parametrize(
    ("make", "message"), [(masked, r"torch\.nn\.utils\.prune\.remove"), (old_weight_norm, "remove_weight_norm")]
)
def test_layers_that_compute_their_weight_are_named(make: Callable[[], nn.Module], message: str):
    with pytest.raises(ModelError, match=f"layer 'second' of mine:net .*\n.*{message}"):
        require_own_weights(make(), "mine:net")


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("grey", "takes images of 1 channel (grey images), and all images here have 3"),
        ("double", "has weights in float64, and images are float32.\nCall .float()"),
    ],
)
def test_networks_for_other_images_are_refused_by_what_they_take(
    factory: str, reason: str, tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    module = ModuleType("mine")
    module.grey = lambda num_classes: Small(num_classes, inputs=1)  # type: ignore[attr-defined]
    module.double = lambda num_classes: Small(num_classes).double()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", module)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"version: 1\nmodel: {{name: mine:{factory}}}\n"
        f"data: {{name: imagefolder, root: {image_folder}, image_size: 16}}\n"
        "prune: {prompt: {kind: none}}\n"
    )
    for command in (("check", "--recipe", recipe), ("inspect", f"mine:{factory}", "--image-size", 16)):
        said = call_command(*command, "--allow-code")
        assert said.exit_code == 2
        assert reason in said.stderr
        assert "image_size" not in said.output
