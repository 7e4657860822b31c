"""From a YAML file to a Recipe: checked once, then trusted everywhere.

Every key has its default, its unit and its meaning here, and nowhere else; `recipe_schema()` publishes
them as JSON Schema. An unknown key is an error. What a name stands for (a model, a data set on disk)
is not looked up here: this module must stay importable without torch.

A key given on the command line as `--set a.b=c` is written over the file before anything is checked.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from passdeploy.errors import RecipeError
from passdeploy.strict_yaml import MAX_BYTES, Document, KeyPath, Mark, clipped, dotted, dump, parse

if TYPE_CHECKING:
    from importlib.abc import Traversable

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
Method = Literal["pass", "random", "uniform", "magnitude", "bn_scale", "taylor", "growing"]
TargetKind = Literal["macs", "params", "channels", "latency", "latency_ms"]


def _share_or_count(value: int | float) -> int | float:
    if 0 < value < 1:
        return value
    if value > 1 and float(value).is_integer():
        return int(value)  # 3e8 is a fine way to write a count
    raise ValueError("is neither a share of the dense model (between 0 and 1) nor a count (above 1).")


FilePath = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
Share = Annotated[float, Field(gt=0, lt=1)]  # of the dense model
ShareOrCount = Annotated[int | float, AfterValidator(_share_or_count)]


class _Section(BaseModel):
    """Closed (an unknown key is an error), frozen, and without silent conversions: `"8"` is not 8."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class ModelSpec(_Section):
    """The network to prune."""

    name: str = Field(
        min_length=1,
        description="torchvision/NAME, timm/NAME, passdeploy/NAME (ours, such as resnet20_cifar), or "
        "package.module:factory (your code; it runs only with --allow-code).",
    )
    weights: FilePath | None = Field(
        default=None,
        description="null: train the dense model first, as `train` says. pretrained: the library's own. "
        "Otherwise the path of a .safetensors file, relative to the current directory.",
    )


class DataSpec(_Section):
    """The images that masks are learned on, and accuracy is measured on."""

    name: str = Field(description=f"One of {', '.join(DATASETS)}, or hf/NAME for a data set of the Hugging Face hub.")
    root: FilePath | None = Field(
        default=None,
        description="Folder of the images, relative to the current directory; null where none is needed. "
        "For imagefolder it holds train/CLASS/*.jpg and test/CLASS/*.jpg.",
    )
    image_size: int = Field(
        default=64, ge=8, le=4096, description="Height and width of the network's input, in pixels."
    )
    batch_size: int = Field(default=64, ge=1, description="Images per step, in training and in evaluation.")
    on_unreadable: Literal["error", "skip"] = Field(
        default="error",
        description="An image file that cannot be read: error stops and names it; skip leaves it out and lists it "
        "(every file is then decoded once before anything starts).",
    )
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto",
        description="Processes or threads that prepare images; auto: as many as there are cores to spare. "
        "The images and their order do not depend on it.",
    )

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name in DATASETS or (name.startswith("hf/") and len(name) > 3):
            return name
        raise ValueError(f"{clipped(name)!r} is not a data set we know.\n{_choose(name, (*DATASETS, 'hf/NAME'))}")


class OptimizerSpec(_Section):
    """How weights (or, under `prune`, the hypernetwork and the prompt) move along the gradient."""

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
        """A rate for one optimizer ruins another: who changes the name alone gets that name's rate."""
        name = keys.get("name") if isinstance(keys, dict) else None
        usual = {"sgd": 0.05, "adamw": 0.001}
        if name == cls.model_fields["name"].default or not isinstance(name, str) or name not in usual:
            return keys
        return {"lr": usual[name], **keys}


class FinetuneOptimizerSpec(OptimizerSpec):
    """The optimizer of fine-tuning: gentler, since the weights are already good."""

    lr: float = Field(default=0.02, gt=0, description=OptimizerSpec.model_fields["lr"].description)


