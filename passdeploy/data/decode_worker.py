"""Program of a process that decodes image files into memory which it shares with the process that started it.

It is started by `decoding_processes.py` and ends when its connection is closed. It imports neither torch nor anything
that knows of a GPU, so that it starts fast and stays small.
"""

from __future__ import annotations

import math
import mmap
import signal
import sys
from multiprocessing.connection import Connection

import numpy as np

from passdeploy.data.images import decode_file
from passdeploy.errors import DataError


def serve(connection: Connection, memory: mmap.mmap) -> None:
    """Answer requests until the connection is closed.

    A request is the frame of images, the offset of a number in `memory`, and a list of (offset in `memory`, path). The
    number is set to the offset of the image that is being decoded. The answer lists (offset, message) of those that
    cannot be read.
    """
    while True:
        try:
            frame, progress_at, files = connection.recv()
        except (EOFError, OSError):
            return
        problems: list[tuple[int, str]] = []
        progress = np.frombuffer(memory, np.int64, 1, progress_at)
        for offset, path in files:
            progress[0] = offset
            shape = (3, frame.size, frame.size)
            place = np.frombuffer(memory, np.uint8, math.prod(shape), offset).reshape(shape)
            try:
                place[:] = decode_file(path, frame)
            except DataError as error:
                problems.append((offset, str(error)))
        connection.send(problems)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # of the terminal or a scheduler, to the whole group: the parent
        signal.signal(number, signal.SIG_IGN)  # still needs images, to end its step, and then closes the connection
    serve(Connection(int(sys.argv[1])), mmap.mmap(int(sys.argv[2]), 0))
