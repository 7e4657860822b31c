"""Import the packages of the guest networks, those that are installed: once for all processes of `guests.py`."""

from contextlib import suppress
from importlib import import_module

for _package in ("ultralytics.nn.tasks", "transformers.modeling_utils", "segmentation_models_pytorch", "rfdetr"):
    with suppress(ImportError):
        import_module(_package)
