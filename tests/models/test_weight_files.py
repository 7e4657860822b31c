"""Files of weights as they are published: read without running their code, wherever in the file the tensors are."""

from __future__ import annotations

import re
import shlex
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from passdeploy.errors import WeightsError
from passdeploy.models.build import build_model
from passdeploy.models.weights import classifier_rows, load_weights_
from passdeploy.runtime.events import Warned

Tensors = dict[str, Tensor]


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


def state(seed: int = 1) -> Tensors:
    torch.manual_seed(seed)
    return Net().state_dict()


SAVED = state()


def with_prefix(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def loaded(path: Path, classes: int = 3) -> tuple[Tensors, str]:
    network = Net(classes)
    notes = load_weights_(network, path)
    return network.state_dict(), " ".join(notes)


def refused(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load_weights_(Net(), path)
    assert str(caught.value).count("\n") <= 2
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


NESTED: dict[str, Any] = {
    "state_dict": lambda sd: {"state_dict": sd, "epoch": 3},
    "model": lambda sd: {"model": sd, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}},
    "model_ema": lambda sd: {"model_ema": sd, "args": Namespace(lr=0.1), "best": np.float64(0.7)},
    "net": lambda sd: {"net": with_prefix("module.", sd), "acc": 93.1},
    "backbone": lambda sd: {"backbone": {"model": sd}},
    "teacher": lambda sd: {"teacher": with_prefix("backbone.", sd) | {"head.weight": torch.ones(2, 2)}},
}


def test_weights_of_8_bits_are_read_and_sparse_ones_are_refused(file: Path):
    torch.save({name: t.to(torch.float8_e4m3fn) if t.is_floating_point() else t for name, t in SAVED.items()}, file)
    tensors, notes = loaded(file)
    assert torch.equal(tensors["fc.weight"], SAVED["fc.weight"].to(torch.float8_e4m3fn).float())
    assert "stored in float8_e4m3fn, used in float32" in notes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of sparse tensors in files
        torch.save({**SAVED, "fc.weight": SAVED["fc.weight"].to_sparse()}, file)
        assert "holds a sparse tensor 'fc.weight'; only plain ones are read." in refused(file)


@pytest.mark.parametrize("key", NESTED)
def test_nested_weights_are_found_and_what_is_ignored_is_said(file: Path, key: str):
    saved = state()
    torch.save(NESTED[key](saved), file)
    own, said = loaded(file)
    assert all(torch.equal(own[name], tensor) for name, tensor in saved.items())
    assert f"under '{key}" in said
    for other in ("epoch", "optimizer", "args", "acc"):
        assert (f"'{other}'" in said) == (other in NESTED[key](saved))
    if key == "teacher":
        assert "1 tensor outside of 'backbone.', such as 'head.weight'" in said


@pytest.mark.parametrize("prefix", ["", "module.", "model.module.", "net.", "backbone.", "student.encoder."])
@pytest.mark.parametrize("kind", ["pth", "old pth", "safetensors"])
def test_a_prefix_of_all_names_is_taken_off(file: Path, prefix: str, kind: str):
    saved = with_prefix(prefix, state())
    if kind == "safetensors":
        safetensors.torch.save_file(saved, file)
    else:
        torch.save(saved, file, _use_new_zipfile_serialization=kind == "pth")
    own, said = loaded(file)
    assert torch.equal(own["conv.weight"], saved[f"{prefix}conv.weight"])
    assert not said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(file: Path, dtype: torch.dtype):
    torch.save(
        {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state().items()}, file
    )
    own, said = loaded(file)
    assert own["conv.weight"].dtype == torch.float32
    torch.testing.assert_close(own["conv.weight"], state()["conv.weight"], atol=1e-2, rtol=0)
    assert str(dtype).removeprefix("torch.") in said


@pytest.mark.parametrize(
    "extra",
    [
        {"total_ops": torch.zeros(1), "conv.total_params": torch.zeros(1)},
        with_prefix("ema.", state(2)),
        {"aux.w": torch.ones(2)},
    ],
)
def test_what_no_part_of_the_network_has_is_ignored(file: Path, extra: Tensors):
    torch.save({**state(), **extra}, file)
    own, said = loaded(file)
    assert torch.equal(own["fc.weight"], state()["fc.weight"])
    assert f"ignored: {len(extra)} tensor" in said


def test_an_extra_layer_inside_of_a_part_is_another_network(file: Path):
    torch.save({**state(), "fc.1.weight": torch.ones(2)}, file)
    assert "1 tensor unexpected (first 'fc.1.weight')" in refused(file)


def test_weights_as_trained_come_before_averaged_ones(file: Path):
    torch.save({"model_ema": state(2), "model": state(1)}, file)
    own, said = loaded(file)
    assert torch.equal(own["conv.weight"], state(1)["conv.weight"])
    assert "'model_ema'" in said


def test_a_pickled_network_is_refused_with_a_line_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(1)
    network, path = Net(), tmp_path / "bob's $(touch gone)" / "full.pt"
    path.parent.mkdir()
    for content in (network, {"model": network, "epoch": 1}):
        torch.save(content, path)
        message = refused(path)
        python, option, code = shlex.split(message.splitlines()[-1])
        assert (python, option) == ("python", "-c")
        assert "state_dict" in message
        monkeypatch.chdir(tmp_path)
        exec(code)
        assert torch.equal(loaded(tmp_path / "full-weights.pt")[0]["conv.weight"], network.conv.weight)


def test_nothing_of_a_pickle_runs(file: Path, tmp_path: Path):
    trap = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[Any, Any]:
            return open, (str(trap), "w")

    torch.save({"model": state(), "trap": Trap()}, file)
    assert loaded(file)[0].keys() == state().keys()
    torch.save(Trap(), file)
    assert "holds no tensors with names" in refused(file)
    torch.save({"model": state(), "trap": Trap()}, file, _use_new_zipfile_serialization=False)
    refused(file)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        (b"<html>404 Not Found</html>", "neither a file of torch.save nor"),
        (b"", "neither a file of torch.save nor"),
        (b"PK\x03\x04 cut off", "Is it whole"),
    ],
)
def test_files_of_something_else_say_so(file: Path, content: bytes, message: str):
    file.write_bytes(content)
    assert message in refused(file)


