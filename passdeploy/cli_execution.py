"""Options of `passdeploy profile` that say how networks are run: device, precision, memory format, CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from passdeploy.cli_completion import complete_device
from passdeploy.cli_typed import gathered
from passdeploy.runtime.names import PRECISIONS

if TYPE_CHECKING:
    from passdeploy.profiling import Setting


@dataclass(frozen=True)
class ExecutionOptions:
    """The options of `passdeploy profile` that say how networks are run, as typed."""

    device: str
    precision: str
    channels_last: bool
    cuda_graph: bool
    trust_engine: bool

    def setting(self) -> Setting:
        """Return the setting to measure in; its device may still be `auto`.

        Raises:
            UsageError, MissingError: the device is unknown or not in this machine.
        """
        from passdeploy.profiling import Setting
        from passdeploy.runtime.devices import find_device

        find_device(self.device)
        return Setting(self.device, self.precision, self.channels_last, self.cuda_graph)


def execution_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how networks are run; the command gets them as one argument, `execution`."""
    decorated = gathered(command, ExecutionOptions, "execution")
    for option in (
        click.option("--trust-engine", is_flag=True, help="Run engines without a sidecar; they are native code."),
        click.option("--cuda-graph", is_flag=True, help="One launch for a whole network (torch, compile, tensorrt)."),
        click.option("--channels-last", is_flag=True, help="Memory format of images and weights (torch, compile)."),
        click.option(
            "--precision",
            type=click.Choice(PRECISIONS),
            default="fp32",
            show_default=True,
            help="torch and compile convert the network to it; the other backends take the run's files in it.",
        ),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            shell_complete=complete_device,
            help="auto (the GPU where there is one), cpu, cuda or cuda:N.",
        ),
    ):
        decorated = option(decorated)
    return decorated
