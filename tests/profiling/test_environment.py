from __future__ import annotations

import json
from pathlib import Path

import pytest

from passdeploy.profiling import environment
from passdeploy.profiling.environment import default_threads, physical_cores, read_environment

FOUR_THREADS_ON_TWO_CORES = "\n\n".join(
    f"processor\t: {cpu}\nmodel name\t: Imaginary CPU\nphysical id\t: 0\ncore id\t: {cpu % 2}" for cpu in range(4)
)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake the system files of a machine: four hyper-threads on two cores, no quota, no governor."""
    (tmp_path / "cpuinfo").write_text(FOUR_THREADS_ON_TWO_CORES)
    monkeypatch.setattr(environment, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(environment, "_CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(environment, "_GOVERNOR", tmp_path / "scaling_governor")
    monkeypatch.setattr(environment, "usable_cpus", lambda: frozenset(range(4)))
    return tmp_path


BUSY = {"cpu": (1100, 1720), "cpu0": (300, 600), "cpu1": (200, 215), "cpu2": (300, 590), "cpu3": (300, 315)}


@pytest.fixture
def stat(machine: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake a machine whose CPUs 0 and 2 are fully busy during a sleep of 0.3 s, the others for a twentieth of it."""
    path = machine / "stat"

    def write(moment: int) -> None:
        path.write_text("".join(f"{cpu} {ticks[moment]} 0 500 9000 70 0 0 0 0 0\n" for cpu, ticks in BUSY.items()))

    write(0)
    monkeypatch.setattr(environment, "_STAT", path)
    monkeypatch.setattr(environment.os, "sysconf", lambda name: {"SC_CLK_TCK": 1000}[name])
    monkeypatch.setattr(environment, "sleep", lambda _: write(1))
    return path


def test_only_what_others_do_counts_as_busy(stat: Path):
    assert environment.busy_cores(seconds=0.3) == pytest.approx(620 / 300)
    stat.unlink()
    assert environment.busy_cores(seconds=0.3) is None


def test_cpus_that_this_process_may_not_run_on_do_not_count_as_busy(stat: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment, "usable_cpus", lambda: frozenset({1, 3}))
    assert environment.busy_cores(seconds=0.3) == pytest.approx(0.1)


@pytest.mark.parametrize(("quota", "busy"), [("100000", 0.0), ("300000", 620 / 300 - 1), ("400000", 620 / 300)])
def test_others_take_from_a_quota_only_what_no_other_cpu_is_free_for(stat: Path, quota: str, busy: float):
    (stat.parent / "cpu.max").write_text(f"{quota} 100000")
    assert environment.busy_cores(seconds=0.3) == pytest.approx(busy)


def test_hyper_threads_count_once(machine: Path):
    assert physical_cores() == 2


def test_only_the_cpus_of_this_process_count(machine: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment, "usable_cpus", lambda: frozenset({1, 3}))
    assert physical_cores() == 1


@pytest.mark.parametrize(("quota", "cores"), [("100000 100000", 1), ("50000 100000", 1), ("max 100000", 2)])
def test_the_quota_of_a_container_counts(machine: Path, quota: str, cores: int):
    (machine / "cpu.max").write_text(quota)
    assert physical_cores() == cores


def test_without_core_ids_every_logical_cpu_counts(machine: Path):
    (machine / "cpuinfo").write_text("processor\t: 0\n\nprocessor\t: 1\n")
    assert physical_cores() == 4


def test_the_environment_is_json_and_says_what_cannot_be_read(machine: Path):
    found = read_environment(threads=2)
    assert json.loads(json.dumps(found)) == found
    assert (found["cpu"], found["cores"], found["logical_cpus"], found["threads"]) == ("Imaginary CPU", 2, 4, 2)
    assert found["governor"] is None
    assert "torch" in found["versions"]


def test_the_peak_of_memory_is_in_megabytes():
    assert 20 < (environment.peak_memory_mb() or 21) < 1e6


def test_omp_num_threads_is_honoured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert default_threads() == 3
    for unset in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", unset)
        assert default_threads() == physical_cores()


def arm_core(maker: str, part: str) -> str:
    return f"processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: {maker}\nCPU architecture: 8\nCPU part\t: {part}"


def test_arm_processors_are_told_by_their_board_or_their_cores(machine: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment, "_BOARD", machine / "model")
    (machine / "cpuinfo").write_text("\n\n".join([arm_core("0x41", "0xd0b"), arm_core("0x41", "0xd05")] * 2))
    assert environment.cpu_model() == "ARM cores 0x41/0xd05, 0x41/0xd0b"
    (machine / "cpuinfo").write_text(f"model name\t: ARMv7 Processor rev 4 (v7l)\n{arm_core('0x41', '0xd03')}")
    assert environment.cpu_model() == "ARM cores 0x41/0xd03"  # that name is that of thousands of boards
    (machine / "model").write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    assert environment.cpu_model() == "NVIDIA Jetson AGX Orin Developer Kit"


@pytest.mark.parametrize(
    ("cpuinfo", "processor", "expected"),
    [
        ("model name\t: Imaginary CPU", "", "Imaginary CPU"),
        ("", "Intel64 Family 6 Model 154", "Intel64 Family 6 Model 154"),
        ("", "", None),
        ("", "aarch64", None),  # the name of an architecture tells no processor from another
        ("model name\t: unknown", "", None),
    ],
)
def test_a_processor_without_a_name_is_not_known(
    machine: Path, monkeypatch: pytest.MonkeyPatch, cpuinfo: str, processor: str, expected: str | None
):
    (machine / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(environment.platform, "processor", lambda: processor)
    monkeypatch.setattr(environment.platform, "machine", lambda: "aarch64")
    assert environment.cpu_model() == expected


def test_macos_is_asked_for_the_name_of_the_processor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(environment, "_APPLE_NAME", ("echo", "Apple M3 Pro"))
    assert environment.cpu_model() == "Apple M3 Pro"
    monkeypatch.setattr(environment, "_APPLE_NAME", ("/nowhere/sysctl",))
    assert environment.cpu_model() is None
