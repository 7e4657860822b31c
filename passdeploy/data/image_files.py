"""List the image files below a folder in a fixed order, and keep account of what is left out.

Files are images by their ending: every format that this Pillow reads. Hidden folders and files are left out, and so are
links to folders that lead back to where the list came from, which would put all images into one class. A million names
are listed without a `Path` or a call of the system for each.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from PIL import Image

from passdeploy.errors import DataError

# Formats that Pillow lists and that are no images for a network, or that it opens only with the help of other programs.
_NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
_JUNK_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r"}
_JUNK_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}

FolderId = tuple[int, int]  # device and inode


@cache
def image_endings() -> frozenset[str]:
    """Return the endings of file names, in lower case, of all formats that this Pillow reads."""
    Image.init()
    known = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return frozenset(end for end in known if Image.registered_extensions()[end] not in _NO_IMAGES) | {".mpo"}


def is_hidden(name: str) -> bool:
    """True for names of files and folders that operating systems and editors leave behind, and that nobody means."""
    return name.startswith(".") or name.lower() in _JUNK_FOLDERS


def ending_of(name: str) -> str:
    """Return the ending of a file name, in lower case; empty if it has none."""
    return os.path.splitext(name)[1].lower()


def kinds_of_files(paths: Iterable[str]) -> dict[str, int]:
    """Count files by the ending of their names, the most frequent first."""
    return dict(Counter(map(ending_of, paths)).most_common())


def folder_id(path: str | Path) -> FolderId:
    """Return what two paths of one folder have in common."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def is_folder(entry: os.DirEntry[str]) -> bool:
    """True for folders and links to folders; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:  # too many levels of links
        return False


def folders_in(folder: str | Path) -> list[str]:
    """List the names of the folders in a folder that are not hidden, links to folders included, in order."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not is_hidden(entry.name) and is_folder(entry))


def images_in(folder: str | Path) -> int:
    """Count the images that lie in the folder itself."""
    endings = image_endings()
    with os.scandir(folder) as entries:
        return sum(
            ending_of(entry.name) in endings and not is_hidden(entry.name) and not is_folder(entry) for entry in entries
        )


class ImageLister:
    """Lists the images of one class after the other, and counts what it leaves out.

    Args:
        root: folder that all others lie in, to name what is left out.
        around: folders around those that are listed; a link to one of them is a loop.
        is_checked: refuse dangling links and empty files now: large sets are decoded later, in the middle of an epoch.
    """

    def __init__(self, root: Path, around: Sequence[Path], *, is_checked: bool) -> None:
        self.root, self.is_checked = root, is_checked
        self.visited: dict[FolderId, str] = {}  # folders that images were listed in
        self.others: Counter[str] = Counter()  # ending -> files that are no images
        self.hidden: list[str] = []
        self.loops: list[str] = []
        self.repeated: list[str] = []
        self._example = ""
        self._around = {folder_id(folder) for folder in around}

    def images_below(self, folder: Path, taken: Sequence[FolderId] = ()) -> list[str]:
        """List the paths of the images in a folder and the folders below it, in the order of their names.

        Args:
            folder: of a class.
            taken: folders of other classes, whose images do not belong to this one.
        """
        own = folder_id(folder)
        self.visited[own] = str(folder)
        found: list[str] = []
        self._list(str(folder), self._around | {own}, set(taken) - {own}, found)
        return found

    def left_out(self) -> tuple[str, ...]:
        """Describe what was left out, one sentence for each reason."""
        sentences = []
        if self.others:
            kinds = ", ".join(f"{count:,} {ending or 'without ending'}" for ending, count in self.others.most_common(5))
            files = f"{self.others.total():,} files that are" if self.others.total() > 1 else "1 file that is"
            sentences.append(f"{files} no image of a format that Pillow reads ({kinds}), such as {self._example}")
        for names, what in (
            (self.hidden, "hidden folder"),
            (self.loops, "link that leads back to a folder around it"),
            (self.repeated, "link to a folder whose images are used already"),
        ):
            if names:
                head, _, rest = what.partition(" ")
                plural = f"{head}s {rest}" if head == "link" else f"{what}s"
                more = f", such as {names[0]}" if len(names) > 1 else f": {names[0]}"
                sentences.append(f"{len(names)} {plural if len(names) > 1 else what}{more}")
        return tuple(sentences)

    def _list(self, folder: str, above: set[FolderId], taken: set[FolderId], found: list[str]) -> None:
        endings, is_checked = image_endings(), self.is_checked
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=_name_of)
        for entry in entries:
            name = entry.name
            if is_folder(entry):
                if is_hidden(name):
                    self.hidden.append(self._shown(entry.path))
                else:
                    self._list_inside(entry, above, taken, found)
            elif ending_of(name) in endings and name[0] != ".":
                if is_checked:
                    _require_content(entry)
                found.append(entry.path)
            elif name[0] != "." and name.lower() not in _JUNK_FILES:
                self._example = self._example or self._shown(entry.path)
                self.others[ending_of(name)] += 1

    def _list_inside(
        self, entry: os.DirEntry[str], above: set[FolderId], taken: set[FolderId], found: list[str]
    ) -> None:
        own = folder_id(entry.path)
        if own in above:
            self.loops.append(self._shown(entry.path))
        elif own in taken or own in self.visited:
            self.repeated.append(self._shown(entry.path))
        else:
            self.visited[own] = entry.path
            self._list(entry.path, above | {own}, taken, found)

    def _shown(self, path: str) -> str:
        return os.path.relpath(path, self.root)


def _name_of(entry: os.DirEntry[str]) -> str:
    return entry.name


def _require_content(entry: os.DirEntry[str]) -> None:
    try:
        size = entry.stat().st_size
    except FileNotFoundError as error:
        raise DataError(f"{entry.path} is a link to a file that is not there.\nMend the link, or remove it.") from error
    except OSError as error:
        raise DataError(f"{entry.path} cannot be read: {error.strerror}.\nMend it, or remove it.") from error
    if size == 0:
        raise DataError(f"{entry.path} is empty (0 bytes), not an image.\nReplace the file, or remove it.")
