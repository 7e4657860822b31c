"""Load weights from a file into a network, or say what does not fit; what is not used of the file is said."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from passdeploy.errors import WeightsError, clipped, enumerated
from passdeploy.models.classifier import find_classifier
from passdeploy.models.weight_files import WeightFile, read_weight_file

PRETRAINED = "pretrained"

# Prefixes of DataParallel, trainers and torch.compile; where several fit, the first.
_PREFIXES = ("", "module.", "model.", "_orig_mod.", "state_dict.", "net.", "network.", "backbone.", "encoder.")
_AVERAGED = {"ema", "averaged", "swa"}  # words in places and prefixes of averaged weights
_COUNTERS = ("total_ops", "total_params")  # that thop leaves in networks
_BATCH_COUNTER = "num_batches_tracked"


def load_weights_(
    model: nn.Module, path: Path, *, model_name: str = "the network", except_layer: str | None = None
) -> list[str]:
    """Fill every tensor of `model` from a weights file; they may be nested, have a prefix, and be in other precisions.

    Args:
        model: the network.
        path: a file of safetensors or of `torch.save`.
        model_name: what to call the network in errors.
        except_layer: a layer that keeps its tensors; those that the file has for it are ignored.

    Returns:
        Sentences that say where in the file the weights were, and what was ignored; none for a plain file.

    Raises:
        WeightsError: unreadable, not finite, or tensors are missing, unexpected or of another shape.
    """
    own, file = model.state_dict(), read_weight_file(path)
    kept = {name: tensor for name, tensor in own.items() if except_layer and name.startswith(f"{except_layer}.")}
    needed = [name for name in own if name not in kept and not name.endswith(_BATCH_COUNTER)]
    place, prefix = _best_place(file, needed)
    found = file.places[place]
    tensors = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)} | kept
    outside = [name for name in found if not name.startswith(prefix)]
    ignored, tensors = _without_ignorable(tensors, own)
    if message := _mismatch_message(tensors, model, path, model_name):
        raise WeightsError(message)
    _require_sound(tensors, path)
    notes = _notes(file, place, prefix, [*outside, *ignored], tensors, own)
    model.load_state_dict(tensors, strict=False)  # all there but, perhaps, batch counters of old files
    return notes


def classifier_rows(path: Path, layer: str) -> int | None:
    """Return the number of outputs that a weights file has for a layer; None if that is not certain."""
    try:
        file = read_weight_file(path)
    except WeightsError:
        return None
    name = f"{layer}.weight"
    rows = {
        tensor.shape[0]
        for tensors in file.places.values()
        for key, tensor in tensors.items()
        if (key == name or key.endswith(f".{name}")) and tensor.ndim
    }
    return int(rows.pop()) if len(rows) == 1 else None


def _best_place(file: WeightFile, needed: Sequence[str]) -> tuple[str, str]:
    """Choose the place in a file, and the prefix of names there, under which most of the tensors are.

    Of several that have as many, weights as trained come before averaged ones, and known prefixes before others.
    """
    ranked = []
    for place, tensors in file.places.items():
        for prefix in _prefixes_in(tensors, needed):
            count = sum(f"{prefix}{name}" in tensors for name in needed)
            is_averaged = not _AVERAGED.isdisjoint(re.split(r"[._]", f"{place}.{prefix}".lower()))
            known = _PREFIXES.index(prefix) if prefix in _PREFIXES else len(_PREFIXES)
            ranked.append((-count, is_averaged, known, len(place), place, prefix))
    _, _, _, _, place, prefix = min(ranked)
    return place, prefix


def _prefixes_in(tensors: Mapping[str, Tensor], needed: Sequence[str]) -> set[str]:
    """List the prefixes that the tensors of the network may have; names of three of its tensors are looked for."""
    prefixes = {""}
    for wanted in (*needed[:1], *needed[len(needed) // 2 :][:1], *needed[-1:]):
        prefixes |= {name.removesuffix(wanted) for name in tensors if name.endswith(f".{wanted}")}
    if len(prefixes) == 1:  # of another network: take off what wraps it, so that the message is about its own names
        common = ""
        for prefix in _PREFIXES[1:] * 2:  # twice: module.model. and model.module. both occur
            if tensors and all(name.startswith(common + prefix) for name in tensors):
                common += prefix
        prefixes.add(common)
    return prefixes


def _without_ignorable(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
    """Separate tensors that no part of the network could have: counters of tools, and parts that it does not have.

    Extra layers inside of a part that the network has too are not among them: they say that it is another network.
    """
    parts = {name.partition(".")[0] for name in own}
    ignored = [
        name
        for name in tensors
        if name not in own and (name.rpartition(".")[2] in _COUNTERS or name.partition(".")[0] not in parts)
    ]
    has_all = all(name in tensors for name in own if not name.endswith(_BATCH_COUNTER))
    if not has_all:
        ignored = [name for name in ignored if name.rpartition(".")[2] in _COUNTERS]
    return ignored, {name: tensor for name, tensor in tensors.items() if name not in set(ignored)}


def _require_sound(tensors: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantised" if tensor.is_quantized else "sparse"
            raise WeightsError(
                f"{path} holds a {kind} tensor '{clipped(name)}'; only plain ones are read.\n"
                f"Save it as {'tensor.dequantize()' if tensor.is_quantized else 'tensor.to_dense()'}."
            )
        is_8_bits = tensor.is_floating_point() and tensor.element_size() == 1  # torch can hardly compute with them
        values = tensor.float() if is_8_bits else tensor
        if not values.isfinite().all():
            half = " (float16 ends at 65,504)" if tensor.dtype == torch.float16 else ""
            raise WeightsError(
                f"{path} holds NaN or infinite values in '{clipped(name)}'{half}; no network works with them."
            )
        if name.endswith("running_var") and (values < 0).any():
            raise WeightsError(f"{path} holds a negative variance in '{clipped(name)}'; no network works with it.")


def _notes(
    file: WeightFile,
    place: str,
    prefix: str,
    ignored: Sequence[str],
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
) -> list[str]:
    """Say where the weights were, in which precision, and what else the file holds; nothing of a plain file."""
    notes = []
    if place:
        notes.append(f"the weights are those under '{clipped(place)}'")
    others = [*(other for other in file.places if other != place), *file.others]
    left = ([f"{_listed(others)}"] if others else []) + ([_count_of(ignored, prefix)] if ignored else [])
    if left:
        notes.append(f"ignored: {'; '.join(left)}")
    types = {str(t.dtype).removeprefix("torch.") for name, t in tensors.items() if t.dtype != own[name].dtype}
    if types:
        notes.append(f"stored in {', '.join(sorted(types))}, used in float32")
    return [f"{file.path}: {'; '.join(notes)}."] if notes else []


def _count_of(names: Sequence[str], prefix: str) -> str:
    count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    return f"{count}{f' outside of {prefix!r}' if prefix else ''}, such as '{clipped(names[0])}'"


def _listed(names: Iterable[str]) -> str:
    return enumerated([f"'{clipped(name, 40)}'" for name in names], most=6)


def _mismatch_message(tensors: Mapping[str, Tensor], model: nn.Module, path: Path, model_name: str) -> str | None:
    """Say in at most three lines why these tensors do not fit the network; None if they fit."""
    own = model.state_dict()
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in own]
    both = [name for name in own if name in tensors]
    misshapen = [name for name in both if tensors[name].shape != own[name].shape]
    retyped = [name for name in both if tensors[name].is_floating_point() != own[name].is_floating_point()]
    if misshapen and not (missing or unexpected or retyped):
        last = misshapen[-1]
        classes, found = own[last].shape[0], tensors[last].shape[0]
        classifier = find_classifier(model, classes)
        if {name.rpartition(".")[0] for name in misshapen} == {classifier}:
            return (
                f"{path} does not fit {model_name}: only its final classifier '{classifier}' differs.\n"
                f"It is for {found} classes and the data has {classes}: use weights that match, "
                "or train a new one first with model.new_head: true."
            )
    problems = [_count_with_example(missing, "missing"), _count_with_example(unexpected, "unexpected")]
    if misshapen:
        sizes = f"{_shape_text(tensors[misshapen[0]])}, not {_shape_text(own[misshapen[0]])}"
        problems.append(_count_with_example(misshapen, "of another shape", sizes))
    problems.append(_count_with_example(retyped, "of another type"))
    if not any(problems):
        return None
    return (
        f"{path} does not fit {model_name}: {', '.join(filter(None, problems))}.\n"
        "Are these the weights of another network? Check model.name and model.weights."
    )


def _count_with_example(names: list[str], kind: str, detail: str = "") -> str:
    """Write `3 tensors missing (first 'conv1.weight')`; an empty text for no names."""
    if not names:
        return ""
    count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    return f"{count} {kind} (first '{clipped(names[0])}'{': ' if detail else ''}{detail})"


def _shape_text(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
