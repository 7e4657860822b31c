"""A first parse of an ONNX file by TensorRT in a process of its own, since its parser is native code that may crash.

python -m passdeploy.export.trt_parse_trial rtx model.onnx
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from passdeploy.errors import CorruptArtifact, PassDeployError
from passdeploy.export.trt_api import Flavour, load_trt
from passdeploy.export.trt_engine import parse_network
from passdeploy.export.trt_log import BuilderLog, create_trt_object, make_logger
from passdeploy.runtime.child_process import child_environment, how_it_ended

_LIMIT_S = 600.0
_LARGEST_EXIT_CODE = 255  # what is negative, or larger on Windows, is a crash


def require_parsable(path: Path, flavour: Flavour) -> None:
    """Check that TensorRT's parser survives a file; whether it accepts it is found when the engine is built.

    Raises:
        CorruptArtifact: it crashes, or does not end.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "passdeploy.export.trt_parse_trial", flavour, str(path)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LIMIT_S,
            env=child_environment(),
        )
    except subprocess.TimeoutExpired as error:
        raise CorruptArtifact(f"{path} keeps TensorRT's parser busy for more than {_LIMIT_S:.0f} s.") from error
    if not 0 <= done.returncode <= _LARGEST_EXIT_CODE:  # an error of Python is left to the build, which explains it
        raise CorruptArtifact(
            f"{path} crashes TensorRT's parser ({how_it_ended(done.returncode)}).\n"
            "It was tried in a process of its own. The file is damaged, or made to do this."
        )


def main(arguments: Sequence[str]) -> None:
    """Parse the file `arguments[1]` with the flavour `arguments[0]`; a refusal is no failure."""
    flavour: Flavour = "rtx" if arguments[0] == "rtx" else "tensorrt"
    trt, log = load_trt(flavour), BuilderLog()
    logger = make_logger(trt, log)
    with suppress(PassDeployError):
        builder = create_trt_object(lambda: trt.Builder(logger), log)
        parse_network(trt, builder, logger, log, Path(arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
