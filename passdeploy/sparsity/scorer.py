"""The scorer of channels, a visual prompt and a hypernetwork: made untrained, or with the tensors of a trained one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from passdeploy.channels.blocks import Block
from passdeploy.channels.groups import ChannelGroup
from passdeploy.errors import RunError, UsageError
from passdeploy.models.prompt import VisualPrompt
from passdeploy.runtime.seeds import seeded_global_generators
from passdeploy.sparsity.hypernet import Hypernetwork, joined_state, weight_statistics
from passdeploy.sparsity.importance import TaylorImportance
from passdeploy.sparsity.settings import PassSettings


def make_scorer(
    statistics: Sequence[Tensor], importance: TaylorImportance, images: Tensor | None, settings: PassSettings
) -> tuple[VisualPrompt | None, Hypernetwork]:
    """Make the prompt, where there are images for one, and the hypernetwork, untrained, where the importance is."""
    device, prompt = importance.scores.device, None
    if images is not None:
        if images.ndim != 4:
            raise UsageError(
                f"a prompt is added to images (batch, channels, height, width); these inputs are {images.ndim}-d.\n"
                "Leave it out of the settings (prompt_kind='none')."
            )
        channels, height, width = images.shape[1:]
        prompt = VisualPrompt(settings.prompt_kind, (channels, height, width), settings.prompt_size).to(device)
    prompt_channels = None if images is None else images.size(1)
    hypernetwork = _make_hypernetwork(statistics, importance.logits(), settings, prompt_channels)
    return prompt, hypernetwork.to(device)


def _make_hypernetwork(
    statistics: Sequence[Tensor], prior: Tensor, settings: PassSettings, prompt_channels: int | None
) -> Hypernetwork:
    with seeded_global_generators("hypernetwork", settings.seed, device=torch.device("cpu")):
        return Hypernetwork(
            [values.cpu() for values in statistics],
            prior.cpu(),
            hidden=settings.hidden,
            kind=settings.hypernet_kind,
            prompt_channels=prompt_channels,
        )


def require_fitting_hypernetwork(
    start: Mapping[str, Tensor],
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    settings: PassSettings,
    *,
    blocks: Sequence[Block] = (),
    image_channels: int = 3,
) -> None:
    """Check that mask learning of a network can start from a trained hypernetwork.

    Args:
        start: its `state_dict`.
        model: the network.
        groups: its prunable groups.
        settings: of the mask learning.
        blocks: that may be skipped.
        image_channels: of the network's images, and so of the prompt.

    Raises:
        RunError: the hypernetwork is of another network, or was made with other settings.
    """
    statistics = weight_statistics(model, groups, blocks)
    prompt_channels = None if settings.prompt_kind == "none" else image_channels
    prior = torch.zeros(sum(map(len, statistics)))
    load_hypernetwork_(_make_hypernetwork(statistics, prior, settings, prompt_channels), start)


def load_hypernetwork_(hypernetwork: Hypernetwork, start: Mapping[str, Tensor]) -> None:
    """Load trained tensors into a hypernetwork; the weight statistics stay those of its own network."""
    trained, own = joined_state(start), hypernetwork.state_dict()
    for state in (trained, own):
        state.pop("statistics", None)
    differing = sorted(
        name for name in {*trained, *own} if name not in trained or name not in own or not _fits(trained, own, name)
    )
    if differing:
        raise RunError(
            f"the hypernetwork to start from does not fit: {len(differing)} tensors differ (first '{differing[0]}').\n"
            "It must be of the same network, with the same prune.hypernet, prune.include and prune.exclude."
        )
    hypernetwork.load_state_dict(trained, strict=False)


def _fits(trained: Mapping[str, Tensor], own: Mapping[str, Tensor], name: str) -> bool:
    """True if a trained tensor has the shape of its counterpart; the widths of the groups must also be the same."""
    one, other = trained[name], own[name]
    return one.shape == other.shape and (name != "widths" or torch.equal(one.cpu(), other.cpu()))
