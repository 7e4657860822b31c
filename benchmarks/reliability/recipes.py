"""Recipes that are broken in the ways in which people and programs break YAML, given to `passdeploy check`.

Every recipe that comes with passdeploy is changed in one to three places of its structure (keys, values, sections,
positions, copies) or of its text (bytes, lines, indents). The answer must be an error of at most three lines with an
exit code of the list, or a recipe that is written and read back as the same. An accepted recipe whose data are on this
machine is not tried out further: that would take seconds for each.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from benchmarks.reliability.tally import Tally, answer_to, problem_of_text
from passdeploy.errors import PassDeployError
from passdeploy.recipe import Recipe, find_recipe, load_recipe, parse_recipe
from passdeploy.recipe.loading import shipped_recipes

GOAL = 10_000
WORDS: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, 1e308, -1e-300, 10**30, 2**63, float("inf"), float("nan")),
    *("", " ", "0", "1e3", "null", "~", "yes", "no", "off", "2026-01-01", "0x1F", "1_000", "1:30", "NaN", "=", "<<"),
    *(
        "../../../etc/passwd",
        "/dev/zero",
        "/proc/self/mem",
        "a\x00b",
        "a\nb",
        "\u202eabc",
        "\ud7ff",
        "💥",
        "x" * 10_000,
    ),
    *(
        "${HOME}",
        "$(touch x)",
        "{{ 7 * 7 }}",
        "%s%n",
        "*a",
        "&a",
        "!!python/name:os.system",
        "os:system",
        "timm/",
        "hf/",
    ),
    *("torchvision/" + "a" * 300, "torchvision/../x", "timm/resnet18.x", "passdeploy/__init__", ":", "a:b:c", "/"),
    *([], {}, [[]], [None], {"a": {}}, [1, "a", None], {"name": None}, {"macs": 0.5, "params": 0.5}),
)


def measure(count: int = GOAL, seed: int = 0) -> Tally:
    """Check `count` broken recipes."""
    tally, names = Tally(), shipped_recipes()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        for number in range(count):
            chance = random.Random(f"{seed} {number}")
            name = names[number % len(names)]
            path.write_bytes(broken(find_recipe(name).read_text(encoding="utf-8"), chance))
            tally.add(*_answer(path, _overrides(chance), chance), trial=f"seed {seed}, number {number}, {name}")
    return tally


def broken(text: str, chance: random.Random) -> bytes:
    """Break a recipe in one to three places."""
    if chance.random() < 0.7:
        tree = deepcopy(_tree_of(text))
        for _ in range(chance.randint(1, 3)):
            chance.choice(STRUCTURAL)(tree, chance)
        try:
            text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=chance.random() < 0.5)
        except (yaml.YAMLError, ValueError, RecursionError):  # a value that YAML cannot write
            return b"[" * 500
        if chance.random() < 0.8:
            return text.encode(errors="replace")
    content = text.encode(errors="replace")
    for _ in range(chance.randint(1, 3)):
        content = chance.choice(TEXTUAL)(content, chance)
    return content


@cache
def _tree_of(text: str) -> Any:
    return yaml.safe_load(text)


def _answer(path: Path, overrides: list[str], chance: random.Random) -> tuple[str, str | None]:
    """Return what `passdeploy check` says, or that the recipe is accepted."""
    try:
        recipe = load_recipe(path, overrides)
    except PassDeployError as error:
        if chance.random() < 0.8:  # the command line prints all errors alike: a fifth of them shows it
            return f"exit {error.exit_code}", problem_of_text(str(error))
        recipe = None
    except Exception as error:  # the trial is to find these
        return "crash", f"{type(error).__name__}: {error}"[:300]
    if recipe is not None:
        if not _is_read_back(recipe):
            return "accepted", "the recipe that was written is not read back as the same"
        if recipe.data.name == "digits":
            return "accepted", None
    return answer_to("check", path, *(argument for one in overrides for argument in ("--set", one)))


def _is_read_back(recipe: Recipe) -> bool:
    return parse_recipe(recipe.to_yaml(), "written") == recipe


def _overrides(chance: random.Random) -> list[str]:
    if chance.random() < 0.85:
        return []
    keys = (
        "seed",
        "prune.steps",
        "prune.target",
        "data",
        "model.name",
        "finetune.epochs",
        "a.b.c",
        "prune.target.macs.x",
        "",
    )
    return [f"{chance.choice(keys)}{chance.choice(('=', '==', ' = ', ''))}{_text_of(chance.choice(WORDS))}"]


def _text_of(value: Any) -> str:
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).strip()


# Changes of the structure: each changes the tree in place.


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """List every (section or list, key or index) of a tree, which may hold itself."""
    found: list[tuple[Any, Any]] = []
    left, seen = [tree], set()
    while left:
        node = left.pop()
        if id(node) in seen or not isinstance(node, (dict, list)):
            continue
        seen.add(id(node))
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        found += [(node, key) for key in keys]
        left += [node[key] for key in keys]
    return found


def _on_a_place(change: Callable[[Any, Any, random.Random], None]) -> Callable[[Any, random.Random], None]:
    def apply(tree: Any, chance: random.Random) -> None:
        if places := _places(tree):
            change(*chance.choice(places), chance)

    return apply


def _replace(node: Any, key: Any, chance: random.Random) -> None:
    node[key] = deepcopy(chance.choice(WORDS))


def _remove(node: Any, key: Any, _: random.Random) -> None:
    del node[key]


def _rename(node: Any, key: Any, chance: random.Random) -> None:
    if isinstance(node, dict):
        letters = list(str(key))
        letters[chance.randrange(len(letters) or 1) : 1] = chance.choice("_aZ0 .é\n:")
        node["".join(letters)] = node.pop(key)


def _nest(node: Any, key: Any, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 2, 30, 60))):
        node[key] = {str(key): node[key]} if chance.random() < 0.5 else [node[key]]


def _swap(tree: Any, chance: random.Random) -> None:
    if places := _places(tree):
        (one, first), (other, second) = chance.choice(places), chance.choice(places)
        try:
            one[first], other[second] = deepcopy(other[second]), deepcopy(one[first])
        except (KeyError, IndexError, RecursionError):
            return


def _add(node: Any, key: Any, chance: random.Random) -> None:
    word = chance.choice(WORDS)
    if isinstance(node, dict):
        new = word if isinstance(word, (str, int, float, bool, type(None))) else "new"
        node[new] = deepcopy(node[key])
    else:
        node.insert(key, deepcopy(word))


def _share(node: Any, key: Any, chance: random.Random) -> None:
    """Let many places hold one list that holds lists, which YAML writes with anchors: a bomb."""
    bomb: list[Any] = ["x"] * 9
    for _ in range(chance.choice((1, 3, 9))):
        bomb = [bomb] * 9
    node[key] = bomb


def _scale(node: Any, key: Any, chance: random.Random) -> None:
    if isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
        node[key] = node[key] * chance.choice((0, -1, 1e-9, 1e9, 1.5)) + chance.choice((0, 1, 0.1))


STRUCTURAL: tuple[Callable[[Any, random.Random], None], ...] = (
    *(_on_a_place(change) for change in (*[_replace, _remove, _rename, _add, _scale] * 4, _nest, _share)),
    *[_swap] * 4,
)


# Changes of the text.


def _flip(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content or b"x")
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def _insert(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content) + 1)
    return content[:at] + chance.choice(INSERTED) + content[at:]


def _repeat_line(content: bytes, chance: random.Random) -> bytes:
    lines = content.split(b"\n")
    return b"\n".join([*lines, chance.choice(lines)])


def _move_line(content: bytes, chance: random.Random) -> bytes:
    lines = content.split(b"\n")
    lines.insert(chance.randrange(len(lines)), lines.pop(chance.randrange(len(lines))))
    return b"\n".join(lines)


def _indent(content: bytes, chance: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = chance.randrange(len(lines))
    lines[at] = chance.choice((b"  ", b"\t", b" ", b"- ")) + lines[at]
    return b"\n".join(lines)


def _encode(content: bytes, chance: random.Random) -> bytes:
    text = content.decode(errors="replace")
    return text.encode(chance.choice(("utf-16", "utf-8-sig", "utf-32", "cp037")), errors="replace")


INSERTED = (
    *(
        b"\x00",
        b"\xff\xfe",
        b"\t",
        b"\r\n",
        b"---\n",
        b"...\n",
        b"%YAML 1.1\n",
        b"\n? [a, b]\n: c\n",
        b"&a ",
        b"*a ",
        b"<<: *a\n",
    ),
    *(
        b"!!python/object/apply:os.system ['true']",
        b"!!binary aGk=",
        b"!!set {a}",
        b"'",
        b'"',
        b"{",
        b"]",
        b"|",
        b">",
        b"@",
        b"`",
    ),
    *(b"#", b": ", b"- ", "\u2028".encode(), "\u202e".encode(), b"[" * 1000, b"a" * 300_000, b"{a: " * 200),
)
TEXTUAL: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_flip, _flip, _cut, _insert, _insert, _repeat_line, _move_line, _indent, _encode),
)
