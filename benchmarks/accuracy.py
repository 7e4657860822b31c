"""Benchmark of accuracy at equal cost: PASS against the baselines, with the same budget and fine-tuning for all.

    python -m benchmarks.accuracy --cifar CIFAR-FOLDER --weights RESNET20.safetensors [--signs FOLDER] [--quick]
    python -m benchmarks.accuracy --cifar CIFAR-FOLDER --weights RESNET20.safetensors --long --extra
    python -m benchmarks.accuracy --cifar CIFAR-FOLDER --weights RESNET20.safetensors --mobilenet --extra

Three settings. `home`: ResNet-20 with weights trained on the CIFAR-10 images it is pruned on. `signs`: the same weights
with a new head, first fine-tuned on photographs of hands. `halves`: a ResNet-20 trained on the first half of the CIFAR
classes, with a new head fine-tuned on the other half. Both are fine-tuned dense for sixteen times as long as pruned
networks will be, and kept beside the weights.

Every method gets the same budget, batches, recalibration and fine-tuning steps, and the dense network as its teacher.
There are two comparisons. At equal fine-tuning steps, `PASS, rehearsed` and `PASS, frozen` are the fair opponents:
they keep only the plan and the prompt of mask learning. `PASS` also keeps the weights that were trained along with the
masks, so its opponents are the rows with extra steps (`--extra`), baselines that fine-tune for as many steps more, and
growing regularisation, which trains its weights for as many steps before it cuts: `growing` chooses by L1 per MAC, the
others by Taylor scores per MAC or by L1 with the same share of every group; `distilled` ones also learn from the dense
network.

`scratch, widths of PASS` trains the network that PASS made, from random weights, for as many steps as PASS takes in all
and with the same teacher; with extra steps, also for as many images as the dense network was trained on before, where
that was done here. It needs the row of PASS.

`iterative Taylor` is PASS without its hypernetwork and prompt: a Taylor score that is measured again in every step
while the network shrinks and learns (Molchanov et al., arXiv:1906.10771). torch-pruning's pruners cut with their own
scores, groups and slimming; of this network they can cut the inner channels of the blocks only.

Finished rows are kept in the results file, and a second call measures the missing ones. `--quick` asks for fewer rows
and fewer steps, which the results state. `--long` is a schedule that a user would train: `home` alone, 1,500 steps of
mask learning and as many of fine-tuning, in batches of 128 images, with results of its own. Its rate is 0.02, as a
recipe's default; growing regularisation trains at 0.01 before it cuts, where it ends better (`accuracy-trials.md`).
`--mobilenet` is a network whose streams can all be cut: MobileNetV2 on the same images at 64 pixels, 600 + 600 steps.
It is trained here first, where its weights do not lie beside those of ResNet-20.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy_networks import ACCURACY_NETWORKS
from benchmarks.accuracy_report import SCRATCH, report
from benchmarks.accuracy_settings import (
    BATCH,
    FROM_SCRATCH,
    LR,
    SETTINGS,
    TRAINED_HERE,
    TRAINING,
    AccuracySetting,
    Workload,
    train_,
)
from benchmarks.accuracy_splits import FirstImages
from passdeploy import count as count_model
from passdeploy.channels.allocation import Budget, choose_channels
from passdeploy.channels.plan import Plan
from passdeploy.models.prompt import VisualPrompt, with_prompt
from passdeploy.recipe import FinetuneSpec, OptimizerSpec
from passdeploy.runtime.files import write_atomically
from passdeploy.runtime.seeds import seed_of
from passdeploy.runtime.versions import package_versions
from passdeploy.slimming.slim import slim
from passdeploy.sparsity.baselines import bn_scale_scores, magnitude_scores, random_scores, taylor_scores
from passdeploy.sparsity.growing import grow_penalty
from passdeploy.sparsity.learn import learn_masks
from passdeploy.sparsity.settings import PassSettings
from passdeploy.training.batch_norm import RECALIBRATION_BATCHES, recalibrate_batch_norm_
from passdeploy.training.evaluate import evaluate
from passdeploy.training.losses import DistillationLoss

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
PRIOR_BATCHES, PROMPT_PIXELS = 8, 4
QUICK_TEST_IMAGES = 2000  # test images for the accuracy before fine-tuning


@dataclass(frozen=True)
class Method:
    """A way to choose channels: a score, its options, and for PASS the parts of mask learning."""

    score: str
    per_mac: bool = False
    uniform: bool = False
    prompt: str = "padding"
    keep_prompt: bool = True
    hypernet: str = "lstm"
    lr: float = PassSettings.lr
    weights: str = "trained"
    weights_lr: float | None = None  # None: `times_lr` times the rate of fine-tuning
    times_lr: float = 1.0
    distill: float = 0.5
    chosen_by: str = ""  # growing: the score that chooses the channels to remove

    @property
    def has_mask_steps(self) -> bool:
        """True if the method takes all steps anyway: mask learning, growing regularisation, training from scratch."""
        return self.score in ("pass", "growing", "scratch")

    @property
    def uses_torch_pruning(self) -> bool:
        """True if torch-pruning scores and cuts."""
        return self.score in TORCH_PRUNING_METHODS

    def lr_of_weights(self, finetuning: float) -> float:
        """Return the rate of weights that are trained before the cut, given that of fine-tuning."""
        return self.weights_lr or self.times_lr * finetuning


TORCH_PRUNING_METHODS = ("group norm", "group Taylor", "group Hessian")
METHODS = {
    "random": Method("random"),
    **{
        f"{norm} {suffix}": Method(norm, per_mac=suffix == "per MAC", uniform=suffix == "uniform")
        for norm in ("l1", "l2", "bn", "taylor")
        for suffix in ("global", "per MAC", "uniform")
    },
    **{f"torch-pruning, {name}": Method(name) for name in TORCH_PRUNING_METHODS},
    "growing": Method("growing", per_mac=True, chosen_by="l1", distill=0.0, weights_lr=0.02),
    "growing, taylor per MAC": Method("growing", per_mac=True, chosen_by="taylor", distill=0.0, weights_lr=LR),
    "growing, taylor per MAC, distilled": Method("growing", per_mac=True, chosen_by="taylor", weights_lr=LR),
    "growing, l1 uniform, distilled": Method("growing", uniform=True, chosen_by="l1", weights_lr=LR),
    "iterative Taylor": Method("pass", per_mac=True, prompt="none", hypernet="none", lr=0.0),
    "iterative Taylor, rehearsed": Method(
        "pass", per_mac=True, prompt="none", hypernet="none", lr=0.0, weights="rehearsed"
    ),
    "PASS": Method("pass", per_mac=True),
    "PASS, rehearsed": Method("pass", per_mac=True, weights="rehearsed"),
    "PASS, frozen": Method("pass", per_mac=True, weights="frozen"),
    "PASS, frozen, no prompt": Method("pass", per_mac=True, weights="frozen", prompt="none"),
    "iterative Taylor, frozen": Method("pass", per_mac=True, weights="frozen", prompt="none", hypernet="none", lr=0.0),
    "PASS, prompt not kept": Method("pass", per_mac=True, keep_prompt=False),
    "PASS, no prompt": Method("pass", per_mac=True, prompt="none"),
    "PASS, full prompt": Method("pass", per_mac=True, prompt="full"),
    "PASS, mlp": Method("pass", per_mac=True, hypernet="mlp"),
    "PASS, conv": Method("pass", per_mac=True, hypernet="conv"),
    "PASS, free scores": Method("pass", per_mac=True, hypernet="none"),
    "PASS, uniform": Method("pass", uniform=True),
    "PASS, labels alone": Method("pass", per_mac=True, distill=0.0),
    SCRATCH: Method("scratch"),
    "PASS, twice the rate": Method("pass", per_mac=True, times_lr=2.0),
}
MAIN_METHODS = (
    "l1 uniform",
    "taylor per MAC",
    "growing, taylor per MAC, distilled",
    "iterative Taylor",
    "PASS, rehearsed",
    "PASS",
)

FULL = Workload(200, 200, None, (0, 1, 2), (0.5, 0.3, 0.15), ("home", "signs", "halves"))
QUICK = Workload(100, 100, 3000, (0,), (0.3,), ("home",))
LONG = Workload(1500, 1500, None, (0, 1, 2), (0.5, 0.3, 0.15), ("home",), batch=128, lr=0.02)
MOBILENET = Workload(
    600, 600, None, (0, 1), (0.5, 0.3, 0.15), ("mobilenet",), network=ACCURACY_NETWORKS["mobilenet_v2"].title
)
LONG_METHODS = ("taylor per MAC", "growing, taylor per MAC, distilled", "PASS", SCRATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, required=True, help="folder with train/CLASS and test/CLASS")
    parser.add_argument("--signs", type=Path, help="folder with train/CLASS and test/CLASS, for the setting signs")
    parser.add_argument("--weights", type=Path, required=True, help="of ResNet-20, trained on the CIFAR-10 images")
    parser.add_argument("--quick", action="store_true", help="one setting, seed and budget, fewer methods and steps")
    parser.add_argument("--long", action="store_true", help="1,500 + 1,500 steps of 128 images, at home")
    parser.add_argument("--mobilenet", action="store_true", help="MobileNetV2, 600 + 600 steps")
    parser.add_argument("--settings", type=_list_of(str), help="of home, signs, halves, mobilenet")
    parser.add_argument("--shares", type=_list_of(float), help="of the MACs, such as 0.5,0.3,0.15")
    parser.add_argument("--seeds", type=_list_of(int))
    parser.add_argument("--methods", help="names divided by ;, or all")
    parser.add_argument("--steps", type=int, help="of mask learning, and as many of fine-tuning")
    parser.add_argument("--extra", action="store_true", help="baselines also with PASS's mask steps as fine-tuning")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    presets = {"quick": QUICK, "long": LONG, "mobilenet": MOBILENET}
    preset = next((name for name in presets if getattr(options, name)), None)
    size = presets[preset] if preset else FULL
    changes = {key: value for key in ("settings", "shares", "seeds") if (value := getattr(options, key))}
    if options.steps:
        changes |= {"mask_steps": options.steps, "finetune_steps": options.steps}
    size = replace(size, **changes)
    names = LONG_METHODS if preset in ("long", "mobilenet") else MAIN_METHODS
    if options.methods:
        names = tuple(METHODS) if options.methods == "all" else tuple(options.methods.split(";"))
    out = options.out or RESULTS.with_stem(f"accuracy-{preset}" if preset else "accuracy")
    torch.set_num_threads(1)  # one thread: the same sums in the same order, so the same figures
    rows = [row for row in _read_rows(out) if row["size"] == _workload_key(size)]
    for name in size.settings:
        wanted = [
            (share, seed, method, has_extra_steps)
            for share in size.shares
            for seed in size.seeds
            for method in names
            for has_extra_steps in ((False, True) if options.extra and _can_take_longer(method, name) else (False,))
            if (name, share, seed, method, has_extra_steps) not in {_row_key(row) for row in rows}
        ]
        if not wanted:
            continue
        setting = SETTINGS[name](options, size)
        print(f"{name}: dense top-1 {setting.top1:.2%}", flush=True)
        for share, seed, method, has_extra_steps in wanted:
            row = {
                "setting": name,
                "dense_top1": setting.top1,
                "share": share,
                "seed": seed,
                "method": method,
                "extra": has_extra_steps,
                "size": _workload_key(size),
            }
            if method == SCRATCH:
                made = [row for row in rows if _row_key(row) == (name, share, seed, "PASS", False)]
                widths = made[0]["widths"] if made else sys.exit("PASS first")
                row |= _train_from_scratch(setting, widths, seed, size, is_as_long_as_dense=has_extra_steps)
            else:
                row |= _measure(setting, METHODS[method], share, seed, has_extra_steps, size)
            rows.append(row)
            print(
                f"{name} {share:.0%} seed {seed} {method}{' + extra' if has_extra_steps else ''}: {row['top1']:.2%}",
                flush=True,
            )
            _write_rows(out, size, [*(r for r in _read_rows(out) if r["size"] != _workload_key(size)), *rows])
    print(report(rows, size))
    print(out)


def _can_take_longer(method: str, setting: str) -> bool:
    """Return True if there are rows with extra steps: of what takes fewer steps, or fewer than dense training took."""
    return setting in TRAINED_HERE if method == SCRATCH else not METHODS[method].has_mask_steps


def _measure(
    setting: AccuracySetting, method: Method, share: float, seed: int, has_extra_steps: bool, size: Workload
) -> dict[str, Any]:
    """Choose, cut, recalibrate, fine-tune and evaluate once."""
    began = setting.seconds()
    budget = Budget.of("macs", share, setting.channels.costs)
    if method.uses_torch_pruning:
        smaller, macs, widths = _cut_by_torch_pruning(setting, method, budget, seed)
        chosen = setting.seconds()
    else:
        plan, prompt, dense = _choose(setting, method, budget, seed, size)
        chosen, widths = setting.seconds(), plan.widths()
        macs = setting.channels.costs.of("macs", widths)
        smaller = with_prompt(slim(dense, setting.channels.groups, plan), prompt)
    recalibrate_batch_norm_(smaller, islice(setting.stream("recalibrate", seed), RECALIBRATION_BATCHES))
    before = evaluate(smaller, FirstImages(setting.data.test, QUICK_TEST_IMAGES), batch_size=250).top1
    steps = size.finetune_steps + (size.mask_steps if has_extra_steps else 0)
    train_(smaller, setting, steps, seed_of("finetune", seed), teacher=setting.teacher, spec=_finetuning(size.lr))
    return {
        "top1": evaluate(smaller, setting.data.test, batch_size=256).top1,
        "top1_before_finetune": before,
        "macs": macs / setting.channels.costs.of("macs"),
        "seconds_to_choose": round(chosen - began, 1),
        "seconds": round(setting.seconds() - began, 1),
        "widths": widths,
    }


def _finetuning(lr: float) -> FinetuneSpec:
    return TRAINING.model_copy(update={"optimizer": TRAINING.optimizer.model_copy(update={"lr": lr})})


def _train_from_scratch(
    setting: AccuracySetting, widths: dict[str, int], seed: int, size: Workload, *, is_as_long_as_dense: bool
) -> dict[str, Any]:
    """Train a network of these widths from random weights, for as many steps as PASS takes in all.

    Args:
        is_as_long_as_dense: also for as many images as the dense network was trained on.
    """
    began, plan = setting.seconds(), Plan({name: tuple(range(width)) for name, width in widths.items()})
    smaller = slim(setting.dense, setting.channels.groups, plan)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in smaller.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    steps = size.mask_steps + size.finetune_steps
    if is_as_long_as_dense:
        steps += round(setting.dense_images / setting.batch)
    train_(smaller, setting, steps, seed_of("finetune", seed), teacher=setting.teacher, spec=FROM_SCRATCH)
    return {
        "top1": evaluate(smaller, setting.data.test, batch_size=256).top1,
        "top1_before_finetune": 1 / setting.data.num_classes,
        "macs": setting.channels.costs.of("macs", widths) / setting.channels.costs.of("macs"),
        "seconds_to_choose": 0.0,
        "seconds": round(setting.seconds() - began, 1),
        "widths": widths,
    }


def _choose(
    setting: AccuracySetting, method: Method, budget: Budget, seed: int, size: Workload
) -> tuple[Plan, VisualPrompt | None, nn.Module]:
    """Choose channels by a method.

    Returns:
        The plan; the prompt if the method keeps one; and the network to cut, whose weights PASS and growing trained.
    """
    dense = copy.deepcopy(setting.dense).to(memory_format=torch.channels_last)
    groups, costs = setting.channels.prunable, setting.channels.costs
    allocation = "uniform" if method.uniform else "global"
    if method.score == "pass":
        settings = PassSettings(
            steps=size.mask_steps,
            lr=method.lr,
            round_to=1,
            prompt_kind=method.prompt,
            prompt_size=PROMPT_PIXELS,
            hypernet_kind=method.hypernet,
            distill=method.distill,
            temperature=4.0,
            per_cost=method.per_mac,
            allocation=allocation,
            weights=method.weights,
            seed=seed,
            weights_optimizer=_finetuning(method.lr_of_weights(size.lr)).optimizer,
        )
        learned = learn_masks(
            dense,
            groups,
            lambda: setting.stream("learn", seed),
            F.cross_entropy,
            costs=costs,
            budget=budget,
            settings=settings,
            teacher=setting.teacher,
        )
        trained = learned.weights.to(memory_format=torch.contiguous_format) if learned.weights else setting.dense
        return learned.plan, learned.prompt if method.keep_prompt else None, trained
    scores = _scores(setting, dense, method.chosen_by or method.score, seed)
    plan = choose_channels(scores, groups, costs, budget, round_to=1, per_cost=method.per_mac, allocation=allocation)
    if method.score == "growing":
        dense = grow_penalty(
            dense,
            groups,
            plan,
            setting.stream("learn", seed),
            F.cross_entropy,
            steps=size.mask_steps,
            optimizer=OptimizerSpec(lr=method.lr_of_weights(size.lr), weight_decay=0.0),
            distillation=DistillationLoss(setting.teacher, method.distill) if method.distill else None,
        )
        return plan, None, dense.to(memory_format=torch.contiguous_format).eval()
    return plan, None, setting.dense


def _cut_by_torch_pruning(
    setting: AccuracySetting, method: Method, budget: Budget, seed: int
) -> tuple[nn.Module, int, dict[str, int]]:
    """Cut the network to a budget with torch-pruning, globally; return it with its MACs and inner widths.

    torch-pruning cannot trace the zero-padded shortcuts of this network, so only the inner channels of the blocks are
    cut.
    """
    import torch_pruning as tp

    image = torch.zeros(1, *setting.data.image_shape)
    scores = {
        "group norm": tp.importance.GroupMagnitudeImportance(p=2),
        "group Taylor": tp.importance.GroupTaylorImportance(),
        "group Hessian": tp.importance.GroupHessianImportance(),
    }[method.score]

    def cut(ratio: float) -> tuple[nn.Module, int, dict[str, int]]:
        network = copy.deepcopy(setting.dense)
        inner = {name: layer for name, layer in network.named_modules() if name.endswith(".conv1")}
        kept = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m not in inner.values()]
        pruner = tp.pruner.BasePruner(
            network,
            image,
            importance=scores,
            pruning_ratio=ratio,
            max_pruning_ratio=1.0,
            global_pruning=True,
            ignored_layers=kept,
        )
        if method.score != "group norm":
            _accumulate_gradients(network, scores, islice(setting.stream("learn", seed), PRIOR_BATCHES))
        pruner.step()
        network.zero_grad()
        macs = count_model(network, image).macs
        return network.eval(), macs, {name: layer.out_channels for name, layer in inner.items()}

    # torch-pruning leaves a layer whole that would lose all its channels, so beyond some ratio it removes less, not
    # more; the search starts below the first ratio that meets the budget.
    high = next((ratio for ratio in torch.arange(0.1, 1.0, 0.1).tolist() if cut(ratio)[1] <= budget.limit), None)
    if high is None:
        sys.exit(f"{method.score}: torch-pruning cannot cut to {budget.limit:,} multiply-adds")
    low = high - 0.1
    for _ in range(7):  # a thousandth of the ratio
        middle = (low + high) / 2
        low, high = (low, middle) if cut(middle)[1] <= budget.limit else (middle, high)
    return cut(high)


def _accumulate_gradients(network: nn.Module, scores: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Accumulate the gradients of torch-pruning's scores: sums over batches, or squares of single images."""
    network.eval()
    scores.zero_grad() if hasattr(scores, "zero_grad") else None
    for images, labels in batches:
        if hasattr(scores, "accumulate_grad"):  # Hessian: needs the gradient of every image
            for loss in F.cross_entropy(network(images[:16]), labels[:16], reduction="none"):
                network.zero_grad()
                loss.backward(retain_graph=True)
                scores.accumulate_grad(network)
        else:
            F.cross_entropy(network(images), labels).backward()


