"""Commands as they are typed: the options of the running one, a check that none is without effect, and the next one."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import click

from passdeploy.errors import UsageError

Rule = tuple[Iterable[str], bool, str]  # names of parameters, whether they have an effect, and what to say if not


def typed_options() -> set[str]:
    """Return the names of the parameters that were typed, not left at their defaults."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    return {name for name in context.params if context.get_parameter_source(name) is not default}


def gathered(command: Callable[..., Any], kind: type[Any], name: str) -> Callable[..., Any]:
    """Let a command get the options that are fields of a dataclass as one argument of that name."""

    @wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        fields = {field: options.pop(field) for field in kind.__dataclass_fields__}
        return command(*arguments, **{name: kind(**fields)}, **options)

    return wrapped


def flag_of(name: str) -> str:
    """Return a parameter of the running command as it is typed: `--json` for `as_json`."""
    context = click.get_current_context()
    parameter = next(each for each in context.command.params if each.name == name)
    flags = parameter.secondary_opts if context.params[name] is False else parameter.opts
    return flags[0]


def typed_command(*words: str, **flags: bool) -> str:
    """Return a command as it is typed in a shell, with those flags that are on: `allow_code` is `--allow-code`."""
    options = [f"--{name}".replace("_", "-") for name, is_on in flags.items() if is_on]
    return shlex.join(["passdeploy", *words, *options])


def reject_ineffective(rules: Iterable[Rule]) -> None:
    """Raise if an option was typed that has no effect with the others.

    Args:
        rules: looked at in turn.

    Raises:
        UsageError: names the first such option, and what it goes with.
    """
    typed = typed_options()
    for names, has_effect, advice in rules:
        if not has_effect and (ineffective := typed.intersection(names)):
            raise UsageError(f"{flag_of(min(ineffective))} {advice}")
