"""Slimming of a network by passdeploy, and checks of the result: outputs, counts, sizes, training, rebuilding."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.slimming_common import SHARE, Report, error_summary, timed, uncut_layers
from benchmarks.zoo import Entry
from passdeploy.channels.allocation import Budget, choose_channels
from passdeploy.channels.groups import ChannelGroup, ChannelMap
from passdeploy.channels.plan import Plan
from passdeploy.grouping.find import map_channels
from passdeploy.runtime import seeds
from passdeploy.slimming.agreement import relative_error
from passdeploy.slimming.masked import masked
from passdeploy.slimming.size_attributes import size_attributes_after
from passdeploy.slimming.slim import hidden_state, resize_, slim
from passdeploy.tracing.counts import count

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def measure_ours(entry: Entry, report: Report) -> None:
    """Cut the network with passdeploy and check the result."""
    model, inputs = entry.build(), entry.inputs()
    dense = _outputs(model, inputs, entry)
    grads = [parameter.requires_grad for parameter in model.parameters()]
    report({"phase": "groups"})
    channels, groups_s = timed(partial(map_channels, model, inputs))
    plan = half_plan(channels.groups, entry.key)
    report({**_describe_channels(channels, plan), "groups_s": groups_s, "phase": "slim"})
    smaller, slim_s = timed(partial(slim, model, channels.groups, plan))
    report({"slim_s": slim_s, "phase": "compare"})

    reference = masked(model, channels.groups, plan)
    del model
    expected = _outputs(reference, inputs, entry)
    outputs = _outputs(smaller, inputs, entry, like=expected)
    verdict = _compare(expected, outputs, dense)
    if not any(len(plan.removed(group)) for group in channels.groups):
        verdict["status"] = "uncut"
    if verdict["status"] == "inexact":
        verdict["float32"] = verdict["rel_error"]
        reference, smaller, inputs64 = reference.double(), smaller.double(), _as_float64(inputs)
        expected = _outputs(reference, inputs64, entry)
        outputs = _outputs(smaller, inputs64, entry, like=expected)
        finer = _compare(expected, outputs, dense)
        verdict |= {"float64": finer["rel_error"], "status": finer["status"]}
        smaller = smaller.float()
    report({**verdict, "phase": "count"})
    del reference, expected
    gc.collect()

    checks = {
        "counts": lambda: _check_counts(smaller, inputs, channels, plan, entry),
        "numbers": lambda: _check_size_attributes(smaller, grads),
        "trains": lambda: _check_training(smaller, entry),
        "rebuilds": lambda: _check_rebuilding(smaller, inputs, channels, plan, entry),
    }
    for name, check in checks.items():
        report({"phase": name})
        try:
            check()
            report({name: True})
        except Exception as error:
            report({name: error_summary(error)})
        gc.collect()


def half_plan(groups: Sequence[ChannelGroup], key: str) -> Plan:
    """Draw a plan that keeps half of the channels of every prunable group, at least one."""
    draw = random.Random(seeds.seed_of("plan", key))
    kept = {}
    for group in groups:
        if group.is_prunable:
            stay = max(1, round(group.width * (1 - SHARE)))
            kept[group.name] = tuple(sorted(draw.sample(range(group.width), stay)))
    return Plan(kept)


def _describe_channels(channels: ChannelMap, plan: Plan) -> dict[str, Any]:
    """Describe the groups, the reasons of protected ones, and the size that the plan leaves."""
    whole = [group for group in channels.groups if not group.is_prunable]
    sizes = {group.name: group.width * group.span for group in channels.groups}
    outputs = sum(sizes[group.name] for group in whole if group.reason.startswith("the model's output"))
    removable = sum(sizes[group.name] for group in channels.prunable)
    reasons: Counter[str] = Counter()
    for group in whole:
        reasons[group.reason or "a single channel"] += sizes[group.name]
    widths = plan.widths()
    return {
        "groups": len(channels.groups),
        "protected": len(whole),
        "prunable_share": removable / max(1, sum(sizes.values()) - outputs),
        "reasons": reasons.most_common(5),
        "params": channels.costs.of("params"),
        "macs": channels.costs.of("macs"),
        "params_kept": channels.costs.of("params", widths) / max(1, channels.costs.of("params")),
        "macs_kept": channels.costs.of("macs", widths) / max(1, channels.costs.of("macs")),
    }


def _outputs(
    model: nn.Module, inputs: Sequence[Any], entry: Entry, *, like: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Run a network in evaluation mode and name its outputs; detectors take the boxes from `like` if it is given."""
    model.eval()
    with torch.no_grad():
        if entry.zoo != "detection":
            return {str(index): leaf for index, leaf in enumerate(tree_leaves(model(*inputs)))}
        return _detector_outputs(model, inputs[0], like)


