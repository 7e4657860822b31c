"""The stages of `passdeploy prune`, each of which leaves its result in the run folder.

dense -> learn -> (time, for a latency target) -> slim -> finetune -> summary, report
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import nn

from passdeploy.channels.allocation import unspent_words
from passdeploy.channels.plan import Plan
from passdeploy.commands.changed_answers import changed_answers, packed
from passdeploy.commands.closing_latency import measure_closing_latency
from passdeploy.commands.mask_batches import MaskBatches
from passdeploy.commands.prepare import Prepared
from passdeploy.commands.snapshots import SnapshotWriter
from passdeploy.commands.stage_conditions import stage_conditions
from passdeploy.commands.summary import images_per_class, summarise
from passdeploy.errors import percent
from passdeploy.latency.delivered import delivered_networks
from passdeploy.latency.target import LatencyTarget, meet_target
from passdeploy.models.cloning import deep_copy
from passdeploy.models.prompt import PROMPT_KEY, VisualPrompt, state_with_prompt, with_prompt, without_prompt
from passdeploy.profiling.environment import cpu_model, physical_cores
from passdeploy.report.pictures import encode_sample
from passdeploy.report.run_facts import SAMPLE
from passdeploy.report.write import HTML, write_report
from passdeploy.runs.folder import RunFolder
from passdeploy.runs.plan_file import plan_from_json, plan_to_json
from passdeploy.runtime.determinism import reproducibility_facts
from passdeploy.runtime.distributed import SINGLE_PROCESS, Processes
from passdeploy.runtime.events import Listener, Stage, StageFinished, Warned, stage
from passdeploy.runtime.seeds import seed_of
from passdeploy.slimming.slim import hidden_state, slim
from passdeploy.slimming.verify import check_equivalence
from passdeploy.sparsity.batches import SeekableBatches
from passdeploy.sparsity.select import select_channels
from passdeploy.sparsity.settings import allocation_of
from passdeploy.training.batch_norm import RECALIBRATION_BATCHES, recalibrate_batch_norm_
from passdeploy.training.evaluate import Accuracy, evaluate
from passdeploy.training.loop import fit

EQUIVALENCE_IMAGES = 8
_STAGE_TEXTS = {
    "dense": "the network to prune",
    "learn": "which channels matter",
    "time": "plan for the latency that was asked for, build, measure, correct",
    "slim": "cut, and compare with the masked network",
    "finetune": "train the slim network",
}


class PruneJob:
    """The stages of one run; a stage that the folder has as finished is skipped."""

    def __init__(
        self,
        prepared: Prepared,
        folder: RunFolder,
        device: torch.device,
        allow_code: bool,
        listener: Listener,
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        self.processes = processes
        self.prepared, self.folder, self.device, self.listener = prepared, folder, device, listener
        self.allow_code = allow_code
        self.recipe, self.data, self.channels = prepared.recipe, prepared.data, prepared.channels
        self.costs = prepared.channels.costs
        self.batch = prepared.recipe.data.batch_size
        self.batches = MaskBatches(self.recipe, self.data, device, processes.part)
        self.dense = prepared.dense
        self._warned = 0  # of unreadable images

    def run_stages(self) -> dict[str, Any]:
        """Run every stage that is not finished, write summary.json and return its content.

        A run that is finished stays as it is, with what was measured then.
        """
        if self.folder.has(HTML):
            self.listener(Warned(f"{self.folder.path} is finished already: nothing was left to do."))
            finished: dict[str, Any] = self.folder.read_json("summary.json")
            return finished
        self._run_stage("dense", self._train_dense)
        self._run_stage("learn", self._learn_masks)
        if self.prepared.target is not None:
            self._run_stage("time", self._plan_for_latency)
        self._run_stage("slim", self._cut_channels)
        self._run_stage("finetune", self._finetune)
        for name in ("cut.safetensors", "trained.safetensors"):
            if self.folder.has(name):
                self.folder.remove(name)
        summary = summarise(
            self.folder,
            self.recipe,
            images=images_per_class(self.data),
            costs=self.costs,
            blocks=self.channels.blocks,
            target=self.prepared.target,
            latency=self._latency_rows(),
            environment={
                **reproducibility_facts(self.recipe.deterministic, self.device),
                "cpu": cpu_model(),
                "cores": physical_cores(),
            },
        )
        self.folder.write_json("summary.json", summary, kind="summary")
        if self.processes.is_first:
            self.folder.become_latest()
            self._write_report()
        self.folder.record_logs()
        return summary

    def _write_report(self) -> None:
        """Write a test image for the report to show the prompt on, and the report."""
        images, _ = next(self.data.test.batches(1))
        mean, std = (torch.tensor(values) for values in (self.data.mean, self.data.std))
        with self.folder.adding(SAMPLE, "sample") as draft:
            draft.write_bytes(encode_sample((images[0].permute(1, 2, 0).cpu() * std + mean).numpy()))
        write_report(self.folder)

    def _run_stage(self, name: str, work: Callable[[Stage], dict[str, Any]]) -> None:
        if self.folder.is_done(name):
            result = self.folder.result_of(name)
            self.listener(StageFinished(name, result["text"], result["seconds"], is_skipped=True))
            return
        with (
            stage(name, _STAGE_TEXTS[name], self.listener) as progress,
            stage_conditions(
                name,
                progress,
                self.recipe,
                image_shape=self.data.image_shape,
                network=self.dense,
                device=self.device,
                listener=self.listener,
            ),
        ):
            result = work(progress)
        self._warn_of_unreadable()
        self.folder.mark_done(name, {**result, "text": progress.text, "seconds": round(progress.seconds, 3)})

    def _warn_of_unreadable(self) -> None:
        """Warn of images that could not be read since the last warning."""
        new = self.data.unreadable[self._warned :]
        self._warned += len(new)
        if new:
            reasons = "".join(f"\n  {reason}" for reason in new)
            self.listener(Warned(f"{len(new)} images cannot be read; others of their class stood in:{reasons}"))

    # The stages

    def _warn_of_unspent(self, achieved: int) -> None:
        """Warn where a plan that was made for a budget leaves much of it."""
        budget, round_to = self.prepared.budget, self.prepared.round_to
        if self.prepared.target is not None or self.recipe.prune.takes_plan:
            return  # it was not made for this budget
        whole = self.costs.of(budget.kind)
        if words := unspent_words(budget, achieved, whole, round_to=round_to, key="prune.round_to"):
            self.listener(Warned(words))

    def _train_dense(self, progress: Stage) -> dict[str, Any]:
        reused = self.prepared.reused
        if reused is not None and reused.dense is not None:
            self.dense.load_state_dict(reused.dense)
        elif not self.prepared.is_trained:
            fit(
                self.dense,
                self.data,
                self.recipe.train,
                batch_size=self.batch,
                seed=self.recipe.seed,
                device=self.device,
                stage=progress,
                checkpoint=self.folder.checkpoint("dense"),
                processes=self.processes,
            )
        accuracy = self._evaluate(self.dense)
        self.folder.write_tensors("dense.safetensors", self.dense.state_dict())
        progress.text = f"top-1 {percent(accuracy.top1, 2)}"
        return {"top1": accuracy.top1, "right": packed(accuracy.right), "images": len(accuracy.right)}

    def _learn_masks(self, progress: Stage) -> dict[str, Any]:
        larger = self.prepared.larger_budgets
        snapshots = SnapshotWriter(
            self.folder, larger, self.recipe.prune.steps, self.batches.size, len(self.data.train)
        )
        chosen = select_channels(
            self.recipe,
            self.prepared.channels,
            self.prepared.budget,
            self.prepared.round_to,
            self._load_dense(),
            SeekableBatches(lambda first: self.batches.of("learn", first)),
            stage=progress,
            processes=self.processes,
            reused=self.prepared.reused,
            checkpoint=self.folder.checkpoint("learn"),
            larger_budgets=tuple(larger.values()),
            on_larger_budget=snapshots.write,
        )
        tensors = {f"scores.{name}": values for name, values in chosen.scores.items()}
        if chosen.prompt is not None:
            tensors[PROMPT_KEY] = chosen.prompt.pixels().detach()
        self.folder.write_tensors("scores.safetensors", tensors, kind="scores")
        self.folder.write_json("chosen.json", chosen.plan.to_json(), kind="plan")
        if chosen.hypernetwork is not None:
            self.folder.write_tensors("hypernetwork.safetensors", chosen.hypernetwork.state_dict(), kind="hypernetwork")
        if chosen.weights is not None:
            self.folder.write_tensors("trained.safetensors", chosen.weights.state_dict())
        progress.text = chosen.text
        return {"steps_before": chosen.steps_before}

    def _plan_for_latency(self, progress: Stage) -> dict[str, Any]:
        """Choose channels by the scores for a latency target; plans are measured and corrected until one meets it."""
        target = self.prepared.target
        assert target is not None
        plan, facts = self.processes.first_only(lambda: self._search_plan(target, progress))
        self.folder.write_json("timed.json", plan.to_json(), kind="plan")
        progress.text = (
            f"asked for {target.goal}, {'measured' if facts['is_measured'] else 'by the table'} "
            f"{facts['achieved']:.3g}{'' if target.goal.ms is None else ' ms'}, {facts['trials']} plans tried"
        )
        return {"timed": facts}

    def _search_plan(self, target: LatencyTarget, progress: Stage) -> tuple[Plan, dict[str, Any]]:
        dense, prune = self._load_dense().cpu(), self.recipe.prune
        saved = self.folder.read_tensors("scores.safetensors")
        scores = {name.removeprefix("scores."): values for name, values in saved.items() if name.startswith("scores.")}
        prompt = self._new_prompt()
        if prompt is not None:
            prompt.load_pixels_(dict(saved))
        with delivered_networks(target.context, dense, self.channels, prompt) as build_delivered:
            return meet_target(
                target,
                scores,
                dense,
                build_delivered=build_delivered,
                allocation=allocation_of(prune),
                given=None if self.prepared.reused is None else self.prepared.reused.plan,
                progress=progress,
            )

    def _read_plan(self) -> Plan:
        """Read the plan of the latency stage, or without one that of mask learning."""
        name = "timed.json" if self.folder.has("timed.json") else "chosen.json"
        return Plan.from_json(self.folder.read_json(name))

    def _cut_channels(self, progress: Stage) -> dict[str, Any]:
        saved = self.folder.read_tensors("scores.safetensors")
        plan = self._read_plan()
        dense = self._load_dense().cpu()
        if self.folder.has("trained.safetensors"):
            dense = deep_copy(dense)
            dense.load_state_dict(self.folder.read_tensors("trained.safetensors"))
        images, _ = next(self.data.test.batches(EQUIVALENCE_IMAGES))
        equivalence = check_equivalence(
            dense,
            self.channels.groups,
            plan,
            images,
            tolerance=self.recipe.gates.equivalence,
            blocks=self.channels.blocks,
        )
        prompt = self._new_prompt()
        if prompt is not None:
            prompt.load_pixels_(saved)
        smaller = with_prompt(slim(dense, self.channels.groups, plan, self.channels.blocks), prompt).to(self.device)
        with self.processes.synchronised_batch_norm():
            recalibrate_batch_norm_(smaller, islice(self.batches.of("recalibrate"), RECALIBRATION_BATCHES))
        top1, prompted = self._evaluate(smaller).top1, self._top1_with_and_without_prompt(smaller)
        self.folder.write_json(
            "plan.json",
            plan_to_json(
                plan, model=self.recipe.model.name, data=self.data, channels=self.channels, prompt=self._new_prompt()
            ),
            kind="plan",
        )
        self.folder.write_tensors("cut.safetensors", state_with_prompt(smaller))
        kind = "macs" if self.prepared.target is not None else self.prepared.budget.kind
        achieved = self.costs.of(kind, plan.widths())
        self._warn_of_unspent(achieved)
        progress.text = (
            f"{percent(achieved / self.costs.of(kind))} of the {kind}, "
            f"equal to the masked network to {equivalence.max_rel_error:.1e} at {equivalence.size_text}, "
            f"top-1 {percent(top1, 2)}"
        )
        return {
            "max_rel_error": equivalence.max_rel_error,
            "input_shapes": equivalence.input_shapes,
            "top1": top1,
            "achieved": achieved,
            "prompt": prompted,
        }

    def _finetune(self, progress: Stage) -> dict[str, Any]:
        plan = plan_from_json(self.folder.read_json("plan.json"))
        saved, prompt = self.folder.read_tensors("cut.safetensors"), self._new_prompt()
        if prompt is not None:
            saved = prompt.load_pixels_(saved)
        network = slim(self.dense, self.channels.groups, plan, self.channels.blocks)
        network.load_state_dict(saved)
        smaller = with_prompt(network, prompt)
        fit(
            smaller,
            self.data,
            self.recipe.finetune,
            batch_size=self.batch,
            seed=seed_of("finetune", self.recipe.seed),
            device=self.device,
            stage=progress,
            teacher=self._load_dense(),
            checkpoint=self.folder.checkpoint("finetune"),
            processes=self.processes,
        )
        accuracy, before = self._evaluate(smaller), self.folder.result_of("dense")
        hidden = hidden_state(without_prompt(smaller), self.channels.groups)
        self.folder.write_tensors("slim.safetensors", {**state_with_prompt(smaller), **hidden})
        progress.text = f"top-1 {percent(accuracy.top1, 2)}"
        return {
            "top1": accuracy.top1,
            "answers": changed_answers(before.get("right"), accuracy.right, images=before.get("images")),
            "prompt": self._top1_with_and_without_prompt(smaller),
        }

    # Shared by the stages

    def _load_dense(self) -> nn.Module:
        """Load the weights that the first stage wrote into the dense network, and move it to the device."""
        self.dense.load_state_dict(self.folder.read_tensors("dense.safetensors"))
        return self.dense.to(self.device)

    def _new_prompt(self) -> VisualPrompt | None:
        """Build an untrained prompt for the slim network; None if the recipe learns or keeps none."""
        prune, spec = self.recipe.prune, self.recipe.prune.prompt
        is_learned = prune.method == "pass" and not prune.takes_plan
        if not is_learned or spec.kind == "none" or not spec.keep:
            return None
        return VisualPrompt(spec.kind, self.data.image_shape, spec.size)

    def _top1_with_and_without_prompt(self, smaller: nn.Module) -> dict[str, float] | None:
        """Evaluate a slim network with and without the learned prompt in front of it; None if none was learned."""
        spec, saved = self.recipe.prune.prompt, self.folder.read_tensors("scores.safetensors")
        if PROMPT_KEY not in saved:
            return None
        prompt = VisualPrompt(spec.kind, self.data.image_shape, spec.size)
        prompt.load_pixels_(saved)
        network = without_prompt(smaller)
        prompted = smaller if network is not smaller else with_prompt(network, prompt)
        return {"top1_with": self._evaluate(prompted).top1, "top1_without": self._evaluate(network).top1}

    def _evaluate(self, model: nn.Module) -> Accuracy:
        return evaluate(model, self.data.test, batch_size=self.batch, device=self.device)

    def _latency_rows(self) -> list[dict[str, Any]]:
        """Return rows as in `profile.json`: of the last measurement for a latency target, else of a new one."""
        if not self.processes.is_first:
            return []
        if self.prepared.target is not None:
            return self.prepared.target.rows(self.folder.result_of("time")["timed"])
        return measure_closing_latency(
            self.folder, self.data.image_shape, self.device, allow_code=self.allow_code, listener=self.listener
        )
