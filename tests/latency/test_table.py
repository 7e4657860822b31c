from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from passdeploy.channels.groups import ChannelMap
from passdeploy.errors import CorruptArtifact, PlanError, RunError, UsageError
from passdeploy.latency.latency_cost import LatencyCost
from passdeploy.latency.layer_model import LayerModel
from passdeploy.latency.sampling import SamplingPlan, draw_widths
from passdeploy.latency.table import LatencyTable

from .fakes import HERE, WIDTHS, FakeSampler, blocked_ms, chain, table_of


@pytest.fixture(scope="module")
def channels() -> ChannelMap:
    return chain()


@pytest.fixture(scope="module")
def table(channels: ChannelMap) -> LatencyTable:
    return table_of(FakeSampler(), channels)


def test_the_table_predicts_networks_that_were_not_measured(table: LatencyTable):
    sampler = FakeSampler()
    measured = {tuple(widths.items()) for widths, _ in table.measurements}
    errors = []
    for widths in ({"0": 40, "2": 24, "4": 48}, {"0": 8, "2": 88, "4": 16}, {"0": 64, "2": 48, "4": 8}):
        assert tuple(widths.items()) not in measured
        errors.append(abs(table.predict_ms(widths) / sampler.total(widths) - 1))
    assert max(errors) < 0.05
    assert table.error[0] < 0.03
    assert table.error[1] >= table.error[0]


def test_what_a_network_takes_beyond_its_layers_is_learned(channels: ChannelMap):
    def colder(widths: object) -> float:  # the larger the network, the slower each of its layers
        return (sum(node.ms for node in plain.nodes(widths)) / 1.0) ** 0.1  # type: ignore[arg-type]

    plain = FakeSampler()
    cold = FakeSampler(network_factor=colder)
    table = table_of(cold, channels)
    assert table.predict_ms({}) == pytest.approx(cold.total({}), rel=0.04)
    small = {"0": 16, "2": 16, "4": 16}
    assert table.predict_ms(small) == pytest.approx(cold.total(small), rel=0.06)


def test_a_tracer_that_costs_time_itself_is_seen_through(channels: ChannelMap):
    sampler = FakeSampler(layer_ms=lambda a, b: blocked_ms(a, b) + 0.05)  # 0.05 ms of each node is the tracer's

    def untraced(widths: dict[str, int]) -> float:
        return sum(node.ms - 0.05 for node in sampler.nodes(widths))

    sampler.total = untraced  # type: ignore[method-assign, assignment]
    table = table_of(sampler, channels)
    for widths in ({}, {"0": 16, "2": 24, "4": 16}):
        assert table.predict_ms(widths) == pytest.approx(untraced(widths), rel=0.05)


def test_a_table_goes_through_a_file_unchanged(table: LatencyTable, tmp_path: Path):
    table.save(tmp_path / "table.json")
    again = LatencyTable.load(tmp_path / "table.json")
    for widths in ({}, {"0": 24, "2": 40}):
        assert again.predict_ms(widths) == pytest.approx(table.predict_ms(widths), rel=1e-3)
    assert (again.context, again.nodes, again.widths) == (table.context, table.nodes, table.widths)


def test_a_file_keeps_the_image_shape_as_text_and_the_key_of_the_cache_is_stable(table: LatencyTable):
    place = table.to_json()["place"]
    assert place["image"] == "3x8x8"
    assert "image_shape" not in place
    assert HERE.key("structure") == "17b8cab44f68ee80ef80"


@pytest.mark.parametrize(
    "harm",
    [
        lambda document: document.pop("nodes"),
        lambda document: document.update(format=2),
        lambda document: document["nodes"][0]["ms"].pop(),
        lambda document: document["nodes"][0]["ms"].__setitem__(0, -1.0),
        lambda document: document["groups"].pop("0"),
        lambda document: document["place"].update(colour="red"),
    ],
)
def test_a_file_that_is_no_table_is_refused(table: LatencyTable, tmp_path: Path, harm: object):
    document = table.to_json()
    harm(document)  # type: ignore[operator]
    (tmp_path / "table.json").write_text(json.dumps(document))
    with pytest.raises(CorruptArtifact, match="is no latency table"):
        LatencyTable.load(tmp_path / "table.json")
    with pytest.raises(RunError, match="passdeploy profile --table"):
        LatencyTable.load(tmp_path / "none.json")