def _scores(setting: AccuracySetting, dense: nn.Module, score: str, seed: int) -> dict[str, Tensor]:
    groups = setting.channels.prunable
    if score == "random":
        return random_scores(groups, seed=seed)
    if score == "bn":
        return bn_scale_scores(dense, groups)
    if score == "taylor":
        return taylor_scores(dense, groups, islice(setting.stream("learn", seed), PRIOR_BATCHES), F.cross_entropy)
    return magnitude_scores(dense, groups, norm=score)


def _write_rows(out: Path, size: Workload, rows: list[dict[str, Any]]) -> None:
    environment = {"machine": platform.machine(), "threads": 1, "versions": package_versions()}
    document = {"environment": environment, "size": asdict(size), "rows": rows}
    out.parent.mkdir(exist_ok=True)
    write_atomically(out, json.dumps(document, indent=1) + "\n")
    write_atomically(out.with_suffix(".md"), report(rows, size))


def _read_rows(out: Path) -> list[dict[str, Any]]:
    return json.loads(out.read_text())["rows"] if out.is_file() else []


def _workload_key(size: Workload) -> list[Any]:
    others = [] if size.batch == BATCH else [size.batch, size.lr]  # rows of before have neither
    return [size.mask_steps, size.finetune_steps, size.test_images, *others]


def _row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["setting"], row["share"], row["seed"], row["method"], row["extra"]


def _list_of(kind: type) -> Any:
    return lambda text: tuple(kind(part) for part in text.split(","))


if __name__ == "__main__":
    main()
