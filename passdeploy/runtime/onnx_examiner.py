"""Examination of ONNX files of others before this process opens them: parsed, opened and run once in a child process.

A file that crashes a native parser, asks for more memory than there is, or runs without end is refused in a sentence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from passdeploy.errors import CorruptArtifact, clipped
from passdeploy.runtime.child_process import AnsweringChild, ChildEnded

LIMIT_S = 300.0  # of opening a file, and of one run
MEMORY_BYTES = 16 << 30  # of address space, where the machine does not say how much memory it has


class OnnxExaminer:
    """The child process, started for the first file; a context manager ends it."""

    def __init__(
        self, *, limit_s: float = LIMIT_S, memory_bytes: int | None = None, provider: str = "CPUExecutionProvider"
    ) -> None:
        """Start nothing yet.

        Args:
            limit_s: of opening a file, and of one run.
            memory_bytes: address space of the child; None: as much as the machine has memory, and four times the file.
            provider: of ONNX Runtime. On one that uses a GPU the memory is not limited, since CUDA reserves more
                addresses than there is memory, and a refusal is left to the caller, who can say what is missing.
        """
        self._limit_s, self._memory_bytes, self._provider = limit_s, memory_bytes, provider
        self._process: AnsweringChild | None = None

    def __enter__(self) -> OnnxExaminer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self, path: Path) -> None:
        """Parse a file and open it in ONNX Runtime, if that is installed.

        Raises:
            CorruptArtifact: it cannot be opened, or it has tensors outside of its folder.
        """
        answer = self._ask({"path": str(path.absolute())}, path, "opened", 4 * path.stat().st_size)
        if "error" in answer and self._is_on_cpu:
            raise CorruptArtifact(f"{path} cannot be opened.\nIt says: {clipped(answer['error'], 300)}")

    def parse(self, path: Path) -> None:
        """Parse and check a file without opening it, as is enough for one that goes to a parser of its own.

        Raises:
            CorruptArtifact: it is no valid ONNX file, or it has tensors outside of its folder.
        """
        answer = self._ask({"path": str(path.absolute()), "parse": True}, path, "parsed", 4 * path.stat().st_size)
        if "error" in answer:
            raise CorruptArtifact(f"{path} cannot be read.\nIt says: {clipped(answer['error'], 300)}")

    def run(self, path: Path, inputs: Mapping[str, tuple[str, Sequence[int]]]) -> None:
        """Run a file that was opened once on zeros; an error of the runtime is left to the caller's own run.

        Args:
            path: of the file.
            inputs: name -> (numpy type, shape).

        Raises:
            CorruptArtifact: the runtime crashes, or does not end.
        """
        values = {name: (dtype, list(shape)) for name, (dtype, shape) in inputs.items()}
        self._ask({"path": str(path.absolute()), "inputs": values}, path, "run", 0)

    def forget(self, path: Path) -> None:
        """Close a file in the child process."""
        self._ask({"path": str(path.absolute()), "close": True}, path, "closed", 0)

    def close(self) -> None:
        """End the child process."""
        if self._process is not None:
            self._process.close()
            self._process = None

    @property
    def _is_on_cpu(self) -> bool:
        return self._provider == "CPUExecutionProvider"

    def _ask(self, request: dict[str, Any], path: Path, what: str, needed_bytes: int) -> dict[str, str]:
        if self._process is None:
            most = self._memory_bytes or max(_all_memory(), needed_bytes) if self._is_on_cpu else 0
            self._process = _start(self._provider, most)
        try:
            return self._process.ask(request, limit_s=self._limit_s)
        except TimeoutError as error:
            self.close()
            raise CorruptArtifact(
                f"{path} is not {what} within {self._limit_s:.0f} s.\nIt is damaged, or made to keep a machine busy."
            ) from error
        except ChildEnded as error:
            self.close()
            raise CorruptArtifact(
                f"{path} crashes the library that it is {what} with ({error}).\n"
                "It was tried in a process of its own. The file is damaged, or made to do this."
            ) from error


def _all_memory() -> int:
    try:
        return max(MEMORY_BYTES // 4, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):  # unknown, or not Unix
        return MEMORY_BYTES


def _start(provider: str, memory_bytes: int) -> AnsweringChild:
    return AnsweringChild.start("passdeploy.runtime.onnx_examination", provider, str(memory_bytes), OMP_NUM_THREADS="1")
