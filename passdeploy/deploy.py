"""From a finished run to files and figures: load its networks, export them, measure them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from passdeploy.channels.mapping import map_channels
from passdeploy.data import load_data
from passdeploy.errors import CorruptArtifact, RunError, UsageError
from passdeploy.events import Listener, silent
from passdeploy.export import Artifact, ExportSettings, Samples, export_artifacts
from passdeploy.export.delivery import Delivery
from passdeploy.export.run_export import require_possible, stem
from passdeploy.export.trt_api import FLAVOURS
from passdeploy.export.trt_sidecar import engine_of, sidecar_path
from passdeploy.latency.layers import by_group, compare_layers
from passdeploy.latency.place import block_of
from passdeploy.latency.target import example_images
from passdeploy.latency.traces import layers_of, require_traceable
from passdeploy.models import build_model
from passdeploy.profiling import Setting, Subject, physical_cores, profile_pair
from passdeploy.profiling.runners import PROVIDERS, torch_threads
from passdeploy.recipe import Recipe, parse_recipe
from passdeploy.runs import RunFolder
from passdeploy.slimming import resize_
from passdeploy.sparsity.prompt import VisualPrompt, with_prompt

LATEST = Path("runs/latest")
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
    settings: ExportSettings | None = None,
    *,
    dense: bool = False,
    image_size: int | None = None,
    delivery: Delivery | None = None,
    allow_code: bool = False,
    tell: Listener = silent,
) -> Exported:
    """Export the slim network of a run into its `export` folder, checked on images of its test set.

    Args:
        run: the run folder.
        settings: what to export; None: ONNX in fp32.
        dense: export the dense network too.
        image_size: other than the run's own, in pixels; not for a network with a visual prompt.
        delivery: what to gather from the files; its folders are relative to the run's.
        allow_code: let the recipe name a model factory, which runs its module's code.
        tell: hears what happens.
    """
    settings = settings or ExportSettings()
    require_possible(settings)
    with RunFolder.open(Path(run), write=True) as folder:
        samples = _samples_of(folder, settings, image_size)
        written = [
            artifact
            for name in (("slim", "dense") if dense else ("slim",))
            for artifact in _export(folder, name, settings, samples, allow_code, tell)
        ]
        if delivery is not None:
            name = folder.path.name.rpartition("-")[0]
            made = delivery.write(folder.path, written, settings, samples, name=name)
            for artifact in made:
                if artifact.path.is_relative_to(folder.path):
                    folder.adopt(artifact.path.relative_to(folder.path).as_posix(), artifact.kind)
            written += made
        return Exported(folder.path, tuple(written))


def profile_run(
    run: Path | str = LATEST,
    *,
    backends: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8),
    threads: int | None = None,
    setting: Setting | None = None,
    seconds: float = 4.0,
    layers: bool = False,
    trust_engine: bool = False,
    allow_code: bool = False,
    tell: Listener = silent,
) -> dict[str, Any]:
    """Measure the dense and the slim network of a run, in turns, on this machine; writes `profile.json`.

    Networks that ONNX Runtime needs in fp32 and that were not exported yet are exported first; files in another
    precision, engines and programs must be there. With `layers`, the document also says where the time goes, for the
    first backend and batch size: `layers`, and `groups`, the same by channel group.

    Args:
        run: the run folder.
        backends: see `profile_pair`; None: PyTorch, and on a CPU ONNX Runtime.
        batches: images per call.
        threads: of the CPU; None takes every physical core.
        setting: device, precision, layout, CUDA graph.
        seconds: at least this long per backend and batch.
        layers: look into both networks as well.
        trust_engine: load engines that have no sidecar, or that run code of their own.
        allow_code: let the recipe name a model factory, which runs its module's code.
        tell: hears what happens.

    Returns:
        The content of `profile.json`.
    """
    setting = setting or Setting()
    backends = backends or (("torch", "ort") if setting.device == "cpu" else ("torch",))
    setting.require_possible(backends)
    if layers:
        require_traceable(backends[0])
    with RunFolder.open(Path(run), write=True) as folder:
        shape = tuple(_facts_of(folder)["image_shape"])
        subjects = [
            replace(_subject(folder, name, backends, setting, allow_code, tell), trust_engine=trust_engine)
            for name in _PREFIX
        ]
        profile = profile_pair(
            *subjects, image_shape=shape, backends=backends, batches=batches, threads=threads, setting=setting,
            seconds=seconds, tell=tell,
        )  # fmt: skip
        document = profile.to_json()
        if layers:
            images = example_images(batches[0], shape)
            with torch_threads(threads or physical_cores()):
                dense, slim = (
                    layers_of(subject, backends[0], images, threads=threads or physical_cores(), setting=setting)
                    for subject in subjects
                )
            channels = map_channels(load_network(folder, "dense", allow_code), images[:1])
            changes = compare_layers(dense, slim, block=block_of(backends[0], setting), groups=channels.groups)
            document["layers"] = [change.to_json() for change in changes]
            document["groups"] = by_group(changes)
        folder.write_json("profile.json", document, kind="profile")
        return document


def _subject(
    folder: RunFolder, name: str, backends: Sequence[str], setting: Setting, allow_code: bool, tell: Listener
) -> Subject:
    """A network of a run, in the forms that `backends` need."""
    wanted, files = set(backends), stem(_PREFIX[name], setting.precision)
    module = load_network(folder, name, allow_code) if {"torch", "compile"} & wanted else None
    found = Subject(name, module=module, weights=f"{name}.safetensors")
    if wanted & set(PROVIDERS):
        onnx = f"export/{files}.onnx"
        if setting.precision == "fp32" and not folder.has(onnx):
            settings = ExportSettings()
            _export(folder, name, settings, _samples_of(folder, settings), allow_code, tell)
        found = replace(found, onnx=_exported(folder, (onnx,), f"--onnx --precision {setting.precision}"))
    if "tensorrt" in wanted:
        graph = Path("export") / f"{files}.onnx"
        engines = [engine_of(graph, flavour).as_posix() for flavour in FLAVOURS]
        found = replace(found, engine=_exported(folder, engines, f"--trt --precision {setting.precision}"))
    if "torch-trt" in wanted:
        program = f"export/{files}.pt2"
        found = replace(found, program=_exported(folder, (program,), f"--torch-trt --precision {setting.precision}"))
    return found


def _exported(folder: RunFolder, names: Sequence[str], options: str) -> Path:
    """The first of these files that the run has, verified."""
    for name in names:
        if folder.has(name):
            return folder.verified(name)
    raise RunError(
        f"{folder.path} has no {names[0]} to measure.\nWrite both networks: passdeploy export --dense {options}"
    )


def summary_of(run: Path | str = LATEST) -> dict[str, Any]:
    """The content of a run's `summary.json`, verified."""
    found: dict[str, Any] = RunFolder.open(Path(run)).read_json("summary.json")
    return found


