"""Benchmark of accuracy at equal measured latency: plans made for the latency against plans made for multiply-adds.

Two networks are pruned to half their latency (ONNX Runtime, one thread): ResNet-20, whose weights are given, and
torchvision's MobileNetV2 on the same images enlarged to 64 pixels, which is trained here first; its weights are kept.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from itertools import islice, product

import torch
import torch.nn.functional as F

from benchmarks.accuracy_networks import ACCURACY_NETWORKS, build_network, dense_weights, load_images
from benchmarks.accuracy_settings import AccuracySetting, train_
from benchmarks.latency_rows import Rows, measure_pair
from passdeploy.channels.allocation import Budget, choose_channels
from passdeploy.channels.plan import Plan, Scores
from passdeploy.errors import BudgetError
from passdeploy.latency.measurement_context import MeasurementContext, block_of
from passdeploy.latency.resized_networks import make_sampler
from passdeploy.latency.sampling import SamplingPlan, sample_latency
from passdeploy.latency.search import LatencyGoal, LatencySearch
from passdeploy.latency.table import LatencyTable
from passdeploy.profiling.interleaved import TimeBudget
from passdeploy.runtime.seeds import seed_of
from passdeploy.slimming.slim import slim
from passdeploy.sparsity.baselines import taylor_scores
from passdeploy.training.batch_norm import recalibrate_batch_norm_
from passdeploy.training.evaluate import evaluate

TAYLOR_IMAGES = 1024  # that scores are taken over
SHARE = 0.5
KINDS = ("latency", "macs")  # what is planned for


def accuracy(options: argparse.Namespace, rows: Rows) -> None:
    """Prune networks to half their measured latency, planned for the latency and planned for multiply-adds.

    Both have the same scores (Taylor) and the same fine-tuning. A plan for multiply-adds keeps as many as the latency
    allows, found by measuring. Accuracy is measured on all test images. With `--plans` nothing is trained, so that
    plans can be measured first on an otherwise idle machine.
    """
    if options.cifar is None or options.weights is None:
        sys.exit("the part accuracy needs --cifar FOLDER and --weights FILE")
    torch.set_num_threads(1)
    for name, network in ACCURACY_NETWORKS.items():
        if name in options.subjects:
            data = load_images(options.cifar, network)
            weights = dense_weights(name, data, options.weights)
            setting = AccuracySetting.of(name, build_network(network, weights), data)
            scores = {seed: _scores(setting, seed) for seed in options.seeds}
            for batch in options.batches:
                _plan(name, batch, setting, scores, options, rows)
            if not options.plans:
                _finetune(name, setting, scores, options, rows)


def _finetune(
    name: str, setting: AccuracySetting, scores: dict[int, Scores], options: argparse.Namespace, rows: Rows
) -> None:
    """Cut by each plan, fine-tune and evaluate."""
    for batch, seed, kind in product(options.batches, options.seeds, KINDS):
        identity = {"network": name, "batch": batch, "seed": seed, "plan": kind}
        planned = rows.find(part="accuracy plan", **identity)
        key = {"part": "accuracy", **identity, "steps": options.steps}
        if planned is None or rows.find(**key) is not None:
            continue
        kept = {
            group: tuple(sorted(scores[seed][group].sort(descending=True, stable=True).indices[:width].tolist()))
            for group, width in planned["widths"].items()
        }
        smaller = slim(setting.dense, setting.channels.groups, Plan(kept))
        recalibrate_batch_norm_(smaller, islice(setting.stream("recalibrate", seed), 20))
        train_(smaller, setting, options.steps, seed_of("finetune", seed), teacher=setting.dense)
        top1 = evaluate(smaller, setting.data.test, batch_size=256).top1
        rows.add({**planned, **key, "top1": top1, "dense_top1": setting.top1})


def _plan(
    name: str, batch: int, setting: AccuracySetting, scores: dict[int, Scores], options: argparse.Namespace, rows: Rows
) -> None:
    """Make and measure both plans of every seed."""
    shape = tuple(setting.data.image_shape)
    images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    sampler = make_sampler("ort", setting.dense, setting.channels, images, threads=1)
    path = options.tables / f"{name}-cifar-{batch}-1.json"
    if not path.is_file():
        context = MeasurementContext.here(backend="ort", threads=1, batch=batch, image_shape=shape)
        sample_latency(sampler, setting.channels, context, SamplingPlan()).save(path)
    table = LatencyTable.load(path)
    build_dense, costs = partial(sampler.runner, {}, "dense"), setting.channels.costs
    for seed, kind in product(options.seeds, KINDS):
        key = {"part": "accuracy plan", "network": name, "batch": batch, "seed": seed, "plan": kind}
        if rows.find(**key) is not None:
            continue
        if kind == "latency":
            search = LatencySearch(sampler, setting.channels, table, round_to=block_of("ort"), seconds=2.0)
            plan = search.find(scores[seed], LatencyGoal(share=SHARE)).best.plan
        else:

            def is_fast_enough(plan: Plan) -> bool:
                took = measure_pair(
                    build_dense, partial(sampler.runner, plan.widths(), "slim"), TimeBudget(seconds=1.0)
                )
                return took["slim_ms"] <= SHARE * took["dense_ms"]

            plan = _plan_with_most_macs(setting, scores[seed], is_fast_enough)
        measured = measure_pair(build_dense, partial(sampler.runner, plan.widths(), "slim"))
        rows.add(
            {
                **key,
                **measured,
                "found": measured["slim_ms"] / measured["dense_ms"],
                "macs": costs.of("macs", plan.widths()) / costs.of("macs"),
                "widths": plan.widths(),
            }
        )


def _plan_with_most_macs(setting: AccuracySetting, scores: Scores, is_fast_enough: Callable[[Plan], bool]) -> Plan:
    """Find the plan with the most multiply-adds that is fast enough, by bisection."""
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


def _scores(setting: AccuracySetting, seed: int) -> Scores:
    batches = islice(setting.stream("learn", seed), TAYLOR_IMAGES // setting.batch)
    return taylor_scores(copy.deepcopy(setting.dense), setting.channels.prunable, batches, F.cross_entropy)