def _detector_outputs(model: Any, images: list[Tensor], like: Mapping[str, Any] | None) -> dict[str, Any]:
    batch, _ = model.transform(images)
    features = model.backbone(batch.tensors)
    levels = list(features.values()) if isinstance(features, dict) else [features]
    outputs: dict[str, Any] = {}
    if not hasattr(model, "rpn"):
        for index, leaf in enumerate(tree_leaves(model.head(levels))):
            outputs[f"head.{index}"] = leaf
        return outputs
    for index, leaf in enumerate(tree_leaves(model.rpn.head(levels))):
        outputs[f"rpn.{index}"] = leaf
    boxes = like["boxes"] if like else model.rpn(batch, features)[0]
    boxes = [box.to(batch.tensors.dtype) for box in boxes]
    for kind in ("box", "mask", "keypoint"):
        if getattr(model.roi_heads, f"{kind}_roi_pool", None) is not None:
            pooled = getattr(model.roi_heads, f"{kind}_roi_pool")(features, boxes, batch.image_sizes)
            pooled = getattr(model.roi_heads, f"{kind}_head")(pooled)
            for index, leaf in enumerate(tree_leaves(getattr(model.roi_heads, f"{kind}_predictor")(pooled))):
                outputs[f"{kind}.{index}"] = leaf
    return {**outputs, "boxes": boxes}


