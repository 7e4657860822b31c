"""Recurrent hypernetwork (LSTM): from the visual prompt and weight statistics to one logit per channel.

Source: Huang et al., PASS (arXiv:2407.17412), section 3. The prompt encoder turns the visual prompt into the first
hidden state; one LSTM cell then runs over the layers in the order of the forward pass, so the scores of later layers
depend on those of earlier ones. Here the unit is the channel group instead of the layer.

`mlp` and `conv` are the paper's ablations: no connection between layers, and one between neighbours only. `none` has no
network: one free logit per channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from passdeploy.channels.groups import ChannelGroup


class PromptEncoder(nn.Module):
    """Three convolutions that encode the prompt as one vector."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, hidden, 3, stride=2, padding=1),
        )

    def forward(self, prompt: Tensor) -> Tensor:
        """Encode a prompt (1, channels, height, width) as a state (1, hidden)."""
        return torch.tanh(self.layers(prompt).mean((2, 3)))


class Hypernetwork(nn.Module):
    """Network from the prompt and the statistics of every group's weights to one logit per channel.

    Args:
        statistics: per group one number per channel, shape (width,); its input embedding, fixed.
        prior: per group the logits that the output is added to, shape (width,). The last linear layers start at zero,
            so an untrained hypernetwork returns the prior.
        hidden: width of the hidden state.
        kind: `lstm`, `mlp`, `conv` or `none`.
        prompt_channels: channels of the prompt; None where there is no prompt.
    """

    def __init__(
        self,
        statistics: Sequence[Tensor],
        prior: Sequence[Tensor],
        *,
        hidden: int,
        kind: str = "lstm",
        prompt_channels: int | None = 3,
    ) -> None:
        super().__init__()
        self.kind = kind
        hidden = 1 if kind == "none" else hidden
        self.encoder = PromptEncoder(prompt_channels, hidden) if prompt_channels and kind != "none" else None
        embedded = () if kind == "none" else statistics
        self.embed = nn.ModuleList(nn.Linear(len(values), hidden) for values in embedded)
        self.cell = nn.LSTMCell(hidden, hidden) if kind == "lstm" else None
        self.mix = {"mlp": nn.Linear(hidden, hidden), "conv": nn.Conv1d(hidden, hidden, 3, padding=1)}.get(kind)
        self.heads = nn.ModuleList(nn.Linear(hidden, len(values)) for values in prior)
        for number, (head, logits) in enumerate(zip(self.heads, prior, strict=True)):
            nn.init.zeros_(head.weight)  # type: ignore[arg-type]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]
            self.register_buffer(f"prior{number}", logits)
            self.register_buffer(f"statistics{number}", statistics[number])

    def forward(self, prompt: Tensor | None) -> list[Tensor]:
        """Compute the logits of every group, each (width,), from a prompt (1, channels, height, width)."""
        if self.kind == "none":
            return [head.bias + self.get_buffer(f"prior{number}") for number, head in enumerate(self.heads)]  # type: ignore[operator]
        inputs = [embed(self.get_buffer(f"statistics{i}"))[None] for i, embed in enumerate(self.embed)]  # (1, hidden)
        start = torch.zeros_like(inputs[0]) if self.encoder is None or prompt is None else self.encoder(prompt)
        return [
            head(state)[0] + self.get_buffer(f"prior{number}")
            for number, (head, state) in enumerate(zip(self.heads, self._hidden_states(start, inputs), strict=True))
        ]

    def prior(self) -> list[Tensor]:
        """Return the logits that the output is added to, one tensor (width,) per group."""
        return [self.get_buffer(f"prior{number}") for number in range(len(self.heads))]

    def set_prior_(self, logits: Sequence[Tensor]) -> None:
        """Replace the logits that the output is added to."""
        for old, new in zip(self.prior(), logits, strict=True):
            old.copy_(new)

    def _hidden_states(self, start: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Compute the hidden state at every group, each (1, hidden)."""
        if self.cell is not None:
            hidden, memory, states = start, torch.zeros_like(start), []
            for step in inputs:
                hidden, memory = self.cell(step, (hidden, memory))
                states.append(hidden)
            return states
        sequence = torch.cat(list(inputs)) + start  # (groups, hidden)
        assert self.mix is not None
        mixed = self.mix(sequence) if self.kind == "mlp" else self.mix(sequence.T[None])[0].T
        return list(torch.tanh(mixed).split(1))


def weight_statistics(model: nn.Module, groups: Sequence[ChannelGroup]) -> list[Tensor]:
    """Compute, per group, the standardised log-norm of each channel's filters, shape (width,).

    They are the input of the hypernetwork (PASS, arXiv:2407.17412, section 3: an embedding of weight statistics).
    """
    state = dict(model.named_parameters())
    statistics = []
    for group in groups:
        logs = []
        for slot in group.slots:
            if slot.is_output and slot.tensor in state:
                weight = state[slot.tensor].detach().float()
                norm = weight.movedim(slot.dim, 0).flatten(1).norm(dim=1)[slot.index.to(weight.device)].norm(dim=1)
                logs.append(norm.clamp_min(1e-12).log())
        values = torch.stack(logs).mean(0)
        statistics.append((values - values.mean()) / values.std(unbiased=False).clamp_min(1e-6))
    return statistics
