"""Report of the rows of `benchmarks/latency.py` as tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from passdeploy.profiling.statistics import is_measurable

NETWORKS = ("mobilenet_v2", "resnet18", "resnet50", "efficientnet_b0", "vgg11_bn", "densenet121")
TOLERANCE = 0.03  # a plan may be this much slower, or faster, than asked


def report(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Build the tables of all parts that have rows, as lines of Markdown."""
    rows = list(rows)
    lines: list[str] = []
    for part, write in _REPORTS.items():
        if mine := [row for row in rows if row["part"] == part]:
            lines += ["", *write(mine)]
    return lines[1:]


def _target_report(rows: list[dict[str, Any]]) -> list[str]:
    return _by_backend(rows, _targets_on)


def _by_backend(rows: list[dict[str, Any]], write: Callable[[str, list[dict[str, Any]]], list[str]]) -> list[str]:
    """Write a table for every backend and setting."""
    lines: list[str] = []
    for on in dict.fromkeys(row["on"] for row in rows):
        lines += [*write(on, [row for row in rows if row["on"] == on]), ""]
    return lines[:-1]


def _targets_on(on: str, rows: list[dict[str, Any]]) -> list[str]:
    met = [row for row in rows if "found" in row]
    hit = sum(row["found"] <= row["asked"] * (1 + TOLERANCE) for row in met)
    close = sum(abs(row["found"] / row["asked"] - 1) <= TOLERANCE for row in met)
    off = [abs(row["predicted"] / row["first_found"] - 1) for row in met] or [float("nan")]
    lines = [
        f"{'ONNX Runtime on the CPU' if on == 'ort' else on}:",
        "",
        f"Targets: {hit} of {len(rows)} within 3 % of what was asked, or faster, and {close} within 3 % either way, "
        f"measured again after the plan was made. The table's first plan against its measurement: median "
        f"{statistics.median(off):.1%}, largest "
        f"{max(off):.1%}, {sum(value <= 0.08 for value in off)} of {len(off)} within 8 %. Intervals of "
        f"{sum('sittings' in row for row in met)} rows are over sittings, those of the others, which were measured "
        "before, of one session each.",
        "",
        *_heading(
            "network",
            "batch",
            "threads",
            "asked",
            "measured",
            "speed-up, 95 %",
            "table said",
            "first plan had",
            "plans",
            "MACs kept",
        ),
    ]
    for row in sorted(rows, key=lambda r: (r["threads"], r["batch"], NETWORKS.index(r["network"]), -r["asked"])):
        head = row["network"], row["batch"], row["threads"], f"{row['asked']:.0%}"
        if "refused" in row:
            lines.append(_line(*head, f"refused: {row['refused'].splitlines()[0]}", *[""] * 5))
            continue
        shares = (f"{row[key]:.1%}" for key in ("predicted", "first_found"))
        lines.append(_line(*head, f"{row['found']:.1%}", _interval(row), *shares, row["trials"], f"{row['macs']:.1%}"))
    return lines


def _reach_report(rows: list[dict[str, Any]]) -> list[str]:
    return _by_backend(rows, _reach_on)


def _reach_on(on: str, rows: list[dict[str, Any]]) -> list[str]:
    title = "ONNX Runtime" if on == "ort, blocks" else on.removesuffix(", blocks")
    lines = [
        f"The smallest latency that can be planned, whatever weights are worth, in {title}: shares of the dense "
        "network's latency, with channels in multiples of 8. Where no block is skipped both are the same network, and "
        "the last column shows how far two measurements of it lie apart.",
        "",
        *_heading(
            "network",
            "batch",
            "threads",
            "widths alone, measured",
            "table said",
            "widths and blocks, measured",
            "table said",
            "blocks skipped",
            "times as fast as widths alone",
        ),
    ]
    for row in sorted(rows, key=lambda r: (r["threads"], r["batch"], NETWORKS.index(r["network"]))):
        alone, both = row["widths alone"], row["widths and blocks"]
        head = row["network"], row["batch"], row["threads"]
        shares = (f"{kind[key]:.1%}" for kind in (alone, both) for key in ("found", "predicted"))
        lines.append(_line(*head, *shares, both["skipped"], f"{alone['found'] / both['found']:.2f}"))
    return lines


def _halving_report(rows: list[dict[str, Any]]) -> list[str]:
    heading = _heading("network", "batch", "threads", "speed-up", "95 %", "by the MACs", "of what these promise")
    return ["Uniform halving of all widths, aligned:", "", *heading] + [
        _line(
            row["network"],
            row["batch"],
            row["threads"],
            f"{row['speedup']:.2f}",
            _interval(row),
            f"{row['ideal']:.2f}",
            f"{row['speedup'] / row['ideal']:.0%}",
        )
        for row in rows
    ]


