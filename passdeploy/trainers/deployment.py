"""Export and profile of a network with any outputs: those that count go into the ONNX file, compared with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passdeploy.errors import UsageError, first_line
from passdeploy.export.artifact import Artifact
from passdeploy.export.drafts import set_aside
from passdeploy.export.onnx_graph import export_onnx
from passdeploy.export.ort_session import open_session
from passdeploy.models.chosen_outputs import OutputChoice, choose_outputs
from passdeploy.models.cloning import deep_copy
from passdeploy.models.modes import evaluating
from passdeploy.models.outputs import tensors_in
from passdeploy.profiling.candidates import Candidate
from passdeploy.profiling.pair import profile_pair
from passdeploy.profiling.report import Profile
from passdeploy.runtime.events import Listener
from passdeploy.slimming.agreement import relative_error

_ALLOWED_ERROR = 1e-3  # relative, of an output in ONNX Runtime: float32 in another order of operations


class ChosenOutputs(nn.Module):
    """A network that returns those outputs that count: one tensor, or a tuple of several."""

    def __init__(self, network: nn.Module, choice: OutputChoice | None) -> None:
        super().__init__()
        self.network, self._choice = network, choice

    def forward(self, *inputs: Any) -> Any:
        """Run the network."""
        tensors = tensors_in(choose_outputs(self.network(*inputs), self._choice))
        return tensors[0] if len(tensors) == 1 else tuple(tensors)


def images_of(inputs: Sequence[Any]) -> Tensor:
    """Return the only input of a network, a batch of images (batch, channels, height, width).

    Raises:
        UsageError: the network takes something else, so it cannot be exported or measured this way.
    """
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        raise UsageError(
            "only networks of one tensor of images are exported and measured here.\n"
            "Leave export=, profile= and latency targets out, and export the slim network as its own library does."
        )
    return inputs[0]


def export_slim(
    network: nn.Module, images: Tensor, path: Path, choice: OutputChoice | None, options: Mapping[str, Any]
) -> Artifact:
    """Write a network to an ONNX file and compare every output that counts with PyTorch's, where ONNX Runtime is here.

    Args:
        network: on any device; it is left as it was.
        images: (batch, channels, height, width), to trace and compare with.
        path: of the file.
        choice: the outputs that count.
        options: of `export_onnx`.

    Raises:
        ExportError: the network cannot be exported.
        ParityError: an output differs, or the file does not run; it is renamed to `<name>.rejected`.
    """
    chosen, images = ChosenOutputs(deep_copy(network).cpu(), choice).eval(), images[:1].cpu()
    artifact = export_onnx(chosen, images, path, **{"batch": (1, 1, 1), **options})
    if find_spec("onnxruntime") is None:
        return artifact
    session = open_session(path, threads=1)
    try:
        found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    except Exception as error:  # of the runtime, which has many types
        raise set_aside(path, f"does not run in ONNX Runtime: {first_line(error)}") from error
    with torch.no_grad():
        expected = tensors_in(chosen(images))
    errors = [relative_error(one, torch.as_tensor(other)) for one, other in zip(expected, found, strict=True)]
    if not max(errors) <= _ALLOWED_ERROR:
        raise set_aside(path, f"differs from the PyTorch model by {max(errors):.1e} (limit {_ALLOWED_ERROR:.0e})")
    return artifact.with_facts(max_rel_error=max(errors))


def profile_slim(
    dense: nn.Module,
    slim: nn.Module,
    images: Tensor,
    choice: OutputChoice | None,
    files: Callable[[nn.Module, str], Path],
    options: Mapping[str, Any],
    listener: Listener,
) -> Profile:
    """Measure a dense and a slim network in turns.

    Args:
        dense: the network before.
        slim: the network after.
        images: whose shape past the batch counts.
        choice: the outputs that count.
        files: (network, name) -> its ONNX file, asked for only where a backend needs it.
        options: of `profile_pair`: backends (default: torch), batches (1), seconds and so on.
        listener: receives progress events.
    """
    settings = {"backends": ("torch",), "batches": (1,), **options}
    on_file = any(backend not in ("torch", "compile") for backend in settings["backends"])
    pair = [
        Candidate(
            name,
            ChosenOutputs(deep_copy(network), choice).eval(),
            onnx=files(network, name) if on_file else None,
        )
        for name, network in (("dense", dense), ("slim", slim))
    ]
    with evaluating(dense), evaluating(slim):
        return profile_pair(*pair, image_shape=tuple(images.shape[1:]), listener=listener, **settings)
