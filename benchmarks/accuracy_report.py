"""Report of the rows of `accuracy.py` in Markdown: differences between methods, and every figure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.accuracy_settings import Workload

Rows = Sequence[dict[str, Any]]
LOSS = 0.01  # of top-1; methods are compared by the least MACs at which they lose no more
MOST_GAP = 0.8  # no interpolation between the whole network and a measured share below this
SCRATCH = "scratch, widths of PASS"
ABLATIONS = (
    "iterative Taylor",
    "PASS, no prompt",
    "PASS, full prompt",
    "PASS, mlp",
    "PASS, conv",
    "PASS, free scores",
    "PASS, uniform",
    "PASS, prompt not kept",
    "PASS, labels alone",
    "PASS, twice the rate",
)
FROZEN = ("iterative Taylor, frozen", "PASS, frozen, no prompt")
EARLIER = "PASS, dense prices"  # as PASS was when its parts were measured: budgets due at 90 % of the steps
ONCE, GROWING, LONGER = "once", "growing", "longer"  # kinds of baselines, by what they do before fine-tuning


def report(rows: Rows, size: Workload) -> str:
    """Build all tables, after a line that describes the runs."""
    tested = "all test images" if size.test_images is None else f"{size.test_images:,} of the test images (a subset)"
    whole = EARLIER if any(row["method"] == EARLIER for row in rows) else "PASS"  # what ablations were made of
    return "\n".join(
        [
            f"{size.network}, {size.mask_steps} steps of mask learning, {size.finetune_steps} of fine-tuning, "
            f"batches of {size.batch}, {tested}; one CPU thread. Differences are points of top-1, of the means and of "
            "every seed.",
            "",
            "At equal fine-tuning steps, against the best of the baselines that choose once (`PASS` has trained its",
            "weights while it learned masks; `PASS, rehearsed` takes nothing but the plan and the prompt out of that),",
            "and against the best form of growing regularisation, which trains its weights for as many steps as PASS:",
            "",
            *comparison_lines(rows, [("PASS", {ONCE}), ("PASS, rehearsed", {ONCE}), ("PASS", {GROWING})]),
            "",
            "At equal steps in all: against the best of growing regularisation and of the baselines that choose once",
            "and then fine-tune for as many steps more as PASS learns masks:",
            "",
            *comparison_lines(rows, [("PASS", {GROWING, LONGER})]),
            "",
            "PASS against itself with less, or with something else"
            + (
                f". `{EARLIER}` and the rows compared with it are of an\nearlier PASS: channels at the prices of the "
                "dense network, and the budget reached at 90 % of the steps:"
                if whole == EARLIER
                else ":"
            ),
            "",
            *comparison_lines(
                rows,
                [
                    ("PASS", EARLIER),
                    ("PASS", SCRATCH),
                    *((whole, other) for other in ABLATIONS),
                    *(("PASS, frozen", other) for other in FROZEN),
                    ("PASS, rehearsed", "iterative Taylor, rehearsed"),
                ],
            ),
            "",
            f"The least share of the MACs that still reaches dense top-1 minus {100 * LOSS:.0f} point, on a straight",
            "line between the shares measured on either side of it (means of the seeds there are); and how long that",
            "takes at such widths, which here are not rounded to what the hardware likes:",
            "",
            *least_macs_lines(rows),
            "",
            "Every method; spread is the largest minus the smallest over the seeds. Seconds (mean) are those of",
            "choosing and training together; rows were made beside others, so they only say the order of magnitude:",
            "",
            *results_table(rows),
            "",
        ]
    )


def comparison_lines(rows: Rows, comparisons: Sequence[tuple[str, str | set[str]]]) -> list[str]:
    """Build one line per setting, budget and comparison, from the seeds that both methods were measured with.

    Args:
        rows: the measurements.
        comparisons: a form of PASS, and its opponent: a method, or kinds of baselines, of which the best is taken.
    """
    lines = ["| setting | MACs | | against | difference | of single seeds | seeds |", "|" + "---|" * 7]
    for setting, share in sorted({(row["setting"], row["share"]) for row in rows}, key=lambda p: (p[0], -p[1])):
        here = [row for row in rows if (row["setting"], row["share"]) == (setting, share)]
        for ours, opponent in comparisons:
            mine = _by_seed(here, ours, is_extra=False)
            against = (opponent, False) if isinstance(opponent, str) else _best_baseline(here, mine, opponent)
            theirs = _by_seed(here, against[0], is_extra=against[1]) if against else {}
            if gaps := [100 * (mine[seed] - theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]:
                lines.append(
                    f"| {setting} | {share:.0%} | {ours} | {against[0]}{', extra steps' if against[1] else ''} | "
                    f"{statistics.mean(gaps):+.2f} | {' '.join(f'{gap:+.2f}' for gap in gaps)} | {len(gaps)} |"
                )
    return lines


def _best_baseline(here: Rows, mine: dict[int, float], kinds: set[str]) -> tuple[str, bool] | None:
    """Return the baseline of these kinds with the best mean over the seeds of `mine`."""
    opponents = {(row["method"], row["extra"]) for row in here if _kind(row) in kinds}
    return _best({key: _by_seed(here, key[0], is_extra=key[1]) for key in opponents}, mine.keys())


def _kind(row: dict[str, Any]) -> str | None:
    """Return the kind of a baseline (ONCE, GROWING, LONGER); None for forms of PASS, and for a control."""
    if row["method"].startswith(("PASS", "iterative", "scratch")):
        return None
    if row["method"].startswith("growing"):
        return GROWING
    return LONGER if row["extra"] else ONCE


def least_macs_lines(rows: Rows) -> list[str]:
    """Build one line per setting, method and number of steps measured at several budgets, the least share first."""
    tops: dict[tuple[Any, ...], dict[float, list[float]]] = {}
    times: dict[tuple[Any, ...], dict[float, float]] = {}  # slim over dense latency, where it was measured
    dense: dict[tuple[Any, ...], float] = {}  # a dense network may have been trained again between methods
    for row in rows:
        key = row["setting"], row["method"], row["extra"]
        dense[key] = row["dense_top1"]
        tops.setdefault(key, {}).setdefault(row["share"], []).append(row["top1"])
        if "latency" in row:
            times.setdefault(key, {})[row["share"]] = row["latency"]
    seed_rows = []
    for (setting, method, extra), by_share in tops.items():
        line = sorted((share, statistics.mean(values)) for share, values in by_share.items())
        if len(line) > 1:
            whole = dense[setting, method, extra]
            share, words = _crossing([*line, (1.0, whole)], whole - LOSS)
            time = _between({**times.get((setting, method, extra), {}), 1.0: 1.0}, share)
            words += f" | {time:.0%}" if time and words[0].isdigit() else " | "
            seed_rows.append((setting, share, f"| {setting} | {method}{', extra steps' if extra else ''} | {words} |"))
    heading = ["| setting | method | MACs | latency (ONNX Runtime, batch 8) |", "|---|---|---|---|"]
    return [*heading, *(words for *_, words in sorted(seed_rows))]


def _between(times: dict[float, float], share: float) -> float | None:
    """Interpolate the latency at a share between the two nearest measured shares; None if one of them is missing."""
    low = max((one for one in times if one <= share), default=None)
    high = min((one for one in times if one >= share), default=None)
    if low is None or high is None:
        return None
    return times[low] + (times[high] - times[low]) * (share - low) / ((high - low) or 1)


def _crossing(line: list[tuple[float, float]], wanted: float) -> tuple[float, str]:
    """Find the share at which a line of (share, top-1) reaches `wanted`, from the whole network down; also as text."""
    for (low, below), (high, above) in zip(reversed(line[:-1]), reversed(line[1:]), strict=True):
        if below < wanted:
            if high == 1.0 and low < MOST_GAP:
                return high, f"more than {low:.0%}"
            share = low + (high - low) * (wanted - below) / (above - below)
            return share, f"{share:.0%}"
    return line[0][0], f"less than {line[0][0]:.0%}"


def results_table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Build one line per setting, budget and method: mean top-1, spread, mean seconds and every seed."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["setting"], row["share"], row["extra"], row["method"]), []).append(row)
    lines = [
        "| setting | MACs | method | extra steps | top-1 | spread | before fine-tuning | s | seeds |",
        "|" + "---|" * 9,
    ]
    order = sorted(cells, key=lambda c: (c[0], -c[1], c[2], -statistics.mean(r["top1"] for r in cells[c])))
    for setting, share, extra, method in order:
        seed_rows = sorted(cells[setting, share, extra, method], key=lambda row: row["seed"])
        values = [row["top1"] for row in seed_rows]
        before = statistics.mean(row["top1_before_finetune"] for row in seed_rows)
        seconds = statistics.mean(row["seconds"] for row in seed_rows)
        lines.append(
            f"| {setting} | {share:.0%} | {method} | {'yes' if extra else 'no'} | {statistics.mean(values):.2%} | "
            f"{max(values) - min(values):.2%} | {before:.2%} | {seconds:.0f} | "
            f"{' '.join(f'{value:.2%}' for value in values)} |"
        )
    return lines


def _by_seed(rows: Rows, method: str, *, is_extra: bool) -> dict[int, float]:
    return {row["seed"]: row["top1"] for row in rows if (row["method"], row["extra"]) == (method, is_extra)}


def _best(seed_rows: dict[tuple[str, bool], dict[int, float]], seeds: Iterable[int]) -> tuple[str, bool] | None:
    """Return the method with the best mean over `seeds`, among those measured with all of them."""
    means = {
        key: statistics.mean(top1[seed] for seed in seeds)
        for key, top1 in seed_rows.items()
        if seeds and top1.keys() >= set(seeds)
    }
    return max(sorted(means), key=lambda key: means[key]) if means else None
