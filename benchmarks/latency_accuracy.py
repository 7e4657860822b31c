"""Accuracy at equal measured latency: plans made for the latency against plans made for multiply-adds.

Two networks at half their latency (ONNX Runtime, one thread): ResNet-20, whose weights are given, and torchvision's
MobileNetV2 on the same images enlarged to 64 pixels, which is trained here first; its weights are kept.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.accuracy_settings import DENSE_BATCH, Setting, train_, train_dense
from benchmarks.latency_rows import Rows, against
from passdeploy.channels.allocation import Budget, choose_channels
from passdeploy.channels.plan import Plan, Scores
from passdeploy.data.splits import ImageData, load_data
from passdeploy.errors import BudgetError
from passdeploy.latency.hardware import MeasurementContext, block_of
from passdeploy.latency.resized_networks import sampler_for
from passdeploy.latency.sampling import SamplingPlan, sample_latency
from passdeploy.latency.search import LatencyGoal, LatencySearch
from passdeploy.latency.table import LatencyTable
from passdeploy.models.build import build_model
from passdeploy.profiling.interleaved import TimeBudget
from passdeploy.recipe import DataSpec
from passdeploy.runtime.seeds import seed_of
from passdeploy.slimming.slim import slim
from passdeploy.sparsity.baselines import taylor_scores
from passdeploy.training.batch_norm import recalibrate_batch_norm_
from passdeploy.training.evaluate import evaluate

TAYLOR_IMAGES = 1024  # that scores are taken over
SHARE = 0.5
KINDS = ("latency", "macs")  # what is planned for
DENSE_STEPS = 4000  # of training MobileNetV2


@dataclass(frozen=True)
class Subject:
    """A network, and the size of the images it sees."""

    model: str
    pixels: int
    title: str


SUBJECTS = {
    "resnet20": Subject("passdeploy/resnet20_cifar", 32, "ResNet-20"),
    "mobilenet_v2": Subject("torchvision/mobilenet_v2", 64, "MobileNetV2 (64 pixels)"),
}


def accuracy(asked: argparse.Namespace, rows: Rows) -> None:
    """Networks at half their measured latency: planned for the latency, and planned for multiply-adds.

    The same scores (Taylor) and the same fine-tuning; of multiply-adds as many are kept as the latency allows, found by
    measuring. Accuracy is counted on all test images. `--plans` stops before the training, which may be disturbed.
    """
    if asked.cifar is None or asked.weights is None:
        sys.exit("the part accuracy needs --cifar FOLDER and --weights FILE")
    torch.set_num_threads(1)
    for name, subject in SUBJECTS.items():
        if name in asked.subjects:
            data = _images(asked.cifar, subject)
            weights = asked.weights if name == "resnet20" else asked.weights.with_name(f"{name}-cifar10.safetensors")
            if not weights.is_file():
                train_dense(_network(subject, None), data, weights, steps=DENSE_STEPS)
            setting = Setting.of(name, _network(subject, weights), data)
            scores = {seed: _scores(setting, seed) for seed in asked.seeds}
            for batch in asked.batches:
                _plan(name, batch, setting, scores, asked, rows)
            if not asked.plans:
                _finetune(name, setting, scores, asked, rows)


def _finetune(name: str, setting: Setting, scores: dict[int, Scores], asked: argparse.Namespace, rows: Rows) -> None:
    """Cut by each plan, fine-tune and count."""
    for batch, seed, kind in product(asked.batches, asked.seeds, KINDS):
        which = {"network": name, "batch": batch, "seed": seed, "plan": kind}
        planned = rows.find(part="accuracy plan", **which)
        key = {"part": "accuracy", **which, "steps": asked.steps}
        if planned is None or rows.find(**key) is not None:
            continue
        kept = {
            group: tuple(sorted(scores[seed][group].sort(descending=True, stable=True).indices[:width].tolist()))
            for group, width in planned["widths"].items()
        }
        smaller = slim(setting.dense, setting.channels.groups, Plan(kept))
        recalibrate_batch_norm_(smaller, islice(setting.stream("recalibrate", seed), 20))
        train_(smaller, setting, asked.steps, seed_of("finetune", seed), teacher=setting.dense)
        top1 = evaluate(smaller, setting.data.test, batch_size=256).top1
        rows.add({**planned, **key, "top1": top1, "dense_top1": setting.top1})


def _plan(
    name: str, batch: int, setting: Setting, scores: dict[int, Scores], asked: argparse.Namespace, rows: Rows
) -> None:
    """Both plans of every seed, measured."""
    shape = tuple(setting.data.image_shape)
    images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    sampler = sampler_for("ort", setting.dense, setting.channels, images, threads=1)
    path = asked.tables / f"{name}-cifar-{batch}-1.json"
    if not path.is_file():
        place = MeasurementContext.here(backend="ort", threads=1, batch=batch, image_shape=shape)
        sample_latency(sampler, setting.channels, place, SamplingPlan()).save(path)
    table = LatencyTable.load(path)
    dense_again, costs = partial(sampler.runner, {}, "dense"), setting.channels.costs
    for seed, kind in product(asked.seeds, KINDS):
        key = {"part": "accuracy plan", "network": name, "batch": batch, "seed": seed, "plan": kind}
        if rows.find(**key) is not None:
            continue
        if kind == "latency":
            meeting = LatencySearch(sampler, setting.channels, table, round_to=block_of("ort"), seconds=2.0)
            plan = meeting.find(scores[seed], LatencyGoal(share=SHARE)).trial.plan
        else:

            def is_fast_enough(plan: Plan) -> bool:
                took = against(dense_again, partial(sampler.runner, plan.widths(), "slim"), TimeBudget(seconds=1.0))
                return took["slim_ms"] <= SHARE * took["dense_ms"]

            plan = _most_macs(setting, scores[seed], is_fast_enough)
        measured = against(dense_again, partial(sampler.runner, plan.widths(), "slim"))
        rows.add({
            **key, **measured, "found": measured["slim_ms"] / measured["dense_ms"],
            "macs": costs.of("macs", plan.widths()) / costs.of("macs"), "widths": plan.widths(),
        })  # fmt: skip


def _most_macs(setting: Setting, scores: Scores, is_fast_enough: Callable[[Plan], bool]) -> Plan:
    """The plan with the most multiply-adds that is fast enough, found by halving."""
    costs, best = setting.channels.costs, None
    low, high = 0.1, 0.9
    for _ in range(7):
        share = (low + high) / 2
        budget = Budget.of("macs", share, costs)
        try:
            tried = choose_channels(scores, setting.channels.prunable, costs, budget, round_to=8)
        except BudgetError:  # so few cannot be kept
            low = share
            continue
        if is_fast_enough(tried):
            low, best = share, tried
        else:
            high = share
    if best is None:
        sys.exit("no plan for multiply-adds is fast enough")
    return best


def _scores(setting: Setting, seed: int) -> Scores:
    batches = islice(setting.stream("learn", seed), TAYLOR_IMAGES // setting.batch)
    return taylor_scores(copy.deepcopy(setting.dense), setting.channels.prunable, batches, F.cross_entropy)


def _images(root: Path, subject: Subject) -> ImageData:
    """Decoded once, kept in memory as uint8."""
    return load_data(DataSpec(name="imagefolder", root=str(root), image_size=subject.pixels, batch_size=DENSE_BATCH))


def _network(subject: Subject, weights: Path | None) -> nn.Module:
    return build_model(subject.model, num_classes=10, weights=None if weights is None else str(weights))
