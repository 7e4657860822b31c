"""JSON files that carry the SHA-256 of their own content, so that damage to them is found when they are read.

A seal shows that a file was damaged or edited by hand. It is no signature: who changes a file on purpose can seal it
again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "seal"  # the key of the SHA-256 over all other keys


def sealed(document: Mapping[str, Any], *, indent: int = 2) -> str:
    """Write a document as JSON with its seal as the last key.

    >>> print(sealed({"version": 2}, indent=1))
    {
     "version": 2,
     "seal": "732322c128ed67841ef5aa42c7cd04ffcd74a61b2d17d710"
    }
    <BLANKLINE>
    """
    plain = json.loads(json.dumps(document))  # as it is read back
    return json.dumps({**document, SEAL: _seal_of(plain)}, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def read_sealed(content: bytes, *, version_key: str, sealed_from: int) -> dict[str, Any]:
    """Read what `sealed` wrote, and compare it with its seal.

    Args:
        content: of the file.
        version_key: key of the format's version; files of versions below `sealed_from` need no seal.
        sealed_from: first version with a seal.

    Raises:
        BrokenSealError: the content is JSON, and not that which was sealed.
        ValueError: it is no JSON object.
    """
    try:
        document = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(document, dict):
        raise ValueError("it is no JSON object")
    seal = document.pop(SEAL, None)
    version = document.get(version_key, 0)
    is_older = isinstance(version, int) and version < sealed_from
    if seal != _seal_of(document) and not (seal is None and is_older):
        raise BrokenSealError(document)
    return document


class BrokenSealError(ValueError):
    """A sealed document that was changed after it was written; `document` is what it says now."""

    def __init__(self, document: dict[str, Any]) -> None:
        super().__init__("it was damaged or edited: it is not what its seal was made for")
        self.document = document


def _seal_of(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:48]