class PruneOptimizerSpec(OptimizerSpec):
    """The optimizer of mask learning: it moves the hypernetwork and the prompt, never the weights."""

    name: Literal["sgd", "adamw"] = Field(default="adamw", description=OptimizerSpec.model_fields["name"].description)
    lr: float = Field(default=0.001, gt=0, description=OptimizerSpec.model_fields["lr"].description)
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay per step.")


class DistillSpec(_Section):
    """Learning from the dense model's answers as well as from the labels."""

    alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the loss that is the dense model's; the labels have the rest.",
    )
    temperature: float = Field(default=4.0, gt=0, description="Softens both answers before they are compared.")


class TrainSpec(_Section):
    """One training: dense under `train`, slim under `finetune`."""

    epochs: int = Field(default=8, ge=0, description="Passes over the training images; 0 skips this training.")
    optimizer: OptimizerSpec = Field(default=OptimizerSpec(), description="What moves the weights.")
    warmup_epochs: float = Field(
        default=1.0, ge=0, description="Epochs over which the learning rate rises from near zero to its peak."
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
        description="What products are computed in; weights stay fp32. "
        "fp16 scales the loss (automatic mixed precision).",
    )
    compile: bool = Field(default=False, description="Run the training step through torch.compile.")
    augment: Literal["auto", "none"] = Field(
        default="auto",
        description="Random changes to training images; auto: what suits the data set. none: none.",
    )
    channels_last: bool = Field(
        default=True,
        description="Keep images and weights in channels-last memory order: often faster, same results.",
    )
    distill: DistillSpec | None = Field(
        default=None,
        description="Learn from the dense model too; null: from the labels alone. Only under finetune.",
    )


class FinetuneSpec(TrainSpec):
    """Training the slim model, from the weights that it kept."""

    optimizer: FinetuneOptimizerSpec = Field(default=FinetuneOptimizerSpec(), description="What moves the weights.")
    distill: DistillSpec | None = Field(
        default=DistillSpec(), description="Learn from the dense model too; null: from the labels alone."
    )


