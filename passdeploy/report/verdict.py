"""The verdict of a run in words: what was gained, what was lost, whether to deploy it, and how sure that is.

The rules are few and on the safe side: the slim network must be measurably faster in what was measured, and its loss of
top-1 within what the recipe allows. What cannot be told with this many images, or on this machine, is said to be so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from passdeploy.display.units import relative_change
from passdeploy.errors import percent
from passdeploy.report.run_facts import RunFacts
from passdeploy.runtime.intervals import accuracy_change_interval, is_measurable, paired_change_interval

# What a network is deployed in comes before what it was trained in.
BACKENDS = {
    "tensorrt": "TensorRT",
    "torch-trt": "Torch-TensorRT",
    "ort-trt": "ONNX Runtime (TensorRT)",
    "ort-cuda": "ONNX Runtime (CUDA)",
    "ort": "ONNX Runtime",
    "compile": "torch.compile",
    "torch": "PyTorch",
}
_FILES = {"tensorrt": "engine", "torch-trt": "program", "ort-trt": "onnx", "ort-cuda": "onnx", "ort": "onnx"}
_UNLIMITED_DROP = 0.05  # of top-1: what must be ruled out where the recipe sets no limit
_CONDITIONS = ("precision", "threads", "device", "options")  # of a latency target, beside its backend and batch


@dataclass(frozen=True)
class Tile:
    """One of the few numbers that stand at the top: a label, the number, and what must be known with it."""

    label: str
    value: str
    detail: str
    mood: str  # good, neutral or bad


@dataclass(frozen=True)
class Todo:
    """Next step for a run: a sentence, and the commands to type."""

    text: str
    commands: tuple[str, ...] = ()

    @property
    def lines(self) -> str:
        """The sentence, and each command in a line of its own."""
        return "\n".join([self.text, *(f"  {command}" for command in self.commands)])


@dataclass(frozen=True)
class Verdict:
    """The judgement on a run: what it gained, what it lost, and whether to deploy it."""

    mood: str  # good: deploy it; unsure: check something first; bad: do not
    answer: str
    reason: str
    tiles: tuple[Tile, ...]
    todo: tuple[Todo, ...]
    sure: tuple[str, ...]  # how sure each of it is, one sentence each

    @property
    def sentence(self) -> str:
        """Answer and reason in a line."""
        return f"{self.answer}. {self.reason}"


@dataclass
class _Judged:
    """Judgement on the speed, or on the accuracy."""

    tile: Tile
    mood: str  # good, unsure or bad
    words: str  # a clause of the sentence
    sure: str  # how sure it is
    todo: Todo | None = None  # what would make it better, or better known


def judge(facts: RunFacts) -> Verdict:
    """Judge a run by what its folder has."""
    row = main_row(facts)
    accuracy, speed = _judge_accuracy(facts), _judge_speed(facts, row)
    dense, slim = facts.summary["dense"], facts.summary["slim"]
    sizes = [
        Tile(label, relative_change(dense[key], slim[key]).replace("-", "−"), detail, "neutral")
        for key, label, detail in (
            ("params", "parameters", "the weights to store and to load"),
            ("macs", "multiply-adds", "the arithmetic for one image"),
        )
    ]
    mood, answer = _answer(accuracy.mood, speed.mood)
    joint = "and" if (speed.mood == "good") == (accuracy.tile.mood == "good") else "but"
    reason = f"{speed.words}, {joint} {accuracy.words}."
    todo = tuple(one.todo for one in (speed, accuracy) if one.todo) or _deployment(facts, row)
    sure = (speed.sure, accuracy.sure, *_sure_of_the_rest(facts))
    return Verdict(mood, answer, reason[0].upper() + reason[1:], (speed.tile, accuracy.tile, *sizes), todo, sure)


def main_row(facts: RunFacts) -> Mapping[str, Any] | None:
    """Return the slim row that stands for the speed of a run: of its latency target, else of what is deployed."""
    slim = [row for row in facts.rows if row["model"] == "slim" and row.get("speedup")]
    budget = facts.summary["budget"]
    asked = [row for row in slim if row["backend"] == budget.get("backend") and row["batch"] == budget.get("batch")]
    asked.sort(key=lambda row: -sum(row.get(key) == budget.get(key) for key in _CONDITIONS))
    return next(iter([*asked, *sorted(slim, key=lambda row: preference(row["backend"]))]), None)


def preference(backend: str) -> int:
    """Return the rank of a backend, 0 for the one that is nearest to deployment."""
    return list(BACKENDS).index(backend) if backend in BACKENDS else len(BACKENDS)


def where(row: Mapping[str, Any]) -> str:
    """Name what a row was measured in: `ONNX Runtime, fp32, batch 8`."""
    return f"{BACKENDS.get(row['backend'], row['backend'])}, {row['precision']}, batch {row['batch']}"


def _answer(accuracy: str, speed: str) -> tuple[str, str]:
    if "bad" in (accuracy, speed):
        return "bad", "Do not deploy it"
    if "unsure" in (accuracy, speed):
        return "unsure", "Not yet: check first"
    return "good", "Deploy it"


def _judge_accuracy(facts: RunFacts) -> _Judged:
    before, after = facts.summary["dense"]["top1"], facts.summary["slim"]["top1"]
    change, allowed, images = after - before, facts.recipe.gates.top1_drop, facts.test_images
    detail = f"{percent(before, 2)} dense, {percent(after, 2)} slim"
    verb = "rose" if change > 0 else "fell"
    words = "top-1 is the same" if change == 0 else f"top-1 {verb} by {abs(100 * change):.2f} points"
    mood, tile_mood, todo = "good", "good", None
    bearable = _UNLIMITED_DROP if allowed is None else allowed
    if -change > bearable + 1e-9:
        mood = tile_mood = "bad"
        whose = "are held bearable, for want of a limit in the recipe" if allowed is None else "the recipe allows"
        words += f", more than the {100 * bearable:g} points that {whose}"
        todo = Todo("Win accuracy back: a larger prune.target, more prune.steps or more finetune.epochs in the recipe.")
    if images is None:
        sure = "How many images the accuracy was counted on is not known: this run is of an earlier version."
        return _Judged(Tile("top-1", f"{_points(change)} points", detail, tile_mood), mood, words, sure, todo)
    low, high = _change_interval(facts, images)
    detail += f"; 95 % interval {_points(low)} to {_points(high)}"
    sure = f"Accuracy: {_counted(facts, images, low, high)}. {_limit_of(allowed)}"
    if mood == "good" and -low > bearable + 1e-9:
        mood, tile_mood = "unsure", "neutral"
        sure += " A loss of more than that is not ruled out."
        todo = Todo("Count accuracy on more test images: four times as many halve the interval.")
        words = (
            f"{images:,} test images are too few to rule out that more than {100 * bearable:g} points of top-1 "
            f"are lost ({_points(change)} were counted)"
        )
    elif mood == "good" and low <= 0 <= high:
        if change < 0:
            tile_mood = "neutral"
            words += f" on {images:,} test images, which may be chance"
        else:
            words = f"no loss of accuracy shows on {images:,} test images ({_points(change)} points)"
    return _Judged(Tile("top-1", f"{_points(change)} points", detail, tile_mood), mood, words, sure, todo)


def _change_interval(facts: RunFacts, images: int) -> tuple[float, float]:
    """Return the 95 % interval of the change of top-1, from the images whose answer changed where these are known."""
    dense, slim = facts.summary["dense"], facts.summary["slim"]
    if answers := facts.summary.get("answers"):
        return paired_change_interval(answers["became_right"], answers["became_wrong"], images)
    return accuracy_change_interval(dense["top1"], slim["top1"], images)


def _counted(facts: RunFacts, images: int, low: float, high: float) -> str:
    """Say what was counted, and how far other images like these could take it."""
    dense, slim = (round(facts.summary[which]["top1"] * images) for which in ("dense", "slim"))
    text = f"dense {dense:,} and slim {slim:,} of {images:,} test images right"
    if answers := facts.summary.get("answers"):
        text += f" ({answers['became_right']:,} became right, {answers['became_wrong']:,} wrong)"
    return f"{text}. Other images like these could make it {_points(low)} to {_points(high)} points (95 % interval)"


def _limit_of(allowed: float | None) -> str:
    """Name the loss that is held bearable."""
    if allowed is None:
        return f"The recipe sets no limit (gates.top1_drop): {100 * _UNLIMITED_DROP:g} points are held bearable."
    return f"The recipe allows a loss of {100 * allowed:g} point{'s' if allowed != 0.01 else ''} (gates.top1_drop)."


def _judge_speed(facts: RunFacts, row: Mapping[str, Any] | None) -> _Judged:
    run = facts.run_option
    todo: Todo | None
    if row is None:
        tile = Tile("speed", "not measured", "type: passdeploy profile", "neutral")
        todo = Todo("Measure it:", (f"passdeploy profile {run}",))
        return _Judged(tile, "unsure", "its speed is unknown", "Speed: not measured.", todo)
    speedup, interval, place = float(row["speedup"]), row.get("speedup_ci"), where(row)
    if interval is None:
        tile = Tile("speed", f"{speedup:.2f}×", f"predicted for {place}", "neutral")
        words = f"it should be {speedup:.2f} times as fast ({place})"
        todo = Todo("Measure it on the target machine:", (f"passdeploy profile {run}",))
        return _Judged(tile, "unsure", words, "Speed: predicted by a latency table, not measured.", todo)
    low, high = interval
    detail = f"95 % interval {low:.2f} to {high:.2f}; {place}"
    todo = Todo(
        "Ask for less in prune.target. Which layers stay slow is shown by:", (f"passdeploy profile --layers {run}",)
    )
    if not is_measurable(low, high) and is_disturbed(row):
        tile, mood = Tile("speed", "not known", detail, "neutral"), "unsure"
        words = f"whether it is faster could not be told on a busy machine ({place})"
        todo = Todo("Measure again when nothing else runs:", (f"passdeploy profile --seconds 20 {run}",))
    elif not is_measurable(low, high):
        tile, mood = Tile("speed", "no difference", detail, "bad"), "bad"
        words = f"it is not measurably faster ({place}{_other_batches(facts, row)})"
    elif speedup < 1:
        tile, mood = Tile("speed", f"{speedup:.2f}×", detail, "bad"), "bad"
        words = f"it is slower: {speedup:.2f} times as fast as the dense network ({place}{_other_batches(facts, row)})"
    else:
        tile, mood, todo = Tile("speed", f"{speedup:.2f}×", detail, "good"), "good", None
        words = f"it is {speedup:.2f} times as fast ({place}{_other_batches(facts, row)})"
    calls = f"{int(row['n']):,} calls of each network" if row.get("n") else "calls of both networks in turns"
    sure = f"Speed: {calls}, {low:.2f} to {high:.2f} times as fast (95 % interval), on {device_name(facts, row)}."
    if mood == "bad" and _has_faster_batch(facts, row):
        mood, todo = "unsure", Todo("Deploy it only where it runs with a batch for which it is faster.", ())
    if _has_note(row, "disturbed", "throttled"):
        sure += " Other programs disturbed the measurement: repeat it on a quiet machine for a narrower interval."
    elif is_disturbed(row):
        sure += " Single calls took very different times, which makes the interval wider."
    if not facts.profile.get("rows") and row["backend"] in ("torch", "compile"):
        sure += " What will be deployed was not measured."
        if mood != "unsure":
            mood, tile = "unsure", replace(tile, mood="neutral")
            words += " in a short measurement, and the file that will run was not measured"
        if mood == "unsure":
            export = () if facts.exports else (f"passdeploy export {run}",)
            todo = Todo("Measure the file that will run:", (*export, f"passdeploy profile {run}"))
    return _Judged(tile, mood, words, sure, todo)


def _deployment(facts: RunFacts, row: Mapping[str, Any] | None) -> tuple[Todo, ...]:
    """Name the file to deploy, the one whose speed the verdict is of, and where else to measure."""
    assert row is not None, "what was not measured is not deployed"
    kind = _FILES.get(row["backend"])
    named = [
        name
        for name, record in facts.exports.items()
        if (record["kind"], record.get("precision")) == (kind, row["precision"])
        and not (name.startswith("dense") or record.get("stale"))
    ]
    run = facts.run_option
    what = f"export/{named[0]}" if named else "the slim network of this run, which pd.load reads"
    return (
        Todo(f"Deploy {what}."),
        Todo("Speed differs from machine to machine. On the one it will run on:", (f"passdeploy profile {run}",)),
    )


def _rows_of_other_batches(facts: RunFacts, row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """List the rows of the slim network that were measured in the same way as `row`, with other batch sizes."""
    same = ("backend", "precision", "device", "options")
    return [
        one
        for one in facts.rows
        if one["model"] == "slim" and one is not row and all(one.get(key) == row.get(key) for key in same)
    ]


def _has_faster_batch(facts: RunFacts, row: Mapping[str, Any]) -> bool:
    """True if the slim network is measurably faster with another batch size than that of `row`."""
    intervals = (one.get("speedup_ci") for one in _rows_of_other_batches(facts, row))
    return any(interval and is_measurable(*interval) and interval[0] > 1 for interval in intervals)


def _other_batches(facts: RunFacts, row: Mapping[str, Any]) -> str:
    """Name the speed-ups of the other batch sizes that were measured in the same way as `row`."""
    return "".join(
        f"; {one['speedup']:.2f} with batch {one['batch']}"
        if is_measurable(*(one.get("speedup_ci") or (one["speedup"],) * 2))
        else f"; not measurably faster with batch {one['batch']}"
        for one in _rows_of_other_batches(facts, row)
        if one.get("speedup")
    )


def is_disturbed(row: Mapping[str, Any]) -> bool:
    """True if other programs or a throttled clock disturbed a measurement, or its calls took very different times."""
    return _has_note(row, "disturbed", "throttled", "unstable")


def _has_note(row: Mapping[str, Any], *beginnings: str) -> bool:
    return any(str(note).startswith(beginnings) for note in row.get("notes") or ())


def device_name(facts: RunFacts, row: Mapping[str, Any]) -> str:
    """Name the processor that a row was measured on, with the threads of a CPU."""
    processor = facts.processor_of(row)
    if row.get("device") != "cpu":
        return processor or str(row.get("device") or "an unknown device")
    threads = row.get("threads")
    count = f", {threads} thread{'s' if threads != 1 else ''}" if threads else ""
    return f"{processor or 'the CPU'}{count}"


def _sure_of_the_rest(facts: RunFacts) -> list[str]:
    """Say what was checked of the network and its files, and what one run cannot show."""
    error, limit = facts.summary["equivalence"]["max_rel_error"], facts.recipe.gates.equivalence
    sure = [
        f"Cutting: with the channels taken out, the network computes what it computes with them switched off, to "
        f"{_power(error)} of the largest output ({_power(limit)} is allowed)."
    ]
    compared = [one["facts"]["parity"] for one in facts.exports.values() if one.get("facts", {}).get("parity")]
    if compared:
        agreement, images = (min(parity[key] for parity in compared) for key in ("top1_agreement", "real_images"))
        sure.append(
            f"Files: {len(compared)} of {len(facts.exports)} were compared with PyTorch on "
            f"{f'{images:,} images' if images else 'noise alone, not on images'}; "
            + (
                "all answers are the same."
                if agreement == 1
                else f"at least {percent(agreement)} of the answers agree."
            )
        )
    seed = facts.summary["seed"]
    sure.append(
        f"One training was run (seed {seed}). How much depends on chance is shown by the same recipe with "
        f"--set seed={seed + 1}, and by passdeploy compare."
    )
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
