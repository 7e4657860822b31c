from __future__ import annotations

from passdeploy.display.gpus import gpu_lines

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
    assert gpu_lines([GPU]) == [
        "cuda:0                       Imaginary GPU, 80.0 GiB, compute capability 9.0, driver 580.65.06 for CUDA up to "
        "13.0; PyTorch is built for 13.0"
    ]
    others = [{"pid": 7, "name": None, "memory_mb": None}]
    lines = gpu_lines([{**GPU, "driver": None, "why": "It is too old.\nUpdate it.", "other_processes": others}])
    assert "driver of unknown version" in lines[0]
    assert [line.strip() for line in lines[1:]] == ["It is too old. Update it.", "in use by 1 other process"]
    assert gpu_lines([]) == []
