"""The whole pipeline of `passdeploy prune`: from a recipe to a slim, checked, fine-tuned network in a run folder.

    recipe -> data, dense network -> channel groups -> scores -> plan -> slim network -> summary

The recipe is checked as far as that is possible without training before a run folder is made. With `resume`, finished
stages are read from the folder, and an interrupted one continues from its checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from passdeploy.commands.prepare import prepare
from passdeploy.commands.published import with_published_input
from passdeploy.commands.resume import find_run_to_resume, leaves, require_room_for_runs
from passdeploy.commands.stages import PruneJob
from passdeploy.data.splits import ImageData
from passdeploy.errors import AccuracyError, percent
from passdeploy.recipe import Recipe, load_recipe
from passdeploy.runs.folder import RunFolder
from passdeploy.runtime.determinism import require_cublas_workspace_
from passdeploy.runtime.devices import find_device, unused_gpu
from passdeploy.runtime.distributed import Processes, process_group
from passdeploy.runtime.events import Listener, Warned, broadcast, silent, stage
from passdeploy.runtime.trackers import require_trackers, tracking


@dataclass(frozen=True)
class RunResult:
    """The folder and the summary of a finished run."""

    path: Path
    summary: dict[str, Any]  # content of summary.json
    is_first: bool = True  # true in the process that writes and prints; false in the others of a distributed run


def run(
    recipe: Recipe | str | Path,
    *,
    out: Path | str = "runs",
    overrides: Sequence[str] = (),
    device: str = "auto",
    resume: bool = False,
    allow_code: bool = False,
    trackers: Sequence[str] = (),
    tell: Listener = silent,
) -> RunResult:
    """Prune the network of `recipe` and write the result to a new folder in `out`.

    Args:
        recipe: a recipe, or the name or path of one.
        out: folder of the run folders.
        overrides: `a.b=c`, as for `--set`; only with a name or path.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        resume: continue the newest run in `out` that was made with exactly this recipe.
        allow_code: let the recipe name a model factory, which runs its module's code.
        trackers: `tensorboard`, `mlflow`, to which the metrics are passed on.
        tell: a listener, which receives an event for every stage, step and warning.

    Raises:
        PassDeployError: any of its kinds; no folder is left behind if training had not begun.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    recipe = with_published_input(recipe)
    torch_device = find_device(device)
    if recipe.deterministic and torch_device.type == "cuda":
        require_cublas_workspace_(tell)  # before anything starts CUDA
    if device == "auto" and (reason := unused_gpu()):
        tell(Warned(reason))
    if os.environ.get("RANK", "0") == "0":  # the others never see the folder
        require_trackers(trackers)
        if resume:
            find_run_to_resume(Path(out), recipe)
        else:
            require_room_for_runs(Path(out))
    with stage("prepare", f"{recipe.model.name}, {recipe.data.name}", tell) as progress:
        prepared = prepare(recipe, device=str(torch_device), allow_code=allow_code, listener=tell)
        progress.text = prepared.text
        _warn_of_left_out(prepared.data, tell)
    with process_group(torch_device) as processes, _open_folder(processes, Path(out), recipe, resume) as folder:
        if not folder.has("recipe.resolved.yaml"):
            folder.write_text("recipe.resolved.yaml", recipe.to_yaml(), kind="recipe")
        listener = broadcast(tell if processes.is_first else silent, folder.metrics_listener(), folder.log_listener())
        wanted = tuple(trackers) if processes.is_first else ()
        facts = dict(leaves(recipe.model_dump(mode="json")))
        with tracking(wanted, folder.path, folder.path.name, facts, tell=listener) as track:
            told = broadcast(listener, track)
            summary = PruneJob(prepared, folder, torch_device, allow_code, told, processes).run_stages()
        path = processes.broadcast_object(folder.path)
    _check_accuracy(recipe, summary)
    return RunResult(path, summary, processes.is_first)


def _warn_of_left_out(data: ImageData, tell: Listener) -> None:
    """Warn of what lies in the data set's folder and is not used."""
    if data.skipped:
        reasons = "".join(f"\n  {reason}" for reason in data.skipped)
        tell(Warned(f"{len(data.skipped)} images cannot be read and are left out:{reasons}"))
    if data.contents is not None and data.contents.left_out:
        tell(Warned("not used of the data: " + "; ".join(data.contents.left_out) + "."))


def _check_accuracy(recipe: Recipe, summary: dict[str, Any]) -> None:
    drop, allowed = summary["dense"]["top1"] - summary["slim"]["top1"], recipe.gates.top1_drop
    if allowed is not None and drop > allowed + 1e-9:
        raise AccuracyError(
            f"the slim network lost {percent(drop, 2)} of top-1 ({percent(summary['dense']['top1'], 2)} to "
            f"{percent(summary['slim']['top1'], 2)}), the recipe allows {percent(allowed, 2)} (gates.top1_drop).\n"
            "The run is kept. Ask for a larger budget, or raise prune.steps or finetune.epochs."
        )


@contextmanager
def _open_folder(processes: Processes, out: Path, recipe: Recipe, resume: bool) -> Iterator[RunFolder]:
    """Open the run folder in the first process, and a temporary copy of it in the others.

    The others may run on other machines, which do not see the folder of the first.
    """
    if not processes.is_first:
        with TemporaryDirectory() as temporary, RunFolder.create(Path(temporary), recipe.name) as folder:
            for name, content in processes.broadcast_object(None).items():
                (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
                (folder.path / name).write_bytes(content)
            yield folder
        return
    with (
        RunFolder.open(find_run_to_resume(out, recipe), write=True)
        if resume
        else RunFolder.create(out, recipe.name) as folder
    ):
        if processes.count > 1:
            processes.broadcast_object(folder.content() if resume else {})
        yield folder
