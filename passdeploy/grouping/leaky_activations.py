"""Let rectifiers leak while two networks are compared: behind units that are all off, any error would be hidden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from passdeploy.tracing.dispatch_mode import UncompiledMode
from passdeploy.tracing.op_call import aten

SLOPE = 0.2  # of what is below zero

_LEAKY = {
    aten.relu.default: aten.leaky_relu.default,
    aten.relu_.default: aten.leaky_relu_.default,
    aten.hardtanh.default: aten.leaky_relu.default,
    aten.hardtanh_.default: aten.leaky_relu_.default,
}
_HARDTANH = {aten.hardtanh.default, aten.hardtanh_.default}


class LeakyActivations(UncompiledMode):
    """A dispatch mode in which ReLU and ReLU6 pass on a part of what is below zero, and ReLU6 has no upper bound."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation; called by torch for each of them."""
        leaky = _LEAKY.get(func)
        if leaky is None or not args[0].is_floating_point() or (func in _HARDTANH and args[1:2] != (0,)):
            return func(*args, **(kwargs or {}))
        leaked = leaky(args[0], SLOPE)
        is_bounded = func in _HARDTANH and args[2:3] != (6,)  # a bound that the code states, perhaps by a width
        return leaked.clamp_(max=args[2]) if is_bounded and len(args) > 2 else leaked
