"""Identity of a data set, by which a change is noticed: classes, numbers of images, a hash of what is listed.

No image is read for it: a file that was replaced by another one of its name, in the same class, is not noticed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from passdeploy.data.images import ImageSource, RawDataset
from passdeploy.errors import enumerated
from passdeploy.runtime.files import expanded


@dataclass(frozen=True)
class SplitIdentity:
    """Number of the images of a split, and a hash of their paths and labels."""

    images: int
    sha256: str  # of the paths below `data.root` and the labels, in their order; without files, of the labels

    @classmethod
    def of(cls, source: ImageSource, root: str) -> SplitIdentity:
        """Describe the images of a source whose paths begin with `root`."""
        labels = np.asarray(source.labels, dtype=np.int64).tobytes()
        names = "\n".join(path.removeprefix(root) for path in source.paths or ())
        return cls(len(source.labels), sha256(labels + names.encode(errors="surrogateescape")).hexdigest())


@dataclass(frozen=True)
class DataIdentity:
    """Classes of a data set, and what its splits consist of."""

    classes: tuple[str, ...]
    train: SplitIdentity
    test: SplitIdentity

    @classmethod
    def of(cls, dataset: RawDataset, root: str | None) -> DataIdentity:
        """Describe a data set in the folder `root`; None: it is in none."""
        prefix = "" if root is None else str(expanded(root))
        return cls(dataset.classes, SplitIdentity.of(dataset.train, prefix), SplitIdentity.of(dataset.test, prefix))

    def to_json(self) -> dict[str, Any]:
        """Return the content of data.json: `classes`, and `images` and `sha256` of `train` and `test`."""
        return {**asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> DataIdentity:
        """Read what `to_json` returned."""
        train, test = (SplitIdentity(**document[part]) for part in ("train", "test"))
        return cls(tuple(document["classes"]), train, test)

    def changes_since(self, earlier: DataIdentity) -> list[str]:
        """Say in a few words each what has changed; empty if nothing has."""
        changes = list(_class_changes(earlier.classes, self.classes))
        same_classes = not changes
        for name, before, now in (("training", earlier.train, self.train), ("test", earlier.test, self.test)):
            if before.images != now.images:
                changes.append(f"{before.images:,} {name} images then, {now.images:,} now")
            elif same_classes and before.sha256 != now.sha256:
                changes.append(f"as many {name} images, but with other names or labels")
        return changes


def _class_changes(before: Sequence[str], now: Sequence[str]) -> Iterable[str]:
    """Say which classes are new and which are gone.

    >>> list(_class_changes(("ant", "bee"), ("bee", "cat", "dog")))
    ["new classes 'cat', 'dog'", "class 'ant' is gone"]
    """
    new, gone = (
        [name for name in names if name not in others] for names, others in ((now, set(before)), (before, set(now)))
    )
    if new:
        yield f"class {new[0]!r} is new" if len(new) == 1 else f"new classes {_named(new)}"
    if gone:
        yield f"class {gone[0]!r} is gone" if len(gone) == 1 else f"classes {_named(gone)} are gone"
    if not new and not gone and list(before) != list(now):
        yield "the classes are in another order"


def _named(classes: Sequence[str]) -> str:
    return enumerated([repr(name) for name in classes])
