"""Accuracy at equal cost: PASS against the baselines, the same budget and the same fine-tuning for all.

    python benchmarks/accuracy.py --cifar CIFAR-FOLDER --weights RESNET20.safetensors [--signs FOLDER] [--quick]

Three settings. `home`: ResNet-20 with weights trained on the CIFAR-10 images it is pruned on. `signs`: the same weights
with a new head, first fine-tuned on photographs of hands. `halves`: a ResNet-20 trained on the first half of the CIFAR
classes, with a new head fine-tuned on the other half. Both are fine-tuned dense for sixteen times as long as pruned
networks will be, and kept beside the weights.

Every method gets the same budget, batches, recalibration and fine-tuning steps, and the dense network as its teacher.
There are two comparisons. At equal fine-tuning steps, `PASS, rehearsed` and `PASS, frozen` are the fair opponents:
they take nothing but the plan and the prompt out of mask learning. `PASS` keeps the weights that learned along, so its
opponents are the rows with extra steps (`--extra`), baselines that fine-tune for as many steps more, and growing
regularisation, which trains its weights for as many steps before it cuts: `growing` goes by L1 per MAC, the others by
Taylor scores per MAC or by L1 with the same share of every group, and listen to the dense network where they say so.

`iterative Taylor` is PASS without its hypernetwork and prompt, what is left being a Taylor score that is measured again
in every step while the network shrinks and learns (Molchanov et al., arXiv:1906.10771). torch-pruning's pruners cut
with their own scores, groups and slimming; of this network they can cut the inner channels of the blocks only.

Finished rows are kept in the results file, and a second call goes on with what is missing. `--quick` asks for fewer
rows and fewer steps, which the results say.
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
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy_report import report
from benchmarks.accuracy_settings import BATCH, SETTINGS, TRAINING, First, Setting, Size, train_
from passdeploy import count as count_model
from passdeploy.channels.allocation import Budget, choose_channels
from passdeploy.channels.plan import Plan
from passdeploy.models.prompt import VisualPrompt, with_prompt
from passdeploy.runtime.files import write_atomically
from passdeploy.runtime.seeds import seed_of
from passdeploy.runtime.versions import package_versions
from passdeploy.slimming.slim import slim
from passdeploy.sparsity.baselines import bn_scale_scores, magnitude_scores, random_scores, taylor_scores
from passdeploy.sparsity.growing import grow_penalty
from passdeploy.sparsity.learn import PassSettings, learn_masks
from passdeploy.training.batch_norm import recalibrate_batch_norm_
from passdeploy.training.evaluate import evaluate
from passdeploy.training.losses import DistillationLoss

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
PRIOR_BATCHES, RECALIBRATION_BATCHES, PROMPT_PIXELS = 8, 20, 4
GLIMPSE = 2000  # test images on which a network is looked at before it is fine-tuned


@dataclass(frozen=True)
class Method:
    """How channels are chosen."""

    score: str
    per_mac: bool = False
    uniform: bool = False
    prompt: str = "padding"
    keep_prompt: bool = True
    hypernet: str = "lstm"
    lr: float = PassSettings.lr
    weights: str = "trained"
    weights_lr: float = TRAINING.optimizer.lr
    distill: float = 0.5
    chosen_by: str = ""  # growing: the score that says what will go

    @property
    def learns(self) -> bool:
        """Whether it takes steps of its own before fine-tuning."""
        return self.score in ("pass", "growing")

    @property
    def is_partner(self) -> bool:
        """Whether another library cuts."""
        return self.score in PARTNERS


PARTNERS = ("group norm", "group Taylor", "group Hessian")
METHODS = {
    "random": Method("random"),
    **{
        f"{norm} {suffix}": Method(norm, per_mac=suffix == "per MAC", uniform=suffix == "uniform")
        for norm in ("l1", "l2", "bn", "taylor")
        for suffix in ("global", "per MAC", "uniform")
    },
    **{f"torch-pruning, {name}": Method(name) for name in PARTNERS},
    "growing": Method("growing", per_mac=True, chosen_by="l1", distill=0.0, weights_lr=0.02),
    "growing, taylor per MAC": Method("growing", per_mac=True, chosen_by="taylor", distill=0.0),
    "growing, taylor per MAC, distilled": Method("growing", per_mac=True, chosen_by="taylor"),
    "growing, l1 uniform, distilled": Method("growing", uniform=True, chosen_by="l1"),
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
    "PASS, twice the rate": Method("pass", per_mac=True, weights_lr=2 * TRAINING.optimizer.lr),
}
MAIN_METHODS = (
    "l1 uniform", "taylor per MAC", "growing, taylor per MAC, distilled", "iterative Taylor", "PASS, rehearsed", "PASS",
)  # fmt: skip

FULL = Size(200, 200, None, (0, 1, 2), (0.5, 0.3, 0.15), ("home", "signs", "halves"))
QUICK = Size(100, 100, 3000, (0,), (0.3,), ("home",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", type=Path, required=True, help="folder with train/CLASS and test/CLASS")
    parser.add_argument("--signs", type=Path, help="folder with train/CLASS and test/CLASS, for the setting signs")
    parser.add_argument("--weights", type=Path, required=True, help="of ResNet-20, trained on the CIFAR-10 images")
    parser.add_argument("--quick", action="store_true", help="one setting, seed and budget, fewer methods and steps")
    parser.add_argument("--settings", type=_list_of(str), help="of home, signs, halves")
    parser.add_argument("--shares", type=_list_of(float), help="of the MACs, such as 0.5,0.3,0.15")
    parser.add_argument("--seeds", type=_list_of(int))
    parser.add_argument("--methods", help="names divided by ;, or all")
    parser.add_argument("--steps", type=int, help="of mask learning, and as many of fine-tuning")
    parser.add_argument("--extra", action="store_true", help="baselines also with PASS's mask steps as fine-tuning")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    size = QUICK if asked.quick else FULL
    changes = {key: value for key in ("settings", "shares", "seeds") if (value := getattr(asked, key))}
    if asked.steps:
        changes |= {"mask_steps": asked.steps, "finetune_steps": asked.steps}
    size = replace(size, **changes)
    names = MAIN_METHODS
    if asked.methods:
        names = tuple(METHODS) if asked.methods == "all" else tuple(asked.methods.split(";"))
    out = asked.out or (RESULTS.with_stem("accuracy-quick") if asked.quick else RESULTS)
    torch.set_num_threads(1)  # one thread: the same sums in the same order, so the same figures
    rows = [row for row in _read(out) if row["size"] == _key(size)]
    for name in size.settings:
        wanted = [
            (share, seed, method, extra)
            for share in size.shares
            for seed in size.seeds
            for method in names
            for extra in ((False, True) if asked.extra and not METHODS[method].learns else (False,))
            if (name, share, seed, method, extra) not in {_row_key(row) for row in rows}
        ]
        if not wanted:
            continue
        setting = SETTINGS[name](asked, size)
        print(f"{name}: dense top-1 {setting.top1:.2%}", flush=True)
        for share, seed, method, extra in wanted:
            row = {
                "setting": name, "dense_top1": setting.top1, "share": share, "seed": seed, "method": method,
                "extra": extra, "size": _key(size),
            }  # fmt: skip
            row |= _measure(setting, METHODS[method], share, seed, extra, size)
            rows.append(row)
            print(
                f"{name} {share:.0%} seed {seed} {method}{' + extra' if extra else ''}: {row['top1']:.2%}", flush=True
            )
            _write(out, size, [*(r for r in _read(out) if r["size"] != _key(size)), *rows])
    print(report(rows, size.mask_steps, size.finetune_steps, BATCH, size.test_images))
    print(out)


def _measure(setting: Setting, method: Method, share: float, seed: int, extra: bool, size: Size) -> dict[str, Any]:
    """Choose, cut, recalibrate, fine-tune and evaluate once."""
    began = perf_counter()
    budget = Budget.of("macs", share, setting.channels.costs)
    if method.is_partner:
        smaller, macs, widths = _cut_by_torch_pruning(setting, method, budget, seed)
        chosen = perf_counter()
    else:
        plan, prompt, dense = _choose(setting, method, budget, seed, size)
        chosen, widths = perf_counter(), plan.widths()
        macs = setting.channels.costs.of("macs", widths)
        smaller = with_prompt(slim(dense, setting.channels.groups, plan), prompt)
    recalibrate_batch_norm_(smaller, islice(setting.stream("recalibrate", seed), RECALIBRATION_BATCHES))
    before = evaluate(smaller, First(setting.data.test, GLIMPSE), batch_size=250).top1
    steps = size.finetune_steps + (size.mask_steps if extra else 0)
    train_(smaller, setting, steps, seed_of("finetune", seed), teacher=setting.teacher)
    return {
        "top1": evaluate(smaller, setting.data.test, batch_size=256).top1,
        "top1_before_finetune": before,
        "macs": macs / setting.channels.costs.of("macs"),
        "seconds_to_choose": round(chosen - began, 1),
        "seconds": round(perf_counter() - began, 1),
        "widths": widths,
    }


def _choose(
    setting: Setting, method: Method, budget: Budget, seed: int, size: Size
) -> tuple[Plan, VisualPrompt | None, nn.Module]:
    """The plan of a method; the prompt that it keeps; and the weights to cut, trained only by `growing`."""
    dense = copy.deepcopy(setting.dense).to(memory_format=torch.channels_last)
    groups, costs = setting.channels.prunable, setting.channels.costs
    allocation = "uniform" if method.uniform else "global"
    if method.score == "pass":
        settings = PassSettings(
            steps=size.mask_steps, lr=method.lr, round_to=1, prompt_kind=method.prompt, prompt_size=PROMPT_PIXELS,
            hypernet_kind=method.hypernet, distill=method.distill, temperature=4.0, per_cost=method.per_mac,
            allocation=allocation, weights=method.weights, seed=seed,
            weights_optimizer=TRAINING.optimizer.model_copy(update={"lr": method.weights_lr}),
        )  # fmt: skip
        learned = learn_masks(
            dense, groups, lambda: setting.stream("learn", seed), F.cross_entropy, costs=costs, budget=budget,
            settings=settings, teacher=setting.teacher,
        )  # fmt: skip
        trained = learned.weights.to(memory_format=torch.contiguous_format) if learned.weights else setting.dense
        return learned.plan, learned.prompt if method.keep_prompt else None, trained
    scores = _scores(setting, dense, method.chosen_by or method.score, seed)
    plan = choose_channels(
        scores, groups, costs, budget, round_to=1, per_cost=method.per_mac, allocation=allocation
    )  # fmt: skip
    if method.score == "growing":
        dense = grow_penalty(
            dense, groups, plan, setting.stream("learn", seed), F.cross_entropy, steps=size.mask_steps,
            lr=method.weights_lr,
            distillation=DistillationLoss(setting.teacher, method.distill) if method.distill else None,
        )  # fmt: skip
        return plan, None, dense.to(memory_format=torch.contiguous_format).eval()
    return plan, None, setting.dense


def _cut_by_torch_pruning(
    setting: Setting, method: Method, budget: Budget, seed: int
) -> tuple[nn.Module, int, dict[str, int]]:
    """The network as torch-pruning cuts it to a budget, globally; its MACs and inner widths.

    It cannot follow the zero-padded shortcuts of this network, so all but the inner channels of the blocks stay.
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
            network, image, importance=scores, pruning_ratio=ratio, max_pruning_ratio=1.0, global_pruning=True,
            ignored_layers=kept,
        )  # fmt: skip
        if method.score != "group norm":
            _accumulate(network, scores, islice(setting.stream("learn", seed), PRIOR_BATCHES))
        pruner.step()
        network.zero_grad()
        macs = count_model(network, image).macs
        return network.eval(), macs, {name: layer.out_channels for name, layer in inner.items()}

    # A layer that would lose all its channels it leaves whole: beyond some ratio there is more left, not less.
    high = next((ratio for ratio in torch.arange(0.1, 1.0, 0.1).tolist() if cut(ratio)[1] <= budget.limit), None)
    if high is None:
        sys.exit(f"{method.score}: torch-pruning cannot cut to {budget.limit:,} multiply-adds")
    low = high - 0.1
    for _ in range(7):  # a thousandth of the ratio
        middle = (low + high) / 2
        low, high = (low, middle) if cut(middle)[1] <= budget.limit else (middle, high)
    return cut(high)


