"""Import of Torch-TensorRT: which of its two packages is installed, and whether its release fits torch and TensorRT.

`torch-tensorrt` is made of TensorRT, `torch-tensorrt-rtx` of TensorRT for RTX; both install the module
`torch_tensorrt`, so only one of them can be there. Each release is compiled for one release of torch, and needs a GPU
even to be imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from passdeploy.errors import MissingError, first_line
from passdeploy.export.quiet import quietly
from passdeploy.export.trt_api import Flavour, half_installed
from passdeploy.runtime.cuda_driver import require_gpu
from passdeploy.runtime.versions import package_versions

# torch and both packages have the same number. From the requirements in their metadata: the release of TensorRT, and of
# TensorRT for RTX, that each is made for. There is no RTX package for torch 2.10.
_TENSORRT_FOR = {
    "2.14": ("11.1", "1.6"),
    "2.13": ("11.0", "1.5"),
    "2.12": ("10.16", "1.4"),
    "2.11": ("10.15", "1.3"),
    "2.10": ("10.14", None),
}
VERSION_MATRIX: tuple[Mapping[str, str], ...] = tuple(
    {"torch": number, "torch-tensorrt": number, "tensorrt": trt}
    | ({"torch-tensorrt-rtx": number, "tensorrt-rtx": rtx} if rtx else {})
    for number, (trt, rtx) in _TENSORRT_FOR.items()
)
PACKAGES: Mapping[Flavour, str] = {"tensorrt": "torch-tensorrt", "rtx": "torch-tensorrt-rtx"}
TITLES: Mapping[Flavour, str] = {"tensorrt": "Torch-TensorRT", "rtx": "Torch-TensorRT for RTX"}
_EXTRAS: Mapping[Flavour, str] = {"tensorrt": "torch-trt", "rtx": "torch-trt-rtx"}
_TENSORRT: Mapping[Flavour, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt-rtx"}


def installed_flavour() -> Flavour | None:
    """Return the flavour of the Torch-TensorRT that is installed, from the packages' metadata; None without one.

    Raises:
        MissingError: both are installed, one over the other.
    """
    installed = package_versions()
    found = [flavour for flavour, package in PACKAGES.items() if package in installed]
    if len(found) > 1:
        raise MissingError(
            f"{' and '.join(PACKAGES.values())} are both installed, one over the files of the other.\n"
            "Install one of them in an environment of its own."
        )
    return found[0] if found else None


def load_torch_trt(flavour: Flavour | None = None) -> tuple[Any, Flavour]:
    """Import `torch_tensorrt`, and turn all the exceptions with which that can fail into a MissingError.

    Args:
        flavour: that must be installed; None: either.

    Returns:
        The module, and its flavour.

    Raises:
        MissingError: no GPU, not installed, the other flavour, or made for another torch or TensorRT than those here.
    """
    require_gpu("a Torch-TensorRT program", hint="Run `passdeploy export --torch-trt` on the machine with the GPU.")
    found = installed_flavour()
    if found is None:
        wanted = flavour or "tensorrt"
        raise MissingError(f"{TITLES[wanted]} is not installed.\n{_install_line(wanted)}")
    if flavour not in (None, found):
        raise MissingError(
            f"asked was {TITLES[flavour]}, installed is {TITLES[found]} {package_versions()[PACKAGES[found]]}.\n"
            f"{_install_line(flavour)}\nOr leave out --flavour, which takes what is installed."
        )
    require_pair(found)
    try:
        with quietly():
            return import_module("torch_tensorrt"), found
    except Exception as error:  # libraries that do not fit together end in a plain Exception, RuntimeError or OSError
        raise MissingError(
            f"{TITLES[found]} does not load: {half_installed(found) or first_line(error)}\n"
            f"{version_matrix_text(found)}\n{_install_line(found)}"
        ) from error


def require_pair(flavour: Flavour) -> None:
    """Check that the installed torch and Torch-TensorRT were made for each other, without importing either.

    Raises:
        MissingError: they were not; the message names the pairs that fit.
    """
    installed, package = package_versions(), PACKAGES[flavour]
    torch_release, release = _minor(installed["torch"]), _minor(installed[package])
    if torch_release == release:  # the packages are numbered alike
        return
    rows = {row["torch"]: row for row in VERSION_MATRIX if package in row}
    row = rows.get(torch_release)
    fitting = _row_text(row, flavour) if row else f"no {package} is made for it"
    other = f"; {package} {release} takes torch {release}" if release in rows else ""
    raise MissingError(
        f"torch {installed['torch']} and {package} {installed[package]} were not made for each other.\n"
        f"For torch {torch_release}: {fitting}{other}.\n{_install_line(flavour)}"
    )


def version_matrix_text(flavour: Flavour) -> str:
    """State in one line the releases that are installed, and those that belong together."""
    installed = package_versions()
    names = [name for name in installed if "torch-tensorrt" in name or name.startswith("tensorrt")]
    here = ", ".join(f"{name} {installed[name]}" for name in ("torch", *names))
    rows = [row for row in VERSION_MATRIX if row["torch"] == _minor(installed["torch"])] or list(VERSION_MATRIX)
    fitting = "; ".join(f"torch {row['torch']}, {_row_text(row, flavour)}" for row in rows if PACKAGES[flavour] in row)
    return f"Here: {here}. Made for each other: {fitting}."


def _row_text(row: Mapping[str, str], flavour: Flavour) -> str:
    """Name the Torch-TensorRT and the TensorRT of a row."""
    return ", ".join(f"{name} {row[name]}" for name in (PACKAGES[flavour], _TENSORRT[flavour]))


def _install_line(flavour: Flavour) -> str:
    return f"In an environment of its own: pip install 'passdeploy[{_EXTRAS[flavour]}]'"


def _minor(version: str) -> str:
    """Return the first two numbers of a version: `2.14` for `2.14.1+cu130`."""
    return ".".join(version.split("+")[0].split(".")[:2])
