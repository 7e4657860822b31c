"""The functions of torch that reduce over channels: means, norms, softmax and the like."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Functions that reduce over channels: without one channel, their result changes for all others.
MEAN_FUNCTIONS = {torch.mean, Tensor.mean}
MAX_FUNCTIONS = {torch.softmax, Tensor.softmax, F.softmax, torch.amax, Tensor.amax}  # -inf leaves a channel out
_NORM_FUNCTIONS = {Tensor.norm, torch.norm, torch.linalg.norm, torch.linalg.vector_norm, F.normalize}
# Functions that leave nothing of the dimension: what is not there can be left out beforehand.
REMOVING_FUNCTIONS = {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in ("max", "min", "amin", "aminmax", "var", "std", "logsumexp")
} | {torch.var_mean, torch.std_mean}
REDUCTION_FUNCTIONS = {
    *(*MEAN_FUNCTIONS, *MAX_FUNCTIONS, *_NORM_FUNCTIONS, *REMOVING_FUNCTIONS),
    *(torch.sum, Tensor.sum),
}
