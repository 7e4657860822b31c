"""Recurrent hypernetwork (LSTM): from the visual prompt and weight statistics to one logit per channel.

Source: Huang et al., PASS (arXiv:2407.17412), section 3. The prompt encoder turns the visual prompt into the first
hidden state; one LSTM then runs over the layers in the order of the forward pass, so the scores of later layers depend
on those of earlier ones. Here the unit is the channel group instead of the layer. The linear layers at its ends, one a
group, are computed together: their rows are joined, channel after channel.

`mlp` and `conv` are the paper's ablations: no connection between layers, and one between neighbours only. `none` has no
network: one free logit per channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from passdeploy.channels.blocks import Block
from passdeploy.channels.groups import ChannelGroup
from passdeploy.models.cloning import named_state
from passdeploy.sparsity.mask import producing_slots


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
        prior: the logits that the output is added to, shape (channels of all groups,). The last linear layers start
            at zero, so an untrained hypernetwork returns the prior.
        hidden: width of the hidden state.
        kind: `lstm`, `mlp`, `conv` or `none`.
        prompt_channels: channels of the prompt; None where there is no prompt.
    """

    prior: Tensor
    statistics: Tensor  # (channels,)
    widths: Tensor  # (groups,)
    member: Tensor  # (channels, groups): 1 where a channel belongs to the group

    def __init__(
        self,
        statistics: Sequence[Tensor],
        prior: Tensor,
        *,
        hidden: int,
        kind: str = "lstm",
        prompt_channels: int | None = 3,
    ) -> None:
        super().__init__()
        self.kind = kind
        widths = torch.tensor([len(values) for values in statistics])
        member = torch.repeat_interleave(torch.eye(len(widths)), widths, dim=0)
        self.encoder = PromptEncoder(prompt_channels, hidden) if prompt_channels and kind != "none" else None
        if kind != "none":
            embed = [nn.Linear(len(values), hidden) for values in statistics]
            self.embed_weight = nn.Parameter(torch.cat([layer.weight.detach().T for layer in embed]))  # as `member`
            self.embed_bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in embed]))  # (groups, hidden)
            self.head_weight = nn.Parameter(torch.zeros(len(prior), hidden))
        self.lstm = nn.LSTM(hidden, hidden) if kind == "lstm" else None
        self.mix = {"mlp": nn.Linear(hidden, hidden), "conv": nn.Conv1d(hidden, hidden, 3, padding=1)}.get(kind)
        self.head_bias = nn.Parameter(torch.zeros(len(prior)))
        self.register_buffer("prior", prior)
        self.register_buffer("statistics", torch.cat(list(statistics)))
        self.register_buffer("widths", widths)
        self.register_buffer("member", member, persistent=False)

    def forward(self, prompt: Tensor | None) -> Tensor:
        """Compute the logits of all channels, (channels,), from a prompt (1, channels, height, width)."""
        if self.kind == "none":
            return self.head_bias + self.prior
        embedded = self.member.T @ (self.embed_weight * self.statistics[:, None]) + self.embed_bias  # (groups, hidden)
        start = torch.zeros_like(embedded[:1]) if self.encoder is None or prompt is None else self.encoder(prompt)
        states = self._hidden_states(start, embedded)  # (groups, hidden)
        # A product and not an index: the gradient of an index is a sum by atomics on a GPU.
        return (self.head_weight * (self.member @ states)).sum(1) + self.head_bias + self.prior

    def set_prior_(self, logits: Tensor) -> None:
        """Replace the logits that the output is added to."""
        self.prior.copy_(logits)

    def _hidden_states(self, start: Tensor, inputs: Tensor) -> Tensor:
        """Compute the hidden state at every group, (groups, hidden), from the inputs in this shape."""
        if self.lstm is not None:
            states: Tensor = self.lstm(inputs[:, None], (start[None], torch.zeros_like(start)[None]))[0]
            return states[:, 0]
        sequence = inputs + start
        assert self.mix is not None
        return torch.tanh(self.mix(sequence) if self.kind == "mlp" else self.mix(sequence.T[None])[0].T)


def joined_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state of a hypernetwork as it was saved layer by layer, once; any other is returned as it is."""
    if "prior0" not in tensors:
        return dict(tensors)
    count = sum(name.startswith("prior") for name in tensors)

    def of_each(name: str) -> list[Tensor]:
        return [tensors[name.format(number)] for number in range(count)]

    state = {name: values for name, values in tensors.items() if name.startswith(("encoder.", "mix."))}
    state |= {f"lstm.{name[5:]}_l0": values for name, values in tensors.items() if name.startswith("cell.")}
    if "embed.0.weight" in tensors:
        state["embed_weight"] = torch.cat([weight.T for weight in of_each("embed.{}.weight")])
        state["embed_bias"] = torch.stack(of_each("embed.{}.bias"))
        state["head_weight"] = torch.cat(of_each("heads.{}.weight"))
    state["head_bias"], state["prior"] = torch.cat(of_each("heads.{}.bias")), torch.cat(of_each("prior{}"))
    state["widths"] = torch.tensor([len(prior) for prior in of_each("prior{}")])
    return state


def weight_statistics(model: nn.Module, groups: Sequence[ChannelGroup], blocks: Sequence[Block] = ()) -> list[Tensor]:
    """Compute, per group, the standardised log-norm of each channel's filters, shape (width,).

    For each block follows the log-norm of its weights, standardised over all blocks, shape (1,).

    They are the input of the hypernetwork (PASS, arXiv:2407.17412, section 3: an embedding of weight statistics).
    """
    state = dict(named_state(model))
    statistics = []
    for group in groups:
        logs = []
        for slot in producing_slots(group, state):
            weight = state[slot.tensor].detach().float()
            norm = weight.movedim(slot.dim, 0).flatten(1).norm(dim=1)[slot.index.to(weight.device)].norm(dim=1)
            logs.append(norm.clamp_min(1e-12).log())
        statistics.append(_standardised(torch.stack(logs).mean(0)))
    norms = [
        torch.stack([state[name].detach().float().norm() for name in block.tensors if name in state]).norm()
        for block in blocks
    ]
    of_blocks = _standardised(torch.stack(norms).clamp_min(1e-12).log()).split(1) if norms else ()
    return [*statistics, *of_blocks]


def _standardised(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std(unbiased=False).clamp_min(1e-6)
