"""Files and names that are made to do harm, and a canary that none of them may touch.

Each case tries to write a file (`touched`), to change or show the canary (a file outside of the folder that is worked
in), to put markup into a report, or to keep the machine busy. The answer is a result or a short error, and comes soon.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import signal
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from PIL import Image

from benchmarks.reliability.tally import Tally, answer_to, refusal_of
from benchmarks.reliability.tiny import prune_arguments, shortened, two_layers, write_recipe
from passdeploy.data.splits import load_data
from passdeploy.export.bundle import MANIFEST as BUNDLE_MANIFEST
from passdeploy.export.bundle import build_bundle
from passdeploy.export.trt_engine import EngineOptions
from passdeploy.latency.table import LatencyTable
from passdeploy.models.weight_files import read_weight_file
from passdeploy.recipe import load_recipe
from passdeploy.report.page import render_html, render_markdown
from passdeploy.report.run_facts import read_run
from passdeploy.runs.folder import MANIFEST, RunFolder
from passdeploy.runs.load import load
from passdeploy.runtime.files import sha256_of
from passdeploy.runtime.sealed_json import sealed

GOAL = 80
_LIMIT_S = 120  # of one case: a busy machine may need it
SECRET = "canary-4711"
SHELL = ("$(touch touched)", "`touch touched`", "; touch touched #", "| touch touched", "--help", "-rf")
NAMES = (
    "<script>alert(7)</script>",
    "two words",
    'it\'s "quoted"',
    "new\nline",
    "\u202egpj.exe",
    "{{ 7 * 7 }}",
    "%s%n",
)

Answer = tuple[str, str | None]


@dataclass(frozen=True)
class Place:
    """The folders of a case."""

    work: Path  # the working folder
    canary: Path  # a file outside of it
    recipe: Path  # of a tiny run
    run: Path  # a finished run, a copy of the case's own


class _Payload:
    """An object whose pickle runs a command when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch touched",)


def measure(count: int = GOAL, seed: int = 0) -> Tally:
    """Try the first `count` cases."""
    tally = Tally()
    with TemporaryDirectory() as temporary, shortened():
        folder = Path(temporary)
        recipe = write_recipe(folder)
        answer_to(*prune_arguments(recipe, folder / "runs"))
        whole = (folder / "runs" / "latest").resolve()
        for number, (name, case) in enumerate(list(_cases())[:count]):
            place = Place(folder / f"case-{number}", folder / f"canary-{number}.txt", recipe, folder / f"run-{number}")
            place.work.mkdir()
            place.canary.write_text(SECRET)
            _copy(whole, place.run)
            tally.add(name.split(":")[0], _outcome(case, place), trial=name)
    return tally


def _outcome(case: Callable[[Place], Answer], place: Place) -> str | None:
    """Run a case; say what is wrong."""
    try:
        with _working_in(place.work), _time_limit():
            _, problem = case(place)
    except TimeoutError:
        problem = f"no answer within {_LIMIT_S} s"
    if problem:
        return problem
    if list(place.work.parent.rglob("touched")) or Path("touched").exists():
        return "its command was run"
    if not place.canary.is_file() or place.canary.read_text() != SECRET:
        return "the canary was touched"
    return None


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _time_limit() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(_LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())


def _cases() -> Iterator[tuple[str, Callable[[Place], Answer]]]:
    """Yield all cases with their names; the word before the colon is the kind that is counted."""
    yield from _pickles()
    yield from _recipes()
    yield from _code()
    yield from _paths()
    yield from _images()
    yield from _native_files()
    yield from _names()


# Pickles


