"""Attention layers: heads may be removed, unless somebody uses the attention weights that the layer also returns."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import passdeploy as pd


class Attending(nn.Module):
    """A patch embedding, a self-attention and a classifier; `use` says what becomes of the attention weights."""

    def __init__(self, use: str, **options: bool) -> None:
        super().__init__()
        self.use, self.options = use, options
        self.embedding, self.norm, self.head = nn.Conv2d(3, 32, 4, 4), nn.LayerNorm(32), nn.Linear(32, 5)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, images: Tensor) -> object:
        tokens = self.embedding(images).flatten(2).transpose(1, 2)
        attended, weights = self.attention(tokens, tokens, tokens, **self.options)
        logits = self.head(self.norm(tokens + attended).mean(1))
        if self.use == "returned":
            return logits, weights
        if self.use == "computed with":
            return logits + weights.flatten(1).sum(1, keepdim=True)
        if self.use == "read":
            return logits * len(weights.tolist())
        return logits


@pytest.mark.parametrize("options", [{}, {"need_weights": False}, {"average_attn_weights": False}], ids=str)
def test_heads_are_removed_however_attention_is_called(options):
    model = Attending("unused", **options).eval()
    groups = pd.find_groups(model, torch.rand(1, 3, 16, 16))
    assert [(group.name, group.width) for group in groups if group.is_prunable] == [("embedding", 4)]
    plan, images = pd.Plan({"embedding": (0, 2)}), torch.rand(3, 3, 16, 16)
    assert_close(pd.slim(model, groups, plan)(images), pd.masked(model, groups, plan)(images))


@pytest.mark.parametrize("use", ["returned", "computed with", "read"])
@pytest.mark.parametrize("options", [{}, {"average_attn_weights": False}], ids=str)
def test_heads_stay_where_attention_weights_are_used(use, options):
    groups = pd.find_groups(Attending(use, **options).eval(), torch.rand(1, 3, 16, 16))
    assert not any(group.is_prunable for group in groups)  # the stream is as wide as all heads together


def test_decoders_lose_heads_of_both_attentions():
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 5)
            self.queries = nn.Parameter(torch.randn(6, 1, 32))
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64), 1)

        def forward(self, images: Tensor) -> Tensor:
            memory = self.embedding(images).flatten(2).permute(2, 0, 1)
            return self.head(self.decoder(self.queries.expand(-1, memory.shape[1], -1), memory))

    model = Detector().eval()
    groups = pd.find_groups(model, torch.rand(1, 3, 16, 16))
    assert {group.name: group.width for group in groups if group.is_prunable} == {
        "embedding": 4,
        "decoder.layers.0.linear1": 64,
    }
    plan, images = pd.Plan({"embedding": (1, 2, 3), "decoder.layers.0.linear1": (5, 9)}), torch.rand(2, 3, 16, 16)
    assert_close(pd.slim(model, groups, plan)(images), pd.masked(model, groups, plan)(images))


class Grouped(nn.Module):
    """Grouped-query attention: two heads of keys and values serve six heads of queries."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width, self.embedding, self.head = 8, nn.Conv2d(3, 12, 4, 4), nn.Linear(48, 5)
        self.queries, self.keys, self.values = nn.Linear(12, 48), nn.Linear(12, 16), nn.Linear(12, 16)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embedding(images).flatten(2).transpose(1, 2)
        queries, keys, values = (
            layer(tokens).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for layer in (self.queries, self.keys, self.values)
        )
        attended = F.scaled_dot_product_attention(queries, keys, values, enable_gqa=True)
        return self.head(attended.transpose(1, 2).flatten(2).mean(1))


def test_a_head_of_keys_goes_with_all_heads_of_queries_that_it_serves():
    model, images = Grouped().eval(), torch.rand(3, 3, 16, 16)
    groups = pd.find_groups(model, images[:1])
    assert {group.name: group.width for group in groups if group.is_prunable} == {"embedding": 12, "queries": 2}
    plan = pd.Plan({"queries": (1,)})
    smaller = pd.slim(model, groups, plan)
    assert (smaller.queries.out_features, smaller.keys.out_features, smaller.head.in_features) == (24, 8, 24)
    assert pd.verify(model, groups, plan, images, tolerance=1e-5) <= 1e-5