class Target(_Section):
    """What the slim model may cost: exactly one of these keys."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": [kind]} for kind in get_args(TargetKind)]})

    macs: ShareOrCount | None = Field(
        default=None,
        description="Multiply-adds of one image: a share of the dense model's (0 to 1), or a number.",
    )
    params: ShareOrCount | None = Field(
        default=None, description="Parameters: a share of the dense model's (0 to 1), or a number."
    )
    channels: Share | None = Field(default=None, description="Share of the removable channels that stay (0 to 1).")
    latency: Share | None = Field(
        default=None,
        description="Share of the dense model's median latency (0 to 1), on what `measure` names.",
    )
    latency_ms: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Median latency of one batch in milliseconds, on what `measure` names."
    )

    @model_validator(mode="after")
    def _is_one(self) -> Target:
        given = [kind for kind in get_args(TargetKind) if getattr(self, kind) is not None]
        if len(given) == 1:
            return self
        found = " and ".join(given) or "none"
        raise ValueError(f"needs exactly one of {', '.join(get_args(TargetKind))}; here: {found}.")

    @model_serializer
    def _only_the_given(self) -> dict[str, float]:
        return {self.kind: self.value}

    @property
    def kind(self) -> TargetKind:
        """The one kind that is asked for."""
        kinds: tuple[TargetKind, ...] = get_args(TargetKind)
        return next(kind for kind in kinds if getattr(self, kind) is not None)

    @property
    def value(self) -> int | float:
        """Its number: a share of the dense model, a count, or milliseconds."""
        value: int | float = getattr(self, self.kind)
        return value


class MeasureSpec(_Section):
    """What a latency target is measured on."""

    backend: Literal["torch", "ort", "tensorrt"] = Field(
        default="ort", description="torch: PyTorch. ort: ONNX Runtime. tensorrt: a TensorRT engine."
    )
    batch: int = Field(default=8, ge=1, description="Images per call.")
    threads: int = Field(default=1, ge=1, description="CPU threads of the backend.")
    table: FilePath | None = Field(
        default=None,
        description="A latency table that `passdeploy profile --table` made on the target machine; "
        "null: measured here, or taken from the cache.",
    )
    force: bool = Field(
        default=False,
        description="Use a table of another machine all the same; the plan is then not measured. Same as --force.",
    )


class PromptSpec(_Section):
    """The visual prompt: learned pixels that are added to every input image."""

    kind: Literal["padding", "full", "none"] = Field(
        default="padding", description="padding: a border. full: every pixel. none: no prompt."
    )
    size: int = Field(default=8, ge=1, description="Width of the border in pixels; only padding has one.")
    keep: bool = Field(
        default=True,
        description="true: the slim model keeps the prompt as part of its input. "
        "false: the prompt only helps to choose.",
    )


class HypernetSpec(_Section):
    """The network that proposes a score for every channel."""

    kind: Literal["lstm", "mlp", "conv", "none"] = Field(
        default="lstm",
        description="lstm: decisions for early layers reach later ones. mlp, conv: for comparison. "
        "none: no hypernetwork, one free score per channel.",
    )
    hidden: int = Field(default=64, ge=1, description="Width of its hidden state.")


class PruneSpec(_Section):
    """Which channels go."""

    method: Method = Field(
        default="pass",
        description="pass: masks learned by a recurrent hypernetwork with a visual prompt. "
        "The others are baselines: random, uniform (norm of the filters, the same share of every group), "
        "magnitude (the same norm, all groups together), bn_scale, taylor, growing (the weights that will go are "
        "pushed to zero first, which trains the others too).",
    )
    norm: Literal["l1", "l2"] = Field(default="l1", description="Norm of uniform, magnitude and growing.")
    allocation: Literal["auto", "global", "uniform"] = Field(
        default="auto",
        description="global: one threshold for all groups. uniform: the same share of every group. "
        "auto: uniform for method uniform, else global.",
    )
    target: Target = Field(default=Target(macs=0.5), description="What the slim model may cost.")
    measure: MeasureSpec = Field(default=MeasureSpec(), description="What a latency target is measured on.")
    round_to: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Widths become multiples of this many channels. auto: 8; for a latency target what the kernels of "
        "its backend compute together (fp32 on x86: 16 with AVX-512, 8 with AVX2). 1: any width.",
    )
    include: tuple[str, ...] = Field(
        default=("*",),
        strict=False,
        description="Layers whose output channels may be cut; * stands for any characters.",
    )
    exclude: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="Layers whose output channels stay all the same, and with them all that share these channels.",
    )
    steps: int = Field(default=300, ge=0, description="Steps of mask learning, one batch each.")
    from_run: FilePath | None = Field(
        default=None,
        description="A run of the same network, on other data perhaps, to take over what `reuse` names from.",
    )
    reuse: Literal["plan", "hypernetwork"] = Field(
        default="plan",
        description="plan: the channels that run kept; nothing is learned and `target` is not looked at. "
        "hypernetwork: its trained hypernetwork to start from (`steps: 0` takes its scores as they are).",
    )
    batch_size: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Images per step of mask learning; null: as data.batch_size."
    )
    optimizer: PruneOptimizerSpec = Field(
        default=PruneOptimizerSpec(), description="What moves the hypernetwork and the prompt."
    )
    distill: DistillSpec | None = Field(
        default=DistillSpec(alpha=0.5, temperature=4.0),
        description="Learn masks from the dense model's answers too; null: from the labels alone.",
    )
    anneal: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="Share of the steps over which the budget tightens from the dense model to the target, "
        "fast at first and slowly at the end; 0: the target from the first step on.",
    )
    weights: Literal["frozen", "rehearsed", "trained"] = Field(
        default="trained",
        description="The weights while masks are learned. frozen: as in the paper. rehearsed: a copy learns along, "
        "as finetune.optimizer says but at a constant rate, so that masks foresee fine-tuning; it is thrown away. "
        "trained: the copy is kept, and mask learning is fine-tuning too.",
    )
    per_cost: bool = Field(
        default=True,
        description="true: compare channels by score per unit of what the target counts. "
        "false: by score alone, as in the paper.",
    )
    prompt: PromptSpec = Field(default=PromptSpec(), description="Learned pixels that are added to every image.")
    hypernet: HypernetSpec = Field(default=HypernetSpec(), description="The network that proposes the scores.")


class GatesSpec(_Section):
    """Promises that a run checks; it stops where one is broken."""

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


class Recipe(_Section):
    """Everything that decides what a run does. Two runs of one recipe on one machine give the same files."""

    version: Literal[1] = Field(default=1, description="Version of this format.")
    name: str = Field(
        default="run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=64,
        description="Name of the run folder: letters, digits, dot, dash and underscore. "
        "Left out, it is the name of the file.",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="All chance in a run follows from this number.")
    model: ModelSpec = Field(description="The network to prune.")
    data: DataSpec = Field(description="The images it is for.")
    train: TrainSpec = Field(default=TrainSpec(), description="Dense training; used where model.weights is null.")
    prune: PruneSpec = Field(default=PruneSpec(), description="Which channels go.")
    finetune: FinetuneSpec = Field(default=FinetuneSpec(), description="Training of the slim model.")
    gates: GatesSpec = Field(default=GatesSpec(), description="Promises that a run checks.")

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        prompt, size = self.prune.prompt, self.data.image_size
        if prompt.kind == "padding" and 2 * prompt.size >= size:
            raise _Misfit(
                ("prune", "prompt", "size"),
                f"a border of {prompt.size} pixels leaves nothing of an image of {size}; "
                f"the widest is {(size - 1) // 2}, and kind: full has no border.",
            )
        if self.train.distill is not None:
            raise _Misfit(("train", "distill"), "dense training has no teacher; distill belongs under finetune.")
        return self

    def to_yaml(self) -> str:
        """This recipe with every default filled in; loading it gives an equal Recipe."""
        return dump(self.model_dump(mode="json"))


def recipe_schema() -> dict[str, Any]:
    """The format of recipes as JSON Schema (draft 2020-12), for editors and for other tools."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path_or_name: a file of the reader's own, or the name of a recipe we ship; `.yaml` may be left out.
        overrides: `a.b=c`, later ones win; `c` is read as YAML, so `prune.target={macs: 0.4}` works.
            Setting one kind of `prune.target` replaces the kind that was there.

    Raises:
        RecipeError: no such file, not YAML, or a key that does not fit. At most three lines, which name
            the key and where it stands.
    """
    path, shown = _locate(str(path_or_name))
    return parse_recipe(_read(path, shown), shown, overrides, name=_run_name(path.name))


def parse_recipe(text: str, source: str, overrides: Sequence[str] = (), *, name: str = "run") -> Recipe:
    """The recipe in `text`; `source` is what errors call it, `name` the run's where the text gives none.

    Raises:
        RecipeError: not YAML, or a key that does not fit.
    """
    document = parse(text, source)
    if not isinstance(document.value, dict):
        raise RecipeError(f"{source} holds no recipe: at its top there must be keys such as 'model' and 'data'.")
    document.value.setdefault("name", name)
    return _check(_override(document, overrides))


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with passdeploy, sorted, with their `.yaml`."""
    return sorted(entry.name for entry in _shipped())


