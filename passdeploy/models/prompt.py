"""The visual prompt: learned pixels that are added to every image.

Source: Huang et al., PASS (arXiv:2407.17412), section 3; the border is that of Bahng et al., Exploring Visual
Prompts (arXiv:2203.17274). It costs nothing at inference: an exported network contains the sum and takes plain images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

PROMPT_KEY = "passdeploy.prompt"  # beside the network's own tensors, which keep their names


class VisualPrompt(nn.Module):
    """Layer that adds one learned image to every image of a batch.

    Args:
        kind: `padding`, a border of `size` pixels, or `full`, every pixel.
        image_shape: (channels, height, width) of the images.
        size: width of the border in pixels; a border that meets in the middle is the full image.

    Starts at zero, so an untrained prompt changes nothing.
    """

    frame: Tensor  # 1 where the prompt may be, shape (1, 1, height, width)

    def __init__(self, kind: str, image_shape: tuple[int, int, int], size: int) -> None:
        super().__init__()
        self.kind, self.size = kind, size
        self.values = nn.Parameter(torch.zeros(1, *image_shape))  # (1, channels, height, width)
        frame = torch.ones(1, 1, *image_shape[1:])
        if kind == "padding":
            frame[..., size : image_shape[1] - size, size : image_shape[2] - size] = 0
        self.register_buffer("frame", frame, persistent=False)

    def pixels(self) -> Tensor:
        """Return the prompt as an image, shape (1, channels, height, width), zero inside a border."""
        return self.values * self.frame

    def load_pixels_(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Load the prompt's pixels from a run's tensors, and return the tensors without them."""
        with torch.no_grad():
            self.values.copy_(tensors[PROMPT_KEY])
        return {name: tensor for name, tensor in tensors.items() if name != PROMPT_KEY}

    def forward(self, images: Tensor) -> Tensor:
        """Add the prompt to `images`, shape (batch, channels, height, width)."""
        return images + self.pixels()


class Prompted(nn.Module):
    """A network with a visual prompt in front of it."""

    def __init__(self, prompt: VisualPrompt, network: nn.Module) -> None:
        super().__init__()
        self.prompt, self.network = prompt, network

    def forward(self, images: Tensor) -> Any:
        """Run the network on the images with the prompt added."""
        return self.network(self.prompt(images))


def with_prompt(network: nn.Module, prompt: VisualPrompt | None) -> nn.Module:
    """Put `prompt` in front of `network`; with None, return `network` itself."""
    return network if prompt is None else Prompted(prompt, network)


def without_prompt(model: nn.Module) -> nn.Module:
    """Return the network behind a prompt, or `model` itself if it has none."""
    return model.network if isinstance(model, Prompted) else model


def state_with_prompt(model: nn.Module) -> dict[str, Tensor]:
    """Return the network's state dict, plus the pixels of a prompt in front of it under `PROMPT_KEY`."""
    if isinstance(model, Prompted):
        return {**model.network.state_dict(), PROMPT_KEY: model.prompt.pixels().detach()}
    return model.state_dict()
