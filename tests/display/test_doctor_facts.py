"""What `passdeploy doctor` prints: what is wrong with a GPU, and lines that end at the width of the terminal."""

from __future__ import annotations

from passdeploy.display.doctor_facts import doctor_facts, gpu_facts

GPU = {
    "device": "cuda:0",
    "name": "Imaginary GPU",
    "memory_mb": 81920,
    "compute_capability": "9.0",
    "driver": "580.65.06",
    "cuda": "13.0",
    "torch_cuda": "13.0",
    "why": "",
}


def test_a_gpu_is_a_line_and_what_is_wrong_with_it_another():
    assert list(gpu_facts([GPU])) == [
        (
            "cuda:0",
            "Imaginary GPU, 80.0 GiB, compute capability 9.0, driver 580.65.06 for CUDA up to 13.0; "
            "PyTorch is built for 13.0",
        )
    ]
    others = [{"pid": 7, "name": None, "memory_mb": None}]
    facts = list(gpu_facts([{**GPU, "driver": None, "why": "It is too old.\nUpdate it.", "other_processes": others}]))
    assert "driver of unknown version" in facts[0][1]
    assert facts[1:] == [("", "It is too old. Update it."), ("", "in use by 1 other process")]
    assert list(gpu_facts([])) == []


def test_long_reasons_go_on_beneath_themselves_and_one_set_of_releases_is_named():
    found = {
        "versions": {"torch": "2.13.1"},
        "gpus": [GPU],
        "starts": {"tensorrt": {"ok": False, "why": "a long reason " * 10, "device": ""}},
        "can": {"export --torch-trt --flavour rtx": {"ok": True, "why": ""}},
        "torch_tensorrt_installed": "none",
        "torch_tensorrt": [{"torch": "2.14", "tensorrt": "11.1"}, {"torch": "2.13", "tensorrt": "11.0"}],
    }
    lines = doctor_facts(found).text(80).splitlines()
    assert max(map(len, lines)) <= 80
    start = next(number for number, line in enumerate(lines) if line.startswith("backend tensorrt"))
    assert lines[start].split()[2:4] == ["no:", "a"]
    assert lines[start + 1].startswith(" " * 34)
    assert lines[start + 1].strip()
    assert [line.split("other")[1].split() for line in lines if "made for each" in line] == [
        ["torch", "2.13,", "tensorrt", "11.0"]
    ]
    assert lines[-1].strip() == "and 1 other set, which --json lists"
