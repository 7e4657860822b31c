"""Blocks in latency tables and in the knapsack: a chain of layers between residual blocks, timed by a formula."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from passdeploy.channels.allocation import Budget, choose_channels, narrowest_widths
from passdeploy.channels.blocks import Block, Replacement, presence
from passdeploy.channels.costs import CostModel, Factor, Term
from passdeploy.channels.groups import ChannelGroup, ChannelMap, Slot
from passdeploy.channels.widths import candidate_widths
from passdeploy.latency.knapsack import adjust, allocate, allocate_fastest
from passdeploy.latency.latency_cost import with_latency
from passdeploy.latency.sampling import SamplingPlan, draw_widths, sample_latency
from passdeploy.latency.table import LatencyTable
from passdeploy.profiling.kernel_times import NodeTime
from tests.profiling.fakes import FakeClock

from .fakes import HERE, FormulaSampler

STREAM, INNER, COUNT = 32, 24, 3  # widths, and the number of blocks


def _group(name: str, width: int) -> ChannelGroup:
    return ChannelGroup(
        name, width, (Slot(f"{name}.weight", 0, torch.arange(width)[:, None], is_output=True, is_input=False),)
    )


def residual() -> ChannelMap:
    """Map a stem and three blocks, each of which expands the stream and projects it back."""
    inner = [f"{number}.expand" for number in range(COUNT)]
    blocks = tuple(
        Block(str(number), replacements=(Replacement(str(number), "identity"),), groups=(inner[number],))
        for number in range(COUNT)
    )
    stream = Factor(0, (("stem", 1),))
    macs = [Term(3 * STREAM, [stream], "stem")]
    for name in inner:
        for layer in (name, name.replace("expand", "project")):
            macs.append(Term(STREAM * INNER, [stream, Factor(0, ((name, 1),))], layer))
    widths = {"stem": STREAM, **dict.fromkeys(inner, INNER)}
    costs = CostModel.build(widths, macs=macs, params=[], channels=[], blocks=blocks)
    return ChannelMap(tuple(_group(name, width) for name, width in widths.items()), costs, blocks)


class ResidualSampler(FormulaSampler):
    """Sampler of that network: every layer takes 0.1 ms and some more by its widths."""

    backend, block = "fake", 8

    def __init__(self) -> None:
        self.clock = FakeClock()

    def nodes(self, widths: Mapping[str, int]) -> tuple[NodeTime, ...]:
        stream = widths.get("stem", STREAM)
        ends = [("stem", 3, stream)]
        for number in range(COUNT):
            if widths.get(presence(str(number)), 1):
                inner = widths.get(f"{number}.expand", INNER)
                ends += [(f"{number}.expand", stream, inner), (f"{number}.project", inner, stream)]
        return tuple(
            NodeTime(f"{name}/Conv.0", "Conv", ((1, a, 8, 8), (b, a, 3, 3), (1, b, 8, 8)), 2, 0.1 + 1e-4 * a * b)
            for name, a, b in ends
        )


@pytest.fixture(scope="module")
def channels() -> ChannelMap:
    return residual()


@pytest.fixture(scope="module")
def table(channels: ChannelMap) -> LatencyTable:
    return sample_latency(ResidualSampler(), channels, HERE, SamplingPlan(networks=18, repeats=1, seconds=0.01))


@pytest.fixture(scope="module")
def costs(channels: ChannelMap, table: LatencyTable) -> CostModel:
    return with_latency(channels.costs, table)


@pytest.fixture(scope="module")
def scores(channels: ChannelMap) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(1)
    by_group = {group.name: torch.rand(group.width, generator=draws) for group in channels.groups}
    inside = {presence(block.name): by_group[block.groups[0]].sum()[None] for block in channels.blocks}
    return {**by_group, **{name: score * (1 + 0.2 * number) for number, (name, score) in enumerate(inside.items())}}


def test_some_networks_of_a_table_skip_blocks(channels: ChannelMap):
    drawn = draw_widths(channels, 12, 8, seed=0)
    skipping = [widths for widths in drawn if not all(widths.get(presence(str(number)), 1) for number in range(COUNT))]
    assert 3 <= len(skipping) <= 6
    assert all(len(widths) == 1 + COUNT for widths in drawn if widths not in skipping)


def test_a_table_predicts_networks_without_some_blocks(channels: ChannelMap, table: LatencyTable, costs: CostModel):
    sampler, names = ResidualSampler(), list(costs.widths)
    for widths in [{presence("1"): 0}, *draw_widths(channels, 8, 8, seed=7)]:
        assert table.predict_ms(widths) == pytest.approx(sampler.total(widths), rel=0.02)
        assert costs.of("latency", widths) == pytest.approx(1e6 * sampler.total(widths), rel=0.02)
        vector, cost = costs.vector(widths), costs.cost_of("latency")
        ends = cost.curve(vector, names.index(presence("2")), np.array([0, 1]))  # type: ignore[attr-defined]
        here = sum(node.ms for node in sampler.nodes({**widths, presence("2"): 1}) if node.name.startswith("2"))
        assert ends[0] == 0
        assert ends[1] == pytest.approx(1e6 * here, rel=0.05)
    again = LatencyTable.from_json(table.to_json())
    assert [node.blocks for node in again.nodes] == [(), *[(presence(str(n // 2)),) for n in range(2 * COUNT)]]
    assert again.predict_ms({presence("1"): 0}) == pytest.approx(table.predict_ms({presence("1"): 0}), rel=1e-3)


def test_a_table_without_blocks_leaves_them_alone(channels: ChannelMap, table: LatencyTable):
    document = table.to_json()
    document["groups"] = {name: width for name, width in document["groups"].items() if not name.startswith("block:")}
    document["looks"] = [look for look in document["looks"] if not any(n.startswith("block:") for n in look["widths"])]
    kept = [number for number, look in enumerate(table.to_json()["looks"]) if look in document["looks"]]
    for node in document["nodes"]:
        node["blocks"], node["ms"] = [], [node["ms"][number] for number in kept]
    older = with_latency(channels.costs, LatencyTable.from_json(document))
    assert not older.blocks
    plan = allocate_fastest({"stem": torch.ones(STREAM)}, channels.groups, older, round_to=8)
    assert not plan.skipped


@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
def test_the_knapsack_weighs_blocks_and_channels_nearly_as_well_as_trying_everything(
    share: float, channels: ChannelMap, costs: CostModel, scores: dict[str, Tensor]
):
    limit = int(share * costs.of("latency"))
    plan = allocate(scores, channels.groups, costs, limit, round_to=8)
    assert costs.of("latency", plan.widths()) <= limit

    def kept(widths: Mapping[str, int]) -> float:
        total = float(scores["stem"].sort(descending=True).values[: widths.get("stem", STREAM)].sum())
        for number in range(COUNT):
            name = f"{number}.expand"
            if widths.get(presence(str(number)), 1):
                total += float(scores[name].sort(descending=True).values[: widths.get(name, INNER)].sum())
                total += float(scores[presence(str(number))] - scores[name].sum())  # of the block beside its channels
        return total

    best = 0.0
    choices = [candidate_widths(group, 8, is_strict=True).tolist() for group in channels.groups]
    for widths in product(*choices, *[(0, 1)] * COUNT):
        named = dict(zip(costs.widths, widths, strict=True))
        if costs.of("latency", named) <= limit:
            best = max(best, kept(named))
    assert kept(plan.widths()) >= 0.97 * best
    assert plan.skipped or share > 0.6


def test_the_fastest_plan_skips_every_block_and_a_plan_names_no_group_of_a_skipped_one(
    channels: ChannelMap, costs: CostModel, scores: dict[str, Tensor]
):
    plan = allocate_fastest(scores, channels.groups, costs, round_to=8)
    assert plan.skipped == ("0", "1", "2")
    assert plan.widths() == {"stem": 8, **{presence(str(number)): 0 for number in range(COUNT)}}


def test_a_plan_that_is_nearly_right_is_adjusted_with_its_blocks(
    channels: ChannelMap, costs: CostModel, scores: dict[str, Tensor]
):
    plan = allocate(scores, channels.groups, costs, int(0.5 * costs.of("latency")), round_to=8)
    wanted = int(1.05 * costs.of("latency", plan.widths()))
    other = adjust(plan, scores, channels.groups, costs, wanted, round_to=8, known=[plan])
    assert other is not None
    assert other != plan
    assert costs.of("latency", other.widths()) == pytest.approx(wanted, rel=0.08)


def test_no_plan_is_measured_twice_because_of_what_is_inside_of_its_skipped_blocks(
    channels: ChannelMap, costs: CostModel, scores: dict[str, Tensor]
):
    for share in (0.3, 0.4, 0.5, 0.6):
        plan = allocate(scores, channels.groups, costs, int(share * costs.of("latency")), round_to=8)
        known, wanted = [plan], int(0.97 * costs.of("latency", plan.widths()))
        for _ in range(12):
            other = adjust(plan, scores, channels.groups, costs, wanted, round_to=8, known=known)
            if other is None:
                break
            assert other.widths() not in [each.widths() for each in known]
            known.append(other)


def test_blocks_and_channels_share_one_threshold_on_score_per_cost(channels: ChannelMap):
    scores = {group.name: torch.ones(group.width) for group in channels.groups}
    scores |= {presence("0"): torch.tensor([1.0]), presence("1"): torch.tensor([500.0])}  # and no score for the third
    budget = Budget.of("macs", 0.75, channels.costs)
    plan = choose_channels(scores, channels.groups, channels.costs, budget, round_to=1)
    assert plan.skipped == ("0",)
    assert channels.costs.of("macs", plan.widths()) <= budget.limit
    uniform = choose_channels(scores, channels.groups, channels.costs, budget, round_to=1, allocation="uniform")
    assert not uniform.skipped
    narrowest = narrowest_widths(channels.groups, channels.costs, round_to=8)
    assert channels.costs.of("macs", narrowest) == 3 * 8