def find_recipe(name: str) -> Traversable:
    """The reader's own file, else one we ship (inside a wheel, beside the package in a checkout).

    Raises:
        RecipeError: neither exists; names the closest of ours.
    """
    return _locate(name)[0]


def _locate(name: str) -> tuple[Traversable, str]:
    """A recipe's file, and the name by which errors call it."""
    spellings = [name] if name.endswith((".yaml", ".yml")) else [name, f"{name}.yaml"]
    for spelling in spellings:
        if os.path.isfile(own := os.path.expanduser(spelling)):
            return Path(own), spelling
    for entry in _shipped():
        if entry.name in spellings:
            return entry, entry.name
    ours = _choose(name, shipped_recipes())
    raise RecipeError(f"no recipe {clipped(name)!r}: not a file here, and not one of ours.\n{ours}")


def _shipped() -> list[Traversable]:
    """Our recipes: in an installed package inside it, in a checkout beside it."""
    homes: tuple[Traversable, ...] = (files("passdeploy") / "recipes", Path(__file__).parents[1] / "recipes")
    home = next((home for home in homes if home.is_dir()), None)
    return [entry for entry in home.iterdir() if entry.name.endswith(".yaml")] if home else []


def _run_name(file_name: str) -> str:
    """A file's name as the name of a run: `my nets.yaml` -> `my-nets`."""
    stem = file_name.removesuffix(".yaml").removesuffix(".yml")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:64] or "run"


