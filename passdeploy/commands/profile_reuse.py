"""Figures of an earlier `profile.json` that hold for what is asked for now, and need not be measured again."""

from __future__ import annotations

from typing import Any

from passdeploy.commands.export_run import FILE_PREFIX
from passdeploy.commands.measured_forms import file_names
from passdeploy.errors import CorruptArtifact
from passdeploy.latency.measurement_context import UNKNOWN_CPU, MeasurementContext
from passdeploy.profiling import Setting
from passdeploy.profiling.layer_traces import first_traceable
from passdeploy.runs.folder import RunFolder
from passdeploy.runtime.events import Listener, Warned
from passdeploy.runtime.versions import package_versions


def earlier_profile(folder: RunFolder, weights: dict[str, str], listener: Listener) -> dict[str, Any]:
    """Return the run's profile if it is of these weights; otherwise nothing. A damaged one is warned of."""
    if not folder.has("profile.json") or not (folder.path / "profile.json").is_file():
        return {}
    try:
        document: dict[str, Any] = folder.read_json("profile.json")
    except CorruptArtifact:
        listener(Warned(f"{folder.path / 'profile.json'} was damaged or edited: it is not used, and is written anew."))
        return {}
    return document if document.get("asked", {}).get("weights") == weights else {}


def circumstances_of(folder: RunFolder, backend: str, setting: Setting) -> dict[str, Any]:
    """Return what times depend on besides what was asked for: the processor, the software and the measured files."""
    here = MeasurementContext.here(backend=backend, threads=1, batch=1, image_shape=(), setting=setting)
    recorded = folder.manifest()
    files = (
        next((name for name in file_names(backend, network, setting) if name in recorded), None)
        for network in FILE_PREFIX
    )
    hashes = {name: recorded[name]["sha256"] for name in files if name is not None}
    return {"processor": here.processor, "versions": package_versions(), "files": hashes}


def _are_same(then: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Test whether circumstances are those of before; a processor that is not known is another one."""
    return then == now and now["processor"] != UNKNOWN_CPU


def includes(document: dict[str, Any], asked: dict[str, Any]) -> bool:
    """True if a profile has at least the backends, batches and seconds that are asked for, and all else is the same.

    A backend that was left out, since it could not run, is asked again: it may be able to now.
    """
    measured = document.get("asked")
    if measured is None or not measured.keys() >= asked.keys():
        return False
    found = {(row["backend"], row["batch"]) for row in document["rows"]}
    return (
        found >= {(backend, batch) for backend in asked["backends"] for batch in asked["batches"]}
        and asked["seconds"] <= measured["seconds"]
        and all(asked[key] == measured[key] for key in ("threads", "setting", "weights"))
        and all(_are_same(measured["circumstances"].get(name), now) for name, now in asked["circumstances"].items())
    )


def trace_of(document: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Return what the layers of a profile are traced in: its first backend that can be, and the first batch.

    Raises:
        UsageError: none of the backends that it measured can be traced.
    """
    measured = {row["backend"] for row in document["rows"]}
    backend = first_traceable([name for name in asked["backends"] if name in measured])
    common = {key: asked[key] for key in ("threads", "setting")}
    return {"backend": backend, "batch": asked["batches"][0], **common, **asked["circumstances"][backend]}


def is_still_true(trace: dict[str, Any] | None, folder: RunFolder) -> bool:
    """Test whether layers were traced on this machine, with this software and in the files of now."""
    if trace is None or "processor" not in trace:  # an earlier version did not say it
        return False
    now = circumstances_of(folder, trace["backend"], Setting(**trace["setting"]))
    return _are_same({key: trace.get(key) for key in now}, now)
