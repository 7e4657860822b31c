"""The whole road in one call: find groups, learn masks, cut, check, train as the user does, export and measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from passdeploy.channels.allocation import Budget, require_below_dense, unspent_words
from passdeploy.channels.blocks import Block
from passdeploy.channels.costs import CostModel
from passdeploy.channels.groups import ChannelGroup, ChannelMap
from passdeploy.channels.plan import Plan
from passdeploy.errors import TrainingError, UsageError, clipped, percent
from passdeploy.export.artifact import Artifact
from passdeploy.grouping.find import map_channels
from passdeploy.latency.target import LatencyTarget, meet_target, prepare_target
from passdeploy.models.chosen_outputs import OutputChoice
from passdeploy.models.cloning import named_state
from passdeploy.models.wrappers import unwrapped
from passdeploy.profiling.report import Profile
from passdeploy.recipe.pruning import MeasureSpec, PruneSpec, Target
from passdeploy.runtime.events import Listener, Warned, silent, stage
from passdeploy.slimming.slim import slim
from passdeploy.slimming.verify import Equivalence, check_equivalence
from passdeploy.sparsity.batch_loss import BatchLoss
from passdeploy.sparsity.batches import Loss, Stream, first_batch, inputs_in, started
from passdeploy.sparsity.learn import learn_masks
from passdeploy.sparsity.settings import PassSettings
from passdeploy.tracing.counts import Counts, count
from passdeploy.trainers.deployment import export_slim, images_of, profile_slim
from passdeploy.trainers.slim_file import Rebuild, save_slim
from passdeploy.training.batch_norm import RECALIBRATION_BATCHES, recalibrate_batch_norm_

if TYPE_CHECKING:
    from pydantic import ValidationError

VERIFIED_IMAGES = 2
Finetune = Callable[[nn.Module], Any]
_KINDS = ("macs", "params", "channels", "latency", "latency_ms")


@dataclass(frozen=True, eq=False)
class Pruned:
    """A slim network, and what is known about it."""

    model: nn.Module  # the slim network, trained if there was a trainer
    plan: Plan
    groups: tuple[ChannelGroup, ...]  # of the dense network
    blocks: tuple[Block, ...]  # of the dense network; empty unless they were asked for
    before: Counts  # of the dense network, on the example inputs
    after: Counts  # of the slim one
    equivalence: Equivalence  # of the slim network and the masked one, before it was trained
    losses: tuple[float, ...]  # of mask learning, one per step
    rebuild: Rebuild  # how the slim network came from the dense one
    latency: Mapping[str, Any] | None = None  # what was measured for a latency target
    exported: Artifact | None = None
    profile: Profile | None = None

    def save(self, path: Path | str) -> Path:
        """Write the slim network, as it is now, to one safetensors file, which `rebuild` reads.

        Raises:
            UsageError: the file cannot be written there.
        """
        return save_slim(self.model, self.rebuild, self.groups, path)

    def __str__(self) -> str:
        shares = [
            f"{after:,} of {before:,} {name} ({percent(after / max(before, 1), 0)})"
            for name, before, after in (
                ("multiply-adds", self.before.macs, self.after.macs),
                ("parameters", self.before.params, self.after.params),
            )
        ]
        return f"{', '.join(shares)}; equal to the masked network to {self.equivalence.max_rel_error:.0e}"


def prune(
    model: nn.Module,
    batches: Stream,
    loss: Loss,
    *,
    target: Mapping[str, float] | None = None,
    finetune: Finetune | None = None,
    outputs: OutputChoice | None = None,
    example_inputs: Tensor | Sequence[Any] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    blocks: bool = False,
    settings: PassSettings | None = None,
    measure: Mapping[str, Any] | None = None,
    tolerance: float = 1e-5,
    save: Path | str | None = None,
    export: Path | str | None = None,
    export_options: Mapping[str, Any] | None = None,
    profile: bool | Mapping[str, Any] = False,
    listener: Listener = silent,
) -> Pruned:
    """Prune a trained network of any kind and train the slim one as the user does.

    Channel groups are found, masks are learned with the user's loss, the network is cut and compared with the masked
    one, statistics of batch norms are measured again, and the slim network goes to the user's trainer.

    Args:
        model: the trained network, with its weights, on the device to learn on; it is left as it was.
        batches: (inputs, targets) on the model's device, or with a `BatchLoss` batches of any form: something that can
            be walked more than once, or a function that starts the same stream.
        loss: of the network's output and a target, or a `BatchLoss`, for which the user's code runs the network.
        target: `{"macs": 0.5}`, or params, channels, latency (shares of the dense network; macs and params above 1 are
            counts), latency_ms (milliseconds of one batch). None: half of the multiply-adds.
        finetune: trains the slim network that it is given, in place; or it returns the trained network.
        outputs: which of the network's outputs count, as for `find_groups`.
        example_inputs: the arguments that networks are traced and compared with; None: two inputs of the first batch.
        include: patterns of the layers whose output channels may be cut, and of blocks that may be skipped.
        exclude: patterns of the layers whose output channels must stay, and of blocks; one with such a layer inside
            stays as well.
        blocks: leave out whole blocks as well.
        settings: of mask learning; None: the defaults without a prompt.
        measure: for a latency target, what it is measured on: the keys of `prune.measure` of a recipe.
        tolerance: largest relative error between the slim and the masked network.
        save: file for the slim network, which `rebuild` reads.
        export: ONNX file for the slim network with the outputs that count, compared with PyTorch.
        export_options: of `export_onnx`; without them the batch is 1.
        profile: measure the dense and the slim network in turns; options are those of `profile_pair`, such as
            `{"backends": ("torch", "ort"), "batches": (1, 8)}`.
        listener: receives progress events.

    Raises:
        UsageError: an argument makes no sense; no output of that name; a pattern that matches no layer.
        BudgetError: the target cannot be reached.
        EquivalenceError: the slim network differs from the masked one.
        TrainingError: mask learning diverged, or the trainer returned something else than the slim network.
        DataError: there are no batches.
    """
    kind, amount = _read_target(target, measure)
    model = unwrapped(model)
    arguments = _arguments(batches, loss, example_inputs)
    images = images_of(arguments) if export or profile or kind.startswith("latency") else None
    settings = settings or PassSettings(prompt_kind="none")
    if settings.prompt_kind != "none":
        raise UsageError(
            f"prune learns no prompt, which the user's trainer would not know of (prompt_kind={settings.prompt_kind!r}"
            ").\nLeave it out of the settings (prompt_kind='none'), or learn masks with learn_masks."
        )
    with stage("groups", "which channels belong together", listener) as progress:
        channels = map_channels(model, arguments, include=include, exclude=exclude, with_blocks=blocks, outputs=outputs)
        progress.text = f"{len(channels.prunable)} of {len(channels.groups)} channel groups can be pruned"
    latency_target = None
    if images is not None and kind.startswith("latency"):
        latency_target = _latency_target(model, channels, images, {kind: amount}, measure, listener)
        settings = replace(settings, round_to=latency_target.round_to)
    costs, budget = _costs_and_budget(channels, latency_target, kind, amount)
    with stage("learn", "which channels matter", listener, total=settings.steps) as progress:
        learned = learn_masks(
            model, channels.groups, batches, loss, costs=costs, budget=budget, settings=settings, stage=progress
        )
    plan, facts = learned.plan, None
    if latency_target is None:
        achieved, whole, round_to = costs.of(budget.kind, plan.widths()), costs.of(budget.kind), settings.round_to
        if words := unspent_words(budget, achieved, whole, round_to=round_to, key="settings.round_to"):
            listener(Warned(words))
    else:
        with stage("time", "plan for the latency that was asked for", listener) as progress:
            plan, facts = meet_target(latency_target, learned.scores, model, progress=progress)
    trained = learned.weights or model
    with stage("slim", "cut, and compare with the masked network", listener):
        equivalence = check_equivalence(
            trained, channels.groups, plan, arguments, tolerance=tolerance, blocks=channels.blocks, outputs=outputs
        )
        smaller = slim(trained, channels.groups, plan, channels.blocks)
        run = loss.function if isinstance(loss, BatchLoss) else None
        recalibrate_batch_norm_(smaller, islice(started(batches), RECALIBRATION_BATCHES), run=run)
    rebuild = Rebuild.of(model, channels.groups, plan, channels.blocks)
    if finetune is not None:
        with stage("finetune", "train the slim network", listener):
            smaller = _trained(smaller, finetune)
    result = Pruned(
        model=smaller,
        plan=plan,
        groups=channels.groups,
        blocks=channels.blocks,
        before=count(model, arguments),
        after=count(smaller, arguments),
        equivalence=equivalence,
        losses=learned.losses,
        rebuild=rebuild,
        latency=facts,
    )
    if save is not None:
        result.save(save)
    return _deployed(result, model, images, outputs, export, export_options or {}, profile, listener)


def _read_target(target: Mapping[str, float] | None, measure: Mapping[str, Any] | None) -> tuple[str, float]:
    """Check a target and return its kind and amount."""
    given = {"macs": 0.5} if target is None else target
    if not isinstance(given, Mapping) or len(given) != 1 or not given.keys() <= set(_KINDS):
        raise UsageError(
            f"target={clipped(given)}: it needs exactly one of {', '.join(_KINDS)}.\n"
            "Give one, such as target={'macs': 0.5}."
        )
    ((kind, amount),) = given.items()
    is_number = isinstance(amount, int | float) and not isinstance(amount, bool) and 0 < amount < inf
    is_too_much = is_number and ((kind == "channels" and amount > 1) or (kind == "latency" and amount >= 1))
    if not is_number or is_too_much:
        share = f"a share above 0 and {'below' if kind == 'latency' else 'up to'} 1"
        raise UsageError(f"target={clipped(given)}: {kind} is {share if is_too_much else 'a number above 0'}.")
    if measure is not None and not kind.startswith("latency"):
        raise UsageError(f"measure says what a latency is measured on, but the target is {kind}.\nLeave it out.")
    return kind, amount


def _arguments(batches: Stream, loss: Loss, example_inputs: Tensor | Sequence[Any] | None) -> tuple[Any, ...]:
    """Return the network's arguments for tracing and comparing: those given, or some inputs of the first batch."""
    if example_inputs is not None:
        return (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    return (inputs_in(first_batch(batches), loss)[:VERIFIED_IMAGES],)


def _latency_target(
    model: nn.Module,
    channels: ChannelMap,
    images: Tensor,
    target: dict[str, float],
    measure: Mapping[str, Any] | None,
    listener: Listener,
) -> LatencyTarget:
    """Find or measure the latency table that a target needs."""
    from pydantic import ValidationError

    try:
        spec = PruneSpec(target=Target(**target), measure=MeasureSpec(**(measure or {})))
    except ValidationError as error:
        raise UsageError(_wrong_measure(error)) from error
    shape, device = tuple(images.shape[1:]), str(images.device)
    return prepare_target(spec, model, channels, shape, device=device, listener=listener)


def _wrong_measure(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"measure: {'.'.join(map(str, first['loc']))}: {first['msg']}.\nSee prune.measure in the keys of a recipe."


def _costs_and_budget(
    channels: ChannelMap, target: LatencyTarget | None, kind: str, amount: float
) -> tuple[CostModel, Budget]:
    if target is not None:
        return target.channels.costs, target.budget
    budget = Budget.of(kind, amount, channels.costs)
    if amount > 1:  # a share of 1 asks for no cut, to see what the rest does
        require_below_dense(budget, channels.costs)
    return channels.costs, budget


def _trained(network: nn.Module, finetune: Finetune) -> nn.Module:
    """Let the user's trainer train a slim network, and return it in evaluation mode.

    Raises:
        TrainingError: the trainer returned a network of other sizes, as those do that build it anew.
    """
    sizes = {name: tuple(tensor.shape) for name, tensor in named_state(network)}
    returned = finetune(network)
    trained = unwrapped(returned) if isinstance(returned, nn.Module) else network
    found = {name: tuple(tensor.shape) for name, tensor in named_state(trained)}
    if found != sizes:
        name = next(name for name in sorted({*sizes, *found}) if sizes.get(name) != found.get(name))
        raise TrainingError(
            f"finetune returned another network than the slim one: '{name}' has the shape {found.get(name, 'none')} "
            f"instead of {sizes.get(name, 'none')}.\n"
            "A trainer that builds the network anew loses what was cut: let it train the network that it is given."
        )
    return trained.eval()


def _deployed(
    result: Pruned,
    dense: nn.Module,
    images: Tensor | None,
    outputs: OutputChoice | None,
    export: Path | str | None,
    export_options: Mapping[str, Any],
    profile: bool | Mapping[str, Any],
    listener: Listener,
) -> Pruned:
    """Export and profile a result where that was asked for."""
    if images is None:
        return result
    if export is not None:
        with stage("export", str(export), listener):
            exported = export_slim(result.model, images, Path(export), outputs, export_options)
        result = replace(result, exported=exported)
    if profile is not False:
        with TemporaryDirectory() as folder:
            options = {} if profile is True else profile
            measured = profile_slim(
                dense,
                result.model,
                images,
                outputs,
                lambda network, name: (
                    export_slim(
                        network,
                        images,
                        Path(folder) / f"{name}.onnx",
                        outputs,
                        {**_batch_of(options), **export_options},
                    ).path
                ),
                options,
                listener,
            )
        result = replace(result, profile=measured)
    return result


def _batch_of(profile_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the range of batch sizes that a profile needs of an ONNX file."""
    sizes = sorted(profile_options.get("batches", (1,)))
    return {"batch": (sizes[0], sizes[-1], sizes[-1])}
