"""The whole pipeline of `passdeploy prune`: from a recipe to a slim, checked, fine-tuned network in a run folder.

    recipe -> data, dense network -> channel groups -> scores -> plan -> slim network -> summary

The recipe is checked as far as that is possible without training before a run folder is made. With `resume`, finished
stages are read from the folder, and an interrupted one continues from its checkpoint. With several budgets
(`prune.targets`) the run of the smallest one learns masks, and those of the others go on from its snapshots.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from passdeploy.commands.crowded_cores import crowded_cores
from passdeploy.commands.prepare import Prepared, prepare
from passdeploy.commands.published import with_published_input
from passdeploy.commands.resume import can_be_resumed, find_run_to_resume, leaves, require_room_for_runs
from passdeploy.commands.run_data import DATA, require_same_data
from passdeploy.commands.snapshots import epochs_left
from passdeploy.commands.stages import PruneJob
from passdeploy.data.splits import ImageData
from passdeploy.errors import AccuracyError, UsageError, percent
from passdeploy.recipe import Recipe, Target, load_recipe
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
    larger: tuple[RunResult, ...] = ()  # of the larger ones of `prune.targets`, the largest first


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
    """Prune the network of `recipe` and write the result to a new folder in `out`; with `prune.targets`, to one each.

    Args:
        recipe: a recipe, or the name or path of one.
        out: folder of the run folders.
        overrides: `a.b=c`, as for `--set`; only with a name or path.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        resume: continue the newest run in `out` that was made with exactly this recipe.
        allow_code: let the recipe name a model factory, which runs its module's code.
        trackers: names of `tensorboard` and `mlflow`, to which the metrics are passed on.
        tell: a listener, which receives an event for every stage, step and warning.

    Raises:
        PassDeployError: any of its kinds; no folder is left behind if training had not begun.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    recipe = with_published_input(recipe)
    shares = recipe.prune.larger_targets
    if shares and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "prune.targets makes several runs one after another, in one process.\n"
            "Start it without torchrun, or make one run for each target."
        )
    torch_device = find_device(device)
    if recipe.deterministic and torch_device.type == "cuda":
        require_cublas_workspace_(tell)  # before anything starts CUDA
    if device == "auto" and (reason := unused_gpu()):
        tell(Warned(reason))
    if torch_device.type == "cpu" and (reason := crowded_cores()):
        tell(Warned(reason))
    if os.environ.get("RANK", "0") == "0":  # the others never see the folder
        require_trackers(trackers)
        if resume:
            find_run_to_resume(Path(out), recipe)
        else:
            require_room_for_runs(Path(out))
    runner = _Runner(Path(out), torch_device, allow_code, tuple(trackers), tell)
    result = runner.run(recipe, resume=resume)
    larger = list[RunResult]()
    for share in shares:
        own = _with_larger_target(recipe, share, result.path)
        larger.append(runner.run(own, resume=resume and can_be_resumed(Path(out), own)))
    for each in (result, *larger):
        _check_accuracy(recipe, each, is_one_of_several=bool(larger))
    return replace(result, larger=tuple(larger))


@dataclass(frozen=True)
class _Runner:
    """Makes runs in one folder, on one device."""

    out: Path
    device: torch.device
    allow_code: bool
    trackers: tuple[str, ...]
    tell: Listener

    def run(self, recipe: Recipe, *, resume: bool) -> RunResult:
        """Make the run of one budget, or go on with it."""
        tell = self.tell
        with process_group(self.device) as processes:  # first: on a GPU it says which one is this process's
            with stage("prepare", f"{recipe.model.name}, {recipe.data.name}", tell) as progress:
                prepared = prepare(
                    recipe, device=str(self.device), allow_code=self.allow_code, listener=tell, processes=processes
                )
                progress.text = prepared.text
                _warn_of_left_out(prepared.data, tell)
            _require_parts(prepared, processes)
            return self._run_prepared(prepared, processes, resume=resume)

    def _run_prepared(self, prepared: Prepared, processes: Processes, *, resume: bool) -> RunResult:
        recipe, tell = prepared.recipe, self.tell
        with (
            _open_folder(processes, self.out, recipe, resume) as folder,
            ExitStack() as open_trackers,
        ):
            listener = broadcast(
                tell if processes.is_first else silent, folder.metrics_listener(), folder.log_listener()
            )
            with _discarded_on_error(folder, is_new=not resume):
                _write_identity(folder, recipe, prepared.data)
                wanted = self.trackers if processes.is_first else ()
                facts = dict(leaves(recipe.model_dump(mode="json")))
                track = open_trackers.enter_context(
                    tracking(wanted, folder.path, folder.path.name, facts, tell=listener)
                )
            told = broadcast(listener, track)
            summary = PruneJob(prepared, folder, self.device, self.allow_code, told, processes).run_stages()
            path = processes.broadcast_object(folder.path)
        return RunResult(path, summary, processes.is_first)


