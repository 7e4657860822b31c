"""Build a network from its name in a recipe, with its weights, in eval mode, on the CPU.

The part of the name before the slash is the library: torchvision, timm or passdeploy. `package.module:factory` is
code of the user, and is imported only if that was allowed. Of files with weights only the tensors are read, and no
code in them is run.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passdeploy.errors import MissingError, ModelError, RecipeError, clipped, first_line, require
from passdeploy.models.cifar_resnet import NETWORKS
from passdeploy.models.classifier import classifier_of, replace_classifier_
from passdeploy.models.weights import PRETRAINED, load_weights_
from passdeploy.models.wrappers import unwrapped
from passdeploy.runtime.events import Listener, Warned
from passdeploy.runtime.files import DISK_ERRNOS, expanded
from passdeploy.runtime.seeds import seeded_global_generators


def build_model(
    name: str,
    *,
    num_classes: int,
    weights: str | None = None,
    new_head: bool = False,
    as_pretrained: bool = False,
    allow_code: bool = False,
    seed: int = 0,
    listener: Listener | None = None,
) -> nn.Module:
    """Build the network a recipe names.

    Args:
        name: torchvision/NAME, timm/NAME, passdeploy/NAME or package.module:factory. A factory is called
            with `num_classes` (and `pretrained`) where it takes them.
        num_classes: width of the network's output.
        weights: None (random), "pretrained" (the library's own; where those are for another number of
            classes the final classifier is new), or the path of a file of weights.
        new_head: leave the final classifier of `weights` out, even if its number of classes fits; it starts at random.
        as_pretrained: build it as for the library's own weights, which are not loaded: some networks are others for
            them, such as GoogLeNet, which then changes its input first.
        allow_code: allow `package.module:factory` to be imported and called.
        seed: random weights depend on it alone; the state of the global generator is restored.
        listener: is told what is not used of a file of weights; None: that is a Python warning.

    Returns:
        The network in eval mode, on the CPU: (batch, 3, height, width) -> logits (batch, num_classes).

    Raises:
        ModelError: unknown name, a name that cannot be built, or code that was not allowed.
        RecipeError: the weights file does not exist.
        WeightsError: the weights file is unreadable or does not fit the network.
        MissingError: a package is missing, or pretrained weights cannot be downloaded.
    """
    is_file = weights not in (None, PRETRAINED)
    if is_file and not expanded(str(weights)).is_file():
        raise RecipeError(
            f"model.weights: no such file: {clipped(weights, 200)}.\nPaths start at the current directory."
        )
    with seeded_global_generators("model", seed, device=torch.device("cpu")):
        arguments = _pretrained_arguments(name) if as_pretrained else {}
        model = _create(name, num_classes, pretrained=weights == PRETRAINED, allow_code=allow_code, **arguments)
        if new_head and weights == PRETRAINED:
            replace_classifier_(model, old_classes=num_classes, num_classes=num_classes)
    if is_file:
        classifier = classifier_of(model, num_classes) if new_head else None
        path = expanded(str(weights))
        for note in load_weights_(model, path, model_name=name, except_layer=classifier):
            if listener is None:
                warnings.warn(note, stacklevel=2)
            else:
                listener(Warned(note))
    return model.cpu().eval()


def comes_trained(name: str, *, num_classes: int, weights: str | None, new_head: bool = False) -> bool:
    """Test whether the network that `build_model` returns for these arguments is trained for its classes.

    False for random weights and for a new classifier. A factory of the user that takes `pretrained` is assumed to
    return a network that is trained for the classes asked for.
    """
    if weights is None or new_head:
        return False
    return weights != PRETRAINED or published_classes(name) in (None, num_classes)


def _create(name: str, num_classes: int, *, pretrained: bool, allow_code: bool, **arguments: Any) -> nn.Module:
    """Build a network; `arguments` go to torchvision's builder."""
    if ":" in name:
        return _from_code(name, num_classes, pretrained, allow_code)
    source, slash, short = name.partition("/")
    if slash and source in _SOURCES:
        return _SOURCES[source](short, num_classes, pretrained, **arguments)
    import torchvision

    known = [f"torchvision/{known}" for known in _torchvision_names(torchvision)]
    known += [f"passdeploy/{known}" for known in NETWORKS]
    advice = "Models are torchvision/NAME, timm/NAME, passdeploy/NAME or package.module:factory."
    raise _unknown_model(name, known, advice)


def _pretrained_arguments(name: str) -> dict[str, Any]:
    """Look up what torchvision's builder sets for published weights and not without; empty for other libraries."""
    source, _, short = name.partition("/")
    if source == "torchvision" and short in ("googlenet", "inception_v3"):
        return {"transform_input": True}
    if source == "torchvision" and short.startswith("vit_"):
        import torchvision

        return {"image_size": torchvision.models.get_model_weights(short).DEFAULT.meta["min_size"][0]}
    return {}


def _from_torchvision(name: str, num_classes: int, pretrained: bool, **arguments: Any) -> nn.Module:
    import torchvision

    names = _torchvision_names(torchvision)
    if name not in names:
        raise _unknown_model(f"torchvision/{name}", [f"torchvision/{known}" for known in names])
    if not pretrained:
        # Their auxiliary classifiers only help training from scratch; init_weights=None would warn.
        extra: dict[str, Any] = {}
        if name in ("googlenet", "inception_v3"):
            extra = {"aux_logits": False, "init_weights": True}
        extra.update(arguments)
        return _as_module(torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra))
    with _downloading(f"torchvision/{name}"):
        model = _as_module(torchvision.models.get_model(name, weights="DEFAULT", progress=False))
    if name == "inception_v3":
        model.aux_logits, model.AuxLogits = False, None  # type: ignore[assignment]
    trained_for = published_classes(f"torchvision/{name}")
    assert trained_for is not None
    if trained_for != num_classes:
        replace_classifier_(model, old_classes=trained_for, num_classes=num_classes)
    return model


