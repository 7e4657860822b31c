"""The main job: a recipe becomes a slim, checked, fine-tuned network in a run folder.

    recipe -> data, dense network -> channel groups -> scores -> plan -> slim network -> summary

Everything that can be found wrong without training is found before a folder is made. A stage that an
earlier process finished is taken over from the folder; one that it left in the middle goes on from its checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count as count_from
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.channels.plan import Plan
from passdeploy.commands.prepare import Prepared, prepare
from passdeploy.commands.summary import summarise
from passdeploy.errors import AccuracyError, PassDeployError, RunError
from passdeploy.latency.delivered import as_used
from passdeploy.latency.target import LatencyTarget, meet_target
from passdeploy.models.prompt import PROMPT_KEY, VisualPrompt, state_with_prompt, with_prompt, without_prompt
from passdeploy.profiling import Candidate, profile_pair
from passdeploy.recipe import Recipe, load_recipe
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.load import load_network
from passdeploy.runs.plan_file import plan_from_json, plan_to_json
from passdeploy.runtime.devices import find_device
from passdeploy.runtime.distributed import SINGLE_PROCESS, Processes, process_group
from passdeploy.runtime.events import Listener, Stage, StageFinished, Warned, broadcast, silent, stage
from passdeploy.runtime.seeds import seed_of
from passdeploy.slimming.slim import hidden_state, slim
from passdeploy.slimming.verify import verify
from passdeploy.sparsity.select import choose
from passdeploy.training.batch_norm import recalibrate_batch_norm_
from passdeploy.training.evaluate import evaluate
from passdeploy.training.loop import fit

RECALIBRATION_BATCHES = 20
EQUIVALENCE_IMAGES = 8


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    path: Path
    summary: dict[str, Any]  # as in summary.json
    is_first: bool = True  # of several processes, the one that writes and speaks


def run(
    recipe: Recipe | str | Path,
    *,
    out: Path | str = "runs",
    overrides: Sequence[str] = (),
    device: str = "auto",
    resume: bool = False,
    allow_code: bool = False,
    tell: Listener = silent,
) -> RunResult:
    """Prune the network of `recipe` and leave the result in a new folder below `out`.

    Args:
        recipe: a recipe, or the name or path of one.
        out: where run folders are.
        overrides: `a.b=c`, as for `--set`; only with a name or path.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        resume: go on with the newest run in `out` that was made with this very recipe.
        allow_code: let the recipe name a model factory, which runs its module's code.
        tell: hears of every stage and step.

    Raises:
        PassDeployError: any of its kinds; nothing is left behind where no training had begun.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    place = find_device(device)
    with stage("prepare", f"{recipe.model.name}, {recipe.data.name}", tell) as progress:
        prepared = prepare(recipe, allow_code=allow_code, tell=tell)
        progress.text = prepared.text
        if prepared.data.skipped:
            listed = "".join(f"\n  {reason}" for reason in prepared.data.skipped)
            tell(Warned(f"{len(prepared.data.skipped)} images cannot be read and are left out:{listed}"))
    with process_group(place) as processes, _folder_of(processes, Path(out), recipe, resume) as folder:
        if not folder.has("recipe.resolved.yaml"):
            folder.write_text("recipe.resolved.yaml", recipe.to_yaml(), kind="recipe")
        listener = broadcast(tell if processes.is_first else silent, folder.metrics_listener(), folder.log_listener())
        summary = _Job(prepared, folder, place, allow_code, listener, processes).finish()
        path = processes.broadcast_object(folder.path)
    _check_accuracy(recipe, summary)
    return RunResult(path, summary, processes.is_first)


