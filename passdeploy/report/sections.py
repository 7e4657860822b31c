"""The sections of a run's page, each as the template takes it: a heading, a text, and tables, charts or pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log10
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from passdeploy.display.bench_table import bench_table
from passdeploy.display.changes import blocks_text
from passdeploy.display.exports import exports_table
from passdeploy.display.listing import Footnotes, Listing
from passdeploy.display.tables import latency_rows, layer_channels, summary_table
from passdeploy.display.units import duration, quantity, three_digits
from passdeploy.errors import percent
from passdeploy.report.charts import Line, bar, line_chart, range_strip, two_bars
from passdeploy.report.page_parts import Grid
from passdeploy.report.pictures import Picture, prompt_pictures
from passdeploy.report.run_facts import Curve, RunFacts

COUNTED = {"macs": "multiply-adds", "params": "parameters", "channels": "channels", "latency": "latency"}
_MOST_CLASSES = 40  # in the table of images by class; of more, those with the fewest images are shown
_MOST_LAYERS = 80  # in the table of layer times; of more, the slowest are shown
_CURVES = {  # (stage, metric) -> title, label of the heights, whether these are fractions
    ("dense", "loss"): ("Training the dense network", "loss", False),
    ("learn", "loss"): ("Learning which channels matter", "loss", False),
    ("learn", "budget"): ("What is left while channels are let go", "share of the dense cost", True),
    ("finetune", "loss"): ("Fine-tuning the slim network", "loss", False),
}


def sections_of(facts: RunFacts) -> list[dict[str, Any]]:
    """List the sections of a run's page, without those that it has nothing for."""
    sections = (
        _numbers_section(facts, summary_table(facts.summary)),
        _cut_section(facts),
        _curves_section(facts),
        _prompt_section(facts, prompt_pictures(facts)),
        _layers_section(facts),
        _exports_section(facts),
        _images_section(facts),
        _environment_section(facts),
    )
    return [section for section in sections if section]


def _section(name: str, title: str, about: str, **parts: Any) -> dict[str, Any]:
    empty = {"grids": (), "charts": (), "pictures": (), "missing": ""}
    return {"id": name, "title": title, "about": about, **empty, **parts}


def _numbers_section(facts: RunFacts, summary: Listing) -> dict[str, Any]:
    notes = Footnotes()
    timed, lines = latency_rows(facts.rows, notes)
    grids = [Grid(summary.headings[:4], tuple(row[:4] for row in summary.rows), "Accuracy and size")]
    if timed:
        headings = ("latency", "dense", "slim", "change", "note")
        grids.append(Grid(headings, tuple(timed), "Latency", (*lines, *notes.lines())))
    return _section("numbers", "Dense against slim", about_numbers(facts), grids=grids)


def about_numbers(facts: RunFacts) -> str:
    """Say what was asked for and reached, and how long each network was trained."""
    budget, before = facts.summary["budget"], facts.summary["slim"].get("top1_before_finetune")
    if facts.recipe.prune.takes_plan:
        text = f"The plan is that of {Path(str(facts.recipe.prune.from_run)).name}, whatever the target."
    else:
        text = f"Asked for {_budget_text(budget, 'requested')}, reached {_budget_text(budget, 'achieved')}."
    if before is not None:
        text += f" Before fine-tuning, the slim network had a top-1 of {percent(before, 2)}."
    steps = {curve.stage: curve.steps[-1] for curve in facts.curves if curve.metric == "loss" and curve.steps}
    if "finetune" in steps:
        dense = f"trained for {_steps_text(steps['dense'])}" if "dense" in steps else "there before"
        learning = f"{_steps_text(steps['learn'])} of choosing and " if "learn" in steps else ""
        if snapshot := facts.summary.get("snapshot"):
            learning = f"{_steps_text(snapshot['steps'])} of choosing in {snapshot['run']} and "
        more = f"{learning}{_steps_text(steps['finetune'])} of fine-tuning more"
        text += f" The dense network was {dense}; the slim one had {more}."
    return text


def _steps_text(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps:,} steps"


def _budget_text(budget: Mapping[str, Any], key: str) -> str:
    value = budget.get(key)
    if value is None:
        return "–"
    if budget["kind"] == "latency_ms":
        return f"{three_digits(value)} ms"
    kind = COUNTED.get(budget["kind"], budget["kind"])
    return f"{percent(value)} of the {kind}" if value <= 1.5 else f"{quantity(value)} {kind}"


