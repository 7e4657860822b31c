"""Small networks that add position embeddings without weights to their stream, in the ways of DETR and VideoMAE."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sines(positions: Tensor, channels: int, temperature: float = 100.0) -> Tensor:
    """Compute sines and cosines of several wavelengths; shape (*positions.shape, channels)."""
    waves = temperature ** (2 * torch.arange(channels // 2, device=positions.device) / channels)
    angles = positions[..., None] / waves.to(positions.dtype)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


class SinePositions(nn.Module):
    """DETR's position embedding: half of the channels for rows, half for columns; it has no weights."""

    def __init__(self, channels: int, scale: float = 2 * math.pi) -> None:
        super().__init__()
        self.half, self.scale = channels // 2, scale

    def forward(self, shape: torch.Size, like: Tensor) -> Tensor:
        batch, _, height, width = shape
        rows, columns = (
            sines(torch.arange(1, size + 1, device=like.device).to(like.dtype) / size * self.scale, self.half)
            for size in (height, width)
        )
        both = [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)]
        return torch.cat(both, -1).permute(2, 0, 1).expand(batch, -1, -1, -1)


class Attention(nn.Module):
    """Attention with layers of its own for queries, keys and values."""

    def __init__(self, channels: int, heads: int, width: int = 6) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.queries, self.keys, self.values = (nn.Linear(channels, heads * width) for _ in range(3))
        self.out = nn.Linear(heads * width, channels)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        split = [
            layer(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for layer, x in ((self.queries, queries), (self.keys, keys), (self.values, values))
        ]
        return self.out(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """A layer of DETR's encoder: positions are added to queries and keys, not to values."""

    def __init__(self, channels: int, heads: int = 2) -> None:
        super().__init__()
        self.attention = Attention(channels, heads)
        self.first, self.second = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 24), nn.ReLU(), nn.Linear(24, channels))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        queries = keys = x + positions
        x = self.first(x + self.attention(queries, keys, x))
        return self.second(x + self.mlp(x))


class TinyDetr(nn.Module):
    """A backbone, a projection to the width of the encoder, and layers of it.

    Args:
        positions: makes the position embedding of so many channels.
    """

    def __init__(
        self, channels: int = 16, positions: Callable[[int], nn.Module] = SinePositions, layers: int = 1
    ) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        self.projection = nn.Conv2d(12, channels, 1)
        self.positions = positions(channels)
        self.layers = nn.ModuleList(EncoderLayer(channels) for _ in range(layers))
        self.head = nn.Linear(channels, 5)

    def embedding(self, features: Tensor) -> Tensor:
        return self.positions(features.shape, features)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        positions = self.embedding(features).flatten(2).transpose(1, 2)
        x = self.projection(features).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, positions)
        return self.head(x.mean(1))


class PlainTable(nn.Module):
    """VideoMAE's embedding: a table that is an attribute, neither a parameter nor a buffer, is added to patches."""

    def __init__(self, channels: int = 16, size: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, 4, 4)
        self.table = sines(torch.arange((size // 4) ** 2).float(), channels)[None]
        self.layers = nn.ModuleList(EncoderLayer(channels) for _ in range(1))
        self.head = nn.Linear(channels, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = x + self.table.detach().type_as(x).to(x.device)
        for layer in self.layers:
            x = layer(x, torch.zeros_like(x))
        return self.head(x.mean(1))


class Unprojected(nn.Module):
    """Attention of a stream with itself, without weights for queries and keys: what is masked has to be zero."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.projection, self.positions = nn.Conv2d(3, channels, 4, 4), SinePositions(channels)
        self.head = nn.Linear(channels, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.projection(images)
        x = (features + self.positions(features.shape, features)).flatten(2).transpose(1, 2)
        x = torch.matmul(torch.softmax(torch.matmul(x, x.transpose(1, 2)) / 8, -1), x)
        return self.head(x.mean(1))