def _pickles() -> Iterator[tuple[str, Callable[[Place], Answer]]]:
    def in_file(name: str, content: bytes) -> Callable[[Place], Answer]:
        def case(place: Place) -> Answer:
            path = place.work / name
            path.write_bytes(content)
            outcome, problem = refusal_of(lambda: read_weight_file(path))
            return outcome, problem or (None if outcome != "read" else "it was read")

        return case

    def saved(value: Any, **options: Any) -> bytes:
        stream = io.BytesIO()
        torch.save(value, stream, **options)
        return stream.getvalue()

    def zipped(*names: str) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for name in names:
                archive.writestr(name, pickle.dumps(_Payload()))
        return stream.getvalue()

    array = io.BytesIO()
    np.save(array, np.array([_Payload()], dtype=object), allow_pickle=True)
    plain = pickle.dumps(_Payload())
    header = json.dumps({"__metadata__": {"x": plain.hex()}}).encode()
    contents: dict[str, bytes] = {
        **{f"plain{protocol}.pt": pickle.dumps(_Payload(), protocol) for protocol in range(6)},
        **{f"named.{ending}": plain for ending in ("pth", "bin", "ckpt", "safetensors", "npz", "h5")},
        "saved.pt": saved({"w": torch.ones(1), "extra": _Payload()}),
        "legacy.pt": saved({"state_dict": _Payload()}, _use_new_zipfile_serialization=False),
        "zip.pt": zipped("archive/data.pkl"),
        "slip.pt": zipped("../data.pkl", "archive/data.pkl"),
        "gzip.pt": gzip.compress(plain),
        "array.npy": array.getvalue(),
        "header.safetensors": struct.pack("<Q", len(header)) + header,
        "long.safetensors": struct.pack("<Q", 1 << 62) + b"{}",
    }
    for name, content in contents.items():
        yield f"pickle: {name}", in_file(name, content)


# Recipes


def _recipes() -> Iterator[tuple[str, Callable[[Place], Answer]]]:
    start = "version: 1\nmodel: {name: passdeploy/resnet20_cifar}\ndata: {name: digits, image_size: 32}\n"
    bomb = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]\n" for n in range(12))
    texts = {
        "apply": start + "prune: !!python/object/apply:os.system ['touch touched']\n",
        "new": start + "prune: !!python/object/new:os.system ['touch touched']\n",
        "name": start + "prune: {exclude: [!!python/name:os.system ]}\n",
        "module": start + "seed: !!python/module:os\n",
        "key": start + "? !!python/object/apply:os.system ['touch touched']\n: 1\n",
        "bomb": bomb + start,
        "deep": start + "prune: " + "[" * 3000 + "]" * 3000 + "\n",
        "loop": start + "prune: &a {x: *a}\n",
        "twice": start + "model: {name: 'os:system'}\n",
        "merge": "base: &b {name: 'os:system'}\n" + start + "finetune: {<<: *b}\n",
        "two": start + "---\n" + start,
        "large": start + "# " + "x" * (1 << 20) + "\n",
    }
    for name, text in texts.items():

        def case(place: Place, text: str = text) -> Answer:
            (place.work / "r.yaml").write_text(text)
            outcome, problem = answer_to("check", "r.yaml")
            return outcome, problem or (None if outcome == "exit 2" else f"it ends with {outcome}")

        yield f"recipe: {name}", case


# Code of others


def _code() -> Iterator[tuple[str, Callable[[Place], Answer]]]:
    def with_module(*arguments: str) -> Callable[[Place], Answer]:
        def case(place: Place) -> Answer:
            (place.work / "evil_net.py").write_text("open('touched', 'w')\ndef make(num_classes=1): ...\n")
            (place.work / "r.yaml").write_text(
                place.recipe.read_text().replace("benchmarks.reliability.tiny:two_layers", NET)
            )
            outcome, problem = answer_to(*arguments)
            return outcome, problem or (None if outcome == "exit 2" else f"it ends with {outcome}")

        return case

    NET = "evil_net:make"
    yield "code: check", with_module("check", "r.yaml")
    yield "code: prune", with_module("prune", "r.yaml", "--out", "runs")
    yield "code: inspect", with_module("inspect", NET)
    yield "code: init", with_module("init", "--model", NET, "--data", "digits")
    yield "code: table", with_module("profile", "--table", "t.json", "--model", NET, "--backend", "ort", "--batch", "1")
    yield "code: a path as a module", with_module("inspect", "timm/../evil_net")

    def in_a_plan(place: Place) -> Answer:
        (place.work / "evil_net.py").write_text("open('touched', 'w')\n")
        with RunFolder.open(place.run, write=True) as folder:
            folder.write_json("plan.json", {**folder.read_json("plan.json"), "model": NET}, kind="plan")
        return refusal_of(lambda: load(place.run))

    yield "code: in the plan of a run", in_a_plan


# Paths that lead out