def _accumulate(network: nn.Module, scores: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """The gradients that torch-pruning's scores are made of: sums over batches, or squares of single images."""
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


def _scores(setting: Setting, dense: nn.Module, score: str, seed: int) -> dict[str, Tensor]:
    groups = setting.channels.prunable
    if score == "random":
        return random_scores(groups, seed=seed)
    if score == "bn":
        return bn_scale_scores(dense, groups)
    if score == "taylor":
        return taylor_scores(dense, groups, islice(setting.stream("learn", seed), PRIOR_BATCHES), F.cross_entropy)
    return magnitude_scores(dense, groups, norm=score)


def _write(out: Path, size: Size, rows: list[dict[str, Any]]) -> None:
    environment = {"machine": platform.machine(), "threads": 1, "versions": package_versions()}
    document = {"environment": environment, "size": asdict(size), "rows": rows}
    out.parent.mkdir(exist_ok=True)
    write_atomically(out, json.dumps(document, indent=1) + "\n")
    write_atomically(
        out.with_suffix(".md"), report(rows, size.mask_steps, size.finetune_steps, BATCH, size.test_images)
    )


def _read(out: Path) -> list[dict[str, Any]]:
    return json.loads(out.read_text())["rows"] if out.is_file() else []


def _key(size: Size) -> list[Any]:
    return [size.mask_steps, size.finetune_steps, size.test_images]


def _row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["setting"], row["share"], row["seed"], row["method"], row["extra"]


def _list_of(kind: type) -> Any:
    return lambda text: tuple(kind(part) for part in text.split(","))


if __name__ == "__main__":
    main()
