"""The verdict of a run in words: what was gained, what was lost, whether to deploy it, and how sure that is.

The rules are few and on the safe side: the slim network must be measurably faster in what was measured, and its loss of
top-1 within what the recipe allows. What cannot be told with this many images, or on this machine, is said to be so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from passdeploy.display.units import percent, relative_change
from passdeploy.report.run_facts import RunFacts
from passdeploy.runtime.intervals import accuracy_change_interval, is_measurable

# What a network is deployed in comes before what it was trained in.
PREFERRED = ("tensorrt", "torch-trt", "ort-trt", "ort-cuda", "ort", "compile", "torch")
BACKENDS = {
    "tensorrt": "TensorRT",
    "torch-trt": "Torch-TensorRT",
    "ort-trt": "ONNX Runtime (TensorRT)",
    "ort-cuda": "ONNX Runtime (CUDA)",
    "ort": "ONNX Runtime",
    "compile": "torch.compile",
    "torch": "PyTorch",
}


@dataclass(frozen=True)
class Tile:
    """One of the few numbers that stand at the top: a label, the number, and what must be known with it."""

    label: str
    value: str
    detail: str
    mood: str  # good, neutral or bad


@dataclass(frozen=True)
class Verdict:
    """The judgement on a run: what it gained, what it lost, and whether to deploy it."""

    mood: str  # good: deploy it; unsure: check something first; bad: do not
    answer: str
    reason: str
    tiles: tuple[Tile, ...]
    sure: tuple[str, ...]  # how sure each of it is, one sentence each

    @property
    def sentence(self) -> str:
        """Answer and reason in a line."""
        return f"{self.answer}. {self.reason}"


def judge(facts: RunFacts) -> Verdict:
    """Judge a run by what its folder has."""
    row = main_row(facts)
    accuracy, accuracy_mood, accuracy_words, accuracy_sure = _judge_accuracy(facts)
    speed, speed_mood, speed_words, speed_sure = _judge_speed(facts, row)
    dense, slim = facts.summary["dense"], facts.summary["slim"]
    sizes = [
        Tile(label, relative_change(dense[key], slim[key]).replace("-", "−"), detail, "neutral")
        for key, label, detail in (
            ("params", "parameters", "the weights to store and to load"),
            ("macs", "multiply-adds", "the arithmetic for one image"),
        )
    ]
    mood, answer = _answer(accuracy_mood, speed_mood)
    joint = "and" if (speed_mood == "good") == (accuracy_mood == "good") else "but"
    reason = f"{speed_words}, {joint} {accuracy_words}."
    sure = (*speed_sure, *accuracy_sure, *_sure_of_the_rest(facts))
    return Verdict(mood, answer, reason[0].upper() + reason[1:], (speed, accuracy, *sizes), sure)


def main_row(facts: RunFacts) -> Mapping[str, Any] | None:
    """Return the slim row that stands for the speed of a run: of its latency target, else of what is deployed."""
    slim = [row for row in facts.rows if row["model"] == "slim" and row.get("speedup")]
    budget = facts.summary["budget"]
    asked = [row for row in slim if row["backend"] == budget.get("backend") and row["batch"] == budget.get("batch")]
    ranked = sorted(slim, key=lambda row: PREFERRED.index(row["backend"]) if row["backend"] in PREFERRED else 99)
    return next(iter([*asked, *ranked]), None)


def where(row: Mapping[str, Any]) -> str:
    """Name what a row was measured in: `ONNX Runtime, fp32, batch 8`."""
    return f"{BACKENDS.get(row['backend'], row['backend'])}, {row['precision']}, batch {row['batch']}"


def _answer(accuracy: str, speed: str) -> tuple[str, str]:
    if "bad" in (accuracy, speed):
        return "bad", "Do not deploy it"
    if "unsure" in (accuracy, speed):
        return "unsure", "Not yet: check first"
    return "good", "Deploy it"


def _judge_accuracy(facts: RunFacts) -> tuple[Tile, str, str, list[str]]:
    """Return the tile, the mood, the clause for the sentence, and how sure it is."""
    before, after = facts.summary["dense"]["top1"], facts.summary["slim"]["top1"]
    change, allowed, images = after - before, facts.recipe.gates.top1_drop, facts.test_images
    detail = f"{percent(before, 2)} dense, {percent(after, 2)} slim"
    verb = "rose" if change > 0 else "fell"
    words = "top-1 is the same" if change == 0 else f"top-1 {verb} by {abs(100 * change):.2f} points"
    mood, sure = "good", list[str]()
    interval = None if images is None else accuracy_change_interval(before, after, images)
    if allowed is not None and -change > allowed + 1e-9:
        mood, words = "bad", f"{words}, more than the {100 * allowed:g} points that the recipe allows"
    if interval is None or images is None:
        sure.append("How many images the accuracy was counted on is not known: this run is of an earlier version.")
    else:
        low, high = interval
        detail += f"; 95 % interval {_points(low)} to {_points(high)}"
        if mood == "good" and low <= 0 <= high:
            words = f"no loss of accuracy shows on {images:,} test images ({_points(change)} points)"
        sure.append(
            f"Accuracy: counted on {images:,} test images, so the true change of top-1 lies between "
            f"{_points(low)} and {_points(high)} points (95 % interval)."
        )
        if mood == "good" and allowed is not None and -low > allowed + 1e-9:
            mood = "unsure"
            sure[-1] += (
                f" A loss of more than the {100 * allowed:g} points that the recipe allows is not ruled out: "
                "four times the images would halve this interval."
            )
            words = (
                f"{images:,} test images are too few to rule out that more than {100 * allowed:g} points of top-1 "
                f"are lost ({_points(change)} were counted)"
            )
    tile_mood = {"bad": "bad", "unsure": "neutral"}.get(mood, "good")
    return Tile("top-1", f"{_points(change)} points", detail, tile_mood), mood, words, sure


def _judge_speed(facts: RunFacts, row: Mapping[str, Any] | None) -> tuple[Tile, str, str, list[str]]:
    """Return the tile, the mood, the clause for the sentence, and how sure it is."""
    if row is None:
        sure = ["Speed: not measured. Type: passdeploy profile"]
        return (
            Tile("speed", "not measured", "type: passdeploy profile", "neutral"),
            "unsure",
            "its speed is unknown",
            sure,
        )
    speedup, interval = float(row["speedup"]), row.get("speedup_ci")
    place, sure = where(row), list[str]()
    if interval is None:
        sure.append("Speed: predicted by a latency table, not measured: measure it on the target machine.")
        mood, words, value = "unsure", f"it should be {speedup:.2f} times as fast ({place})", f"{speedup:.2f}×"
        return Tile("speed", value, f"predicted for {place}", "neutral"), mood, words, sure
    low, high = interval
    detail = f"95 % interval {low:.2f} to {high:.2f}; {place}"
    if not is_measurable(low, high):
        tile = Tile("speed", "no difference", detail, "bad")
        mood, words = "bad", f"it is not measurably faster ({place})"
        if is_disturbed(row):
            mood, words = "unsure", f"whether it is faster could not be told on a busy machine ({place})"
    elif speedup < 1:
        tile, mood = Tile("speed", f"{speedup:.2f}×", detail, "bad"), "bad"
        words = f"it is slower: {speedup:.2f} times as fast as the dense network ({place})"
    else:
        tile, mood = Tile("speed", f"{speedup:.2f}×", detail, "good"), "good"
        words = f"it is {speedup:.2f} times as fast ({place}{_other_batches(facts, row)})"
    calls = f"{int(row['n']):,} calls of each network" if row.get("n") else "calls of both networks in turns"
    device = device_name(facts, row)
    sure.append(f"Speed: {calls}, {low:.2f} to {high:.2f} times as fast (95 % interval), on {device}.")
    if is_disturbed(row):
        sure[-1] += " Other programs disturbed the measurement, which makes the interval wider."
    if not facts.profile.get("rows") and row["backend"] in ("torch", "compile") and mood == "good":
        mood = "unsure"
        words += ", measured briefly in PyTorch and not yet in what will be deployed"
        sure.append("What will be deployed was not measured. Type: passdeploy export, then passdeploy profile")
    return tile, mood, words, sure


def _other_batches(facts: RunFacts, row: Mapping[str, Any]) -> str:
    """Name the speed-ups of the other batch sizes that were measured in the same way as `row`."""
    same = ("backend", "precision", "device", "options")
    others = [
        one
        for one in facts.rows
        if one["model"] == "slim" and one is not row and all(one.get(key) == row.get(key) for key in same)
    ]
    return "".join(f"; {one['speedup']:.2f} with batch {one['batch']}" for one in others if one.get("speedup"))


def is_disturbed(row: Mapping[str, Any]) -> bool:
    """True if other programs or a throttled clock disturbed a measurement."""
    return any(str(note).startswith(("disturbed", "throttled", "unstable")) for note in row.get("notes") or ())


def device_name(facts: RunFacts, row: Mapping[str, Any]) -> str:
    """Name the processor that a row was measured on, with the threads of a CPU."""
    environment = facts.profile.get("environment") or facts.summary.get("environment") or {}
    if row.get("device") != "cpu":
        return str(row.get("device") or "an unknown device")
    threads = row.get("threads")
    count = f", {threads} thread{'s' if threads != 1 else ''}" if threads else ""
    return f"{environment.get('cpu') or 'the CPU'}{count}"


def _sure_of_the_rest(facts: RunFacts) -> list[str]:
    """Say what was checked of the network and its files, and what one run cannot show."""
    error, limit = facts.summary["equivalence"]["max_rel_error"], facts.recipe.gates.equivalence
    sure = [
        f"Cutting: the slim network gives the same outputs as the masked one, to {_power(error)} of the largest output "
        f"({_power(limit)} is allowed)."
    ]
    compared = [one["facts"]["parity"] for one in facts.exports.values() if one.get("facts", {}).get("parity")]
    if compared:
        agreement = min(parity["top1_agreement"] for parity in compared)
        images = max(parity["real_images"] for parity in compared)
        sure.append(
            f"Files: {len(compared)} of {len(facts.exports)} were compared with PyTorch on {images:,} images; "
            + (
                "all answers are the same."
                if agreement == 1
                else f"at least {percent(agreement)} of the answers agree."
            )
        )
    sure.append(f"One training was run (seed {facts.summary['seed']}); another seed gives another network.")
    return sure


def _power(value: float) -> str:
    """Write a small number as a digit times a power of ten.

    >>> _power(2.6e-7)
    '3×10⁻⁷'
    """
    digit, _, power = f"{value:.0e}".partition("e")
    return (
        digit
        if not int(power)
        else f"{digit}×10{str(int(power)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    )


def _points(change: float) -> str:
    """Write a difference of accuracies in points, with a true minus sign."""
    return f"{100 * change:+.2f}".replace("-", "−")
