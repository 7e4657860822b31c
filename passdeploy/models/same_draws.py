"""Let two networks, of which one has fewer channels, draw the same random numbers: to compare them in training mode.

The same seed is not enough. Noise for fewer channels is another sequence from the first number on, and dropout would
keep other values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from passdeploy.models.cloning import modules_by_name
from passdeploy.runtime.seeds import seed_of, seeded_python_and_numpy, states_of_python_and_numpy

# Arguments by which operations, such as attention and recurrent layers, are told to drop values, and not to.
_DROPPING = {"dropout_p": 0.0, "dropout": 0.0, "train": False, "training": False}

_Place = tuple[str, int]  # a module, and the number of the draw in it

_MOST_CONSTANTS = 300  # of one run: on them, `while not keep.any(): keep = torch.rand(3) > 0.5` may never end
_MOST_ROUNDS = 4  # until all draws have the shapes that both networks share

# What chance may decide. Branches that are taken rarely, or are one of several, are seen where all numbers come from
# one part of their range: those of torch are constants then, and these seeds make the first three of Python's and
# NumPy's lower than 0.1, between 0.3 and 0.4, between 0.6 and 0.7, and above 0.9.
_CHANCES: tuple[tuple[float | None, int, int], ...] = (  # the constant, and the seeds of Python and NumPy
    (None, 0, 0),
    (None, 1, 1),
    (0.02, 14963, 273),
    (0.35, 1016, 3046),
    (0.65, 494, 2147),
    (0.98, 1643, 4075),
)


def largest_over_chances(compare: Callable[[SameDraws], float | None], *, enough: float) -> float | None:
    """Compare two networks for several ways in which chance may decide, and return the largest error.

    Args:
        compare: runs one network in `SameDraws.recording()`, then the other in `SameDraws.replaying()`, and returns
            the error; None where they cannot be compared.
        enough: an error above which nothing else is tried.

    Returns:
        None where `compare` returns None every time.
    """
    largest, cut_dims = None, dict[_Place, set[int]]()
    for chance in _CHANCES:
        draws = SameDraws(*chance, cut_dims)
        error = compare(draws)
        for _ in range(_MOST_ROUNDS):
            if not draws.has_met_other_shapes():
                break
            error = compare(draws)
        if error is not None:
            largest = error if largest is None else max(largest, error)
        if not draws.were_made or (largest is not None and not largest <= enough):
            break
    return largest


class SameDraws:
    """Random numbers for two networks: where both draw a tensor of the same shape, its values are the same.

    Where the shapes differ, the values are the same along the dimensions that do, since channels were cut out of them:
    one number for all channels of a pixel. So that the first network does this as well, it runs again.

    Args:
        constant: draw numbers from this share of their range only, instead of random ones.
        python_seed: of Python's generator, and of torch's.
        numpy_seed: of NumPy's.
        cut_dims: dimensions in which the shapes of a draw differ, as far as known; more are added.
    """

    def __init__(
        self,
        constant: float | None = None,
        python_seed: int = 0,
        numpy_seed: int = 0,
        cut_dims: dict[_Place, set[int]] | None = None,
    ) -> None:
        self.constant, self.were_made = constant, False
        self.seed, self._numpy_seed = python_seed, numpy_seed
        self._recorded: dict[_Place, Tensor] = {}
        self._cut_dims = {} if cut_dims is None else cut_dims
        self._has_news = False

    @contextmanager
    def recording(self, network: nn.Module | None = None) -> Iterator[None]:
        """Draw for the first network. All global generators are afterwards what they were.

        Args:
            network: the one that runs; of other code draws are told apart by their number alone.
        """
        self._recorded = {}
        with self._drawing(network, self._recorded_draw):
            yield

    @contextmanager
    def replaying(self, network: nn.Module | None = None) -> Iterator[None]:
        """Draw for the second network, as `recording` does for the first."""
        with self._drawing(network, self._replayed_draw):
            yield

    def has_met_other_shapes(self) -> bool:
        """True once after both networks drew tensors whose shapes differ in dimensions that were not known before."""
        has_news, self._has_news = self._has_news, False
        return has_news

    @contextmanager
    def _drawing(self, network: nn.Module | None, settled: Callable[[_Place, Tensor], Tensor]) -> Iterator[None]:
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        with (
            seeded_python_and_numpy(self.seed, self._numpy_seed),
            torch.random.fork_rng(devices=list(gpus)),
        ):
            before = states_of_python_and_numpy()
            try:
                with _called_modules(network) as stack, _Drawing(self, settled, stack):
                    yield
            finally:
                self.were_made |= states_of_python_and_numpy() != before

    def _recorded_draw(self, place: _Place, drawn: Tensor) -> Tensor:
        drawn = _constant_along(self._cut_dims.get(place, set()), drawn, drawn)
        self._recorded[place] = drawn.clone()
        return drawn

    def _replayed_draw(self, place: _Place, drawn: Tensor) -> Tensor:
        recorded = self._recorded.get(place)
        if recorded is None or recorded.ndim != drawn.ndim:
            return drawn
        dims = {dim for dim in range(drawn.ndim) if drawn.shape[dim] != recorded.shape[dim]}
        known = self._cut_dims.setdefault(place, set())
        self._has_news |= not dims <= known
        known |= dims
        return _constant_along(dims, recorded, drawn)


@contextmanager
def _called_modules(network: nn.Module | None) -> Iterator[list[str]]:
    """Return the names of the modules that are being called, the innermost last.

    By them draws are told apart: a network without a block, or without a stochastic depth, draws less often.
    """
    names = {} if network is None else {id(module): name for name, module in modules_by_name(network)}
    stack = [""]

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(names.get(id(module), stack[-1]))

    def leave(*_: Any) -> None:
        stack.pop()

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    try:
        yield stack
    finally:
        for hook in hooks:
            hook.remove()


def _constant_along(dims: set[int], recorded: Tensor, drawn: Tensor) -> Tensor:
    """Return the first of the recorded values along some dimensions, in the shape of what was drawn."""
    if not dims:
        return drawn
    if drawn.ndim == 1 and _is_permutation(drawn):
        return torch.arange(len(drawn), dtype=drawn.dtype, device=drawn.device)  # an order of channels
    for dim in dims:
        recorded = recorded.narrow(dim, 0, min(1, recorded.shape[dim]))
    return recorded.expand(drawn.shape).clone()


def _is_permutation(drawn: Tensor) -> bool:
    is_whole = not drawn.is_floating_point() and not drawn.is_complex()
    return is_whole and torch.equal(drawn.sort().values, torch.arange(len(drawn), device=drawn.device).to(drawn.dtype))


class _Drawing(TorchDispatchMode):
    """The mode in which one of the two networks runs."""

    def __init__(
        self, draws: SameDraws, settled: Callable[[_Place, Tensor], Tensor], called_modules: list[str]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws, self._settled, self._called_modules = draws, settled, called_modules
        self._numbers = Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run any operation; one that draws random numbers draws those of this way in which chance decides."""
        given = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **given)
        given |= {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        if told := {argument.name for argument in func._schema.arguments} & _DROPPING.keys():
            return func(**given | {name: _DROPPING[name] for name in told})
        with suppress(Exception):  # such as a type without fractions: it is drawn like anything else
            if (drawn := self._drawn_around(func, given)) is not None:
                return drawn
        self._draws.were_made, module = True, self._called_modules[-1]
        place = module, self._numbers[module]
        self._numbers[module] += 1
        if self._draws.constant is not None and self._numbers.total() > _MOST_CONSTANTS:
            raise RuntimeError(f"more than {_MOST_CONSTANTS} draws of random numbers, which are all the same here")
        if "generator" in given:
            given["generator"] = None  # one that the code keeps would be another for the second network
        _seed(seed_of("draw", self._draws.seed, *place))
        result = func(**given)
        if (constant := self._draws.constant) is not None:
            return tree_map(lambda leaf: _filled(leaf, constant, func, given), result)
        return tree_map(lambda leaf: leaf.copy_(self._settled(place, leaf)), result)

    def _drawn_around(self, func: Any, given: Mapping[str, Any]) -> Tensor | None:
        """Draw by a tensor of means or chances from noise that does not depend on it; None for any other operation."""
        ops, own = torch.ops.aten, given.get("self")
        if func.overloadpacket is ops.normal and any(isinstance(given.get(name), Tensor) for name in ("mean", "std")):
            mean, std = given["mean"], given.get("std", 1.0)
            like = mean + torch.zeros_like(std) if isinstance(std, Tensor) else mean
            like = like if isinstance(like, Tensor) else torch.zeros_like(std)
            with self:
                noise = torch.randn_like(like)
            drawn: Tensor = noise * std + mean
            return drawn
        if func in (ops.bernoulli.default, ops.bernoulli_.Tensor, ops.bernoulli.Tensor) and own is not None:
            chances = given.get("p", own)
            with self:
                uniform = torch.rand_like(own, dtype=chances.dtype)
            kept: Tensor = (uniform < chances).to(own.dtype)
            if func is not ops.bernoulli_.Tensor:
                return kept
            return cast(Tensor, own.copy_(kept))
        return None


def _seed(seed: int) -> None:
    """Seed the global generators of torch; `torch.manual_seed` takes milliseconds for devices that are not there."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def _filled(leaf: Tensor, share: float, func: Any, given: Mapping[str, Any]) -> Tensor:
    """Fill what was drawn with one number of its range: zero or one, a fraction, or a whole number."""
    if "bernoulli" in func.name():
        return leaf.fill_(round(share))
    if leaf.is_floating_point() or leaf.is_complex():
        return leaf.fill_(share)
    if "randperm" in func.name():
        return leaf.copy_(torch.arange(len(leaf), device=leaf.device).roll(round(share)))
    low, high = given.get("low", given.get("from", 0)), given.get("high", given.get("to"))
    return leaf.fill_(low if high is None else low + int(share * (high - low)))