def _paths() -> Iterator[tuple[str, Callable[[Place], Answer]]]:
    def in_manifest(name: str) -> Callable[[Place], Answer]:
        def case(place: Place) -> Answer:
            manifest = json.loads((place.run / MANIFEST).read_text())
            record = {"sha256": sha256_of(place.canary), "size_bytes": len(SECRET), "kind": "text", "versions": {}}
            artifacts = {**manifest["artifacts"], name.format(canary=place.canary): record}
            (place.run / MANIFEST).write_text(sealed({"version": 2, "artifacts": artifacts}))
            outcome, problem = refusal_of(lambda: RunFolder.open(place.run).content())
            return outcome, problem or (None if outcome != "read" else "it was read")

        return case

    yield "path: manifest, relative", in_manifest("../../{canary}")
    yield "path: manifest, absolute", in_manifest("{canary}")

    def link_in_run(place: Place) -> Answer:
        (place.run / "plan.json").unlink()
        (place.run / "plan.json").symlink_to(place.canary)
        outcome, problem = refusal_of(lambda: load(place.run, allow_code=True))
        return outcome, problem or (None if outcome == "CorruptArtifact" else outcome)

    yield "path: a link in a run", link_in_run

    def in_bundle(place: Place) -> Answer:
        entry = {
            "file": f"../{place.canary.name}",
            "sha256": sha256_of(place.canary),
            "precision": "fp32",
            "batch": [1, 1, 1],
        }
        document = {
            "version": 2,
            "flavour": "rtx",
            "options": EngineOptions().to_json(),
            "models": [entry],
            "sha256": {},
        }
        (place.work / BUNDLE_MANIFEST).write_text(sealed(document))
        outcome, problem = refusal_of(lambda: list(build_bundle(place.work)))
        return outcome, problem or (None if outcome == "CorruptArtifact" else outcome)

    yield "path: bundle", in_bundle

    def named_run(name: str) -> Callable[[Place], Answer]:
        def case(place: Place) -> Answer:
            return answer_to(*prune_arguments(place.recipe, place.work / "runs", "--set", f"name={name}"))

        return case

    for name in ("../../x", "/tmp/x", "a/b", ".."):
        yield f"path: a run called {name}", named_run(name)

    for where in ("../{name}", "{path}", "link", "folder/{name}"):

        def external(place: Place, where: str = where) -> Answer:
            (place.work / "link").symlink_to(place.canary)
            (place.work / "folder").symlink_to(place.canary.parent)
            model = _identity()
            tensor = model.graph.initializer[0]
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            location = where.format(name=place.canary.name, path=place.canary)
            tensor.external_data.add(key="location", value=location)
            tensor.external_data.add(key="length", value="8")
            path = place.work / "m.onnx"
            path.write_bytes(model.SerializeToString())
            outcome, problem = answer_to("profile", str(path), "--seconds", "0.1")
            return outcome, problem or (None if outcome == "exit 5" else f"it ends with {outcome}")

        yield f"path: tensors of an ONNX file at {where}", external


def _identity() -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor("w", TensorProto.FLOAT, [2], b"\0" * 8, raw=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


# Images


def _images() -> Iterator[tuple[str, Callable[[Place], Answer]]]:
    def png(width: int, height: int, data: bytes) -> bytes:
        def chunk(kind: bytes, content: bytes) -> bytes:
            return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")

    def as_link(target: str) -> Callable[[Path], None]:
        return lambda path: path.symlink_to(target)

    def as_bytes(content: bytes) -> Callable[[Path], Any]:
        return lambda path: path.write_bytes(content)

    text = io.BytesIO()
    Image.new("RGB", (4, 4)).save(text, "PNG")
    makers: dict[str, Callable[[Path], Any]] = {
        "bomb.png": as_bytes(png(60_000, 60_000, zlib.compress(b"\0" * 1_000_000))),
        "huge.png": as_bytes(png(2**31 - 1, 2**31 - 1, b"")),
        "cut.png": as_bytes(text.getvalue()[:40]),
        "shell.jpg": as_bytes(b"#!/bin/sh\ntouch touched\n"),
        "script.eps": as_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touched) (w) file\n"),
        "pickle.png": as_bytes(pickle.dumps(_Payload())),
        "endless.png": as_link("/dev/zero"),
        "itself.png": as_link("itself.png"),
        "pipe.png": os.mkfifo,
        "folder.png": Path.mkdir,
    }
    for name, make in makers.items():

        def case(place: Place, name: str = name, make: Callable[[Path], Any] = make) -> Answer:
            for label in ("a", "b"):
                folder = place.work / "images" / label
                folder.mkdir(parents=True)
                for number in range(12):
                    Image.new("RGB", (16, 16), (number, 9, 9)).save(folder / f"{number}.png")
            make(place.work / "images" / "a" / name)
            return refusal_of(lambda: _read_images(place.recipe))

        yield f"image: {name}", case


