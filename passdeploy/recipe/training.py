"""The `train` and `finetune` sections of a recipe, and the optimizer and distillation keys that `prune` uses, too."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from passdeploy.recipe.augmentation import AugmentationSpec
from passdeploy.recipe.base import Section


class OptimizerSpec(Section):
    """Optimizer of the weights, or, under `prune`, of the hypernetwork and the prompt."""

    name: Literal["sgd", "adamw"] = Field(default="sgd", description="sgd: with Nesterov momentum. adamw: AdamW.")
    lr: float = Field(
        default=0.05,
        gt=0,
        description="Peak learning rate, reached after the warm-up; it then falls to zero along a cosine. "
        "Where `name` is given and lr is not: 0.05 for sgd, 0.001 for adamw.",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of sgd (adamw: its first beta).")
    weight_decay: float = Field(default=5e-4, ge=0, description="Weight decay per step; norms and biases have none.")

    @model_validator(mode="before")
    @classmethod
    def _lr_suits_the_name(cls, keys: Any) -> Any:
        """Set the usual rate of the optimizer if only its name is given: sgd and adamw need different ones."""
        name = keys.get("name") if isinstance(keys, dict) else None
        usual = {"sgd": 0.05, "adamw": 0.001}
        if name == cls.model_fields["name"].default or not isinstance(name, str) or name not in usual:
            return keys
        return {"lr": usual[name], **keys}


class FinetuneOptimizerSpec(OptimizerSpec):
    """Optimizer of fine-tuning, with a lower rate than dense training, since the weights are already trained."""

    lr: float = Field(default=0.02, gt=0, description=OptimizerSpec.model_fields["lr"].description)


class PruneOptimizerSpec(OptimizerSpec):
    """Optimizer of mask learning: it updates the hypernetwork and the prompt, never the weights."""

    name: Literal["sgd", "adamw"] = Field(default="adamw", description="sgd: with momentum. adamw: AdamW.")
    lr: float = Field(
        default=0.001,
        gt=0,
        description="Learning rate of the first step; it falls to zero along a cosine. "
        "Where `name` is given and lr is not: 0.05 for sgd, 0.001 for adamw.",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay per step.")


class DistillSpec(Section):
    """Knowledge distillation: the dense model's outputs are learned as well as the labels."""

    alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Weight of the dense model's outputs in the loss; the labels have the rest.",
    )
    temperature: float = Field(default=4.0, gt=0, description="Divides both models' logits before the softmax.")
    only_better: bool = Field(
        default=False,
        description="Learn the dense model's outputs only for those images for which its own loss is the lower one: "
        "for a dense model that was trained too briefly to be a good teacher.",
    )


class TrainSpec(Section):
    """One training: dense under `train`, slim under `finetune`."""

    epochs: int = Field(default=8, ge=0, description="Passes over the training images; 0 skips this training.")
    optimizer: OptimizerSpec = Field(default=OptimizerSpec(), description="What moves the weights.")
    warmup_epochs: float = Field(
        default=1.0,
        ge=0,
        description="Epochs over which the learning rate rises from near zero to its peak, at most half of all.",
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Share of every label given to all classes.")
    mixup: float = Field(
        default=0.0, ge=0, description="Blend pairs of images; the parameter of the Beta distribution. 0: never."
    )
    cutmix: float = Field(
        default=0.0,
        ge=0,
        description="Paste a box of one image into another; the parameter of the Beta distribution. 0: never. "
        "With mixup too, each step takes one of the two.",
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="End with a running average of the weights with this decay per step; null: none.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32",
        description="Number format of matrix products and convolutions; weights stay fp32. "
        "fp16 scales the loss (automatic mixed precision). Masks are always learned in fp32.",
    )
    compile: bool = Field(default=False, description="Run the training step through torch.compile.")
    augment: Literal["auto", "none"] = Field(
        default="auto",
        description="Random changes to training images; auto: those that suit the data set. none: none.",
    )
    augmentation: AugmentationSpec | None = Field(
        default=None,
        description="Random changes to training images in place of those of `augment`: crop, flip, colour, "
        "RandAugment, erasing. null: as `augment` says.",
    )
    channels_last: bool = Field(
        default=True,
        description="Keep images and weights in channels-last memory order: often faster, same results.",
    )
    distill: DistillSpec | None = Field(
        default=None,
        description="Learn from the dense model too; null: from the labels alone. Only under finetune.",
    )

    @property
    def random_changes(self) -> AugmentationSpec | bool:
        """The random changes to training images: those that are spelled out, those of the data set, or none."""
        return self.augmentation or self.augment != "none"

    @model_validator(mode="after")
    def _augments_in_one_way(self) -> TrainSpec:
        if self.augmentation is not None and self.augment == "none":
            raise ValueError("augment is none, and augmentation lists changes.\nLeave one of them out.")
        return self


class FinetuneSpec(TrainSpec):
    """Training of the slim model, starting from the weights that it kept."""

    optimizer: FinetuneOptimizerSpec = Field(default=FinetuneOptimizerSpec(), description="What moves the weights.")
    distill: DistillSpec | None = Field(
        default=DistillSpec(), description="Learn from the dense model too; null: from the labels alone."
    )
