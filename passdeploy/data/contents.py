"""Contents of a loaded data set: images of each class, kinds of files, and what was left out, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from passdeploy.data.image_files import kinds_of_files
from passdeploy.data.images import RawDataset

_MOST_NAMED = 12  # classes that are listed one by one


@dataclass(frozen=True)
class DataContents:
    """Counts of the images of a data set that are used, and what was left out."""

    train: Mapping[str, int]  # class -> images
    test: Mapping[str, int]
    kinds: Mapping[str, int]  # ending of the files' names -> images; empty where there are no files
    left_out: tuple[str, ...]  # one sentence for each reason

    @classmethod
    def of(cls, dataset: RawDataset, unreadable: Sequence[str] = ()) -> DataContents:
        """Count the images of a data set, from which those with the reasons `unreadable` were taken out."""
        parts = (dataset.train, dataset.test)
        train, test = (_per_class(part.labels, dataset.classes) for part in parts)
        kinds = kinds_of_files([path for part in parts for path in part.paths or ()])
        lost = (f"{len(unreadable)} images that cannot be read, such as: {unreadable[0]}",) if unreadable else ()
        return cls(train, test, kinds, (*dataset.left_out, *lost))

    @property
    def per_class(self) -> str:
        """Count the images of each class, in training and in testing, in a few words: `6 and 2 of each`."""
        ranges = [(min(counts.values()), max(counts.values())) for counts in (self.train, self.test)]
        texts = [f"{least:,}" if least == most else f"{least:,} to {most:,}" for least, most in ranges]
        return f"{' and '.join(texts)} of each"

    @property
    def lines(self) -> list[str]:
        """Lines of text: the images of each class in training and in testing, their kinds, what was left out."""
        lines = [f"{name}: {_count_text(counts)}" for name, counts in (("train", self.train), ("test", self.test))]
        if self.kinds:
            lines.append("files: " + ", ".join(f"{count:,} {ending}" for ending, count in self.kinds.items()))
        return lines + [f"left out: {sentence}" for sentence in self.left_out]


def _per_class(labels: Sequence[int], classes: Sequence[str]) -> dict[str, int]:
    counts = Counter(labels)
    return {name: counts[label] for label, name in enumerate(classes)}


def _count_text(counts: Mapping[str, int]) -> str:
    """Write how many images there are of each class; of many classes, the smallest and the largest.

    >>> _count_text({"ant": 6, "bee": 6}), _count_text({"ant": 1, "bee": 6})
    ('12 images, 6 of each of 2 classes', '7 images: ant 1, bee 6')
    """
    total, least, most = sum(counts.values()), min(counts.values()), max(counts.values())
    if least == most:
        return f"{total:,} images, {least:,} of each of {len(counts):,} classes"
    if len(counts) <= _MOST_NAMED:
        return f"{total:,} images: " + ", ".join(f"{name} {count:,}" for name, count in counts.items())
    names = sorted(counts, key=lambda name: counts[name])
    return f"{total:,} images of {len(counts):,} classes, from {least:,} ({names[0]}) to {most:,} ({names[-1]})"