def summary_with_groups(facts: RunFacts) -> Mapping[str, Any]:
    """Return the summary; for runs of earlier versions with the widths of the plan, without what they saved."""
    if facts.summary.get("groups"):
        return facts.summary
    groups = [
        {"name": name, "width": entry["width"], "kept": len(entry["kept"]), "macs_saved": 0.0}
        for name, entry in facts.plan["groups"].items()
    ]
    return {**facts.summary, "groups": groups}


def _cut_section(facts: RunFacts) -> dict[str, Any]:
    groups: Sequence[Mapping[str, Any]] = summary_with_groups(facts)["groups"]
    has_time = any("latency_saved" in group for group in groups)
    all_scores = [values for values in facts.scores.values() if len(values)]
    lowest = float(min(values.min() for values in all_scores)) if all_scores else 0.0
    highest = float(max(values.max() for values in all_scores)) if all_scores else 1.0
    is_log = 0 < 100 * lowest < highest
    scaled: Callable[[float], float] = log10 if is_log else float
    rows = []
    for group in groups:
        name, share = group["name"], group["kept"] / group["width"]
        scores, strip = facts.scores.get(name), Markup("")
        if scores is not None and len(scores):
            spread = [float(value) for value in np.quantile(scores, (0, 0.25, 0.5, 0.75, 1))]
            text = f"scores of {name}: median {spread[2]:.2g}"
            strip = range_strip([*map(scaled, spread)], scaled(lowest), scaled(highest), text)
        rows.append(
            (
                name,
                f"{group['width']} → {group['kept']}" if share < 1 else f"{group['width']}",
                bar(share, f"{name} keeps {percent(share, 0)}"),
                percent(group["macs_saved"]) if share < 1 else "",
                *((percent(group.get("latency_saved", 0.0)) if share < 1 else "",) if has_time else ()),
                *((strip,) if all_scores else ()),
            )
        )
    headings = ["channel group", "channels", "kept", "MACs saved"]
    headings += [*(["time saved"] if has_time else []), *(["scores, low to high"] if all_scores else [])]
    gone = blocks_text(facts.summary.get("blocks") or ()) or ", ".join(facts.plan.get("skipped") or ())
    about = (
        "One row for each group of channels that must go together, in the order of the network. What a group saved is "
        "its share of the dense network's multiply-adds; the shares add up to the whole saving. "
    )
    about += f"Blocks that were taken out: {gone}." if gone else "No block was taken out."
    if all_scores:
        about += " Scores: a line over all channels, a box over the middle half, a tick at the median"
        about += " (logarithmic)." if is_log else "."
    left = frozenset({0, 2, len(headings) - 1}) if all_scores else frozenset({0, 2})
    grid = Grid(tuple(headings), tuple(rows), "Channels before and after", left=left)
    return _section("cut", "What was cut", about, grids=[grid])


def _curves_section(facts: RunFacts) -> dict[str, Any] | None:
    charts = []
    for key, (title, label, has_shares) in _CURVES.items():
        curve = next((one for one in facts.curves if (one.stage, one.metric) == key and len(one.steps) > 1), None)
        if curve is None:
            continue
        target = facts.recipe.prune.target
        is_share = target.kind != "latency_ms" and target.value <= 1
        mark = float(target.value) if key[1] == "budget" and is_share else None
        charts.append((_curve_title(title, curve), _draw(title, curve, label, has_shares, mark)))
    if not charts:
        return None
    about = "Losses are those of the training batches, averaged over neighbouring steps where there are many."
    return _section("curves", "Learning curves", about, charts=charts)


def _curve_title(title: str, curve: Curve) -> str:
    return f"{title}, {_steps_text(len(curve.steps))}"


def _draw(title: str, curve: Curve, label: str, is_share: bool, mark: float | None) -> Markup:
    text = f"{title}: {label} from {curve.values[0]:.3g} to {curve.values[-1]:.3g} over {_steps_text(curve.steps[-1])}"
    lines = [Line(label, curve.steps, curve.values)]
    return line_chart(text, lines, x_label="step", y_label=label, mark=mark, is_share=is_share)


def _prompt_section(facts: RunFacts, pictures: list[Picture]) -> dict[str, Any] | None:
    prompt = facts.summary.get("prompt")
    if prompt is None:
        return None
    kept = "It is part of the slim network." if prompt["keep"] else "It only helped to choose, and was then dropped."
    about = (
        f"PASS learns pixels that are added to every image. {kept} Top-1 with it "
        f"{percent(prompt['top1_with'], 2)}, without it {percent(prompt['top1_without'], 2)}."
    )
    return _section("prompt", "The learned prompt", about, pictures=pictures)