def _read(path: Traversable, shown: str) -> str:
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_BYTES + 1).decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{shown} is not text (UTF-8); a recipe is a YAML file.") from error
    except OSError as error:
        raise RecipeError(f"cannot read {shown}: {error.strerror}.") from error


def _override(document: Document, overrides: Iterable[str]) -> Document:
    """A new document with every `a.b=c` written over it."""
    value, marks = document.value, dict(document.marks)
    for override in overrides:
        mark = Mark(f"--set {clipped(override, 60)}")
        key, equals, text = override.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            raise RecipeError(f"{mark}: an override is key=value, for example --set prune.steps=200.")
        changed = parse(text, str(mark), has_lines=False)
        marks = {old: where for old, where in marks.items() if old[: len(path)] != path}
        marks |= {path[:depth]: mark for depth in range(1, len(path)) if path[:depth] not in marks}
        marks |= {(*path, *below): mark for below in changed.marks}
        value = _with(value, path, changed.value, path)
    return Document(value, marks)


def _with(section: Any, path: Sequence[str], value: Any, whole: KeyPath) -> Any:
    """`section` with the key at `path` replaced; sections that are missing or null come into being."""
    if not path:
        return value
    if isinstance(section, list):
        raise RecipeError(f"--set {dotted(whole)}: a list is set as a whole, for example --set prune.exclude=[stem].")
    keys = dict(section) if isinstance(section, dict) else {}
    if whole[:2] == ("prune", "target") and len(whole) == 3 and len(path) == 1:
        keys = {}  # a target has one kind: the new one replaces the old
    return {**keys, path[0]: _with(keys.get(path[0]), path[1:], value, whole)}


class _Misfit(ValueError):
    """Two keys that are each fine and do not go together; `path` is the one to change."""

    def __init__(self, path: KeyPath, message: str) -> None:
        super().__init__(message)
        self.path = path


def _check(document: Document) -> Recipe:
    try:
        return Recipe.model_validate(document.value)
    except ValidationError as error:
        raise RecipeError(_lesson(error.errors(), document)) from error


def _lesson(errors: Sequence[ErrorDetails], document: Document) -> str:
    """The first thing that is wrong, in at most three lines; how many others there are."""
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")  # a misspelt key explains a missing one
    path = _key_path(first, document.value)
    alike = [error for error in errors if _key_path(error, document.value) == path]
    others = len({_key_path(error, document.value) for error in errors}) - 1
    lesson = f"{_where(path, document)}: {_sentence(path, alike, document.value)}"
    if others and lesson.count("\n") < 2:
        lesson += f"\n{others} more {'key needs' if others == 1 else 'keys need'} a look too."
    return lesson


def _key_path(error: ErrorDetails, value: Any) -> KeyPath:
    """The path of the key that an error is about, without pydantic's names for members of a union."""
    reason = error.get("ctx", {}).get("error")
    if isinstance(reason, _Misfit):
        return reason.path
    if error["type"] == "missing":
        return error["loc"]
    path: KeyPath = ()
    for part in error["loc"]:
        known = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if not known:
            break
        path, value = (*path, part), value[part]
    return path


def _where(path: KeyPath, document: Document) -> Mark:
    """Where a key stands; for a key that is not there, where the nearest section around it does."""
    return next(document.marks[path[:depth]] for depth in range(len(path), -1, -1) if path[:depth] in document.marks)


