"""From a finished run to files and figures: load its networks, export them, measure them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from passdeploy.data import load_data
from passdeploy.errors import CorruptArtifact
from passdeploy.events import Listener, silent
from passdeploy.export import Artifact, export_artifacts
from passdeploy.export.trt_engine import Flavour, sidecar_path
from passdeploy.models import build_model
from passdeploy.profiling import Subject, profile_pair
from passdeploy.recipe import Recipe, parse_recipe
from passdeploy.runs import RunFolder
from passdeploy.slimming import resize_
from passdeploy.sparsity.prompt import VisualPrompt, with_prompt

LATEST = Path("runs/latest")
PARITY_IMAGES = 64
EXPORTED = "export/artifacts.json"


def load(run: Path | str = LATEST, which: str = "slim", *, allow_code: bool = False) -> nn.Module:
    """A network of a run, on the CPU in evaluation mode; it takes normalised images (batch, 3, height, width).

    Built from the model's factory, the plan and the tensors, each verified; nothing is unpickled.

    Args:
        run: the run folder.
        which: `slim` or `dense`.
        allow_code: let the recipe name a model factory, which runs its module's code.

    Raises:
        RunError: no such run, or it has no such network yet.
        CorruptArtifact: a file is not what was written.
    """
    return load_network(RunFolder.open(Path(run)), which, allow_code)


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    run: Path
    artifacts: tuple[Artifact, ...]


def export_run(
    run: Path | str = LATEST,
    *,
    which: Collection[str] = ("onnx",),
    flavour: Flavour = "tensorrt",
    batch: Sequence[int] = (1, 8, 32),
    dense: bool = False,
    allow_code: bool = False,
    tell: Listener = silent,
) -> Exported:
    """Export the slim network of a run into its `export` folder, checked on images of its test set.

    Args:
        run: the run folder.
        which: `onnx`, `trt` or both.
        flavour: `tensorrt`, for this machine's GPU, or `rtx`, which is built without one.
        batch: the smallest, the typical and the largest batch.
        dense: export the dense network too.
        allow_code: let the recipe name a model factory, which runs its module's code.
        tell: hears what happens.
    """
    with RunFolder.open(Path(run), write=True) as folder:
        written = [
            artifact
            for name in (("slim", "dense") if dense else ("slim",))
            for artifact in _export(folder, name, which, flavour, batch, allow_code, tell)
        ]
        return Exported(folder.path, tuple(written))


def profile_run(
    run: Path | str = LATEST,
    *,
    backends: Sequence[str] = ("torch", "ort"),
    batches: Sequence[int] = (1, 8),
    threads: int | None = None,
    seconds: float = 4.0,
    allow_code: bool = False,
    tell: Listener = silent,
) -> dict[str, Any]:
    """Measure the dense and the slim network of a run, in turns, on this machine; writes `profile.json`.

    Networks that ONNX Runtime needs and that were not exported yet are exported first.

    Returns:
        The content of `profile.json`.
    """
    with RunFolder.open(Path(run), write=True) as folder:
        shape = tuple(folder.read_json("plan.json")["image_shape"])
        subjects = {}
        for name, prefix in _PREFIX.items():
            onnx = f"export/{prefix}.onnx"
            if "ort" in backends and not folder.has(onnx):
                _export(folder, name, ("onnx",), "tensorrt", (1, 8, 32), allow_code, tell)
            subjects[name] = Subject(
                name,
                module=load_network(folder, name, allow_code) if "torch" in backends else None,
                onnx=folder.verified(onnx) if "ort" in backends else None,
                weights=f"{name}.safetensors",
            )
        profile = profile_pair(
            subjects["dense"], subjects["slim"], image_shape=shape, backends=backends, batches=batches,
            threads=threads, seconds=seconds, tell=tell,
        )  # fmt: skip
        document = profile.to_json()
        folder.write_json("profile.json", document, kind="profile")
        return document


def summary_of(run: Path | str = LATEST) -> dict[str, Any]:
    """The content of a run's `summary.json`, verified."""
    found: dict[str, Any] = RunFolder.open(Path(run)).read_json("summary.json")
    return found


_PREFIX = {"dense": "dense", "slim": "model"}  # network -> how its exported files are called


def load_network(folder: RunFolder, which: str, allow_code: bool) -> nn.Module:
    """`load`, from a folder that is open."""
    facts = folder.read_json("plan.json")
    tensors = folder.read_tensors(f"{which}.safetensors")
    network = build_model(facts["model"], num_classes=len(facts["classes"]), allow_code=allow_code)
    prompt = None
    if which == "slim" and facts["prompt"]:
        prompt = VisualPrompt(facts["prompt"]["kind"], tuple(facts["image_shape"]), facts["prompt"]["size"])
        tensors = prompt.take_(tensors)
    known = network.state_dict().keys()
    if not known <= tensors.keys() <= known | dict(network.named_buffers()).keys():
        raise CorruptArtifact(
            f"{which}.safetensors of {folder.path} does not hold the tensors of {facts['model']}.\n"
            "It was made with another version of the model's library: install that one (manifest.json)."
        )
    numbers = [((module, attribute, place), value) for module, attribute, place, value in facts["numbers"]]
    resize_(network, tensors, numbers if which == "slim" else ())
    return with_prompt(network, prompt).eval()


def _export(
    folder: RunFolder,
    name: str,
    which: Collection[str],
    flavour: Flavour,
    batch: Sequence[int],
    allow_code: bool,
    tell: Listener,
) -> list[Artifact]:
    """Export one network, and record its files and what is known of them."""
    facts = folder.read_json("plan.json")
    images, _ = next(load_data(_recipe_of(folder).data).test.batches(PARITY_IMAGES))
    metadata = {key: facts[key] for key in ("model", "classes", "image_shape", "mean", "std")}
    written = export_artifacts(
        load_network(folder, name, allow_code),
        images=images,
        folder=folder.path / "export",
        which=which,
        flavour=flavour,
        batch=batch,
        metadata={**metadata, "network": name, "run": folder.path.name},
        prefix=_PREFIX[name],
        tell=tell,
    )
    known = folder.read_json(EXPORTED) if folder.has(EXPORTED) else {}
    for artifact in written:
        folder.adopt(f"export/{artifact.path.name}", artifact.kind)
        if artifact.kind == "engine":
            folder.adopt(f"export/{sidecar_path(artifact.path).name}", "sidecar")
        known[artifact.path.name] = {
            "network": name,
            "kind": artifact.kind,
            "precision": artifact.precision,
            "size_bytes": artifact.size_bytes,
            "sha256": artifact.sha256,
            "facts": dict(artifact.facts),
        }
    folder.write_json(EXPORTED, known)
    return written


def _recipe_of(folder: RunFolder) -> Recipe:
    return parse_recipe(folder.read_text("recipe.resolved.yaml"), "recipe.resolved.yaml")
