"""The TensorRT layer against the signatures of both majors, which are not part of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Beside the checkout where we work on it; elsewhere: wherever the variable says.
STUBS = Path(os.environ.get("PASSDEPLOY_TENSORRT_STUBS", ROOT.parent / "shared" / "tensorrt-api"))
# What the layer shares with the rest is checked with the package; following all of it into torch takes a minute.
SETTINGS = """
[mypy]
strict = true
follow_imports = skip
[mypy-tensorrt.*,numpy.*,passdeploy.errors,passdeploy.runtime.files,passdeploy.runtime.garbage]
follow_imports = normal
[mypy-passdeploy.export.artifact,passdeploy.runtime.cuda_driver]
follow_imports = normal
"""


@pytest.mark.parametrize("release", ["10.16", "11.4"])
def test_the_layer_type_checks_against_a_release(release: str, tmp_path: Path):
    stubs = STUBS / release
    if not (stubs / "tensorrt.pyi").is_file():
        pytest.skip(f"no TensorRT stubs at {stubs}; PASSDEPLOY_TENSORRT_STUBS names their folder")
    settings = tmp_path / "mypy.ini"
    settings.write_text(SETTINGS)
    layer = sorted(str(path) for path in (ROOT / "passdeploy").glob("*/trt_*.py"))
    assert len(layer) >= 6
    done = subprocess.run(
        [sys.executable, "-m", "mypy", f"--config-file={settings}", f"--cache-dir={tmp_path}", *layer],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "MYPYPATH": str(stubs)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