def _sentence(path: KeyPath, errors: Sequence[ErrorDetails], value: Any) -> str:
    """What is wrong with one key, from all that pydantic said about it; a second line says what to do."""
    key, kind, message = dotted(path), errors[0]["type"], errors[0]["msg"]
    if kind == "extra_forbidden":
        return f"unknown key '{key}'.\n{_nearest_key(path)}"
    if kind == "missing":
        return f"the key '{key}' is missing; {_needed(path)}"
    if kind == "value_error":
        return f"{key}: {message.removeprefix('Value error, ')}"
    found = _at(value, path)
    if kind == "model_type":
        known = ", ".join(_known_keys(path))
        return f"{key}: found {_shown(found)}, where keys are expected.\nKnown here: {known}."
    if kind == "string_pattern_mismatch":
        return f"{key}: {_shown(found)} cannot name a folder; use letters, digits, dot, dash and underscore."
    if kind == "literal_error" and len(errors) == 1:
        return f"{key}: {_shown(found)} is not known.\n{_choose(str(found), _choices(path))}"
    wanted = dict.fromkeys(error["msg"].removeprefix("Input should be ") for error in errors)
    if _PLAIN["a valid number"] in (plain := [_PLAIN.get(text, text) for text in wanted]):
        plain = [text for text in plain if text != _PLAIN["a valid integer"]]
    return f"{key}: found {_shown(found)}, expected {' or '.join(plain)}."


_PLAIN = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid tuple": "a list",
    "a valid string": "text",
    "a valid boolean": "true or false",
}


def _nearest_key(path: KeyPath) -> str:
    """A real key for one that is not: the same word elsewhere, a like word here, or all that are here."""
    word, section = str(path[-1]), path[:-1]
    elsewhere = sorted(_homes_of(word), key=lambda home: home[: len(section)] != section)
    if elsewhere:
        return f"Did you mean '{dotted(elsewhere[0])}'?"
    known = _known_keys(section)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"Did you mean '{dotted((*section, close[0]))}'?"
    return f"Known here: {', '.join(known)}."


def _needed(path: KeyPath) -> str:
    example = {"model": "torchvision/mobilenet_v2", "data": "digits"}[str(path[0])]  # the two keys without a default
    return f"for example `{path[0]}: {{name: {example}}}`."


def _shown(value: Any) -> str:
    names = {"dict": "a section of keys", "list": "a list"}
    if value is None:
        return "nothing (null)"
    return names.get(type(value).__name__) or clipped(repr(value) if isinstance(value, str) else dump(value).split()[0])


def _at(value: Any, path: KeyPath) -> Any:
    for part in path:
        value = value[part]
    return value


def _choose(wrong: str, choices: Iterable[str]) -> str:
    """One line: the nearest choice, and all of them."""
    choices = list(choices)
    close = difflib.get_close_matches(wrong, choices, n=1, cutoff=0.6)
    guess = f"Did you mean {close[0]!r}? " if close else ""
    return f"{guess}Known: {', '.join(choices)}."


def _section_at(path: KeyPath) -> type[BaseModel]:
    """The model class of a section that exists."""
    section: type[BaseModel] = Recipe
    for part in path:
        section = _sections(section)[str(part)]
    return section


def _sections(section: type[BaseModel]) -> Mapping[str, type[BaseModel]]:
    """The sections directly below one, by key."""
    below: dict[str, type[BaseModel]] = {}
    for key, field in section.model_fields.items():
        members = (field.annotation, *get_args(field.annotation))
        for kind in members:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                below[key] = kind
    return below


def _known_keys(path: KeyPath) -> list[str]:
    return list(_section_at(path).model_fields)


def _choices(path: KeyPath) -> list[str]:
    annotation = _section_at(path[:-1]).model_fields[str(path[-1])].annotation
    return [str(choice) for choice in get_args(annotation)]


def _homes_of(key: str, section: type[BaseModel] = Recipe, path: KeyPath = ()) -> list[KeyPath]:
    """Every path whose last part is `key`: someone who writes `steps` at the top means `prune.steps`."""
    homes: list[KeyPath] = [(*path, key)] if key in section.model_fields else []
    for name, below in _sections(section).items():
        homes += _homes_of(key, below, (*path, name))
    return homes