def _compare(expected: Mapping[str, Any], outputs: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the outputs of the slim network with the masked one, and the masked one with the dense one."""
    tensors = {name: value for name, value in expected.items() if isinstance(value, Tensor) and name != "boxes"}
    if expected.keys() != outputs.keys():
        return {"status": "inexact", "rel_error": float("inf")}
    error = max(relative_error(value, outputs[name]) for name, value in tensors.items())
    dtype = next(iter(tensors.values())).dtype
    tolerance = TOLERANCE[dtype]
    is_finite = all(bool(value.isfinite().all()) for value in tensors.values())
    moved = max(_movement(dense[name], value) for name, value in tensors.items())
    status = "exact" if error <= tolerance else "inexact"
    if status == "exact" and (not is_finite or moved < 100 * TOLERANCE[torch.float32]):
        status = "unjudged"
    return {"status": status, "rel_error": error, "moved": moved}


def _movement(dense: Tensor, cut: Tensor) -> float:
    return relative_error(dense, cut) if dense.shape == cut.shape else float("inf")


def _as_float64(inputs: Sequence[Any]) -> tuple[Any, ...]:
    moved: tuple[Any, ...] = tree_map(lambda leaf: leaf.double() if isinstance(leaf, Tensor) else leaf, tuple(inputs))
    return moved


def _check_counts(smaller: nn.Module, inputs: Sequence[Any], channels: ChannelMap, plan: Plan, entry: Entry) -> None:
    """Check that the counts of the slim network are those that the cost model predicts."""
    counted, widths = count(smaller, inputs), plan.widths()
    for kind in ("params", "macs"):
        if kind == "macs" and entry.zoo == "detection":
            continue  # the number of boxes, and with it the work, depends on the weights
        expected, is_now = channels.costs.of(kind, widths), getattr(counted, kind)
        if expected != is_now:
            raise ValueError(f"{is_now:,} {kind}, but {expected:,} were predicted")


def _check_size_attributes(smaller: nn.Module, grads: Sequence[bool]) -> None:
    """Check that size attributes match the shapes of the weights, and that `requires_grad` is unchanged."""
    if [parameter.requires_grad for parameter in smaller.parameters()] != list(grads):
        raise ValueError("requires_grad changed")
    for name, module in smaller.named_modules():
        for attribute, expected in _expected_sizes(module):
            if getattr(module, attribute) != expected:
                raise ValueError(f"{name}.{attribute} is {getattr(module, attribute)}, but its weight says {expected}")


def _expected_sizes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    shape = tuple(weight.shape)
    if isinstance(module, nn.modules.conv._ConvNd):
        first, second = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
        yield first, shape[0]
        yield second, shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        yield "out_features", shape[0]
        yield "in_features", shape[1]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        yield "num_features", shape[0]
    elif isinstance(module, nn.GroupNorm):
        yield "num_channels", shape[0]
    elif isinstance(module, nn.LayerNorm):
        yield "normalized_shape", shape


def _check_training(smaller: nn.Module, entry: Entry) -> None:
    """Check that a deep copy of the slim network can take a training step, if the dense network can."""
    try:
        _train_one_step(deepcopy(smaller), entry)
    except Exception:
        try:
            _train_one_step(entry.build(), entry)
        except Exception:
            return  # the dense network cannot either
        raise


def _train_one_step(model: nn.Module, entry: Entry) -> None:
    model.train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    leaves = [leaf for leaf in tree_leaves(model(*entry.training_inputs())) if isinstance(leaf, Tensor)]
    loss = sum(leaf.float().square().mean() for leaf in leaves if leaf.is_floating_point())
    assert isinstance(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    moved = [bool((old != new).any()) for old, new in zip(before, model.parameters(), strict=True)]
    if not any(moved):
        raise ValueError("no parameter moved")


def _check_rebuilding(
    smaller: nn.Module, inputs: Sequence[Any], channels: ChannelMap, plan: Plan, entry: Entry
) -> None:
    """Check that the factory, the plan and the tensors give the same network again, bit for bit."""
    tensors = {**smaller.state_dict(), **hidden_state(smaller, channels.groups)}
    state = {name: tensor.clone() for name, tensor in tensors.items()}
    expected = _outputs(smaller, inputs, entry)
    again = entry.build()
    resize_(again, state, size_attributes_after(channels.groups, plan))
    for name, value in _outputs(again, inputs, entry, like=expected).items():
        if isinstance(value, Tensor) and not torch.equal(value, expected[name]):
            raise ValueError(f"output {name} differs by {relative_error(expected[name], value):.1e}")


def measure_rounding(entry: Entry, report: Report) -> None:
    """Count the layers that stay whole when half of the multiply-adds are removed with widths in multiples of 8."""
    model, inputs = entry.build(), entry.inputs()
    report({"phase": "slim"})
    channels = map_channels(model, inputs)
    scores = {
        group.name: torch.rand(group.width, generator=seeds.generator("round", entry.key, group.name))
        for group in channels.prunable
    }
    budget = Budget.of("macs", SHARE, channels.costs)
    plan = choose_channels(scores, channels.groups, channels.costs, budget, round_to=8, allocation="uniform")
    smaller = slim(model, channels.groups, plan)
    touched = {slot.layer for group in channels.prunable for slot in group.slots}
    widths = [
        size
        for module in smaller.modules()
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        for size in module.weight.shape[:1]
    ]
    layers, uncut = uncut_layers(model, smaller, touched)
    report(
        {
            "layers": layers,
            "uncut": uncut,
            "odd_widths": sum(width % 8 != 0 for width in widths),
            "macs_kept": channels.costs.of("macs", plan.widths()) / channels.costs.of("macs"),
            "status": "ok",
        }
    )
