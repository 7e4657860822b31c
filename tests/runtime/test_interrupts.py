from __future__ import annotations

import os
import signal
import time

import pytest

from passdeploy.errors import DataError, PeerError
from passdeploy.runtime import interrupts
from passdeploy.runtime.interrupts import TerminatedError, ending_on_sigterm, held_interrupts


def test_sigterm_ends_the_block_as_ctrl_c_does_and_nothing_after_it():
    def wait_in_vain() -> None:
        with ending_on_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(TerminatedError):
        wait_in_vain()
    assert issubclass(TerminatedError, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_held_back_until_it_is_asked_for(number: signal.Signals):
    done = []

    def work() -> None:
        with ending_on_sigterm(), held_interrupts() as held:
            held.raise_pending()
            os.kill(os.getpid(), number)
            done.append(held.is_pending)
            held.raise_pending()
            done.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def test_an_interrupt_that_nobody_asked_for_is_raised_at_the_end():
    done = []

    def work() -> None:
        with held_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("end")
        done.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["end"]


@pytest.mark.parametrize("count", [1, 2])
def test_a_held_interrupt_ends_the_program_after_some_time_or_at_a_second_one(
    monkeypatch: pytest.MonkeyPatch, count: int
):
    monkeypatch.setattr(interrupts, "GRACE_S", 0.05 if count == 1 else 60.0)

    def wait_in_vain() -> None:
        with held_interrupts():
            for _ in range(count):
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(20)
            pytest.fail("it slept on")

    with pytest.raises(KeyboardInterrupt):
        wait_in_vain()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_saving_may_take_longer_than_the_time_of_grace(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(interrupts, "GRACE_S", 0.05)
    done = []

    def save() -> None:
        with held_interrupts() as held:
            with held.without_alarm():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
                done.append("saved")
            held.raise_pending()

    with pytest.raises(KeyboardInterrupt):
        save()
    assert done == ["saved"]


def test_what_an_interrupt_does_to_others_is_no_error_of_its_own():
    def work(error: Exception, *, is_interrupted: bool) -> None:
        with held_interrupts():
            if is_interrupted:
                os.kill(os.getpid(), signal.SIGINT)
            raise error

    with pytest.raises(KeyboardInterrupt):
        work(PeerError("another process is gone"), is_interrupted=True)
    with pytest.raises(PeerError):
        work(PeerError("another process is gone"), is_interrupted=False)
    with pytest.raises(DataError):
        work(DataError("no image"), is_interrupted=True)


def test_handlers_of_others_stay_in_place():
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append("theirs"))
    try:
        with held_interrupts() as held:
            os.kill(os.getpid(), signal.SIGINT)
            assert not held.is_pending
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == ["theirs"]
