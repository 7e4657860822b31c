"""Deferred scalars: steps keep their numbers and values, and are read together."""

from __future__ import annotations

import math

import torch

from passdeploy.training.deferred import DeferredScalars, steps_per_report
from tests.device_reads import DeviceReads


def test_steps_come_in_order_with_one_read_for_all():
    deferred, reports, weight = DeferredScalars(every=3), [], torch.tensor(0.125)
    with DeviceReads([weight]) as reads:
        for step in range(5, 12):
            due = deferred.add(step, loss=weight * step, top1=weight * 4, lr=0.1 * step)
            assert reads.count == (0 if step < 7 else 1 if step < 10 else 2)
            assert len(due) == (3 if step in (7, 10) else 0)
            reports += due
        reports += deferred.flush()
        assert deferred.flush() == []
    assert reads.count == 3
    assert [(report.step, report.values) for report in reports] == [
        (step, {"loss": step / 8, "top1": 0.5, "lr": 0.1 * step}) for step in range(5, 12)
    ]


def test_values_are_read_exactly_whatever_their_types():
    deferred = DeferredScalars(every=9)
    deferred.add(0, loss=torch.tensor(0.1, dtype=torch.float64), top1=torch.tensor(0.1))
    deferred.add(1, loss=torch.tensor(math.nan), top1=torch.tensor(0.25, dtype=torch.bfloat16))
    first, second = deferred.flush()
    assert first.values == {"loss": 0.1, "top1": torch.tensor(0.1).item()}
    assert math.isnan(second.values["loss"])
    assert second.values["top1"] == 0.25


def test_losses_that_have_a_gradient_are_taken_without_it():
    deferred, loss = DeferredScalars(every=2), torch.tensor(1.0, requires_grad=True)
    deferred.add(0, loss=loss * 2)
    assert [report.values["loss"] for report in deferred.add(1, loss=loss * 3)] == [2.0, 3.0]


def test_only_a_cpu_is_read_in_every_step():
    assert steps_per_report(torch.device("cpu")) == 1
    assert steps_per_report(torch.device("cuda")) == 10
