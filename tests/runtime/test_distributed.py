"""Training on two processes: the same steps as on one, and one clear error if a process dies."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from passdeploy.errors import UsageError
from passdeploy.runtime.distributed import SINGLE_PROCESS, _synchronised_batch_norm, process_group

RUN = """
import sys
from passdeploy.cli import main
from tests.short_measurements import shorten_measurements
shorten_measurements()
main(["prune", "--recipe", sys.argv[1], "--out", sys.argv[2], "--json", *sys.argv[3:]])
"""


def start_processes(code: str, *arguments: str, count: int = 2) -> list[subprocess.Popen[str]]:
    """Start `count` processes as torchrun does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(count)
    ]


STEPS = """
import json, os, signal, torch
from torch import nn
from passdeploy import Plan
from passdeploy.grouping.find import map_channels
from passdeploy.data.splits import load_data
from passdeploy.channels.allocation import Budget
from passdeploy.errors import RunError
from passdeploy.runtime.distributed import process_group
from passdeploy.runtime.events import Stage
from passdeploy.runtime.interrupts import ending_on_sigterm
from passdeploy.recipe import DataSpec, TrainSpec
from passdeploy.sparsity.learn import PassSettings, learn_masks
from passdeploy.training import saving
from passdeploy.training.loop import fit
from tests.nets import Residual
from tests.sparsity.test_resuming import Memory

with process_group(torch.device("cpu")) as processes:
    data = load_data(DataSpec(name="digits", image_size=8))
    torch.manual_seed(0)
    net = Residual()
    net.head.fc = nn.Linear(8, 10)
    net.double()  # sums in another order differ by rounding, which training makes larger
    fit(net, data, TrainSpec(epochs=1), batch_size=250, seed=0, device="cpu", processes=processes)
    channels = map_channels(net, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    batches = [(images.double(), labels) for images, labels in
               data.train.batches(101, epoch=0, augment=True, drop_last=True, part=processes.part)]
    saving.EVERY_S, saving._LARGEST_SHARE = 0.0, float("inf")

    def learn(memory, stage=None):
        return learn_masks(net, channels.groups, batches, nn.functional.cross_entropy, costs=channels.costs,
                           budget={"macs": 0.5}, settings=PassSettings(steps=8, round_to=1, prompt_size=1, hidden=8),
                           processes=processes, checkpoint=memory, stage=stage)

    memory = Memory()
    learned = learn(memory)
    assert len(memory.states) == (8 if processes.is_first else 0)
    again = learn(Memory(processes.broadcast_object(memory.states[4] if processes.is_first else None)))
    assert again.losses == learned.losses and again.plan == learned.plan
    assert all(torch.equal(again.scores[name], scores) for name, scores in learned.scores.items())
    if processes.count > 1:
        assert processes.any(processes.rank == 1) and not processes.any(False)
        assert processes.first_only(lambda: processes.rank) == 0
        try:
            processes.first_only(lambda: saving.require_same_settings({"a": 1}, {"a": 2}))
        except RunError:
            pass
        else:
            raise AssertionError("the error of the first process is raised in all")
        saving.EVERY_S, stopped = 60.0, Memory()

        def interrupt_one(event):
            if processes.rank == 1 and event.done == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            with ending_on_sigterm():
                learn(stopped, Stage("learn", interrupt_one))
        except KeyboardInterrupt:
            assert [facts["step"] for _, facts in stopped.states] == ([3] if processes.is_first else [])
        else:
            raise AssertionError("all processes stop where one is interrupted")
    weights = {name: tensor.double().sum().item() for name, tensor in net.state_dict().items()}
    print(json.dumps([learned.plan.to_json(), weights, learned.losses]))
"""


def test_two_processes_train_and_choose_as_one_does():
    """Compare training with batches of 250 in equal parts, and mask learning with 101 images in parts of 51 and 50."""
    (alone,), pair = start_processes(STEPS, count=1), start_processes(STEPS)
    outputs = [process.communicate(timeout=300) for process in (alone, *pair)]
    assert [process.returncode for process in (alone, *pair)] == [0, 0, 0], outputs
    results = [json.loads(output) for output, _ in outputs]
    assert results[0][0] == results[1][0] == results[2][0]  # the plan
    assert results[1] == results[2]
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-6, abs=1e-9)
    assert results[1][2] == pytest.approx(results[0][2], rel=1e-6)


def test_only_the_first_of_two_processes_writes(tiny_recipe: Path, tmp_path: Path):
    short = ("train.epochs=0", "finetune.epochs=1", "prune.steps=2")
    options = [word for change in short for word in ("--set", change)]
    pair = start_processes(RUN, str(tiny_recipe), str(tmp_path / "two"), *options)
    outputs = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert [path.name for path in sorted((tmp_path / "two").iterdir())] == ["latest", "tiny-0001"]
    assert json.loads(outputs[0][0])["summary"]["model"] == "passdeploy/resnet8_cifar"
    assert outputs[1][0] == ""


def test_a_lost_process_ends_the_other_with_one_clear_error(tiny_recipe: Path, tmp_path: Path):
    dies = "import sys, os\nfrom passdeploy.commands import stages\n" + (
        "def tell(event):\n    pass\n"
        "real = stages.fit\n"
        "def fit(*args, **options):\n"
        "    if os.environ['RANK'] == '1':\n        os._exit(9)\n"
        "    return real(*args, **options)\n"
        "stages.fit = fit\n"
    )
    pair = start_processes(dies + RUN, str(tiny_recipe), str(tmp_path / "runs"))
    outputs = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [3, 9], outputs
    assert json.loads(outputs[0][0])["error"]["kind"] == "PeerError"
    assert "another process of this training is gone" in outputs[0][1]
    assert "Traceback" not in outputs[0][1]


def test_batch_norm_over_one_process_is_batch_norm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    generator = torch.Generator().manual_seed(0)
    images, scale, shift = (torch.randn(shape, generator=generator) for shape in ((6, 4, 5, 5), (4,), (4,)))
    gradients, states = [], []
    for norm in (F.batch_norm, _synchronised_batch_norm):
        x, mean, variance = images.clone().requires_grad_(), torch.zeros(4), torch.ones(4)
        norm(x, mean, variance, scale, shift, True, 0.1, 1e-5).square().sum().sin().backward()
        gradients.append(x.grad)
        states.append((mean, variance))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(states[1], states[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shared_statistics_of_half_precision_are_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    x = torch.randn(300, 4, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)  # 7,500 is no number of bf16
    results, states = [], []
    for norm in (F.batch_norm, _synchronised_batch_norm):
        mean, variance = torch.zeros(4), torch.ones(4)
        results.append(norm(x, mean, variance, None, None, True, 0.1, 1e-5))
        states.append((mean, variance))
    assert results[1].dtype == dtype
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(states[1], states[0])


def test_one_gpu_is_not_for_several_processes():
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "0"}
    with pytest.raises(UsageError, match="cuda:1 is one GPU, for 2 processes"):
        process_group(torch.device("cuda:1"), environment=environment).__enter__()


def test_without_torchrun_there_is_one_process():
    with process_group(torch.device("cpu"), environment={}) as processes:
        assert processes == SINGLE_PROCESS
        value = torch.ones(2)
        assert processes.average([value])[0] is value
