"""Benchmark of how images reach a training step, against torchvision's `ImageFolder` with a `DataLoader`.

    python -m benchmarks.input_pipeline [--device cuda] [--workers N] [--images N] [--rounds N] [--out FILE]

The images are JPEG files of 640x427 pixels, made on the spot: smooth noise of several scales, about 80 KB each. Both
sides decode every file anew, with the same number of workers, and do the same with it: the shorter side becomes the
image size, the centre is kept; for training it is shifted by up to an eighth, filled up with black, and mirrored at
random.

On the CPU: images per second decoded, batched and normalised (224 pixels, batches of 128), and, as for a GPU, decoded
in processes and batched as uint8.

With `--device cuda`: steps of training through `passdeploy.training.loop.fit`, ResNet-18 at 64 pixels in batches of 64
(fp32) and ResNet-50 at 224 pixels in batches of 128 (bf16), both channels-last. The ideals: the same network and loop
on one batch that stays on the device, and what the cores can decode if nothing is trained. Against them: images
decoded anew in every epoch, images that stay on the GPU once decoded, and batches of `ImageFolder` and `DataLoader`.

All are measured in turns; the table has the best of the rounds. The first epoch of a training is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18, resnet50

from passdeploy.data import feeding
from passdeploy.data.splits import IMAGENET_MEAN, IMAGENET_STD, ImageData, ImageSplit, load_data
from passdeploy.recipe import DataSpec, OptimizerSpec, TrainSpec
from passdeploy.runtime.events import Event, Stage, Step
from passdeploy.runtime.files import write_atomically
from passdeploy.runtime.versions import package_versions
from passdeploy.training.loop import fit

WIDTH, HEIGHT, CLASSES = 640, 427, 10
Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Workload:
    """One training on the GPU."""

    name: str
    network: Callable[..., torch.nn.Module]
    image_size: int
    batch_size: int
    precision: str
    epochs: int  # that are counted


WORKLOADS = (
    Workload("ResNet-18, 64 px, batch 64, fp32", resnet18, 64, 64, "fp32", 4),
    Workload("ResNet-50, 224 px, batch 128, bf16", resnet50, 224, 128, "bf16", 2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: one per core")
    parser.add_argument("--images", type=int, help="default: 1,000 for the CPU, 4,000 for a GPU")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "input_pipeline.json")
    options = parser.parse_args()
    is_gpu = options.device == "cuda"
    images = options.images or (4000 if is_gpu else 1000)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        started = perf_counter()
        write_photographs(root, images, options.workers)
        print(f"{images} files made in {perf_counter() - started:.1f} s, {options.workers} workers", flush=True)
        measure = measure_trainings if is_gpu else measure_batches
        rows = measure(root, options.workers, options.rounds)
    result = {
        "device": torch.cuda.get_device_name() if is_gpu else "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "workers": options.workers,
        "images": images,
        "rounds": options.rounds,
        "versions": package_versions(),
        "rows": rows,
    }
    write_atomically(options.out, json.dumps(result, indent=1) + "\n")
    print(f"\n{result['device']}, {result['cores']} cores, {options.workers} workers")
    for row in rows:
        shares = "".join(f"  {share:5.2f} of {name}" for name, share in row["shares"].items())
        print(f"{row['workload']:36}  {row['batches']:34}  {row['images_per_s']:8.0f} images/s{shares}")


def write_photographs(root: Path, count: int, workers: int) -> None:
    """Write `count` JPEG files for training, and a few for testing, in folders of classes."""
    for part in ("train", "test"):
        for label in range(CLASSES):
            (root / part / str(label)).mkdir(parents=True)
    names = [root / "train" / str(index % CLASSES) / f"{index}.jpg" for index in range(count)]
    names += [root / "test" / str(label) / "0.jpg" for label in range(CLASSES)]
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_write_crops, [names[start::workers] for start in range(workers)], range(workers)))


def _write_crops(paths: Sequence[Path], seed: int) -> None:
    """Write crops of one large canvas of smooth noise."""
    generator = np.random.default_rng(seed)
    width, height = 3 * WIDTH, 3 * HEIGHT
    canvas = np.full((height, width, 3), 120, np.float32)
    for scale, strength in ((160, 60), (40, 30), (10, 18)):
        small = generator.standard_normal((height // scale, width // scale, 3)).astype(np.float32)
        planes = [Image.fromarray(small[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        canvas += strength * np.stack([np.asarray(plane) for plane in planes], axis=-1)
    canvas += 4 * generator.standard_normal(canvas.shape, dtype=np.float32)
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    for path in paths:
        x, y = int(generator.integers(width - WIDTH)), int(generator.integers(height - HEIGHT))
        image.crop((x, y, x + WIDTH, y + HEIGHT)).save(path, quality=90)


def passdeploy_data(root: Path, size: int, workers: int) -> ImageData:
    """Load the images without keeping them in memory."""
    return load_data(DataSpec(name="imagefolder", root=str(root), image_size=size, workers=workers), cache_bytes=0)


class TorchvisionSplit:
    """`ImageFolder` and `DataLoader` behind the interface of our splits."""

    num_classes = CLASSES

    def __init__(self, root: Path, size: int, batch_size: int, workers: int, *, augment: bool, pin: bool) -> None:
        reach = size // 8
        random = [transforms.RandomCrop(size, padding=reach), transforms.RandomHorizontalFlip()] if augment else []
        steps = [transforms.Resize(size), transforms.CenterCrop(size), *random, transforms.ToTensor()]
        normalise = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
        self._images = ImageFolder(str(root / "train"), transforms.Compose([*steps, normalise]))
        self._loader: DataLoader[Any] = DataLoader(
            self._images,
            batch_size=batch_size,
            shuffle=augment,
            num_workers=workers,
            drop_last=augment,
            pin_memory=pin,
            persistent_workers=True,
        )

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, batch_size: int, *, device: torch.device | None = None, **options: Any) -> Batches:
        for images, labels in self._loader:
            if device is not None:
                images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            yield images, labels


class OneBatch:
    """A split that is one batch, again and again, which stays on its device."""

    num_classes = CLASSES

    def __init__(self, split: ImageSplit, batch_size: int, device: torch.device) -> None:
        self._count, self._batch_size = len(split), batch_size
        self._batch = tuple(tensor.to(device) for tensor in next(split.batches(batch_size)))

    def __len__(self) -> int:
        return self._count

    def batches(self, batch_size: int, **options: Any) -> Batches:
        for _ in range(self._count // self._batch_size):
            yield self._batch[0].clone(), self._batch[1]  # a step may change its images


# On the CPU


def measure_batches(root: Path, workers: int, rounds: int, size: int = 224, batch_size: int = 128) -> list[Any]:
    """Measure images per second, decoded and batched."""
    split = passdeploy_data(root, size, workers).train
    assert isinstance(split, ImageSplit)
    plain, random = (
        TorchvisionSplit(root, size, batch_size, workers, augment=augment, pin=False) for augment in (False, True)
    )
    _require_same_work(split, plain)
    reference = "ImageFolder + DataLoader"
    ours: dict[str, Callable[[int], Any]] = {
        "float32, decoded in threads": lambda epoch: split.batches(batch_size),
        "uint8, decoded in processes": lambda epoch: _uint8_batches(split, batch_size),
    }
    trained: dict[str, Callable[[int], Any]] = {
        "float32, decoded in threads": lambda epoch: split.batches(
            batch_size, epoch=epoch, augment=True, drop_last=True
        ),
    }
    rows = _rows_in_turns("as for testing", {reference: lambda epoch: plain.batches(batch_size), **ours}, rounds)
    rows += _rows_in_turns("as for training", {reference: lambda epoch: random.batches(batch_size), **trained}, rounds)
    return rows


def _require_same_work(split: ImageSplit, other: TorchvisionSplit) -> None:
    """Compare the first batches: torchvision resizes before it crops, so that pixels differ a little."""
    (images, labels), (expected, expected_labels) = next(split.batches(128)), next(other.batches(128))
    assert torch.equal(labels, expected_labels)
    difference = (images - expected).abs().mean().item()
    assert difference < 0.1, difference  # about six of 256 levels; other images differ by one


def _uint8_batches(split: ImageSplit, batch_size: int, *, is_pinned: bool = False) -> Iterator[tuple[Tensor, None]]:
    parts = torch.arange(len(split)).split(batch_size)
    return ((pixels, None) for pixels in split._reader.read(parts, in_processes=True, is_pinned=is_pinned))


def _rows_in_turns(workload: str, sources: dict[str, Callable[[int], Any]], rounds: int) -> list[Any]:
    rates: dict[str, list[float]] = {name: [] for name in sources}
    for epoch in range(rounds + 1):  # the first starts the workers and is not counted
        for name, batches in sources.items():
            started = perf_counter()
            images = sum(len(images) for images, _ in batches(epoch))
            rates[name].append(images / (perf_counter() - started))
    best = {name: max(values[1:]) for name, values in rates.items()}
    reference = next(iter(sources))
    return [_row(workload, name, rate, {reference: best[reference]}, rates[name][1:]) for name, rate in best.items()]


def _row(workload: str, batches: str, rate: float, ideals: dict[str, float], rounds: Sequence[float]) -> dict[str, Any]:
    shares = {name: round(rate / ideal, 3) for name, ideal in ideals.items() if name != batches}
    return {
        "workload": workload,
        "batches": batches,
        "images_per_s": round(rate, 1),
        "shares": shares,
        "rounds": [round(value, 1) for value in rounds],
    }


# On a GPU


def measure_trainings(root: Path, workers: int, rounds: int) -> list[Any]:
    """Measure images per second that are trained on."""
    return [row for workload in WORKLOADS for row in _measure_training(workload, root, workers, rounds)]


def _measure_training(workload: Workload, root: Path, workers: int, rounds: int) -> list[Any]:
    device, size, batch_size = torch.device("cuda"), workload.image_size, workload.batch_size
    data = passdeploy_data(root, size, workers)
    split, kept = data.train, passdeploy_data(root, size, workers).train
    assert isinstance(split, ImageSplit)
    loader = TorchvisionSplit(root, size, batch_size, workers, augment=True, pin=True)
    ideal, limit = "one resident batch", "decoding alone"
    sources: dict[str, Any] = {
        ideal: OneBatch(split, batch_size, device),
        "decoded anew": split,
        "kept on the GPU": kept,
        "ImageFolder + DataLoader": loader,
    }
    rates: dict[str, list[float]] = {limit: [], **{name: [] for name in sources}}
    for _ in range(rounds):
        for name, source in sources.items():
            share = feeding.RESIDENT_SHARE if name == "kept on the GPU" else 0.0
            rates[name].append(_trained_images_per_s(workload, replace(data, train=source), share))
        rates[limit].append(_decoded_images_per_s(split, batch_size))
        print("; ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items()), flush=True)
    best = {name: max(values) for name, values in rates.items()}
    ideals = {ideal: best[ideal], limit: best[limit]}
    return [_row(workload.name, name, rate, ideals, rates[name]) for name, rate in best.items()]


def _trained_images_per_s(workload: Workload, data: ImageData, resident_share: float) -> float:
    torch.manual_seed(0)
    network = workload.network(num_classes=CLASSES)
    times: dict[int, float] = {}

    def note(event: Event) -> None:
        if isinstance(event, Step):
            times[event.done] = perf_counter()

    spec = TrainSpec(epochs=1 + workload.epochs, optimizer=OptimizerSpec(lr=0.01), precision=workload.precision)
    share_before, feeding.RESIDENT_SHARE = feeding.RESIDENT_SHARE, resident_share
    try:
        fit(network, data, spec, batch_size=workload.batch_size, seed=0, device="cuda", stage=Stage("train", note))
    finally:
        feeding.RESIDENT_SHARE = share_before
    first = len(data.train) // workload.batch_size  # the last step of an epoch is reported when it is done
    last = first * (1 + workload.epochs)
    return (last - first) * workload.batch_size / (times[last] - times[first])


def _decoded_images_per_s(split: ImageSplit, batch_size: int) -> float:
    started = perf_counter()
    images = sum(len(pixels) for pixels, _ in _uint8_batches(split, batch_size, is_pinned=True))
    return images / (perf_counter() - started)


if __name__ == "__main__":
    main()
