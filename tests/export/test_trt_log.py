"""Tests of TensorRT's log, and of error messages made from it."""

from __future__ import annotations

from typing import Any

import pytest

from passdeploy.errors import MissingError
from passdeploy.export.trt_log import BuilderLog, create_trt_object


def test_an_object_that_cannot_be_made_shows_the_last_error_logged():
    log = BuilderLog()

    def null_factory() -> Any:
        log.add(
            "ERROR", "CUDA initialization failure with error: 35 (cudaError 35: CUDA driver version is insufficient)"
        )
        log.add("INFO", "shutting down")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    with pytest.raises(MissingError, match=r"CUDA initialization failure(.|\n)*update the driver"):
        create_trt_object(null_factory, log)


def test_the_log_keeps_the_newest_lines():
    log = BuilderLog()
    for number in range(1000):
        log.add("ERROR", f"error {number}")
    assert log.last_error() == "error 999"
    assert len(log.lines) < 100
