"""Pictures of the learned prompt: a test image, the prompt alone, and the image as the network sees it."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from passdeploy.errors import percent
from passdeploy.report.run_facts import RunFacts

_LOSSLESS_UP_TO = 96  # pixels; larger pictures are JPEG, so that a report stays small
_SHOWN = 192  # pixels; smaller pictures are enlarged without smoothing by the browser


@dataclass(frozen=True)
class Picture:
    """An image inside the page."""

    source: str  # a data: address
    caption: str
    is_small: bool  # enlarge it without smoothing, so that pixels stay pixels


def prompt_pictures(facts: RunFacts) -> list[Picture]:
    """Return the sample, the prompt, and both together; none where the run has no prompt or no sample."""
    sample = facts.sample
    if facts.prompt is None or sample is None:
        return []
    with Image.open(BytesIO(sample)) as image:
        pixels = np.asarray(image.convert("RGB"), np.float32) / 255  # (height, width, 3)
    std = np.asarray(facts.plan["std"], np.float32)
    prompt = (facts.prompt.transpose(1, 2, 0) * std).astype(np.float32)  # in units of pixels
    if prompt.shape != pixels.shape:
        return []
    largest = float(np.abs(prompt).max()) or 1.0
    return [
        _picture(pixels, "a test image"),
        _picture(0.5 + prompt / (2 * largest), f"the prompt; its largest value is {percent(largest)} of white"),
        _picture(pixels + prompt, "what the network sees: their sum"),
    ]


def encode_sample(pixels: NDArray[np.floating[Any]]) -> bytes:
    """Encode an image of pixels in [0, 1], shape (height, width, 3), as PNG."""
    stream = BytesIO()
    _to_image(pixels).save(stream, "PNG")
    return stream.getvalue()


def _picture(pixels: NDArray[np.floating[Any]], caption: str) -> Picture:
    image, stream = _to_image(pixels), BytesIO()
    is_small = max(image.size) <= _LOSSLESS_UP_TO
    if max(image.size) > 2 * _SHOWN:
        image.thumbnail((2 * _SHOWN, 2 * _SHOWN))
    image.save(stream, "PNG" if is_small else "JPEG", quality=85)
    kind = "png" if is_small else "jpeg"
    return Picture(f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}", caption, is_small)


def _to_image(pixels: NDArray[np.floating[Any]]) -> Image.Image:
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
