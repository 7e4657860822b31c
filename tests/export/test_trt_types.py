"""Type checks of the trt_*.py modules against the stubs of TensorRT 10 and 11, which are not in the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The folder of the stubs; without the variable, one beside the checkout.
STUBS = Path(os.environ.get("PASSDEPLOY_TENSORRT_STUBS", ROOT.parent / "shared" / "tensorrt-api"))
# Imports into the rest of the package are not followed, since following them into torch takes a minute.
SETTINGS = """
[mypy]
strict = true
follow_imports = skip
[mypy-tensorrt.*,numpy.*,passdeploy.errors,passdeploy.runtime.files,passdeploy.runtime.garbage]
follow_imports = normal
[mypy-passdeploy.export.artifact,passdeploy.runtime.cuda_driver]
follow_imports = normal
"""


@pytest.mark.parametrize("release", ["10.3", "10.6", "10.16", "11.4"])
def test_the_layer_type_checks_against_a_release(release: str, tmp_path: Path):
    stubs = STUBS / release
    if not (stubs / "tensorrt.pyi").is_file():
        pytest.skip(f"no TensorRT stubs at {stubs}; PASSDEPLOY_TENSORRT_STUBS names their folder")
    settings = tmp_path / "mypy.ini"
    settings.write_text(SETTINGS)
    modules = sorted(str(path) for path in (ROOT / "passdeploy").glob("*/trt_*.py"))
    assert len(modules) >= 6
    process = subprocess.run(
        [sys.executable, "-m", "mypy", f"--config-file={settings}", f"--cache-dir={tmp_path}", *modules],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(stubs)},
    )
    assert process.returncode == 0, process.stdout + process.stderr