def test_what_a_file_is_does_not_depend_on_its_name(tmp_path: Path):
    torch.save(state(), tmp_path / "a.safetensors")
    safetensors.torch.save_file(state(), tmp_path / "b.pt")
    for name in ("a.safetensors", "b.pt"):
        assert torch.equal(loaded(tmp_path / name)[0]["fc.bias"], state()["fc.bias"])


def test_a_program_is_refused_with_advice(file: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(Net()).save(file)  # type: ignore[no-untyped-call]
    assert "torch.jit.load(" in refused(file)


def test_broken_values_are_refused(file: Path):
    for name, value, message in (
        ("norm.running_var", -1.0, "negative variance"),
        ("fc.bias", float("inf"), "infinite"),
    ):
        tensors = state()
        tensors[name][0] = value
        torch.save(tensors, file)
        assert message in refused(file)


def test_the_number_of_classes_is_read_from_any_file(file: Path):
    torch.save({"state_dict": with_prefix("module.", SAVED), "epoch": 1}, file)
    assert classifier_rows(file, "fc") == 3
    assert classifier_rows(file, "head") is None


def test_a_listener_hears_what_is_ignored_and_otherwise_python_warns(file: Path):
    network, told = build_model("passdeploy/resnet20_cifar", num_classes=3), list[Any]()
    torch.save({"state_dict": network.state_dict(), "epoch": 1}, file)
    build_model("passdeploy/resnet20_cifar", num_classes=3, weights=str(file), listener=told.append)
    assert isinstance(told[0], Warned)
    with pytest.warns(UserWarning, match=re.escape(told[0].text)):
        build_model("passdeploy/resnet20_cifar", num_classes=3, weights=str(file))
