from __future__ import annotations

import os
import signal
import time

import pytest

from passdeploy.runtime.interrupts import TerminatedError, ending_on_sigterm


def test_sigterm_ends_the_block_as_ctrl_c_does_and_nothing_after_it():
    def wait_in_vain() -> None:
        with ending_on_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(TerminatedError):
        wait_in_vain()
    assert issubclass(TerminatedError, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
