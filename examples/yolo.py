"""Example of pruning a YOLO in Ultralytics' own trainer, on drawn squares and circles.

    pip install ultralytics   # AGPL-3.0
    python examples/yolo.py

Trained weights come from `YOLO("yolo11n.pt")` instead; the data set is any that Ultralytics reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from ultralytics import YOLO

from passdeploy.trainers.yolo import prune_yolo, slim_trainer

SIZE = 64
NAMES = ("square", "circle")


def write_shapes(folder: Path, count: int, size: int = SIZE) -> Path:
    """Write images with one square or circle each, their labels, and the file that describes both."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            kind, width = int(random.integers(2)), int(random.integers(size // 4, size // 2))
            left, top = (int(place) for place in random.integers(0, size - width, 2))
            image = Image.fromarray(random.integers(0, 80, (size, size, 3), dtype=np.uint8))
            draw = ImageDraw.Draw(image)
            shape = draw.ellipse if kind else draw.rectangle
            shape((left, top, left + width, top + width), fill=(220, 220, 40) if kind else (40, 220, 220))
            image.save(folder / "images" / split / f"{number}.png")
            box = ((left + width / 2) / size, (top + width / 2) / size, width / size, width / size)
            (folder / "labels" / split / f"{number}.txt").write_text(" ".join(map(str, (kind, *box))) + "\n")
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(NAMES))
    text = f"path: {folder.absolute()}\ntrain: images/train\nval: images/val\nnames:\n{names}"
    (folder / "shapes.yaml").write_text(text)
    return folder / "shapes.yaml"


def main() -> None:
    """Train a YOLO, prune it to half of its multiply-adds, train the slim one, and use it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="yolo11n.yaml", help="configuration or weights")
    parser.add_argument("--images", type=int, default=128, help="of training, and as many of validation")
    parser.add_argument("--epochs", type=int, default=10, help="of the dense and of the slim network")
    parser.add_argument("--steps", type=int, default=40, help="of mask learning")
    options = parser.parse_args()
    data = str(write_shapes(Path("shapes"), options.images))
    common = {"imgsz": SIZE, "batch": 16, "workers": 0, "plots": False, "project": "runs-yolo", "exist_ok": True}

    yolo = YOLO(options.model)
    yolo.train(data=data, epochs=options.epochs, name="dense", **common)
    dense = yolo.val(data=data, name="val-dense", **common).box.map50

    train = {"epochs": options.epochs, "name": "slim", **common}
    result = prune_yolo(yolo, data, target={"macs": 0.5}, train=train, steps=options.steps)
    slim = yolo.val(data=data, name="val-slim", **common).box.map50
    boxes = yolo.predict("shapes/images/val/0.png", imgsz=SIZE, verbose=False)[0].boxes

    yolo.save("slim-yolo.pt")  # a checkpoint of Ultralytics, which YOLO(...) loads
    again = YOLO("slim-yolo.pt")
    again.train(trainer=slim_trainer(again), data=data, epochs=1, name="again", **common)
    exported = again.export(format="onnx", imgsz=SIZE)
    print(result)
    print(f"mAP50: dense {dense:.1%}, slim {slim:.1%}; {len(boxes)} boxes on the first image; exported {exported}")


if __name__ == "__main__":
    main()
