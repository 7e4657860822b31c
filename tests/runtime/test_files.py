from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from passdeploy.runtime.files import atomic_path, sha256_of, write_atomically


def test_the_hash_is_the_hash_of_the_bytes(tmp_path: Path):
    content = bytes(range(256)) * 5000  # more than one chunk
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_file_appears_whole_and_in_a_new_folder(tmp_path: Path):
    path = tmp_path / "new" / "result.json"
    with atomic_path(path) as draft:
        draft.write_text("{}")
        assert not path.exists()
        assert draft.suffix == ".json"
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "result.json"
    write_atomically(path, "old")

    def interrupted() -> None:
        with atomic_path(path) as draft:
            draft.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
