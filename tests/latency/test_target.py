"""Recipes with a latency target: from the table to the summary, and the requests that are refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from passdeploy.channels.allocation import smallest_plan
from passdeploy.channels.groups import ChannelMap
from passdeploy.commands import prepare as prepare_module
from passdeploy.commands import prune, stages
from passdeploy.commands.prepare import prepare
from passdeploy.errors import CorruptArtifact, PlanError, UsageError
from passdeploy.latency import find_table, search, target
from passdeploy.latency.sampling import SamplingPlan
from passdeploy.latency.search import LATENCY_TOLERANCE
from passdeploy.profiling import Setting, execution
from passdeploy.recipe import load_recipe
from passdeploy.recipe.pruning import MeasureSpec
from passdeploy.runs.folder import RunFolder
from passdeploy.runtime.distributed import Processes
from passdeploy.runtime.events import silent
from passdeploy.runtime.sealed_json import SEAL, sealed
from tests.command_line import call_command

from .fakes import SteadySampler

LATENCY = ["prune.target={latency: 0.7}", "prune.round_to=auto", "prune.measure={backend: torch, batch: 8}"]


def named(table: Path, *, force: bool = False) -> list[str]:
    """Return the overrides of a recipe that name a table."""
    return [f"prune.measure.table={table}", f"prune.measure.force={str(force).lower()}"]


@pytest.fixture(scope="module", autouse=True)
def steady():
    """Replace samplers and clocks by ones whose times depend on widths alone, not on the load of this machine."""
    samplers: list[SteadySampler] = []

    def make_sampler(
        backend: str, model: nn.Module, channels: ChannelMap, images: object, *, threads: int, setting: Setting
    ):
        samplers.append(SteadySampler(channels))
        return samplers[-1]

    @contextmanager
    def delivered_networks(context: object, dense: nn.Module, channels: ChannelMap, prompt: object):
        yield lambda plan: lambda: samplers[-1].runner(plan.widths(), "slim")

    class Clock:
        def __getattr__(self, name: str) -> object:
            return getattr(samplers[-1].clock, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(find_table, "make_sampler", make_sampler)
        patch.setattr(stages, "delivered_networks", delivered_networks)
        patch.setattr(search, "clock_of_backend", lambda backend, device: Clock())
        patch.setattr(find_table, "DEFAULT_SAMPLING", SamplingPlan(networks=12, repeats=1, seconds=0.0))
        patch.setattr(target, "SECONDS_PER_PLAN", 0.1)
        yield


@pytest.fixture(scope="module")
def table(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the table of the tiny recipe's network with the command."""
    path = tmp_path_factory.mktemp("tables") / "table.json"
    done = call_command(
        "profile", "--table", path, "--recipe", tiny_recipe, "--backend", "torch", "--batch", 8, "--json"
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["path"] == str(path)
    return path


@pytest.fixture
def elsewhere(table: Path, tmp_path: Path) -> Path:
    """Write the same table as if another machine had made it."""
    document = json.loads(table.read_text())
    document["place"]["processor"] = "Another CPU"
    del document[SEAL]
    (tmp_path / "elsewhere.json").write_text(sealed(document))
    return tmp_path / "elsewhere.json"


def test_a_run_meets_a_latency_and_says_what_was_measured(tiny_recipe: Path, table: Path, tmp_path: Path):
    recipe = load_recipe(tiny_recipe, [*LATENCY, "prune.target={latency: 0.7}", f"prune.measure.table={table}"])
    result = prune.run(recipe, out=tmp_path)
    budget = result.summary["budget"]
    assert (budget["kind"], budget["requested"], budget["is_measured"]) == ("latency", 0.7, True)
    assert budget["achieved"] == pytest.approx(0.7, rel=LATENCY_TOLERANCE)
    assert budget["achieved"] == pytest.approx(budget["slim_ms"] / budget["dense_ms"])
    assert (budget["backend"], budget["batch"], budget["threads"]) == ("torch", 8, 1)
    rows = result.summary["latency"]
    assert [(row["model"], row["threads"], row["options"]) for row in rows] == [("dense", 1, []), ("slim", 1, [])]
    assert RunFolder.open(result.path).read_json("timed.json")["kept"].keys() == {
        group.name for group in prepare(recipe).channels.prunable
    }
    assert result.summary["slim"]["macs"] < result.summary["dense"]["macs"]


def test_the_first_of_several_processes_measures_for_all(
    tiny_recipe: Path, table: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = load_recipe(tiny_recipe, [*LATENCY, f"prune.measure.table={table}"])
    first = prepare(recipe)
    sent = pickle.dumps(first.target)

    class SecondProcess(Processes):
        def first_only(self, work: Callable[[], Any]) -> Any:
            return pickle.loads(sent)

    monkeypatch.setattr(prepare_module, "prepare_target", lambda *_, **__: pytest.fail("it measured a table"))
    second = prepare(recipe, processes=SecondProcess(1, 2))
    assert (second.budget, second.round_to) == (first.budget, first.round_to)
    smallest = [
        smallest_plan(each.channels.prunable, each.channels.costs, each.budget, round_to=each.round_to)
        for each in (first, second)
    ]
    assert smallest[0] == smallest[1]


def test_a_plan_that_is_taken_over_is_measured_and_stays_as_it_is(tiny_recipe: Path, table: Path, tmp_path: Path):
    first = prune.run(load_recipe(tiny_recipe, [*LATENCY, f"prune.measure.table={table}"]), out=tmp_path)
    taken = [f"prune.from_run={first.path}", "prune.reuse=plan", f"prune.measure.table={table}"]
    for asked in ("prune.target={latency: 0.95}", "prune.target={latency_ms: 1000}"):  # slower than the plan, or dense
        again = prune.run(load_recipe(tiny_recipe, [*LATENCY, *taken, asked]), out=tmp_path)
        plans = [json.loads((path / "plan.json").read_text())["groups"] for path in (first.path, again.path)]
        assert plans[0] == plans[1]
    budget = again.summary["budget"]
    assert (budget["is_measured"], budget["trials"], budget["requested"]) == (True, 1, 1000)
    assert budget["achieved"] == pytest.approx(budget["slim_ms"])


def test_uniform_allocation_holds_without_measurements(tiny_recipe: Path, elsewhere: Path, tmp_path: Path):
    overrides = [*LATENCY, f"prune.measure.table={elsewhere}", "prune.measure.force=true", "prune.method=uniform"]
    result = prune.run(load_recipe(tiny_recipe, [*overrides, "prune.round_to=1"]), out=tmp_path)
    groups = json.loads((result.path / "plan.json").read_text())["groups"].values()
    shares = [len(group["kept"]) / group["width"] for group in groups]
    assert max(shares) < 1
    assert max(shares) - min(shares) <= max(1 / group["width"] for group in groups)


def test_a_table_of_another_machine_is_refused_unless_forced(tiny_recipe: Path, elsewhere: Path, tmp_path: Path):
    recipe = load_recipe(tiny_recipe, [*LATENCY, f"prune.measure.table={elsewhere}"])
    with pytest.raises(UsageError, match=r"processor: made with Another CPU, wanted is .*\n.*--force"):
        prepare(recipe)
    options = [part for override in [*LATENCY, f"prune.measure.table={elsewhere}"] for part in ("--set", override)]
    forced = call_command("check", tiny_recipe, *options, "--force", "--json")
    assert forced.exit_code == 0, forced.output
    latency = json.loads(forced.stdout)["latency"]
    assert 0 < latency["fastest_ms"] < latency["asked_ms"] < latency["dense_ms"]
    ran = call_command("prune", tiny_recipe, *options, "--force", "--out", tmp_path, "--json")
    assert ran.exit_code == 0, ran.output
    budget = json.loads(ran.stdout)["summary"]["budget"]
    assert budget["is_measured"] is False  # nothing here can tell how fast it is there
    assert budget["achieved"] <= 0.7


def test_a_table_for_another_batch_is_refused(tiny_recipe: Path, table: Path):
    recipe = load_recipe(
        tiny_recipe, [*LATENCY, "prune.measure={backend: torch, batch: 2}", f"prune.measure.table={table}"]
    )
    with pytest.raises(UsageError, match="batch: made with 8, wanted is 2"):
        prepare(recipe)


def test_a_forced_table_speaks_for_its_own_machine(tiny_recipe: Path, elsewhere: Path):
    document = json.loads(elsewhere.read_text())
    document["block"] = 4  # of kernels there
    document["place"]["threads"] = 6
    del document[SEAL]
    elsewhere.write_text(sealed(document))
    found = prepare(load_recipe(tiny_recipe, [*LATENCY[:2], *named(elsewhere, force=True)])).target
    assert found is not None
    assert not found.is_here
    assert found.conditions == {
        "processor": "Another CPU",
        "backend": "torch",
        "device": "cpu",
        "precision": "fp32",
        "options": [],
        "batch": 8,
        "threads": 6,
        "round_to": 4,
    }


@pytest.mark.parametrize("setting", ["batch: 2", "threads: 3", "precision: bf16", "channels_last: true"])
def test_force_is_for_the_machine_alone(tiny_recipe: Path, elsewhere: Path, setting: str):
    asked = [*LATENCY, f"prune.measure={{backend: torch, {setting}}}", *named(elsewhere, force=True)]
    with pytest.raises(UsageError, match=f"was made with other settings. {setting.partition(':')[0]}: made with "):
        prepare(load_recipe(tiny_recipe, asked))


def test_a_table_brings_its_settings_where_a_recipe_names_none(tiny_recipe: Path, table: Path):
    found = prepare(load_recipe(tiny_recipe, [*LATENCY[:2], *named(table)])).target
    assert found is not None
    assert found.is_here
    assert (found.conditions["backend"], found.conditions["round_to"]) == ("torch", found.table.block)


def test_a_table_of_another_network_is_refused(tiny_recipe: Path, table: Path):
    deeper = [*LATENCY, "model.name=passdeploy/resnet32_cifar", *named(table)]  # it has all groups of the other one
    with pytest.raises(PlanError, match="is of a network with other layers than this one"):
        prepare(load_recipe(tiny_recipe, deeper))


def test_more_milliseconds_than_the_dense_network_takes_are_refused(tiny_recipe: Path, table: Path):
    asked = [*LATENCY, "prune.target={latency_ms: 100000}", f"prune.measure.table={table}"]
    with pytest.raises(UsageError, match=r"asked for 100000 ms, but the dense network takes"):
        prepare(load_recipe(tiny_recipe, asked))


@pytest.mark.parametrize(
    "wrong", ["{latency: 0}", "{latency: -0.5}", "{latency_ms: -1}", "{latency_ms: 0}", "{latency: 2}"]
)
def test_a_budget_of_nothing_or_less_is_refused(wrong: str, tiny_recipe: Path):
    refused = call_command("check", tiny_recipe, "--set", f"prune.target={wrong}")
    assert refused.exit_code == 2
    assert "prune.target.latency" in refused.output
    assert refused.output.count("\n") <= 3


def test_what_cannot_be_reached_says_what_can(tiny_recipe: Path, table: Path):
    options = [*LATENCY, "prune.target={latency: 0.01}", f"prune.measure.table={table}"]
    refused = call_command("check", tiny_recipe, *[part for option in options for part in ("--set", option)])
    assert refused.exit_code == 4
    assert "smallest that can be reached is" in refused.output
    assert " ms (" in refused.output


def test_a_table_that_is_missing_or_damaged_is_named(tiny_recipe: Path, tmp_path: Path):
    (tmp_path / "broken.json").write_text("[]")
    with pytest.raises(CorruptArtifact, match="is no latency table"):
        prepare(load_recipe(tiny_recipe, [*LATENCY, f"prune.measure.table={tmp_path}/broken.json"]))
    with pytest.raises(UsageError, match="there is no latency table"):
        prepare(load_recipe(tiny_recipe, [*LATENCY, f"prune.measure.table={tmp_path}/none.json"]))


def test_int8_is_for_engines(tiny_recipe: Path):
    asked = ["prune.target={latency: 0.5}", "prune.measure={backend: ort-cuda, precision: int8}"]
    with pytest.raises(UsageError, match="no int8 kernels"):
        prepare(load_recipe(tiny_recipe, asked))


def test_a_sweep_of_roundings_is_planned_and_measured(tiny_recipe: Path):
    arguments = ("--backend", "torch", "--batch", 8, "--recipe", tiny_recipe, "--share", 0.7, "--json")
    done = call_command("profile", "--sweep-round", "16", *arguments)
    assert done.exit_code == 0, done.output
    assert [row["round_to"] for row in json.loads(done.stdout)["sweep"]] == [16]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--table", "t.json"], "say which network"),
        (["--table", "t.json", "--model", "torchvision/resnet18"], "one backend and one batch size"),
        (["--table", "t.json", "a.onnx"], "a table is of a network, not of a file"),
        (["--sweep-round", "0,8", "--model", "x"], "is not a list of positive whole numbers"),
        (["--sweep-round", "8", "--model", "x", "--share", "-1"], "--share -1 makes no sense"),
        (["a.onnx"], "there is no file a.onnx"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], words: str):
    refused = call_command("profile", *arguments)
    assert refused.exit_code == 2
    assert words in refused.output


@pytest.mark.parametrize(
    ("measure", "device", "of_table", "expected"),
    [
        ({"backend": "torch"}, "auto", None, "cuda"),
        ({"backend": "torch"}, "cpu", None, "cpu"),  # --device cpu
        ({"backend": "compile"}, "cuda:1", None, "cuda:1"),
        ({"backend": "ort"}, "auto", None, "cpu"),
        ({"backend": "ort"}, "cuda:1", None, "cpu"),
        ({"backend": "torch", "device": "cpu"}, "cuda", None, "cpu"),  # the recipe says it
        ({"backend": "torch"}, "cpu", "cuda", "cuda"),  # a table that was made on another machine
    ],
)
def test_latencies_are_of_the_gpu_where_there_is_one(
    measure: dict[str, str], device: str, of_table: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(execution, "find_device", lambda name: torch.device("cuda" if name == "auto" else name))
    monkeypatch.setattr(execution, "unused_gpu", lambda: None)
    made: Any = None if of_table is None else SimpleNamespace(context=SimpleNamespace(device=of_table))
    spec = MeasureSpec(**measure)  # type: ignore[arg-type]
    assert target._setting_of(spec, made, device, silent) == Setting(expected)
