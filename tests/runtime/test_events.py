"""Progress events and their listeners."""

from __future__ import annotations

import pytest

from passdeploy.runtime.events import Event, StageFinished, StageStarted, Step, broadcast, stage


def test_a_stage_tells_of_its_start_its_steps_and_what_it_achieved():
    heard: list[Event] = []
    with stage("cut", "channels", heard.append, total=2) as running:
        running.step(1, 2, loss=0.5)
        running.text = "half of them"
    started, step, finished = heard
    assert started == StageStarted("cut", "channels", 2)
    assert step == Step("cut", 1, 2, {"loss": 0.5})
    assert isinstance(finished, StageFinished)
    assert finished.text == "half of them"
    assert finished.seconds == running.seconds > 0


def test_a_stage_that_fails_is_not_finished():
    heard: list[Event] = []
    with pytest.raises(ValueError, match="no"), stage("cut", "", heard.append):
        raise ValueError("no")
    assert [type(event) for event in heard] == [StageStarted]


def test_every_listener_hears_every_event_in_order():
    heard: list[str] = []
    tell = broadcast(lambda _: heard.append("first"), lambda _: heard.append("second"))
    tell(StageStarted("a", ""))
    assert heard == ["first", "second"]
