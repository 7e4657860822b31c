"""Which widths to look at, looking, and the table that comes of it, from the cache where it is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from passdeploy.channels.groups import ChannelGroup
from passdeploy.errors import CorruptArtifact
from passdeploy.events import Stage, silent
from passdeploy.latency.observation import Observation, Prober, undisturbed
from passdeploy.latency.place import Place
from passdeploy.latency.table import LatencyTable
from passdeploy.plan import rungs_of

_SPREAD = 0.5  # how far a group's share strays from its network's


@dataclass(frozen=True)
class Survey:
    """How much to look."""

    looks: int = 18  # networks, the dense one among them
    rounds: int = 2  # times that each is looked at
    seconds: float = 0.7  # each time, where its calls are short
    most_seconds: float = (
        240.0  # for all of them; the last round is left unfinished then, and the first not below `least`
    )
    least: int = 8
    seed: int = 0


def survey(
    prober: Prober, groups: Sequence[ChannelGroup], place: Place, plan: Survey | None = None, stage: Stage | None = None
) -> LatencyTable:
    """Look at networks of many widths, and make the table of their layers.

    Args:
        prober: builds and times the networks.
        groups: of the network; those that are not prunable stay whole.
        place: what is measured on.
        plan: how much to look.
        stage: told about every look.
    """
    plan, stage = plan or Survey(), stage or Stage("table", silent)
    widths = {group.name: group.width for group in groups if group.is_prunable}
    designs = [{}, *draw_widths(groups, plan.looks - 1, prober.block, seed=plan.seed)]
    prober.observe({}, seconds=min(0.5, plan.seconds))  # a processor that was idle is slow at first
    once = [*range(plan.looks), 0]  # shares are of the dense network, so it is looked at more often
    seen: dict[int, Observation] = {}
    dense: list[float] = []
    began = perf_counter()
    for done, number in enumerate(once * plan.rounds, start=1):
        if len(seen) >= plan.least and perf_counter() - began > plan.most_seconds:
            break
        look = prober.observe(designs[number], seconds=plan.seconds)
        seen[number] = undisturbed(seen[number], look) if number in seen else look
        if number == 0:
            dense.append(look.total_ms)
        stage.step(done, len(once) * plan.rounds, ms=look.total_ms)
    seen[0] = replace(seen[0], total_ms=median(dense))
    return LatencyTable.build(place, widths, prober.block, list(seen.values()))


def draw_widths(groups: Sequence[ChannelGroup], count: int, block: int, *, seed: int) -> list[dict[str, int]]:
    """Widths of `count` networks from narrow to wide, every group's drawn around its network's share."""
    chance = np.random.default_rng(seed)
    designs = []
    for share in chance.permutation(np.linspace(0.15, 0.95, max(count, 1)))[:count]:
        widths = {}
        for group in groups:
            if group.is_prunable:
                rungs = rungs_of(group, block, is_strict=True)
                wanted = np.clip(share + chance.uniform(-_SPREAD, _SPREAD), 0, 1) * group.width
                widths[group.name] = int(rungs[np.abs(rungs - wanted).argmin()])
        designs.append(widths)
    return designs


def cache_folder() -> Path:
    """Where tables are kept: $PASSDEPLOY_CACHE, else the user's cache."""
    own = os.environ.get("PASSDEPLOY_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "passdeploy"


def cached_table(path: Path) -> LatencyTable | None:
    """The table in `path`, if there is one that can be read."""
    try:
        return LatencyTable.load(path) if path.is_file() else None
    except CorruptArtifact:
        return None  # it is measured again, and written over