_PREFIX = {"dense": "dense", "slim": "model"}  # network -> how its exported files are called


_FACTS = {"model", "classes", "image_shape", "prompt", "groups", "numbers"}  # of a plan.json, to rebuild from


def _facts_of(folder: RunFolder) -> dict[str, Any]:
    """The content of a run's `plan.json`.

    Raises:
        CorruptArtifact: it lacks what this version writes there.
    """
    facts: dict[str, Any] = folder.read_json("plan.json")
    if missing := sorted(_FACTS - facts.keys()):
        raise CorruptArtifact(
            f"plan.json of {folder.path} says nothing of {', '.join(missing)}: "
            "another version of passdeploy wrote it.\n"
            f"Prune again: passdeploy prune --recipe {folder.path / 'recipe.resolved.yaml'}"
        )
    return facts


def load_network(folder: RunFolder, which: str, allow_code: bool) -> nn.Module:
    """`load`, from a folder that is open."""
    facts = _facts_of(folder)
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
    settings: ExportSettings,
    samples: Samples,
    allow_code: bool,
    tell: Listener,
) -> list[Artifact]:
    """Export one network, and record each of its files, and what is known of them, as soon as it is there."""
    facts, recipe = _facts_of(folder), _recipe_of(folder)
    settings = replace(settings, fp32_tolerance=recipe.gates.parity)
    manifest = folder.manifest()
    metadata = {
        **{key: facts[key] for key in ("model", "classes", "mean", "std")},
        "image_shape": list(samples.image_shape),
        "network": name,
        "run": folder.path.name,
        "sha256": {file: manifest[file]["sha256"] for file in (f"{name}.safetensors", "plan.json")},
    }
    network = load_network(folder, name, allow_code)
    written = []
    for artifact in export_artifacts(
        network, samples, folder.path / "export", settings, metadata=metadata, prefix=_PREFIX[name], tell=tell
    ):
        folder.adopt(f"export/{artifact.path.name}", artifact.kind)
        if artifact.kind == "engine":
            folder.adopt(f"export/{sidecar_path(artifact.path).name}", "sidecar")
        is_known = folder.has(EXPORTED) and (folder.path / EXPORTED).is_file()  # a user may have emptied the folder
        known = folder.read_json(EXPORTED) if is_known else {}
        known[artifact.path.name] = {"network": name, **artifact.to_json()}
        folder.write_json(EXPORTED, known)
        written.append(artifact)
    return written


def _samples_of(folder: RunFolder, settings: ExportSettings, image_size: int | None = None) -> Samples:
    """Images of the run's data to check on and to calibrate on, perhaps in another size."""
    facts = _facts_of(folder)
    if image_size is not None and facts["prompt"] and image_size != facts["image_shape"][1]:
        raise UsageError(
            f"the network of {folder.path.name} has a visual prompt of {facts['image_shape'][1]} pixels.\n"
            "Leave --image-size out; with prune.prompt.keep: false, networks take other sizes too."
        )
    size = {} if image_size is None else {"image_size": image_size}
    return Samples.of(load_data(_recipe_of(folder).data.model_copy(update=size)), settings)


def _recipe_of(folder: RunFolder) -> Recipe:
    return parse_recipe(folder.read_text("recipe.resolved.yaml"), "recipe.resolved.yaml")
