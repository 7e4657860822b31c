"""Comparison of the data that a run was begun with (`data.json`) with that of now. Imports no torch."""

from __future__ import annotations

from passdeploy.data.identity import DataIdentity
from passdeploy.errors import DataError, RunError
from passdeploy.runs.folder import RunFolder
from passdeploy.runtime.events import Listener, Warned

DATA = "data.json"  # the `DataIdentity` of a run


def require_same_data(folder: RunFolder, identity: DataIdentity) -> None:
    """Check that the data is what a run was begun with; runs of earlier versions have not written that down.

    Raises:
        RunError: it is not; the message says what has changed.
    """
    earlier = _identity_of(folder)
    if earlier is not None and (changes := identity.changes_since(earlier)):
        raise RunError(
            f"the data has changed since {folder.path.name} was begun: {'; '.join(changes)}.\n"
            "Put the images back as they were, or leave --resume out to start a new run."
        )


def require_same_classes(folder: RunFolder, identity: DataIdentity | None, listener: Listener) -> None:
    """Check that the data has the classes that a run was begun with, and warn where its images are others.

    Args:
        folder: the run; one of an earlier version has not written down what its data was.
        identity: of the data as it is now; None: it has none.
        listener: receives the warning.

    Raises:
        DataError: it has other classes, so that labels and images are not those of the network.
    """
    earlier = _identity_of(folder)
    if earlier is None or identity is None or not (changes := identity.changes_since(earlier)):
        return
    changed = f"the data has changed since {folder.path.name} was begun: {'; '.join(changes)}"
    if identity.classes != earlier.classes:
        raise DataError(
            f"{changed}.\nFiles are compared and calibrated on images of the classes that the network tells apart: "
            "put them back as they were."
        )
    listener(Warned(f"{changed}. Files are compared and calibrated on the images that are there now."))


def _identity_of(folder: RunFolder) -> DataIdentity | None:
    """Read the identity of the data that a run was begun with; None: an earlier version did not write it."""
    return DataIdentity.from_json(folder.read_json(DATA)) if folder.has(DATA) else None
