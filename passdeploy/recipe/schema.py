"""The `Recipe` and its sections `model`, `data` and `gates` with defaults and units; also as JSON Schema."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from passdeploy.errors import clipped
from passdeploy.recipe.base import FilePath, KeyConflict, Section, suggestion_for
from passdeploy.recipe.preprocessing import PreprocessingSpec
from passdeploy.recipe.pruning import PruneSpec
from passdeploy.recipe.strict_yaml import dump
from passdeploy.recipe.training import FinetuneSpec, TrainSpec

SCHEMA_FILE = "recipe.schema.json"  # beside recipes, which name it in their first line
_PRETRAINED = "pretrained"  # as in models/weights.py, which imports torch

DATASETS = (
    "digits",
    "imagefolder",
    "cifar10",
    "cifar100",
    "tiny-imagenet",
    "food101",
    "dtd",
    "stanford-cars",
    "imagenet",
)


class ModelSpec(Section):
    """The network to prune."""

    name: str = Field(
        min_length=1,
        description="torchvision/NAME, timm/NAME, passdeploy/NAME (ours, such as resnet20_cifar), or "
        "package.module:factory (your code; it runs only with --allow-code).",
    )
    weights: FilePath | None = Field(
        default=None,
        description="null: train the dense model first, as `train` says. pretrained: the library's own; if those "
        "are for another number of classes, the model gets a new classifier and is trained first. "
        "Otherwise the path of a .safetensors, .pt or .pth file, relative to the current directory; of that only "
        "the tensors are read, and no code in it is run.",
    )
    new_head: bool = Field(
        default=False,
        description="true: leave the final classifier of `weights` out, and train the dense model with a new one "
        "first, as `train` says: for weights that were trained on other classes or other images.",
    )

    @model_validator(mode="after")
    def _head_is_of_weights(self) -> ModelSpec:
        if self.new_head and self.weights is None:
            raise ValueError("new_head is true, but there are no weights.\nName some in model.weights.")
        return self


class DataSpec(Section):
    """The images that masks are learned on, and accuracy is measured on."""

    name: str = Field(description=f"One of {', '.join(DATASETS)}, or hf/NAME for a data set of the Hugging Face hub.")
    root: FilePath | None = Field(
        default=None,
        description="Folder of the images, relative to the current directory; null where none is needed. "
        "For imagefolder it holds train/CLASS/*.jpg and test/CLASS/*.jpg.",
    )
    train_folder: str | None = Field(
        default=None,
        min_length=1,
        description="For imagefolder: the folder in root with the class folders to train on; null: train or training.",
    )
    test_folder: str | None = Field(
        default=None,
        min_length=1,
        description="For imagefolder: the same to test on; null: test, testing, val, valid or validation.",
    )
    image_size: int = Field(
        default=64,
        ge=8,
        le=4096,
        description="Height and width of the network's input, in pixels. Left out, with pretrained weights: theirs.",
    )
    preprocessing: PreprocessingSpec | None = Field(
        default=None,
        description="Crop, interpolation and normalisation of all images, in training, testing, calibration and in "
        "exported files. null: those that pretrained weights were published with; otherwise the largest centred "
        "square, bilinear, ImageNet's mean and std.",
    )
    batch_size: int = Field(default=64, ge=1, description="Images per step, in training and in evaluation.")
    on_unreadable: Literal["error", "skip"] = Field(
        default="error",
        description="An image file that cannot be read: error stops and names it; skip leaves it out and lists it. Of "
        "sets that do not fit into memory nothing is decoded in advance: the next image of its class takes its place.",
    )
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto",
        description="Threads that decode images, or processes where a GPU trains; auto: one per core that the "
        "process may use, at most 16. "
        "The images and their order do not depend on it.",
    )

    @model_validator(mode="after")
    def _folders_belong_together(self) -> DataSpec:
        if (self.train_folder is None) != (self.test_folder is None):
            raise ValueError("train_folder and test_folder belong together.\nName both, or neither.")
        if self.train_folder is not None and self.name != "imagefolder":
            raise ValueError(f"train_folder and test_folder are for imagefolder, not for {self.name}.")
        return self

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name in DATASETS or (name.startswith("hf/") and len(name) > 3):
            return name
        suggestion = suggestion_for(name, (*DATASETS, "hf/NAME"))
        raise ValueError(f"{clipped(name)!r} is not a data set we know.\n{suggestion}")


class GatesSpec(Section):
    """Checks: `equivalence` stops a run, `top1_drop` is checked at its end, `parity` by an export."""

    equivalence: float = Field(
        default=1e-5,
        gt=0,
        description="Largest relative difference between the slim model's and the masked model's outputs.",
    )
    parity: float = Field(
        default=1e-4,
        gt=0,
        description="Largest relative difference between the outputs of an exported fp32 artifact "
        "and of the PyTorch model.",
    )
    top1_drop: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=0.02,
        description="Largest loss of top-1, dense to slim, as a fraction (0.02: 2 points). null: any.",
    )


class Recipe(Section):
    """Everything that determines a run. Two runs of one recipe on one machine write the same files."""

    version: Literal[1] = Field(default=1, description="Version of this format.")
    name: str = Field(
        default="run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=64,
        description="Name of the run folder: letters, digits, dot, dash and underscore. "
        "Left out, it is the name of the file.",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of all random numbers of a run.")
    deterministic: bool = Field(
        default=True,
        description="true: the same seed on the same device with the same versions gives the same plan and weights, "
        "also after --resume; an operation that has no deterministic kernel is an error (a plan for a latency also "
        "depends on what was measured). false: faster on a GPU, and gives this up: sums are added in any order, so two "
        "runs soon differ in their weights, and may differ in their plan.",
    )
    model: ModelSpec = Field(description="The network to prune.")
    data: DataSpec = Field(description="The images it is for.")
    train: TrainSpec = Field(
        default=TrainSpec(), description="Dense training; used if model.weights is null, or the classifier is new."
    )
    prune: PruneSpec = Field(default=PruneSpec(), description="Selection of the channels to remove.")
    finetune: FinetuneSpec = Field(default=FinetuneSpec(), description="Training of the slim model.")
    gates: GatesSpec = Field(
        default=GatesSpec(),
        description="Checks. equivalence stops a run; top1_drop is checked at its end, and the run is kept; parity is "
        "checked by export.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self._knows_image_size and (problem := self.border_problem):
            raise KeyConflict(("prune", "prompt", "size"), problem)
        if self.prune.measure.table is not None and self.prune.target.kind not in ("latency", "latency_ms"):
            raise KeyConflict(
                ("prune", "measure", "table"),
                f"a latency table is for a latency target, but prune.target is {self.prune.target.kind}.\n"
                "Set prune.target to {latency: 0.5} or {latency_ms: 5}, or leave the table out.",
            )
        if self.train.distill is not None:
            raise KeyConflict(("train", "distill"), "dense training has no teacher; distill belongs under finetune.")
        return self

    @property
    def _knows_image_size(self) -> bool:
        """False where images get the size of pretrained weights, which are looked up later."""
        return "image_size" in self.data.model_fields_set or self.model.weights != _PRETRAINED

    @property
    def border_problem(self) -> str | None:
        """Problem of a border of the prompt that leaves nothing of the images; None if it fits."""
        prompt, size = self.prune.prompt, self.data.image_size
        if prompt.kind != "padding" or 2 * prompt.size < size:
            return None
        return (
            f"a border of {prompt.size} pixels leaves nothing of an image of {size}; "
            f"the widest is {(size - 1) // 2}, and kind: full has no border."
        )

    def to_yaml(self) -> str:
        """Write this recipe as YAML with every default filled in; loading it gives an equal Recipe."""
        return dump(self.model_dump(mode="json"))


def recipe_schema() -> dict[str, Any]:
    """Describe the format of recipes as JSON Schema (draft 2020-12), for editors and other tools."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:passdeploy:recipe:1"}
    return {**head, **Recipe.model_json_schema()}
