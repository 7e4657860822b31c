"""A slim network in one file, without a run folder: its tensors, and the plan that rebuilds it from the dense network.

The file is a safetensors file whose header has the plan as text; nothing in it is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from passdeploy.channels.blocks import Block
from passdeploy.channels.groups import ChannelGroup
from passdeploy.channels.plan import Plan
from passdeploy.errors import CorruptArtifact, PlanError, clipped, first_line
from passdeploy.models.cloning import deep_copy, named_state
from passdeploy.models.wrappers import unwrapped
from passdeploy.runs.plan_file import cut_to_json, replacements_from_json, sizes_from_json
from passdeploy.runtime.files import safetensors_bytes, write_for_user
from passdeploy.slimming.slim import hidden_state, resize_

_KEY = "passdeploy"  # of the text in the header
_VERSION = 1


@dataclass(frozen=True)
class Rebuild:
    """All that turns a dense network into the slim one, but for the tensors, as plain values."""

    dense: Mapping[str, Sequence[int]]  # parameter or buffer of the dense network -> its shape
    cut: Mapping[str, Any]  # see `cut_to_json`

    @classmethod
    def of(cls, dense: nn.Module, groups: Sequence[ChannelGroup], plan: Plan, blocks: Sequence[Block] = ()) -> Rebuild:
        """Describe how `plan` changes a network."""
        return cls(_shapes_of(dense), cut_to_json(plan, groups, blocks))


def save_slim(network: nn.Module, rebuild: Rebuild, groups: Sequence[ChannelGroup], path: Path | str) -> Path:
    """Write a slim network, trained or not, to one file.

    Args:
        network: the slim network.
        rebuild: how it came from the dense one.
        groups: of the dense network.
        path: of the file, which usually ends with `.safetensors`.

    Raises:
        UsageError: the file cannot be written there.
    """
    network, path = unwrapped(network), Path(path)
    text = json.dumps({"version": _VERSION, "dense": rebuild.dense, **rebuild.cut})
    tensors = {**network.state_dict(), **hidden_state(network, groups)}
    write_for_user(path, safetensors_bytes(tensors, {_KEY: text}))
    return path


def rebuild(model: nn.Module, path: Path | str) -> nn.Module:
    """Build the slim network in a file that `Pruned.save` wrote; it is in the mode and on the device of `model`.

    Args:
        model: the dense network, or one of the same architecture with any weights; it is left as it was.
        path: of the file.

    Raises:
        CorruptArtifact: the file is not there, is damaged, or is no such file.
        PlanError: it is of another network.
    """
    document, tensors = _read(Path(path))
    model = unwrapped(model)
    shapes = _shapes_of(model)
    if shapes != document["dense"]:
        differing = sorted({*shapes, *document["dense"]}, key=lambda name: (name in shapes, name))
        name = next(name for name in differing if shapes.get(name) != document["dense"].get(name))
        raise PlanError(
            f"{path} is of another network: '{name}' has the shape {document['dense'].get(name, 'none')} there, "
            f"and {shapes.get(name, 'none')} in this {type(model).__name__}.\n"
            "Build the dense network with the same configuration as when it was pruned."
        )
    network = deep_copy(model)
    resize_(network, tensors, sizes_from_json(document), replacements_from_json(document))
    return network


def _shapes_of(network: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in named_state(unwrapped(network))}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the plan and the tensors of a file."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as stream:
            text = (stream.metadata() or {}).get(_KEY)
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptArtifact(f"{path} cannot be read: {first_line(error)}.\nSave the network again.") from error
    if text is None:
        raise CorruptArtifact(
            f"{path} holds tensors alone, and not what was cut: `save` of a pruned network writes both."
        )
    document: dict[str, Any] = json.loads(text)
    if document.get("version") != _VERSION:
        raise CorruptArtifact(
            f"{path} has the form {clipped(document.get('version'))}, this version reads {_VERSION}.\n"
            "Read it with the passdeploy that wrote it."
        )
    return document, tensors
