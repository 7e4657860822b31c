"""Files of Torch-TensorRT programs (`.pt2`): write one with a label, and refuse one that is not for what is installed.

The label, a JSON file inside the archive, names the flavour and releases that compiled the program: engines inside run
only with the TensorRT that built them.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from passdeploy.errors import CorruptArtifact, MissingError
from passdeploy.export.quiet import quietly
from passdeploy.export.torch_trt_release import PACKAGES, TITLES, installed_flavour
from passdeploy.export.trt_api import FLAVOURS, Flavour
from passdeploy.runtime.versions import package_versions

_LABEL = "extra/passdeploy.json"  # inside the folder that the archive has at its top


def program_path_for(folder: Path, stem: str, flavour: Flavour) -> Path:
    """Return the path of a program: `model.pt2` or `model-rtx.pt2`."""
    return folder / (stem + ("-rtx.pt2" if flavour == "rtx" else ".pt2"))


def write_program(torch_trt: Any, compiled: nn.Module, path: Path, example: Tensor, facts: Mapping[str, Any]) -> None:
    """Save a compiled program, with its facts as label.

    The graph is written as it was compiled (`retrace=False`): exporting it again would run it.

    Args:
        torch_trt: the module.
        compiled: by `dynamo.compile`.
        path: of the file.
        example: a batch of images.
        facts: JSON values, with "flavour" and "versions" among them.
    """
    with quietly():
        torch_trt.save(compiled, str(path), output_format="exported_program", arg_inputs=[example], retrace=False)
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].split("/")[0]
        entry = zipfile.ZipInfo(f"{folder}/{_LABEL}")  # without the time of day, which would change the file's hash
        archive.writestr(entry, json.dumps(dict(facts), indent=2))


def read_label(path: Path) -> dict[str, Any]:
    """Read the facts that a program was saved with; empty for a `.pt2` that was not compiled here.

    Raises:
        CorruptArtifact: the file is no archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.endswith(_LABEL)), None)
            facts: dict[str, Any] = {} if name is None else json.loads(archive.read(name))
            return facts
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CorruptArtifact(
            f"{path.name} is not a program (.pt2): it is cut off, or another kind of file."
        ) from error


def require_loadable(path: Path) -> None:
    """Check that a program was compiled by the flavour and the release of Torch-TensorRT that are installed.

    Raises:
        MissingError: it was compiled by another.
        CorruptArtifact: the file is no archive.
    """
    label, here = read_label(path), installed_flavour()
    made_by: Flavour | None = label.get("flavour")
    if made_by not in FLAVOURS or here is None:
        return
    version, found = (
        str(versions.get(PACKAGES[flavour], ""))
        for versions, flavour in ((label.get("versions", {}), made_by), (package_versions(), here))
    )
    if (made_by, version) != (here, found):
        raise MissingError(
            f"{path.name} was compiled with {TITLES[made_by]} {version}; installed is {TITLES[here]} {found}.\n"
            "Engines run only with the release that built them. Compile it again here: passdeploy export --torch-trt"
        )
