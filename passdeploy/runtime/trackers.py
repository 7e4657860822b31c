"""Listeners that pass the metrics of a run on to TensorBoard or MLflow; each package is imported when it is asked for.

`metrics.jsonl` is always written, whatever tracker is used. A tracker that fails ends nothing but itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

from passdeploy.errors import MissingError, UsageError, clipped, first_line, require
from passdeploy.runtime.events import Event, Listener, StageFinished, Step, Warned, broadcast, silent

TRACKERS = ("tensorboard", "mlflow")


def require_trackers(names: Sequence[str]) -> None:
    """Check, before anything is trained, that trackers are known and installed and that MLflow finds where to write.

    Raises:
        UsageError: there is no tracker of that name.
        MissingExtra: a tracker is not installed.
        MissingError: MLflow cannot write to where its environment says.
    """
    if unknown := [name for name in names if name not in TRACKERS]:
        raise UsageError(f"there is no tracker {clipped(unknown[0])!r}.\nKnown: {', '.join(TRACKERS)}.")
    if "tensorboard" in names:
        require("tensorboard", extra="tensorboard")
    if "mlflow" in names:
        mlflow: Any = require("mlflow", extra="mlflow")
        try:
            mlflow.MlflowClient().search_experiments(max_results=1)
        except Exception as error:
            raise _mlflow_error(mlflow, "write to", error) from error


@contextmanager
def tracking(
    names: Sequence[str], folder: Path, run_name: str, facts: Mapping[str, Any], *, tell: Listener = silent
) -> Iterator[Listener]:
    """Give a listener that passes every step on to the trackers of these names, which are closed at the end.

    Args:
        names: of `TRACKERS`; none: the listener does nothing.
        folder: of the run; TensorBoard writes to `tensorboard` in it, MLflow to where its environment says.
        run_name: name of the run in MLflow.
        facts: keys of the recipe, as MLflow's parameters.
        tell: is warned of a tracker that fails; it then gets nothing more.

    Raises:
        UsageError, MissingExtra, MissingError: as `require_trackers` does, and where MLflow starts no run.
    """
    require_trackers(names)
    listeners: list[Listener] = []
    closings: list[Callable[[str], object]] = []  # called with how the run ended, in MLflow's words
    ended = "FINISHED"
    try:
        if "tensorboard" in names:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"))
            closings.append(lambda _: writer.close())
            listeners.append(_until_it_fails("TensorBoard", _tensorboard(writer), tell))
        if "mlflow" in names:
            mlflow: Any = require("mlflow", extra="mlflow")
            try:
                mlflow.start_run(run_name=run_name)
                closings.append(mlflow.end_run)
                mlflow.log_params(dict(facts))
            except Exception as error:
                raise _mlflow_error(mlflow, "start a run at", error) from error
            listeners.append(_until_it_fails("MLflow", _mlflow(mlflow), tell))
        yield broadcast(*listeners)
    except KeyboardInterrupt:
        ended = "KILLED"
        raise
    except BaseException:
        ended = "FAILED"
        raise
    finally:
        for close in closings:
            try:
                close(ended)
            except Exception as error:  # what ended the run counts, not this
                tell(Warned(f"a tracker could not be closed: {first_line(error)}"))


def _mlflow_error(mlflow: Any, what: str, error: Exception) -> MissingError:
    """Say what MLflow could not do at the place that its environment names."""
    return MissingError(
        f"MLflow cannot {what} {mlflow.get_tracking_uri()}: {first_line(error, longest=100)}\n"
        "Set MLFLOW_TRACKING_URI to your server. A folder, such as file:///data/mlruns, needs "
        "MLFLOW_ALLOW_FILE_STORE=true too."
    )


def _until_it_fails(name: str, listener: Listener, tell: Listener) -> Listener:
    """Pass events on until the tracker raises an error, and warn of that error."""
    works = True

    def listen(event: Event) -> None:
        nonlocal works
        if not works:
            return
        try:
            listener(event)
        except Exception as error:
            works = False
            tell(Warned(f"{name} gets nothing more of this run, which goes on: {first_line(error)}"))

    return listen


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
