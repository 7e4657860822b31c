"""The `prune` section of a recipe: pruning method, target, latency measurement, prompt, hypernetwork."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, model_serializer, model_validator

from passdeploy.recipe.base import FilePath, KeyConflict, Section, Share, ShareOrCount
from passdeploy.recipe.training import DistillSpec, PruneOptimizerSpec

Method = Literal["pass", "random", "uniform", "magnitude", "bn_scale", "taylor", "growing"]
TargetKind = Literal["macs", "params", "channels", "latency", "latency_ms"]
_SHARE_KINDS = frozenset({"macs", "params", "channels", "latency"})  # of which a target may be a share


class Target(Section):
    """Budget of the slim model: exactly one of these keys."""

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
        description="Share of the dense model's median latency (0 to 1), measured as `measure` says.",
    )
    latency_ms: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Median latency of one batch in milliseconds, measured as `measure` says."
    )

    @model_validator(mode="after")
    def _is_one(self) -> Target:
        given = [kind for kind in get_args(TargetKind) if getattr(self, kind) is not None]
        if len(given) == 1:
            return self
        shown = " and ".join(given) or "none"
        raise ValueError(f"needs exactly one of {', '.join(get_args(TargetKind))}; here: {shown}.")

    @model_serializer
    def _only_the_given(self) -> dict[str, float]:
        return {self.kind: self.value}

    @property
    def kind(self) -> TargetKind:
        """The one key that is set."""
        kinds: tuple[TargetKind, ...] = get_args(TargetKind)
        return next(kind for kind in kinds if getattr(self, kind) is not None)

    @property
    def value(self) -> int | float:
        """Its number: a share of the dense model, a count, or milliseconds."""
        value: int | float = getattr(self, self.kind)
        return value


class MeasureSpec(Section):
    """Backend, batch and device on which a latency target is measured."""

    backend: Literal["torch", "compile", "ort", "ort-cuda", "tensorrt"] = Field(
        default="ort",
        description="torch: PyTorch. compile: torch.compile. ort: ONNX Runtime on the CPU. ort-cuda: ONNX Runtime's "
        "CUDA provider. tensorrt: a TensorRT engine, built as `export --trt` builds it.",
    )
    batch: int = Field(default=8, ge=1, description="Images per call.")
    threads: int = Field(default=1, ge=1, description="CPU threads of the backend.")
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto: the device of --device, which is the GPU where there is one; ort stays on the CPU, and a "
        "table is of the device it was made on. Otherwise, for torch and compile: cpu, cuda or cuda:N.",
    )
    precision: Literal["fp32", "fp16", "bf16", "int8"] = Field(
        default="fp32", description="That networks run in; int8 with tensorrt only, ort on the CPU is fp32."
    )
    channels_last: bool = Field(default=False, description="Memory format of torch's and compile's images and weights.")
    cuda_graph: bool = Field(default=False, description="One launch for a whole network, on a GPU.")
    table: FilePath | None = Field(
        default=None,
        description="A latency table that `passdeploy profile --table` made of this network on the target machine. If "
        "nothing else is set here, the settings are those of the table; otherwise they must agree with it. "
        "null: measured here, or taken from the cache.",
    )
    force: bool = Field(
        default=False,
        description="Use a table of another machine (other processor or versions) all the same; the plan is then not "
        "measured. Same as --force.",
    )


class PromptSpec(Section):
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


class HypernetSpec(Section):
    """The network that computes a score for every channel."""

    kind: Literal["lstm", "mlp", "conv", "none"] = Field(
        default="lstm",
        description="lstm: scores of early layers influence those of later ones. mlp, conv: for comparison. "
        "none: no hypernetwork, one free score per channel.",
    )
    hidden: int = Field(default=64, ge=1, description="Width of its hidden state.")


class GrowingSpec(Section):
    """Growing regularisation: the channels to remove are chosen first, then a growing penalty shrinks their weights."""

    score: Literal["taylor", "l1", "l2"] = Field(
        default="taylor", description="Importance by which they are chosen, once, in the dense network."
    )
    ceiling: float = Field(
        default=1.0,
        gt=0,
        description="The penalty's factor at the end: this multiple of a weight is added to its gradient.",
    )
    ramp: float = Field(default=0.75, gt=0, le=1, description="Share of the steps over which that factor grows.")


class PruneSpec(Section):
    """Selection of the channels to remove."""

    method: Method = Field(
        default="pass",
        description="pass: masks learned by a recurrent hypernetwork with a visual prompt. "
        "The others are baselines: random, uniform (norm of the filters, the same share of every group), "
        "magnitude (the same norm, all groups together), bn_scale, taylor, growing (a penalty first shrinks the "
        "weights to remove, while all weights are trained).",
    )
    norm: Literal["l1", "l2"] = Field(default="l1", description="Norm of uniform and magnitude.")
    growing: GrowingSpec = Field(default=GrowingSpec(), description="Settings of method growing.")
    allocation: Literal["auto", "global", "uniform"] = Field(
        default="auto",
        description="global: one threshold for all groups. uniform: the same share of every group. "
        "auto: uniform for method uniform, else global.",
    )
    target: Target = Field(default=Target(macs=0.5), description="Budget of the slim model.")
    targets: tuple[Share, ...] = Field(
        default=(),
        strict=False,
        description="Several budgets from one mask learning: shares of the dense model, in place of the number in "
        "`target`, which says of what. One run each: the first learns for the smallest share, and the others go on "
        "from the plan and the weights that it had when its shrinking budget passed theirs; they are fine-tuned for "
        "what was left of mask learning, too, in whole epochs: not for less than half of one. For method pass. []: one "
        "run, for `target`.",
    )
    measure: MeasureSpec = Field(default=MeasureSpec(), description="Backend and device of a latency target.")
    round_to: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Widths become multiples of this many channels. auto: 8; for a latency target the number of "
        "channels that the backend's kernels compute at once (fp32 on x86: 16 with AVX-512, 8 with AVX2). "
        "1: any width.",
    )
    include: tuple[str, ...] = Field(
        default=("*",),
        strict=False,
        description="Layers whose output channels may be cut, and blocks that may be skipped; * stands for any "
        "characters. A pattern that matches none is an error.",
    )
    exclude: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="Layers whose output channels are kept, like those of all layers that share these channels; "
        "and blocks that are kept, as is a block with any of these inside.",
    )
    blocks: bool | Literal["auto"] = Field(
        default="auto",
        description="true: whole residual blocks may be skipped, besides channels. false: channels only. "
        "auto: true where the target is a latency, which depends on the number of layers more than on their widths.",
    )
    steps: int = Field(
        default=300, ge=0, description="Steps of mask learning, or of growing regularisation; one batch each."
    )
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="The same as an amount of training: passes over the training images, such as 2 or 0.5, which "
        "take the place of `steps`. null: as many steps as `steps` says.",
    )
    from_run: FilePath | None = Field(
        default=None,
        description="A run of the same network, possibly on other data, from which `reuse` is taken.",
    )
    reuse: Literal["plan", "hypernetwork", "snapshot"] = Field(
        default="plan",
        description="plan: keep the channels that that run kept; nothing is learned and `target` is ignored. "
        "hypernetwork: start from its trained hypernetwork (`steps: 0` takes its scores as they are). "
        "snapshot: go on from the plan and the weights that its mask learning had when its budget passed `target`, "
        "one of that run's `targets`; nothing is learned, and model and data are the same.",
    )
    batch_size: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Images per step of mask learning; null: as data.batch_size."
    )
    optimizer: PruneOptimizerSpec = Field(
        default=PruneOptimizerSpec(), description="Optimizer of the hypernetwork and the prompt."
    )
    distill: DistillSpec | None = Field(
        default=DistillSpec(alpha=0.5, temperature=4.0),
        description="Learn masks (and grow penalties) from the dense model's answers too; null: from the labels alone.",
    )
    anneal: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the steps over which the budget tightens from the dense model to the target, "
        "fast at first and slowly at the end; 0: the target from the first step on.",
    )
    weights: Literal["frozen", "rehearsed", "trained"] = Field(
        default="trained",
        description="The weights while masks are learned. frozen: as in the paper. rehearsed: a copy is trained with "
        "the masks, as finetune.optimizer says but at a constant rate, so that masks anticipate fine-tuning; it is "
        "then discarded. trained: the copy is kept, and mask learning is fine-tuning too.",
    )
    weights_lr: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Learning rate of that copy, or of the weights that growing trains, in place of "
        "finetune.optimizer.lr; null: that one.",
    )
    per_cost: bool = Field(
        default=True,
        description="true: compare channels by score per unit of the target's cost (such as MACs). Method pass takes "
        "a cost midway between that in the dense network and that in what is left of it, unless the target is a "
        "latency. "
        "false: by score alone, as in the paper.",
    )
    prompt: PromptSpec = Field(default=PromptSpec(), description="Learned pixels that are added to every image.")
    hypernet: HypernetSpec = Field(default=HypernetSpec(), description="The network that computes the scores.")

    @model_validator(mode="before")
    @classmethod
    def _learns_for_the_smallest_target(cls, section: Any) -> Any:
        """Put the smallest of several targets in the place of the number in `target`."""
        shares = section.get("targets") if isinstance(section, dict) else None
        if not isinstance(shares, list | tuple) or not shares or not all(isinstance(share, float) for share in shares):
            return section  # there are none, or their own rule says what is wrong with them
        target = section.get("target", {"macs": 0.5})
        target = target.model_dump() if isinstance(target, Target) else target
        if not isinstance(target, dict) or len(target) != 1 or not set(target) <= _SHARE_KINDS:
            return section
        return {**section, "target": dict.fromkeys(target, min(shares))}

    @model_validator(mode="after")
    def _targets_are_learned(self) -> PruneSpec:
        if not self.targets:
            return self
        path = ("prune", "targets")
        if self.target.kind not in _SHARE_KINDS:
            raise KeyConflict(
                path,
                f"these are shares of the dense model, but prune.target is {self.target.kind}.\n"
                "Set prune.target to {latency: 0.5}; its number is replaced by the smallest of them.",
            )
        if self.method != "pass":
            raise KeyConflict(path, f"several budgets come from one mask learning; method {self.method} learns none.")
        if self.from_run is not None and self.reuse != "hypernetwork":
            raise KeyConflict(path, "several budgets come from one mask learning, but from_run takes that of a run.")
        if self.anneal == 0 or (self.steps == 0 and self.epochs is None):
            raise KeyConflict(
                path,
                "a budget that does not shrink passes no other one.\nLet prune.steps and prune.anneal be above 0.",
            )
        return self

    @model_validator(mode="after")
    def _reuse_is_of_a_run(self) -> PruneSpec:
        if self.from_run is None and self.reuse != "plan":
            raise KeyConflict(("prune", "reuse"), f"{self.reuse} of which run? Name its folder in prune.from_run.")
        return self

    def counted(self, images: int, batch_size: int) -> PruneSpec:
        """Return the section with `steps` as `epochs` asks for, where it does.

        Args:
            images: training images.
            batch_size: of `data`, which holds where this section has none of its own.
        """
        if self.epochs is None:
            return self
        batch = min(self.batch_size or batch_size, images)
        return self.model_copy(update={"steps": max(1, round(self.epochs * images / batch))})

    @property
    def skips_blocks(self) -> bool:
        """True if whole blocks may be skipped."""
        return self.target.kind in ("latency", "latency_ms") if self.blocks == "auto" else self.blocks

    @property
    def takes_plan(self) -> bool:
        """True if the plan of another run is kept, whatever its budget was."""
        return self.from_run is not None and self.reuse == "plan"

    @property
    def takes_snapshot(self) -> bool:
        """True if plan and weights are those of another run's mask learning."""
        return self.from_run is not None and self.reuse == "snapshot"

    @property
    def larger_targets(self) -> tuple[float, ...]:
        """Those of `targets` that the budget passes on its way to `target`, the largest first."""
        return tuple(sorted({share for share in self.targets if share > self.target.value}, reverse=True))
