"""Adapter to the `Trainer` of Hugging Face: its data and loss for mask learning, and the slim model in it.

Works with any model for images that a Trainer trains: classification, SegFormer, DETR and others. Nothing here imports
transformers: the user hands in a function that makes the Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from passdeploy.errors import UsageError
from passdeploy.sparsity.batch_loss import BatchLoss
from passdeploy.sparsity.settings import PassSettings
from passdeploy.trainers.prune import VERIFIED_IMAGES, Pruned, prune
from passdeploy.training.placement import device_of

MakeTrainer = Callable[[nn.Module], Any]


def predictions(outputs: Any) -> Any:
    """Return the predictions in a model's outputs, without its hidden states, attention weights and features.

    They are what is called logits or pred_boxes, pred_masks and so on; all outputs of a model without any.
    """
    if not isinstance(outputs, Mapping):
        return outputs
    chosen = [value for name, value in outputs.items() if name.endswith("logits") or name.startswith("pred_")]
    return chosen or outputs


def prune_in_trainer(
    model: nn.Module,
    make_trainer: MakeTrainer,
    *,
    target: Mapping[str, float] | None = None,
    finetune: bool = True,
    steps: int = 300,
    settings: PassSettings | None = None,
    **options: Any,
) -> Pruned:
    """Prune a model with the data and the loss of its Trainer, and train the slim one in a Trainer of its own.

    Args:
        model: the trained model; it is left as it was.
        make_trainer: makes a `transformers.Trainer` of a model, with its arguments, data sets and callbacks. A Trainer
            keeps its optimiser, so the slim model gets a new one. Data and `compute_loss` are those of the first.
        target: as for `prune`.
        finetune: run `train` of the new Trainer.
        steps: of mask learning.
        settings: of mask learning, in place of `steps`.
        options: of `prune`. Without `outputs`, predictions count and hidden states do not.

    Raises:
        UsageError: `make_trainer` makes no Trainer.
    """
    trainer = make_trainer(model)
    if not all(hasattr(trainer, name) for name in ("get_train_dataloader", "compute_loss", "train")):
        raise UsageError(
            f"make_trainer made a {type(trainer).__name__}, and not a transformers.Trainer.\n"
            "Give a function of a model, such as lambda model: Trainer(model, arguments, train_dataset=data)."
        )
    batches = trainer_batches(trainer)
    name = getattr(model, "main_input_name", "pixel_values")
    images = next(batches())[name][:VERIFIED_IMAGES]

    def train(slim: nn.Module) -> nn.Module:
        own = make_trainer(slim)
        own.train()
        trained: nn.Module = own.model
        return trained

    return prune(
        model,
        batches,
        trainer_loss(trainer),
        target=target,
        finetune=train if finetune else None,
        settings=settings or PassSettings(steps=steps, prompt_kind="none"),
        **{"outputs": predictions, "example_inputs": images, **options},
    )


def trainer_loss(trainer: Any) -> BatchLoss:
    """Return the loss of a Trainer, its own `compute_loss` if it has one."""

    def loss(network: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        value: Tensor = trainer.compute_loss(network, dict(batch))  # which may take out the labels
        return value

    return BatchLoss(loss)


def trainer_batches(trainer: Any) -> Callable[[], Iterator[dict[str, Any]]]:
    """Return a function that walks the training batches of a Trainer, on the device of its model."""
    device = device_of(trainer.model)

    def walk() -> Iterator[dict[str, Any]]:
        for batch in trainer.get_train_dataloader():
            yield {name: _on(device, value) for name, value in batch.items()}

    return walk


def _on(device: Any, value: Any) -> Any:
    """Move the tensors in a part of a batch; DETR's labels are a list of dictionaries."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _on(device, one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_on(device, one) for one in value]
    return value