def _read_images(recipe: Path) -> None:
    """Read every image of a recipe's data, as training does."""
    spec = load_recipe(recipe, ["data.root=images", "data.batch_size=4"]).data
    data = load_data(spec)
    for split in (data.train, data.test):
        for _ in split.batches(4):
            pass


# Engines, programs, tables


def _native_files() -> Iterator[tuple[str, Callable[[Place], Answer]]]:
    def refused(*arguments: str, exits: tuple[str, ...] = ("exit 3", "exit 5")) -> Callable[[Place], Answer]:
        def case(place: Place) -> Answer:
            (place.work / "m.engine").write_bytes(os.urandom(100))
            outcome, problem = answer_to(*arguments)
            return outcome, problem or (None if outcome in exits else f"it ends with {outcome}")

        return case

    yield "engine: without a sidecar", refused("profile", "m.engine")
    yield "engine: checked", refused("export", "--check-engine", "m.engine")

    def program(place: Place) -> Answer:
        path = place.work / "m.pt2"
        torch.export.save(torch.export.export(two_layers(2).eval(), (torch.rand(2, 3, 8, 8),)), path)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        stream = io.BytesIO()
        torch.save(((_Payload(),), {}), stream)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, stream.getvalue() if "sample_inputs" in name else content)
        outcome, problem = answer_to("profile", str(path), "--seconds", "0.1")
        return outcome, problem or (None if outcome == "exit 5" else f"it ends with {outcome}")

    yield "program: pickled sample inputs", program

    def table(place: Place, text: str) -> Answer:
        path = place.work / "t.json"
        path.write_text(text)
        return refusal_of(lambda: LatencyTable.load(path))

    yield "table: deep", lambda place: table(place, "[" * 100_000)
    yield "table: numbers", lambda place: table(place, '{"format": 1, "nodes": [], "looks": 1e999, "place": NaN}')

    def bomb(place: Place) -> Answer:
        model = helper.make_model(
            helper.make_graph(
                [helper.make_node("ConstantOfShape", ["s"], ["z"]), helper.make_node("Add", ["x", "z"], ["y"])],
                "g",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
                [helper.make_tensor("s", TensorProto.INT64, [2], [1 << 20, 1 << 20])],
            ),
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=8,
        )
        (place.work / "m.onnx").write_bytes(model.SerializeToString())
        return answer_to("profile", "m.onnx", "--seconds", "0.1")

    yield "onnx: terabytes", bomb


# Names


def _names() -> Iterator[tuple[str, Callable[[Place], Answer]]]:
    for name in (*NAMES, *SHELL):

        def classes(place: Place, name: str = name) -> Answer:
            """A class of this name, in all that a run writes."""
            folder = RunFolder.open(place.run, write=True)
            with folder:
                plan, summary = folder.read_json("plan.json"), folder.read_json("summary.json")
                images = {part: dict.fromkeys((name, "b"), 3) for part in ("train", "test")}
                folder.write_json("plan.json", {**plan, "classes": [name, "b"]}, kind="plan")
                folder.write_json("summary.json", {**summary, "images": images}, kind="summary")
                facts = read_run(folder)
            for text in (render_html(facts), render_markdown(facts)):
                if "<script>alert" in text:
                    return "read", "markup in the report"
            return answer_to("runs", "show", str(place.run))

        yield f"name: a class called {name!r}", classes

    for name in NAMES:

        def files(place: Place, name: str = name) -> Answer:
            """A folder of this name that is worked in, and a file of this name that is missing."""
            folder = place.work / name.replace("/", "_")
            folder.mkdir()
            outcome, problem = answer_to("profile", str(folder / "missing.onnx"))
            if problem:
                return outcome, problem
            _copy(place.run, folder / "run")
            outcome, problem = answer_to("runs", "show", str(folder / "run"))
            return outcome, problem or (None if outcome == "exit 0" else f"it ends with {outcome}")

        yield f"name: a folder called {name!r}", files


def cases() -> list[str]:
    """List the names of all cases."""
    return [name for name, _ in _cases()]