def _require_parts(prepared: Prepared, processes: Processes) -> None:
    """Raise a UsageError where a process would get no image of a batch."""
    recipe, images = prepared.recipe, len(prepared.data.train)
    for key, size in (("data", recipe.data.batch_size), ("prune", recipe.prune.batch_size or recipe.data.batch_size)):
        if min(size, images) < processes.count:
            raise UsageError(
                f"{processes.count} processes cannot share batches of {min(size, images)} images.\n"
                f"Start fewer, or raise {key}.batch_size."
            )


def _write_identity(folder: RunFolder, recipe: Recipe, data: ImageData) -> None:
    """Write the recipe of a run, and what tells its data from others; of a run that goes on, check its data.

    Raises:
        RunError: the data has changed.
    """
    if not folder.has("recipe.resolved.yaml"):
        folder.write_text("recipe.resolved.yaml", recipe.to_yaml(), kind="recipe")
    if data.identity is None:
        return
    require_same_data(folder, data.identity)
    if not folder.has(DATA):  # a new run, or one of an earlier version
        folder.write_json(DATA, data.identity.to_json(), kind="data")


@contextmanager
def _discarded_on_error(folder: RunFolder, *, is_new: bool) -> Iterator[None]:
    """Delete a new run, in which nothing was trained yet, if the block fails."""
    try:
        yield
    except BaseException:
        if is_new:
            folder.discard()
        raise


def _with_larger_target(recipe: Recipe, share: float, learned: Path) -> Recipe:
    """Return the recipe of a larger budget, which goes on from a snapshot of the run at `learned`.

    Where mask learning trains the weights that stay, the larger network is fine-tuned for what was left of it, too, in
    whole epochs: it has then been trained for about as many steps as if it had learned masks of its own.
    """
    epochs = recipe.finetune.epochs
    if recipe.prune.weights == "trained":
        epochs += round(epochs_left(RunFolder.open(learned), share))
    update = {
        "target": Target.model_validate({recipe.prune.target.kind: share}),
        "targets": (),
        "from_run": str(learned.resolve()),
        "reuse": "snapshot",
    }
    return recipe.model_copy(
        update={
            "prune": recipe.prune.model_copy(update=update),
            "finetune": recipe.finetune.model_copy(update={"epochs": epochs}),
        }
    )


def _warn_of_left_out(data: ImageData, tell: Listener) -> None:
    """Warn of what lies in the data set's folder and is not used."""
    if data.skipped:
        reasons = "".join(f"\n  {reason}" for reason in data.skipped)
        tell(Warned(f"{len(data.skipped)} images cannot be read and are left out:{reasons}"))
    if data.contents is not None and data.contents.left_out:
        tell(Warned("not used of the data: " + "; ".join(data.contents.left_out) + "."))


def _check_accuracy(recipe: Recipe, result: RunResult, *, is_one_of_several: bool) -> None:
    dense, slim = result.summary["dense"]["top1"], result.summary["slim"]["top1"]
    drop, allowed = dense - slim, recipe.gates.top1_drop
    if allowed is None or drop <= allowed + 1e-9:
        return
    kept = "All runs are" if is_one_of_several else "The run is"
    raised = "prune.steps or " if recipe.prune.method in ("pass", "growing") else ""
    raise AccuracyError(
        f"the slim network of {result.path} lost {100 * drop:.2f} points of top-1 ({percent(dense, 2)} to "
        f"{percent(slim, 2)}), the recipe allows {100 * allowed:g} (gates.top1_drop).\n"
        f"{kept} kept. Ask for a larger budget, or raise {raised}finetune.epochs.",
        run=str(result.path),
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