def _peer_report(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Against torch-pruning at the same kept MACs. Theirs: uniform, by magnitude, widths in multiples of the number "
        "in the third column. Ours: the widths that keep as many MACs in the least time by the latency table, whatever "
        "weights are worth (they are random here). Where nothing in particular has to be kept of a group, these are "
        "lopsided networks that show what MACs can be made to cost, not ones to deploy.",
        "",
        *_heading(
            "network",
            "batch",
            "multiples",
            "each group keeps",
            "our MACs",
            "their MACs",
            "ours, ms",
            "theirs, ms",
            "faster",
            "95 %",
        ),
    ]
    for row in sorted(rows, key=lambda r: (NETWORKS.index(r["network"]), r["batch"], r["asked"], r["least"])):
        macs = (f"{row[key]:.1%}" for key in ("our_macs", "their_macs"))
        times = (f"{row[key]:.2f}" for key in ("our_ms", "their_ms", "speedup"))
        head = row["network"], row["batch"], row["asked"], f"{row['least']:.0%}"
        lines.append(_line(*head, *macs, *times, _interval(row)))
    for multiple, least in sorted({(row["asked"], row["least"]) for row in rows}):
        values = [row["speedup"] for row in rows if (row["asked"], row["least"]) == (multiple, least)]
        median = statistics.median(values)
        kept = f", each group keeping {least:.0%} or more" if least else ""
        lines += ["", f"Median with multiples of {multiple}{kept}: {median:.2f} over {len(values)} networks."]
    return lines


def _same_report(rows: list[dict[str, Any]]) -> list[str]:
    none = sum(not is_measurable(*row["speedup_ci"]) for row in rows)
    holds = sum(row["speedup_ci"][0] <= 1 <= row["speedup_ci"][1] for row in rows)
    return [
        f'The same graph as dense and as slim: "no measurable difference" in {none} of {len(rows)} runs of a second or '
        f"more. The 95 % interval held 1 in {holds}. These runs are new: the rule (Student's t over sittings, in each "
        "of which both networks are loaded anew, without the extreme ones; a claim at about 99 %) was set before them."
    ]


def _power_report(rows: list[dict[str, Any]]) -> list[str]:
    faster = sum(is_measurable(*row["speedup_ci"]) and row["speedup"] > 1 for row in rows)
    ratios = [row["speedup"] for row in rows]
    return [
        f"A network with {1 - rows[0]['macs']:.1%} fewer MACs was found faster in {faster} of {len(rows)} runs of "
        f"{rows[0]['seconds']:.0f} s, as long as `passdeploy profile` takes: {statistics.median(ratios):.3f}x in the "
        f"median, {min(ratios):.3f} to {max(ratios):.3f}."
    ]


def _plain_report(rows: list[dict[str, Any]]) -> list[str]:
    off = [row["in_turns_ms"] / row["plain_ms"] - 1 for row in rows]
    return [
        "Median in turns against a plain loop of the same session, before and after: "
        f"{statistics.median(off):+.1%} in the median of {len(off)} runs, {min(off):+.1%} to {max(off):+.1%}."
    ]


def _table_report(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"Table of {row['network']}, batch {row['batch']}, {row['threads']} threads: {row['seconds']:.0f} s; from its "
        f"file {row['from_cache_seconds']:.2f} s; its own estimate of its error {row['error'][0]:.1%} (median)."
        for row in rows
    ]


def _accuracy_report(rows: list[dict[str, Any]]) -> list[str]:
    """Build a table for every network, batch and number of fine-tuning steps."""
    lines: list[str] = []
    for key in dict.fromkeys((row["network"], row["batch"], row["steps"]) for row in rows):
        network, batch, steps = key
        own = [row for row in rows if (row["network"], row["batch"], row["steps"]) == key]
        own.sort(key=lambda row: (row["plan"], row["seed"]))
        lines += [
            f"{network} on the CIFAR-10 JPEG images at half its measured latency (ONNX Runtime, batch {batch}, "
            f"one thread), {steps} steps of fine-tuning; dense top-1 {own[0]['dense_top1']:.2%}:",
            "",
            *_heading("planned for", "seed", "top-1", "measured", "MACs kept"),
        ]
        for row in own:
            lines.append(
                _line(row["plan"], row["seed"], f"{row['top1']:.2%}", f"{row['found']:.1%}", f"{row['macs']:.1%}")
            )
        means = {kind: [row["top1"] for row in own if row["plan"] == kind] for kind in ("latency", "macs")}
        if all(means.values()):
            gained = statistics.mean(means["latency"]) - statistics.mean(means["macs"])
            lines += ["", f"Planning for latency keeps {100 * gained:+.2f} points against planning for MACs.", ""]
    return lines[:-1] if lines and not lines[-1] else lines


def _heading(*names: str) -> list[str]:
    return [_line(*names), "|" + "---|" * len(names)]


def _line(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _interval(row: dict[str, Any]) -> str:
    low, high = row["speedup_ci"]
    return f"{low:.2f} to {high:.2f}"


_REPORTS: dict[str, Callable[[list[dict[str, Any]]], list[str]]] = {
    "target": _target_report,
    "reach": _reach_report,
    "halving": _halving_report,
    "peer": _peer_report,
    "same": _same_report,
    "power": _power_report,
    "back to back": _plain_report,
    "table": _table_report,
    "accuracy": _accuracy_report,
}
