"""Find out whether a network does in training mode what its trace, of evaluation mode, does not show.

Batch norms and dropout do not count: they treat every channel alike. Where nothing else differs, which a run by shapes
alone shows, nothing need be compared.
"""

from __future__ import annotations

from types import CodeType

from torch import nn

from passdeploy.grouping.traced_network import TracedNetwork
from passdeploy.grouping.transcript import transcript_of
from passdeploy.grouping.width_branches import functions_of
from passdeploy.models.input_sizes import with_one_more
from passdeploy.models.modes import drops_at_random


def may_train_otherwise(network: TracedNetwork) -> bool:
    """True if code of the network asks which mode it is in, and may do something else in training mode."""
    if not asks_for_training_mode(network.model):
        return False
    inputs = with_one_more(network.trial_inputs)  # a batch norm may want more than one sample
    if not network.trace.is_meta or (there := transcript_of(network.trial_cloner, inputs, training=True)) is None:
        return True
    return there != transcript_of(network.trial_cloner, inputs)


def asks_for_training_mode(model: nn.Module) -> bool:
    """True if code of the network, other than torch's own and that of dropout, asks which mode it is in."""
    modules = (module for module in model.modules() if not drops_at_random(module))
    return any(_reads_mode(function.__code__) for function in {one for each in modules for one in functions_of(each)})


def _reads_mode(code: CodeType) -> bool:
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return "training" in code.co_names or any(map(_reads_mode, nested))
