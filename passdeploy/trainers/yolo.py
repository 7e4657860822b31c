"""Adapter to YOLO and RT-DETR of Ultralytics: their data, losses and trainer, with the slim network in them.

`YOLO.train` builds the network anew from its configuration, which would be the dense one. The trainer class that
`slim_trainer` makes trains the network that is there. Its checkpoints are those of Ultralytics and hold the slim
network: `YOLO("best.pt")` loads them, without passdeploy as well.

Ultralytics is AGPL-3.0. It is no dependency of passdeploy: nothing here imports it but with a model of its in hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.errors import UsageError
from passdeploy.models.wrappers import unwrapped
from passdeploy.sparsity.batch_loss import BatchLoss
from passdeploy.sparsity.settings import PassSettings
from passdeploy.trainers.prune import VERIFIED_IMAGES, Pruned, prune
from passdeploy.training.placement import device_of

_MEANS = ("ClassificationModel", "RTDETRDetectionModel")  # other losses are multiplied by the number of images
OUTPUTS = 0  # the predictions; beside them the networks return raw feature maps, which nobody reads after training


def prune_yolo(
    yolo: Any,
    data: str,
    *,
    target: Mapping[str, float] | None = None,
    train: Mapping[str, Any] | None = None,
    steps: int = 300,
    settings: PassSettings | None = None,
    **options: Any,
) -> Pruned:
    """Prune the network of an Ultralytics model with its own data and loss; afterwards the model has the slim network.

    `yolo.val`, `predict`, `export` and `train(trainer=slim_trainer(yolo))` go on with it.

    Args:
        yolo: a trained `ultralytics.YOLO` or `RTDETR`; it is changed.
        data: the data set, as for `yolo.train`.
        target: as for `prune`.
        train: arguments of `yolo.train` for the slim network, such as `{"epochs": 100, "imgsz": 640}`; data loading
            while masks are learned follows them as well. None: the slim network is not trained.
        steps: of mask learning.
        settings: of mask learning, in place of `steps`.
        options: of `prune`.

    Raises:
        UsageError: `yolo` is not a model with a network in PyTorch.
    """
    network, arguments = _network_of(yolo), dict(train or {})
    images = yolo_batches(yolo, data, **arguments)
    example = next(images())["img"][:VERIFIED_IMAGES]

    def finetune(slim: nn.Module) -> nn.Module:
        take_slim_(yolo, slim)
        if train is None:
            return slim
        yolo.train(trainer=slim_trainer(yolo), data=data, **arguments)
        trained: nn.Module = yolo.model.float()
        return trained

    result = prune(
        network,
        images,
        yolo_loss,
        target=target,
        finetune=finetune,
        settings=settings or PassSettings(steps=steps, prompt_kind="none"),
        **{"outputs": OUTPUTS, "example_inputs": example, **options},
    )
    take_slim_(yolo, result.model)
    return result


def slim_trainer(yolo: Any) -> type[Any]:
    """Return a trainer class for `yolo.train(trainer=...)` that trains the network of `yolo` instead of a new one.

    Raises:
        UsageError: `yolo` is not a model with a network in PyTorch.
    """
    network = _network_of(yolo)
    base = yolo.task_map[yolo.task]["trainer"]

    class SlimTrainer(base):  # type: ignore[misc, valid-type]
        """The trainer of the task, with a network that is there."""

        def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
            """Return the network of the checkpoint that is resumed, else a copy of the slim one."""
            is_resumed = bool(self.resume)
            source = weights if is_resumed and weights is not None else network
            model = deepcopy(source).float()
            classes = self.data["nc"]
            if classes != (own := _classes_of(network)):
                raise UsageError(
                    f"the data set has {classes} classes, and the slim network was made for {own}.\n"
                    "Train the dense network on this data set first, and prune it then."
                )
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
            return model

    return SlimTrainer


def take_slim_(yolo: Any, network: nn.Module) -> None:
    """Put a slim network into an Ultralytics model, so that its `val`, `predict` and `export` use it.

    `yolo.save` and `YOLO(file)` save and load it as ever.
    """
    dense = _network_of(yolo)
    _match_split_sizes_(network)
    if network is not dense:
        for name in ("args", "names", "task", "yaml"):  # what its commands read
            if not hasattr(network, name) and hasattr(dense, name):
                setattr(network, name, getattr(dense, name))
        yolo.model = network
    yolo.predictor = None  # the cached one has the network before
    if yolo.ckpt is None:  # of a model made from a configuration; `save` adds to it
        yolo.ckpt = {}


def yolo_batches(yolo: Any, data: str, **arguments: Any) -> Callable[[], Iterator[dict[str, Any]]]:
    """Return a function that walks the training batches of Ultralytics' own loader, augmented, on the network's device.

    Args:
        yolo: the model, whose task decides what a batch holds.
        data: the data set, as for `yolo.train`.
        arguments: of `yolo.train`, such as imgsz, batch, workers and augmentation.
    """
    network = _network_of(yolo)
    device = device_of(network)
    wanted = {
        **arguments,
        "data": data,
        "task": yolo.task,
        "model": "passdeploy",
        "device": str(device),
        "plots": False,
    }
    trainer = yolo.task_map[yolo.task]["trainer"](overrides={**wanted, "mode": "train", "save": False, "resume": False})
    trainer.model, trainer.device = network, device
    trainer.stride = int(max(getattr(network, "stride", torch.tensor([32])).max(), 32))
    loader = trainer.get_dataloader(trainer.data["train"], batch_size=trainer.batch_size, rank=-1, mode="train")

    def walk() -> Iterator[dict[str, Any]]:
        for batch in loader:
            yield trainer.preprocess_batch(batch)

    return walk


def _match_split_sizes_(network: nn.Module) -> None:
    """Let blocks that split their channels in halves know the new half: `export` runs a forward that reads it."""
    module: Any
    for module in network.modules():
        if hasattr(module, "forward_split") and isinstance(getattr(module, "c", None), int):
            module.c = module.cv1.conv.out_channels // 2


def _loss(network: nn.Module, batch: dict[str, Any]) -> Tensor:
    inner: Any = unwrapped(network)
    defaults = import_module("ultralytics.utils").DEFAULT_CFG  # installed, since this network is made of it
    known = getattr(inner, "args", {})
    inner.args = _with(defaults, known if isinstance(known, dict) else vars(known))
    total, _ = inner.loss(batch)
    loss: Tensor = total.sum()
    return loss if type(inner).__name__ in _MEANS else loss / len(batch["img"])


yolo_loss = BatchLoss(_loss)  # the sum of a network's own losses, on the batches of `yolo_batches`


def _with(defaults: Any, changes: Mapping[str, Any]) -> Any:
    """Copy a namespace of settings with some of them changed; the loss reads its gains there."""
    copied = deepcopy(defaults)
    vars(copied).update(changes)
    return copied


def _network_of(yolo: Any) -> nn.Module:
    """Return the network in an Ultralytics model."""
    network = getattr(yolo, "model", None)
    if not isinstance(network, nn.Module) or not hasattr(yolo, "task_map"):
        raise UsageError(
            f"asked for the network of a YOLO, found {type(yolo).__name__}"
            f"{' of an exported file' if hasattr(yolo, 'task_map') else ''}.\n"
            "Give the object that ultralytics.YOLO(...) makes of a .yaml or .pt file."
        )
    return network


def _classes_of(network: nn.Module) -> int | None:
    """Return the number of classes of a network, which its head knows."""
    inner: Any = network
    head = inner.model[-1]
    linear = getattr(head, "linear", None)  # of a classifier
    return linear.out_features if linear is not None else getattr(head, "nc", None)
