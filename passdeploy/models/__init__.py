"""Networks: building them by name, loading their weights, copying them, and the visual prompt in front of them."""

from passdeploy.models.build import build_model

__all__ = ["build_model"]