def published_classes(name: str) -> int | None:
    """Look up the number of classes of a library's pretrained weights; None if the library does not say."""
    source, _, short = name.partition("/")
    if source == "torchvision":
        import torchvision

        return len(torchvision.models.get_model_weights(short).DEFAULT.meta["categories"])
    if source == "timm":
        known = require("timm", extra="timm").get_pretrained_cfg(short)
        return known.num_classes if known else None
    return None


def _torchvision_names(torchvision: Any) -> list[str]:
    """List torchvision's classifiers, without its detection, segmentation, video and quantised models."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _from_timm(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    timm = require("timm", extra="timm")
    if not timm.is_model(name):
        raise _unknown_model(f"timm/{name}", [f"timm/{known}" for known in timm.list_models()])
    with _downloading(f"timm/{name}"):
        try:
            return _as_module(timm.create_model(name, pretrained=pretrained, num_classes=num_classes))
        except RuntimeError as error:  # a weights tag that does not exist, or no weights at all
            raise ModelError(f"timm cannot build {name!r}: {clipped(error, 200)}") from error


def _from_networks(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    if name not in NETWORKS:
        raise _unknown_model(f"passdeploy/{name}", [f"passdeploy/{known}" for known in NETWORKS])
    if pretrained:
        raise ModelError(
            f"passdeploy/{name} comes without pretrained weights.\n"
            "Set model.weights to a file of weights, or to null to train it first."
        )
    return NETWORKS[name](num_classes)


_SOURCES: Mapping[str, Callable[..., nn.Module]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "passdeploy": _from_networks,
}


def _from_code(name: str, num_classes: int, pretrained: bool, allow_code: bool) -> nn.Module:
    if not allow_code:
        raise ModelError(
            f"{clipped(name)!r} names Python code, which a recipe may not run by itself.\n"
            "If you trust that code, say so with --allow-code."
        )
    module_name, _, attribute = name.partition(":")
    with _current_directory_on_path():
        try:
            factory: Any = import_module(module_name)
            for part in attribute.split("."):
                factory = getattr(factory, part)
            offered = {"num_classes": num_classes, **({"pretrained": True} if pretrained else {})}
            model = factory(**{key: value for key, value in offered.items() if _accepts(factory, key)})
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            problem = f"{type(error).__name__}: {clipped(error, 200)}"
            raise ModelError(f"cannot build {clipped(name)!r}: {problem}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{clipped(name)!r} returned {type(model).__name__}, not a torch.nn.Module.")
    model = unwrapped(model)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ModelError(
            f"{clipped(name)!r} returned a network on the meta device, without weights.\n"
            "Let it build the network on the CPU."
        )
    try:
        return model.train().eval()
    except NotImplementedError as error:  # programs of torch.export
        raise ModelError(
            f"{clipped(name)!r} returned a {type(model).__name__} that is fixed in one mode: {first_line(error)}\n"
            "Return the nn.Module that it was made from."
        ) from error


def _accepts(factory: Callable[..., Any], keyword: str) -> bool:
    parameters = inspect.signature(factory).parameters
    return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@contextmanager
def _current_directory_on_path() -> Iterator[None]:
    """Append the current directory to `sys.path`, as `python -m` does and a console script does not.

    It comes last, so that no file in it hides an installed package.
    """
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


@contextmanager
def _downloading(name: str) -> Iterator[None]:
    """Turn a failed download of weights (no network, a proxy, a damaged file) into an error that says what to do."""
    logger = logging.getLogger("huggingface_hub")  # it writes two lines for each of its dozen attempts
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        origin = type(error).__module__.partition(".")[0]
        is_damaged = isinstance(error, RuntimeError) and "invalid hash" in str(error)
        if not (is_damaged or isinstance(error, OSError) or origin in ("huggingface_hub", "httpx", "requests")):
            raise
        if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
            raise MissingError(
                f"cannot keep the pretrained weights of {name}: {clipped(error, 200)}\n"
                "Name a folder with room for them: TORCH_HOME (torchvision) or HF_HOME (timm)."
            ) from error
        raise MissingError(
            f"cannot download the pretrained weights of {name}: {clipped(error, 120)}\n"
            "Go online once (they are kept), or set model.weights to a file of weights or to null."
        ) from error
    finally:
        logger.setLevel(level)


def _unknown_model(name: str, known: Iterable[str], advice: str = "") -> ModelError:
    """Make the error for an unknown name, with the closest known ones: for `resnet18`, `torchvision/resnet18`."""
    by_short = {full.partition("/")[2]: full for full in known}
    short = name.rpartition("/")[2].lower()
    close = [by_short[match] for match in difflib.get_close_matches(short, by_short, n=3, cutoff=0.6)]
    guess = f"\nDid you mean {' or '.join(close)}?" if close else ""
    return ModelError(f"unknown model {clipped(name)!r}.{guess}" + (f"\n{advice}" if advice else ""))


def _as_module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model
