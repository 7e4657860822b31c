"""Files that passdeploy wrote into a run folder, as opposed to files of others."""

from __future__ import annotations

from pathlib import Path

from passdeploy.errors import PassDeployError
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.numbering import MANIFEST

_MOST_LEVELS = 5  # of folders between a run and a file of it, such as `export/triton/NAME/1/model.plan`


def is_file_of_a_run(path: Path) -> bool:
    """Test whether a file lies in a run folder whose manifest has a record of it, which it still fits."""
    path = path.resolve()
    for folder in path.parents[:_MOST_LEVELS]:
        if (folder / MANIFEST).is_file():
            try:
                RunFolder.open(folder).verified(path.relative_to(folder).as_posix())
            except (PassDeployError, OSError):
                return False
            return True
    return False
