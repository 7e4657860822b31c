"""`make audit`: what cannot be looked up is no success."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import audit

KNOWN = {"name": "numpy", "version": "2.4", "vulns": []}
BAD = {"name": "pillow", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize(
    ("packages", "code", "words"),
    [
        ([KNOWN], 0, "1 packages, no known vulnerabilities"),
        ([KNOWN, BAD, UNKNOWN], 1, "pillow 1.0: PYSEC-1, mended in 1.1"),
        ([KNOWN, UNKNOWN], 3, "1 of 2 packages could not be looked up: torch"),
        (None, 3, "the database of vulnerabilities was not reached.\npip-audit says: ProxyError: no"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
def test_a_package_that_was_not_looked_up_is_no_success(
    packages: list[dict[str, object]] | None, code: int, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    report = (
        json.dumps({"dependencies": [*packages, {"name": "passdeploy", "skip_reason": "editable"}]}) if packages else ""
    )
    tool = tmp_path / "pip-audit"
    tool.write_text(f"#!/bin/sh\necho '{report}'\necho 'Traceback\nProxyError: no' >&2\n")
    tool.chmod(0o755)
    assert audit.main(str(tool), "folder") == code
    printed = capfd.readouterr()
    assert words in (printed.out if code == 0 else printed.err)
