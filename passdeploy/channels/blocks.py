"""Blocks: stretches of a network whose output is their input plus a branch, `h(x + f(x))`.

The branch `f` can be taken out: what is left is `h(x)`. A block names what a slim network has in its place, the modules
and tensors that vanish with it, and the addition at which the masked network lets the branch contribute nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

_PRESENCE = "block:"  # a colon is in no name of a module

# What a module of a branch gives way to:
#   identity  `nn.Identity`: the module's input is its output
#   relu      `nn.ReLU`: what follows the addition inside of a module of which nothing else is left
#   first     the first tensor that the module is called with
#   zero      a zero of one element, which contributes nothing to what it is added to
#   zeros     zeros of the shape of the first tensor that the module is called with
Substitute = Literal["identity", "relu", "first", "zero", "zeros"]


@dataclass(frozen=True)
class Replacement:
    """A module that a slim network has something simpler for, and what that is."""

    module: str
    by: Substitute
    ndim: int = 0  # of the module's output; for `zero`
    entries: int = 0  # of the tuple that the module returns, of which the first is a tensor; 0: it returns a tensor

    def to_json(self) -> list[Any]:
        """Convert to plain values."""
        return [self.module, self.by, self.ndim, self.entries]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Replacement:
        """Read what `to_json` made."""
        return cls(*values)


@dataclass(frozen=True)
class Addition:
    """The addition at which a branch joins its input, known by its module and call index.

    `models/function_calls.py` counts the calls.
    """

    module: str
    call_index: int
    branch: int  # which of the two summands the branch is: 0 or 1


@dataclass(frozen=True)
class Block:
    """A stretch of a network whose output is its input plus a branch, and how the branch is taken out."""

    name: str  # the module that goes, or of several the one with the most parameters
    reason: str = ""  # why it must stay; empty if it may be skipped
    source: str = ""  # file:line of the model's own code, where the branch joins its input
    addition: Addition | None = None  # None: it was not found, or is no addition; then there is a reason
    replacements: tuple[Replacement, ...] = ()  # of the modules that go, in the order of the forward pass
    tensors: tuple[str, ...] = ()  # parameters and buffers that go, by name
    groups: tuple[str, ...] = ()  # channel groups all of whose slots are in these tensors: they go as well
    contains: tuple[str, ...] = ()  # blocks inside the branch, which go with it
    # Of the modules around it that are nothing but this block and others, if all of these go: from the inside out.
    chains: tuple[Replacement, ...] = ()

    @property
    def is_prunable(self) -> bool:
        """True if the block may be skipped."""
        return not self.reason

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that go, with all modules inside them."""
        return tuple(one.module for one in self.replacements)

    def holds(self, module: str) -> bool:
        """Test whether a module goes with the block: it is one of `modules`, or inside of one."""
        return any(is_inside(module, name) for name in self.modules)

    def __repr__(self) -> str:
        return f"Block({self.name!r}, {'prunable' if self.is_prunable else f'must stay: {self.reason}'})"


def presence(block: str) -> str:
    """Return the name under which widths say whether a block is there: 1, or 0 where it is skipped.

    >>> presence("layer1.1")
    'block:layer1.1'
    """
    return _PRESENCE + block


def skipped_in(widths: Mapping[str, int]) -> tuple[str, ...]:
    """Return the names of the blocks that are skipped at some widths.

    >>> skipped_in({"layer1.1.conv1": 8, "block:layer1.0": 1, "block:layer1.1": 0})
    ('layer1.1',)
    """
    return tuple(name.removeprefix(_PRESENCE) for name, width in widths.items() if is_presence(name) and not width)


def is_presence(name: str) -> bool:
    """Test whether a name in widths stands for a block."""
    return name.startswith(_PRESENCE)


def is_inside(module: str, other: str) -> bool:
    """Test whether a module is another one or inside of it, by their names."""
    return module == other or module.startswith(other + ".") or not other


def chosen_blocks(
    blocks: Sequence[Block], *, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), layers: Sequence[str] = ()
) -> tuple[Block, ...]:
    """Protect the blocks that `include` leaves out, and those that `exclude` names or that hold what it names.

    Args:
        blocks: of the network.
        include: patterns, as in `fnmatch`, of the blocks that may be skipped.
        exclude: patterns of blocks and layers that must stay.
        layers: names of the layers that `exclude` may mean.
    """

    def reason_of(block: Block) -> str:
        names = (block.name, *block.contains, *(layer for layer in layers if block.holds(layer)))
        for pattern in exclude:
            if name := next((name for name in names if fnmatchcase(name, pattern)), ""):
                return f"excluded by {pattern!r}" + (f" ({name})" if name != block.name else "")
        return "" if any(fnmatchcase(block.name, pattern) for pattern in include) else "not included"

    return tuple(replace(block, reason=block.reason or reason_of(block)) for block in blocks)


def outermost(blocks: Iterable[Block]) -> list[Block]:
    """Leave out the blocks that are inside the branch of another one of them."""
    given = list(blocks)
    within = {name for block in given for name in block.contains}
    return [block for block in given if block.name not in within]


def skipped_blocks(blocks: Sequence[Block], skipped: Collection[str]) -> list[Block]:
    """Return the blocks with these names, in their own order."""
    return [block for block in blocks if block.name in skipped]


def replacements_of(blocks: Sequence[Block], skipped: Collection[str]) -> list[Replacement]:
    """List the replacements that skip these blocks; none of a module inside of another one that goes."""
    going = skipped_blocks(blocks, skipped)
    gone = {block.name for block in going}.union(*(block.contains for block in going))
    stay = {chain for block in blocks if block.name not in gone for chain in block.chains}
    found: dict[Replacement, None] = {}
    for block in outermost(going):
        whole = [chain for chain in block.chains if chain not in stay]
        found.update(dict.fromkeys(whole[:1] or block.replacements))
    return list(found)


def tensors_of(blocks: Sequence[Block], skipped: Collection[str]) -> set[str]:
    """Return the names of the parameters and buffers that go with these blocks."""
    return {name for block in outermost(skipped_blocks(blocks, skipped)) for name in block.tensors}