def _layers_section(facts: RunFacts) -> dict[str, Any]:
    layers: Sequence[Mapping[str, Any]] = facts.profile.get("layers") or ()
    if not layers:
        missing = f"passdeploy profile --layers {facts.run_option}"
        about = "Which layers became faster was not measured yet."
        return _section("layers", "Time by layer", about, missing=missing)
    longest = max(max(layer["dense_ms"], layer["slim_ms"]) for layer in layers)
    slowest = sorted(range(len(layers)), key=lambda index: -layers[index]["dense_ms"])[:_MOST_LAYERS]
    notes, rows = Footnotes(), []
    for layer in (layers[index] for index in sorted(slowest)):
        times = (
            f"{layer['name']}: {three_digits(layer['dense_ms'])} ms before, {three_digits(layer['slim_ms'])} ms after"
        )
        rows.append(
            (
                layer["name"],
                layer_channels(layer),
                three_digits(layer["dense_ms"]),
                three_digits(layer["slim_ms"]),
                two_bars(layer["dense_ms"], layer["slim_ms"], longest, times),
                notes.number_of(layer["why"] and f"no faster because {layer['why']}"),
            )
        )
    of = facts.profile.get("layers_of") or {}
    place = f" ({of['backend']}, batch {of['batch']})" if of else ""
    about = f"Traced, so a little slower than without tracing{place}. Upper bar: dense. Lower bar: slim."
    headings = ("layer", "channels out×in", "dense ms", "slim ms", "", "note")
    left_out = (f"the {len(rows)} slowest of {len(layers)} layers",) if len(rows) < len(layers) else ()
    grid = Grid(headings, tuple(rows), "Time of each layer", (*left_out, *notes.lines()), frozenset({0, 4}))
    return _section("layers", "Time by layer", about, grids=[grid])


def exports_of(facts: RunFacts) -> Listing:
    """List the exported files with their parity."""
    return exports_table({"name": name, **record} for name, record in facts.exports.items())


def _exports_section(facts: RunFacts) -> dict[str, Any]:
    if not facts.exports:
        missing = f"passdeploy export {facts.run_option}"
        return _section("files", "Exported files", "Nothing was exported yet.", missing=missing)
    about = "Each was checked against the PyTorch model, if this machine can run it."
    grids = [Grid.of(exports_of(facts), "Files and their parity")]
    grids += [Grid.of(bench_table(facts.bench), "Every format and precision")] if facts.bench else []
    return _section("files", "Exported files", about, grids=grids)


def classes_grid(facts: RunFacts) -> Grid | None:
    """Count the images of each class; None where the run does not know them."""
    images: Mapping[str, Mapping[str, int]] | None = facts.summary.get("images")
    if not images:
        return None
    train, test = images["train"], images["test"]
    names = list(dict.fromkeys([*train, *test]))
    shown = names if len(names) <= _MOST_CLASSES else sorted(names, key=lambda name: train.get(name, 0))[:_MOST_CLASSES]
    rows = tuple((name, f"{train.get(name, 0):,}", f"{test.get(name, 0):,}") for name in shown)
    notes = () if len(shown) == len(names) else (f"the {len(shown)} classes with the fewest images, of {len(names):,}",)
    return Grid(("class", "training", "test"), rows, "Images by class", notes)


def _images_section(facts: RunFacts) -> dict[str, Any] | None:
    grid = classes_grid(facts)
    if grid is None:
        return None
    train, test = (sum(facts.summary["images"][part].values()) for part in ("train", "test"))
    about = f"{train:,} for training, {test:,} for testing; accuracy is counted on the test images alone."
    return _section("images", "Images", about, grids=[grid])


def environment_of(facts: RunFacts) -> Listing:
    """List the machine, the seed, what each stage took, and the versions."""
    environment = facts.summary.get("environment") or {}
    versions = facts.summary.get("versions") or {}
    names = {"deterministic": "same bits again", "device": "trained on", "cpu": "CPU", "gpu": "GPU", "cores": "cores"}
    rows = [(names.get(key, key), _value_text(value)) for key, value in environment.items() if value is not None]
    rows += [("seed", str(facts.summary["seed"]))]
    rows += [(f"{stage}, time", duration(float(took))) for stage, took in facts.summary["seconds"].items()]
    rows += [(name, str(version)) for name, version in versions.items() if version]
    return Listing(("", ""), tuple(rows), left=frozenset({0, 1}))


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(f"{key} {one}" for key, one in value.items()) if isinstance(value, dict) else str(value)


def _environment_section(facts: RunFacts) -> dict[str, Any]:
    listing = environment_of(facts)
    grid = Grid(("", ""), listing.rows, "Machine, times and versions", left=frozenset({0, 1}))
    return _section("environment", "Environment", "", grids=[grid])
