"""Batches for a GPU, made on the CPU: the bits of those of the host, ahead of use, with errors where they belong."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from passdeploy.data import decoding_threads, feeding, splits
from passdeploy.data.augmentation import change_on_device, change_on_host, changes_from
from passdeploy.data.decoding_processes import DecodingProcesses, borrowed_processes, close_idle_processes
from passdeploy.data.decoding_threads import HangError
from passdeploy.data.feeding import DeviceFeed, ahead
from passdeploy.data.images import Augmentation, Frame, ImageSource, Pixels, decode_file
from passdeploy.data.reading import PixelReader
from passdeploy.data.splits import ImageData, load_data
from passdeploy.errors import DataError, MissingError
from passdeploy.recipe import DataSpec
from tests.device_reads import DeviceReads

DEVICE = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write two classes, each with ten photographs of 40x30 for training and two for testing."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 2)):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{index}.jpg")
    return tmp_path


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Feed the CPU as if it were a GPU, and end the decoding processes afterwards."""
    monkeypatch.setattr(splits, "is_fed", lambda device: True)
    yield
    close_idle_processes()


def images_in(root: Path, *, is_cached: bool = False) -> ImageData:
    spec = DataSpec(name="imagefolder", root=str(root), image_size=16, workers=2)
    return load_data(spec, cache_bytes=10**9 if is_cached else 0)


def require_same(one: Iterator[tuple[Tensor, Tensor]], other: Iterator[tuple[Tensor, Tensor]]) -> None:
    for (images, labels), (expected, expected_labels) in zip(one, other, strict=True):
        assert torch.equal(images, expected)
        assert images.stride() == expected.stride()  # the order in memory decides how a convolution rounds
        assert torch.equal(labels, expected_labels)
        assert len(labels)


@pytest.mark.parametrize("is_resident", [True, False])
@pytest.mark.parametrize("is_cached", [True, False])
def test_batches_for_a_device_have_the_bits_of_the_host(
    folder: Path, fed: None, monkeypatch: pytest.MonkeyPatch, is_cached: bool, is_resident: bool
):
    monkeypatch.setattr(DeviceFeed, "_fits", lambda self: is_resident)
    for split in (images_in(folder, is_cached=is_cached).train, images_in(folder, is_cached=is_cached).test):
        for epoch in (0, 1, 2):
            options = {"epoch": epoch, "seed": 3, "augment": True, "drop_last": True}
            require_same(split.batches(3, **options, device=DEVICE), split.batches(3, **options))
        require_same(split.batches(3, device=DEVICE), split.batches(3))
        parts = [{"epoch": 5, "augment": True, "part": (part, 2)} for part in (0, 1)]
        for options in parts:
            require_same(split.batches(4, **options, device=DEVICE), split.batches(4, **options))


@pytest.mark.parametrize("policy", [Augmentation(), Augmentation(shift=False), Augmentation(flip=False)])
def test_a_gather_shifts_and_flips_as_slices_do(policy: Augmentation):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 3, 17, 17), dtype=torch.uint8, generator=generator)
    changes = changes_from(torch.rand(40, 3, generator=generator), policy, 17)
    changed = change_on_host(images, changes)
    assert torch.equal(change_on_device(images, changes), changed)
    assert not torch.equal(changed, images)
    assert changes[:, :2].unique().tolist() == ([0, 1, 2, 3, 4] if policy.shift else [2])
    assert changes[:, 2].unique().tolist() == ([0, 1] if policy.flip else [0])


def test_images_that_stay_on_the_device_are_decoded_once(folder: Path, fed: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DeviceFeed, "_fits", lambda self: True)
    whole, partly = (images_in(folder).train for _ in range(2))
    expected = [*whole.batches(6, epoch=1)]
    assert len([*whole.batches(6, epoch=0, device=DEVICE)]) == 4
    assert len([*partly.batches(6, epoch=0, drop_last=True, device=DEVICE)]) == 3  # 18 of 20 images
    for path in folder.glob("train/*/*.jpg"):
        path.write_bytes(b"gone")
    threads = threading.active_count()
    batches = whole.batches(6, epoch=1, device=DEVICE)
    require_same(iter([next(batches)]), iter(expected[:1]))
    assert threading.active_count() == threads  # nothing is left to do ahead
    require_same(batches, iter(expected[1:]))
    with pytest.raises(DataError, match=r"\.jpg cannot be read"):
        [*partly.batches(6, epoch=1, device=DEVICE)]


@pytest.mark.parametrize("is_resident", [True, False])
def test_changing_and_normalising_reads_nothing_from_the_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch, is_resident: bool
):
    monkeypatch.setattr(DeviceFeed, "_fits", lambda self: is_resident)
    reads = DeviceReads([])
    monkeypatch.setattr(feeding, "to_device", lambda tensor, device: reads.put_on_device(tensor.clone()))
    split = images_in(folder, is_cached=True).train
    plans = split._plans(torch.arange(20), 5, (0, 1), split._draw_changes(20, 0, 0))  # type: ignore[attr-defined]
    with reads:
        batches = [*DeviceFeed(split._reader, DEVICE)._made(plans, None)]  # type: ignore[attr-defined]
        assert all(reads.is_on_device(images) and reads.is_on_device(labels) for images, labels in batches)
    assert len(batches) == 4
    assert reads.reads == []