class _Job:
    """One run, stage by stage; each stage either works or takes over what is in the folder."""

    def __init__(
        self,
        prepared: Prepared,
        folder: RunFolder,
        device: torch.device,
        allow_code: bool,
        tell: Listener,
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        self.processes = processes
        self.prepared, self.folder, self.device, self.tell = prepared, folder, device, tell
        self.allow_code = allow_code
        self.recipe, self.data, self.channels = prepared.recipe, prepared.data, prepared.channels
        self.costs = prepared.channels.costs
        self.batch = prepared.recipe.data.batch_size
        self.dense = prepared.dense

    def finish(self) -> dict[str, Any]:
        """Every stage in turn; returns the summary."""
        self._stage("dense", self._dense)
        self._stage("learn", self._learn)
        if self.prepared.target is not None:
            self._stage("time", self._time)
        self._stage("slim", self._slim)
        self._stage("finetune", self._finetune)
        for name in ("cut.safetensors", "trained.safetensors"):
            if self.folder.has(name):
                self.folder.remove(name)
        summary = summarise(
            self.folder, self.recipe, costs=self.costs, target=self.prepared.target, latency=self._latency()
        )
        self.folder.write_json("summary.json", summary, kind="summary")
        return summary

    def _stage(self, name: str, work: Callable[[Stage], dict[str, Any]]) -> None:
        if self.folder.is_done(name):
            found = self.folder.result_of(name)
            self.tell(StageFinished(name, found["text"], found["seconds"], is_skipped=True))
            return
        with stage(name, _INTRODUCTIONS[name], self.tell) as progress:
            found = work(progress)
        self.folder.mark_done(name, {**found, "text": progress.text, "seconds": round(progress.seconds, 3)})

    # The stages

    def _dense(self, progress: Stage) -> dict[str, Any]:
        if not self.prepared.is_trained:
            fit(
                self.dense, self.data, self.recipe.train, batch_size=self.batch, seed=self.recipe.seed,
                device=self.device, tell=progress, checkpoint=self.folder.checkpoint("dense"), processes=self.processes,
            )  # fmt: skip
        found = self._evaluate(self.dense)
        self.folder.write_tensors("dense.safetensors", self.dense.state_dict())
        progress.text = f"top-1 {found:.2%}"
        return {"top1": found}

    def _learn(self, progress: Stage) -> dict[str, Any]:
        found = choose(
            self.recipe, self.prepared.channels, self.prepared.budget, self.prepared.round_to, self._trained_dense(),
            lambda: self._placed(self._stream("learn")), stage=progress, processes=self.processes,
            reused=self.prepared.reused,
        )  # fmt: skip
        tensors = {f"scores.{name}": values for name, values in found.scores.items()}
        if found.prompt is not None:
            tensors[PROMPT_KEY] = found.prompt.pixels().detach()
        self.folder.write_tensors("scores.safetensors", tensors, kind="scores")
        self.folder.write_json("chosen.json", found.plan.to_json(), kind="plan")
        if found.hypernetwork is not None:
            self.folder.write_tensors("hypernetwork.safetensors", found.hypernetwork.state_dict(), kind="hypernetwork")
        if found.weights is not None:
            self.folder.write_tensors("trained.safetensors", found.weights.state_dict())
        progress.text = found.text
        return {}

    def _time(self, progress: Stage) -> dict[str, Any]:
        """Plan again by the scores, until what was planned is measured to be as fast as asked."""
        target = self.prepared.target
        assert target is not None
        found: tuple[Plan, dict[str, Any]] | PassDeployError | None = None
        if self.processes.is_first:
            try:
                found = self._met(target, progress)
            except PassDeployError as error:  # the others must hear of it, or they would wait
                found = error
        found = self.processes.broadcast_object(found)
        if isinstance(found, PassDeployError):
            raise found
        assert found is not None
        plan, facts = found
        self.folder.write_json("timed.json", plan.to_json(), kind="plan")
        progress.text = (
            f"asked for {target.request}, {'measured' if facts['is_measured'] else 'by the table'} "
            f"{facts['achieved']:.3g}{'' if target.request.ms is None else ' ms'}, {facts['trials']} plans tried"
        )
        return {"timed": facts}

    def _met(self, target: LatencyTarget, progress: Stage) -> tuple[Plan, dict[str, Any]]:
        dense, prune = self._trained_dense().cpu(), self.recipe.prune
        saved = self.folder.read_tensors("scores.safetensors")
        scores = {name.removeprefix("scores."): values for name, values in saved.items() if name.startswith("scores.")}
        prompt = self._prompt()
        if prompt is not None:
            prompt.load_pixels_(dict(saved))
        is_uniform = prune.allocation == "uniform" or (prune.allocation == "auto" and prune.method == "uniform")
        with as_used(target.context, dense, self.channels, prompt) as confirm:
            return meet_target(
                target,
                scores,
                dense,
                confirm=confirm,
                allocation="uniform" if is_uniform else "global",
                progress=progress,
            )

    def _chosen(self) -> Plan:
        """What learning chose, and measuring corrected."""
        name = "timed.json" if self.folder.has("timed.json") else "chosen.json"
        return Plan({group: tuple(kept) for group, kept in self.folder.read_json(name).items()})

    def _slim(self, progress: Stage) -> dict[str, Any]:
        saved = self.folder.read_tensors("scores.safetensors")
        plan = self._chosen()
        dense = self._trained_dense().cpu()
        if self.folder.has("trained.safetensors"):
            dense = copy.deepcopy(dense)
            dense.load_state_dict(self.folder.read_tensors("trained.safetensors"))
        images, _ = next(self.data.test.batches(EQUIVALENCE_IMAGES))
        error = verify(dense, self.channels.groups, plan, images, tolerance=self.recipe.gates.equivalence)
        prompt = self._prompt()
        if prompt is not None:
            prompt.load_pixels_(saved)
        smaller = with_prompt(slim(dense, self.channels.groups, plan), prompt).to(self.device)
        with self.processes.synchronised_batch_norm():
            batches = self._placed(islice(self._stream("recalibrate"), RECALIBRATION_BATCHES))
            recalibrate_batch_norm_(smaller, batches)
        top1, prompted = self._evaluate(smaller), self._both_ways(smaller)
        self.folder.write_json(
            "plan.json",
            plan_to_json(
                plan, model=self.recipe.model.name, data=self.data, channels=self.channels, prompt=self._prompt()
            ),
            kind="plan",
        )
        self.folder.write_tensors("cut.safetensors", state_with_prompt(smaller))
        kind = "macs" if self.prepared.target is not None else self.prepared.budget.kind
        achieved = self.costs.of(kind, plan.widths())
        progress.text = (
            f"{achieved / self.costs.of(kind):.1%} of the {kind}, "
            f"equal to the masked network to {error:.1e}, top-1 {top1:.2%}"
        )
        return {"max_rel_error": error, "top1": top1, "achieved": achieved, "prompt": prompted}

    def _finetune(self, progress: Stage) -> dict[str, Any]:
        plan = plan_from_json(self.folder.read_json("plan.json"))
        saved, prompt = self.folder.read_tensors("cut.safetensors"), self._prompt()
        if prompt is not None:
            saved = prompt.load_pixels_(saved)
        network = slim(self.dense, self.channels.groups, plan)
        network.load_state_dict(saved)
        smaller = with_prompt(network, prompt)
        fit(
            smaller, self.data, self.recipe.finetune, batch_size=self.batch, seed=seed_of("finetune", self.recipe.seed),
            device=self.device, tell=progress, teacher=self._trained_dense(),
            checkpoint=self.folder.checkpoint("finetune"), processes=self.processes,
        )  # fmt: skip
        top1 = self._evaluate(smaller)
        hidden = hidden_state(without_prompt(smaller), self.channels.groups)
        self.folder.write_tensors("slim.safetensors", {**state_with_prompt(smaller), **hidden})
        progress.text = f"top-1 {top1:.2%}"
        return {"top1": top1, "prompt": self._both_ways(smaller)}

    # What the stages share

    def _trained_dense(self) -> nn.Module:
        """The dense network as the first stage left it, on the device."""
        self.dense.load_state_dict(self.folder.read_tensors("dense.safetensors"))
        return self.dense.to(self.device)

    def _stream(self, purpose: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches without end, the same ones every time for one purpose."""
        size = min(self.recipe.prune.batch_size or self.batch, len(self.data.train))
        for epoch in count_from():
            yield from self.data.train.batches(
                size, epoch=epoch, seed=seed_of(purpose, self.recipe.seed),
                augment=self.recipe.train.augment != "none", drop_last=True, part=self.processes.part,
            )  # fmt: skip

    def _placed(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.channels_last if self.recipe.train.channels_last else torch.contiguous_format
        for images, labels in batches:
            yield images.to(self.device, memory_format=order), labels.to(self.device)

    def _prompt(self) -> VisualPrompt | None:
        """The prompt that the slim network will look through, untrained."""
        prune, spec = self.recipe.prune, self.recipe.prune.prompt
        is_learned = prune.method == "pass" and not prune.takes_plan
        if not is_learned or spec.kind == "none" or not spec.keep:
            return None
        return VisualPrompt(spec.kind, self.data.image_shape, spec.size)

    def _both_ways(self, smaller: nn.Module) -> dict[str, float] | None:
        """Top-1 of a network with and without the learned prompt in front of it; None where none was learned."""
        spec, saved = self.recipe.prune.prompt, self.folder.read_tensors("scores.safetensors")
        if PROMPT_KEY not in saved:
            return None
        prompt = VisualPrompt(spec.kind, self.data.image_shape, spec.size)
        prompt.load_pixels_(saved)
        network = without_prompt(smaller)
        with_it = smaller if network is not smaller else with_prompt(network, prompt)
        return {"top1_with": self._evaluate(with_it), "top1_without": self._evaluate(network)}

    def _evaluate(self, model: nn.Module) -> float:
        return evaluate(model, self.data.test, batch_size=max(self.batch, 128), device=self.device).top1

    def _latency(self) -> list[dict[str, Any]]:
        """A first look, in PyTorch on the CPU; rows as in `profile.json`. `passdeploy profile` looks longer."""
        if not self.processes.is_first:
            return []
        if self.prepared.target is not None:  # measured already, on what was asked for
            return self.prepared.target.rows(self.folder.result_of("time")["timed"])
        pair = [
            Candidate(which, load_network(self.folder, which, self.allow_code), weights=f"{which}.safetensors")
            for which in ("dense", "slim")
        ]
        profile = profile_pair(
            *pair, image_shape=self.data.image_shape, backends=("torch",), batches=(8,), seconds=2.0, tell=self.tell
        )
        rows: list[dict[str, Any]] = profile.to_json()["rows"]
        return rows


_INTRODUCTIONS = {
    "dense": "the network to prune",
    "learn": "which channels matter",
    "time": "plan for the latency that was asked for, build, measure, correct",
    "slim": "cut, and compare with the masked network",
    "finetune": "learn to do without",
}


def _check_accuracy(recipe: Recipe, summary: dict[str, Any]) -> None:
    drop, allowed = summary["dense"]["top1"] - summary["slim"]["top1"], recipe.gates.top1_drop
    if allowed is not None and drop > allowed + 1e-9:
        raise AccuracyError(
            f"the slim network lost {drop:.2%} of top-1 ({summary['dense']['top1']:.2%} to "
            f"{summary['slim']['top1']:.2%}), the recipe allows {allowed:.2%} (gates.top1_drop).\n"
            "The run is kept. Ask for a larger budget, or raise prune.steps or finetune.epochs."
        )


@contextmanager
def _folder_of(processes: Processes, out: Path, recipe: Recipe, resume: bool) -> Iterator[RunFolder]:
    """The run folder of the first process; the others, perhaps on other machines, work in copies that go away."""
    if not processes.is_first:
        with TemporaryDirectory() as place, RunFolder.create(Path(place), recipe.name) as folder:
            for name, content in processes.broadcast_object(None).items():
                (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
                (folder.path / name).write_bytes(content)
            yield folder
        return
    with _find_unfinished(out, recipe) if resume else RunFolder.create(out, recipe.name) as folder:
        if processes.count > 1:
            processes.broadcast_object(folder.content() if resume else {})
        yield folder


def _find_unfinished(out: Path, recipe: Recipe) -> RunFolder:
    from passdeploy.runs.numbering import list_runs

    for path in reversed(list_runs(out)):
        if path.name.rpartition("-")[0] == recipe.name:
            with RunFolder.open(path) as folder:
                resolved = folder.read_text("recipe.resolved.yaml") if folder.has("recipe.resolved.yaml") else ""
            if resolved == recipe.to_yaml():
                return RunFolder.open(path, write=True)
    raise RunError(
        f"no run in {out} was made with this recipe, so there is nothing to resume.\n"
        "Give the same recipe and --set options as before, or leave --resume out."
    )