def test_a_table_of_another_machine_names_the_difference():
    other = replace(HERE, processor="Another CPU", version="2.0")
    words = r"another machine\. processor: made with Another CPU, wanted is Imaginary CPU; version: .*\n.*--force"
    with pytest.raises(UsageError, match=words):
        other.require(HERE, "table.json")
    other.require(HERE, "table.json", force=True)
    assert HERE.differences(HERE) == []
    assert other.key("x") != HERE.key("x") != HERE.key("y")


def test_a_table_of_other_settings_is_refused_even_by_force():
    other = replace(HERE, processor="Another CPU", threads=4, batch=16)
    words = r"other settings\. threads: made with 4, wanted is 1; batch: made with 16, wanted is 1"
    with pytest.raises(UsageError, match=words):
        other.require(HERE, "table.json", force=True)


def test_a_processor_that_is_not_known_is_another_one():
    unknown = replace(HERE, processor="unknown")
    with pytest.raises(UsageError, match="processor: made with unknown, wanted is unknown"):
        unknown.require(unknown, "table.json")


def test_a_latency_cost_agrees_with_its_table_and_falls_with_the_widths(table: LatencyTable, channels: ChannelMap):
    cost = LatencyCost(table, channels.costs.widths)
    full = channels.costs.vector({})
    assert cost.value(full) == pytest.approx(1e6 * table.predict_ms({}), abs=1)
    narrow = channels.costs.vector({"0": 16, "2": 16, "4": 16})
    assert cost.value(narrow) == pytest.approx(1e6 * table.predict_ms({"0": 16, "2": 16, "4": 16}), abs=1)
    slope = cost.gradient(full)
    # A channel of '2' is read by '4' and made from 64; one of '0' is made from 3 and read by 96.
    expected = blocked_ms(3, 64) + blocked_ms(64, 96) - blocked_ms(3, 32) - blocked_ms(32, 96)
    assert slope[0] == pytest.approx(1e6 * expected / 32, rel=0.1)
    with pytest.raises(PlanError, match="group '0' with 64 channels, which this network does not have"):
        LatencyCost(table, {"stem": 64})


def test_one_curve_of_a_group_is_the_difference_of_whole_networks(table: LatencyTable, channels: ChannelMap):
    cost = LatencyCost(table, channels.costs.widths)
    full = channels.costs.vector({})
    low, high = cost.curve(full, 1, np.array([24, 96]))
    narrow = full.copy()
    narrow[1] = 24
    assert high - low == pytest.approx(cost.sum(full) - cost.sum(narrow), rel=1e-6)


def test_random_widths_are_aligned_differ_and_are_the_same_every_time(channels: ChannelMap):
    networks = draw_widths(channels, 12, 16, seed=3)
    assert networks == draw_widths(channels, 12, 16, seed=3)
    assert len({tuple(widths.items()) for widths in networks}) > 9
    for widths in networks:
        for (_, width), full in zip(widths.items(), WIDTHS, strict=True):
            assert width % 16 == 0
            assert 16 <= width <= full


def test_measuring_stops_when_the_time_is_up(channels: ChannelMap):
    table = table_of(
        FakeSampler(),
        channels,
        SamplingPlan(networks=18, repeats=2, seconds=0.01, most_seconds=0.0, fewest_measurements=9),
    )
    assert len(table.measurements) == 9


def test_a_curve_goes_through_steps_that_no_line_would():
    widths = np.arange(8, 264, 8)[:, None]
    ms = 0.05 + 0.01 * np.ceil(widths[:, 0] / 32)  # a kernel that takes four blocks at once
    model = LayerModel.fit(widths[::2], ms[::2], 8)
    assert np.abs(model.predict(widths[1::2]) / ms[1::2] - 1).max() < 0.09
    constant = LayerModel.fit(np.zeros((3, 0), int), np.array([1.0, 1.2, 9.0]), 8)
    assert constant.predict(np.zeros((2, 0), int)) == pytest.approx([1.2, 1.2])
