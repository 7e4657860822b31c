"""Load weights from a safetensors file into a network, or say what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from passdeploy.errors import WeightsError, clipped
from passdeploy.models.classifier import find_classifier

PRETRAINED = "pretrained"

_WRAPPER_PREFIXES = ("module.", "model.", "_orig_mod.")  # of DataParallel, trainers and torch.compile
_PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}


def load_weights_(
    model: nn.Module, path: Path, *, model_name: str = "the network", except_layer: str | None = None
) -> None:
    """Fill every tensor of `model` from a .safetensors file.

    Names may carry one common prefix, such as the `module.` of DataParallel.

    Args:
        model: the network.
        path: the file.
        model_name: what to call the network in errors.
        except_layer: a layer that keeps its tensors; those that the file has for it are ignored.

    Raises:
        WeightsError: unreadable, not finite, or tensors are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    tensors = _without_wrapper_prefixes(_read_tensors(path), own)
    if except_layer is not None:
        tensors |= {name: tensor for name, tensor in own.items() if name.startswith(f"{except_layer}.")}
    if message := _mismatch_message(tensors, model, path, model_name):
        raise WeightsError(message)
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise WeightsError(
            f"{path} holds NaN or infinite values in '{clipped(broken[0])}'; no network works with them."
        )
    model.load_state_dict(tensors, strict=False)  # all there but, perhaps, batch counters of old files


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise WeightsError(
            f"{path} is a pickle, which can run code when it is opened; passdeploy reads .safetensors.\n"
            "Convert it once: safetensors.torch.save_file(torch.load(OLD, weights_only=True), NEW)"
        )
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is not a readable .safetensors file: {clipped(error, 120)}") from error
    return tensors


def _without_wrapper_prefixes(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that all names in the file have and no name in the network has."""
    for prefix in _WRAPPER_PREFIXES * 2:  # twice: module.model. and model.module. both occur
        is_common = bool(tensors) and all(name.startswith(prefix) for name in tensors)
        if is_common and not any(name.startswith(prefix) for name in own):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


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
