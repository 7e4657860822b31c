"""Tests of the adapter to Ultralytics, with the real package where it is installed; it is never imported otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import passdeploy
from passdeploy.errors import UsageError
from passdeploy.trainers.yolo import prune_yolo, slim_trainer, take_slim_

EXAMPLE = Path(__file__).parents[2] / "examples" / "yolo.py"


def test_something_else_than_a_yolo_is_refused():
    for wrong in (nn.Conv2d(3, 3, 1), "yolo11n.pt"):
        with pytest.raises(UsageError, match="asked for the network of a YOLO, found"):
            prune_yolo(wrong, "coco8.yaml")
        with pytest.raises(UsageError, match="asked for the network of a YOLO"):
            slim_trainer(wrong)
        with pytest.raises(UsageError, match="asked for the network of a YOLO"):
            take_slim_(wrong, nn.Conv2d(3, 3, 1))


def test_no_module_imports_the_package_without_a_model_of_its():
    for file in Path(passdeploy.__file__).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "import ultralytics" not in text, file
        assert "from ultralytics" not in text, file


REAL = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from yolo import write_shapes
from ultralytics import YOLO
import passdeploy as pd
from passdeploy.errors import UsageError
from passdeploy.trainers.yolo import OUTPUTS, prune_yolo, slim_trainer, take_slim_

def parameters(network):
    return sum(one.numel() for one in network.parameters())

data = str(write_shapes(Path("shapes"), 8))
common = dict(imgsz=64, batch=8, workers=0, plots=False, device="cpu", project="runs", exist_ok=True, verbose=False)
yolo = YOLO("yolo11n.yaml")
yolo.train(data=data, epochs=1, name="dense", **common)
dense = yolo.model
neck = [f"model.{number}" for number in (13, 16, 19, 22)]
before = parameters(dense)
result = prune_yolo(yolo, data, target={"params": 0.5}, steps=2, train=dict(epochs=1, name="slim", **common))
assert result.after.params <= 0.5 * result.before.params, result
assert parameters(yolo.model) == result.after.params
cut = {name for name in neck
       if yolo.model.get_submodule(name).cv2.conv.out_channels
       < dense.get_submodule(name).cv2.conv.out_channels}
assert cut, "features of the neck are cut as well"
print("trained")

image = "shapes/images/val/0.png"
assert yolo.val(data=data, name="val", **common).box.map50 >= 0
found = yolo.predict(image, imgsz=64, conf=1e-4, verbose=False)[0].boxes.data
yolo.save("slim.pt")
again = YOLO("slim.pt")
assert parameters(again.model) == result.after.params
torch.testing.assert_close(again.predict(image, imgsz=64, conf=1e-4, verbose=False)[0].boxes.data, found)
print("loaded")

again.train(trainer=slim_trainer(again), data=data, epochs=1, name="again", **common)
assert parameters(again.model) == result.after.params
rebuilt = pd.rebuild(dense.float().eval(), result.save("slim.safetensors"))
other = YOLO("yolo11n.yaml")
take_slim_(other, rebuilt)
seen = other.predict(image, imgsz=64, conf=1e-4, verbose=False)[0].boxes.data
torch.testing.assert_close(seen, found, rtol=1e-3, atol=1e-2)
other.train(trainer=slim_trainer(other), data=data, epochs=1, name="rebuilt", **common)
assert parameters(other.model) == result.after.params
print("rebuilt")

exported = YOLO(other.export(format="onnx", imgsz=64), task="detect")
one, two = (each.predict(image, imgsz=64, conf=1e-4, verbose=False)[0].boxes.data for each in (other, exported))
torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-2)
print("exported")

text = Path(data).read_text().replace("  1: circle", "  1: circle\\n  2: star")
Path("three.yaml").write_text(text)
try:
    other.train(trainer=slim_trainer(other), data="three.yaml", epochs=1, name="three", **common)
except UsageError as error:
    assert "has 3 classes, and the slim network was made for 2" in str(error)
    print("refused")
"""


def test_ultralytics_trains_validates_saves_and_exports_the_slim_network(tmp_path: Path):
    pytest.importorskip("ultralytics")
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(EXAMPLE.parent)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr + done.stdout[-2000:]
    said = [word for word in ("trained", "loaded", "rebuilt", "exported", "refused") if f"\n{word}\n" in done.stdout]
    assert said == ["trained", "loaded", "rebuilt", "exported", "refused"]
