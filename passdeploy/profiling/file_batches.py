"""Batches that an exported file runs with: tried, since files declare more than they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from passdeploy.errors import PassDeployError, UsageError, first_line
from passdeploy.profiling.candidates import Candidate
from passdeploy.profiling.runners import Runner
from passdeploy.runtime.device_memory import is_out_of_memory
from passdeploy.runtime.events import Listener, Warned, silent


def batches_that_run(
    candidate: Candidate,
    batches: Sequence[int],
    open_runner: Callable[[Candidate], Runner],
    *,
    is_strict: bool,
    listener: Listener = silent,
) -> list[int]:
    """Run a file once with each batch, and return the batches that it runs with.

    Files may declare any batch and have another one in a reshape inside.

    Args:
        candidate: the file.
        batches: to try.
        open_runner: makes its runner.
        is_strict: raise for a batch that fails; otherwise warn, as long as another one runs.
        listener: receives the warnings.

    Raises:
        UsageError: the file fails with a batch that was asked for, or with all of them.
    """
    assert candidate.inputs is not None
    errors: dict[int, Exception] = {}
    for batch in batches:
        try:
            runner = open_runner(candidate)
            runner.prepare(*candidate.inputs(batch))
            runner.run()
        except PassDeployError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            if not is_out_of_memory(error):  # memory is reported where the batch is measured
                errors[batch] = error
    working = [batch for batch in batches if batch not in errors]
    if not errors:
        return working
    failed, first = next(iter(errors.items()))
    name, reason = Path(candidate.name).name, first_line(first, longest=200)
    if working and not is_strict:
        listener(Warned(f"{name} declares any batch, and fails with a batch of {failed}: {reason}"))
        return working
    runs_alone = not working and failed != 1 and 1 in _working_batches(candidate, open_runner)
    advice = (
        f"It runs with --batch {working[0] if working else 1}, though it declares any."
        if working or runs_alone
        else "Are these the values it takes? Sizes can be given with --shape NAME=1x3x224x224."
    )
    raise UsageError(f"{name} fails with a batch of {failed}: {reason}\n{advice}") from first


def _working_batches(candidate: Candidate, open_runner: Callable[[Candidate], Runner]) -> list[int]:
    try:
        return batches_that_run(candidate, [1], open_runner, is_strict=True)
    except UsageError:
        return []
