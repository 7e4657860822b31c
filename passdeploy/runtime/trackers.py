"""Listeners that pass the metrics of a run on to TensorBoard or MLflow; each package is imported when it is asked for.

`metrics.jsonl` is always written, whatever tracker is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

from passdeploy.errors import require
from passdeploy.runtime.events import Event, Listener, StageFinished, Step, broadcast

TRACKERS = ("tensorboard", "mlflow")


@contextmanager
def tracking(names: tuple[str, ...], folder: Path, run_name: str, facts: Mapping[str, Any]) -> Iterator[Listener]:
    """Give a listener that passes every step on to the trackers of these names, which are closed at the end.

    Args:
        names: of `TRACKERS`; none: the listener does nothing.
        folder: of the run; TensorBoard writes to `tensorboard` in it, MLflow to where its environment says.
        run_name: name of the run in MLflow.
        facts: keys of the recipe, as MLflow's parameters.

    Raises:
        MissingExtra: a tracker is not installed.
    """
    listeners: list[Listener] = []
    closings = []
    if "tensorboard" in names:
        require("tensorboard", extra="tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))
        listeners.append(_tensorboard(writer))
        closings.append(writer.close)
    if "mlflow" in names:
        mlflow: Any = require("mlflow", extra="mlflow")
        mlflow.start_run(run_name=run_name)
        mlflow.log_params(dict(facts))
        listeners.append(_mlflow(mlflow))
        closings.append(mlflow.end_run)
    try:
        yield broadcast(*listeners)
    finally:
        for close in closings:
            close()


def _tensorboard(writer: Any) -> Listener:
    def listen(event: Event) -> None:
        if isinstance(event, Step):
            for name, value in event.metrics.items():
                writer.add_scalar(f"{event.stage}/{name}", value, event.done)
        elif isinstance(event, StageFinished) and event.text:
            writer.add_text(event.stage, event.text)

    return listen


def _mlflow(mlflow: Any) -> Listener:
    def listen(event: Event) -> None:
        if isinstance(event, Step):
            known = {f"{event.stage}.{name}": value for name, value in event.metrics.items() if isfinite(value)}
            mlflow.log_metrics(known, step=event.done)
        elif isinstance(event, StageFinished) and event.text:
            mlflow.set_tag(event.stage, event.text)

    return listen