def test_a_damaged_file_is_named_whoever_decodes_it(folder: Path, fed: None):
    split = images_in(folder).train
    (folder / "train" / "bee" / "7.jpg").write_bytes(b"overwritten")
    with pytest.raises(
        DataError, match=r"bee/7\.jpg cannot be read as an image: Pillow knows no format like it"
    ) as caught:
        [*split.batches(5, device=DEVICE)]
    assert str(caught.value).count("\n") == 1


def test_a_walk_that_is_left_early_ends_its_thread(folder: Path, fed: None):
    before = threading.active_count()
    batches = images_in(folder).train.batches(2, device=DEVICE)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_items_are_made_ahead_but_not_further_than_asked():
    made, enough = [], threading.Event()

    def items() -> Generator[int, None, None]:
        for number in range(9):
            made.append(number)
            if number == 3:
                enough.set()
            yield number

    walk = ahead(items(), 2)
    assert next(walk) == 0
    assert enough.wait(10)  # 1 and 2 are ready, 3 waits for a place
    assert made == [0, 1, 2, 3]
    assert [*walk] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_an_error_comes_after_the_items_before_it():
    def items() -> Generator[int, None, None]:
        yield 1
        raise KeyError("two")

    walk = ahead(items(), 5)
    assert next(walk) == 1
    with pytest.raises(KeyError, match="two"):
        next(walk)


def test_processes_decode_every_batch_to_its_own_place(folder: Path):
    paths = sorted(folder.glob("train/*/*.jpg"))
    batches = [paths[:7], paths[7:9], [], paths[9:]]
    with borrowed_processes(3, 11 * 3 * 16 * 16, 2) as processes:
        for index, batch in enumerate(batches):
            processes.submit(batch, Frame(16))
            if index:
                _require_decoded(processes, batches[index - 1])
        _require_decoded(processes, batches[-1])
    with borrowed_processes(3, 10, 2) as again:
        assert again is processes
    with borrowed_processes(3, 10**6, 2) as larger:
        assert larger is not processes
    close_idle_processes()


def _require_decoded(processes: DecodingProcesses, paths: list[Path]) -> None:
    flat, reasons = processes.collect()
    assert not reasons
    pixels = flat.view(-1, 3, 16, 16).numpy()
    assert len(pixels) == len(paths)
    assert all(np.array_equal(image, decode_file(path, Frame(16))) for image, path in zip(pixels, paths, strict=True))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_of_processes_leaves_the_images_that_a_step_still_needs(
    number: signal.Signals, folder: Path
):
    paths = sorted(folder.glob("train/*/*.jpg"))
    processes = DecodingProcesses(2, 20 * 3 * 16 * 16, 2)
    processes.submit(paths, Frame(16))
    _require_decoded(processes, paths)  # they have started
    for process in processes._processes:
        process.send_signal(number)
    processes.submit(paths, Frame(16))
    _require_decoded(processes, paths)
    processes.close()


def test_a_decoding_process_that_is_killed_is_an_error_that_says_what_to_do(folder: Path):
    paths = sorted(folder.glob("train/*/*.jpg"))
    processes = DecodingProcesses(2, 20 * 3 * 16 * 16, 2)
    os.kill(processes._processes[1].pid, signal.SIGKILL)
    processes._processes[1].wait()
    with pytest.raises(MissingError, match=r"ended with status -9[^\n]*\nSet data\.workers to a smaller number"):
        processes.submit(paths, Frame(16))
    processes.close()


def test_a_process_that_hangs_is_an_error_that_names_its_file(folder: Path, monkeypatch: pytest.MonkeyPatch):
    paths, memory = sorted(folder.glob("train/*/*.jpg")), 21 * 3 * 16 * 16
    os.mkfifo(pipe := folder / "train" / "ant" / "pipe.jpg")  # nobody writes to it: to open it waits for ever
    with borrowed_processes(2, memory, 2) as processes:
        processes.submit(paths, Frame(16))
        _require_decoded(processes, paths)  # they have started
        processes.submit([*paths, pipe], Frame(16))
        with monkeypatch.context() as shorter:
            shorter.setattr(decoding_threads, "HANG_S", 0.5)
            with pytest.raises(HangError, match=rf"has been at {pipe} for more than .*\nCan this file be read"):
                processes.collect()
    assert all(process.returncode is not None for process in processes._processes)
    with borrowed_processes(2, memory, 2) as others:  # the lost ones are not lent again
        others.submit(paths, Frame(16))
        _require_decoded(others, paths)
    close_idle_processes()


def test_a_thread_that_hangs_is_an_error_that_names_its_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoding_threads, "HANG_S", 0.1)
    end = threading.Event()
    source = ImageSource(lambda index: np.zeros((3, 8, 8), np.uint8), (0,) * 4, tuple("abcd"))
    began = monotonic()
    with pytest.raises(HangError, match="has been at c for more than"):
        _read_all(source, lambda index: end.wait() if index == 2 else None)
    assert monotonic() - began < 2  # it is left behind
    end.set()


def test_slow_images_are_no_hang(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoding_threads, "HANG_S", 0.05)
    source = ImageSource(lambda index: np.zeros((3, 8, 8), np.uint8), (0,) * 8)
    assert len(_read_all(source, lambda index: sleep(0.04))) == 8


def _read_all(source: ImageSource, before: Callable[[int], object]) -> list[Tensor]:
    def decode(index: int) -> Pixels:
        before(index)
        return source.decode(index)

    slowed = replace(source, decode=decode)
    reader = PixelReader(slowed, image_size=8, workers=2, is_cached=False)
    return [image for batch in reader.read([torch.arange(len(source.labels))]) for image in batch]
