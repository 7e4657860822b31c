import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passdeploy.errors import RecipeError
from passdeploy.recipe.strict_yaml import MAX_BYTES, MAX_NESTING, dotted, dump, parse


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(text, "mine.yaml")
    message = str(caught.value)
    assert message.count("\n") <= 2
    return message


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-3", 0.001),
        ("1.0e-5", 1e-5),
        ("3e8", 3e8),
        (".5", 0.5),
        ("1_000_000", 1_000_000),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("-3", -3),
        ("true", True),
        ("~", None),
        ("", None),
        ("-.inf", -math.inf),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'8'", "8"),
        ("=", "="),
        ("<<", "<<"),
    ],
)
def test_a_scalar_means_what_yaml_1_2_says(written, meant):
    value = parse(f"key: {written}", "mine.yaml").value["key"]
    assert value == meant
    assert type(value) is type(meant)


def test_every_key_and_item_knows_its_file_and_line():
    marks = parse("a: 1\nb:\n  c: 2\n\n  d:\n    - x\n    - y\n", "mine.yaml").marks
    assert str(marks["a",]) == "mine.yaml:1"
    assert str(marks["b", "c"]) == "mine.yaml:3"
    assert str(marks["b", "d", 1]) == "mine.yaml:7"


def test_text_from_the_command_line_has_no_lines():
    assert str(parse("{a: 1}", "--set x", has_lines=False).marks["a",]) == "--set x"


def test_a_key_given_twice_is_refused_with_both_lines():
    message = refusal("prune:\n  steps: 1\n  method: pass\n  steps: 2\n")
    assert "mine.yaml:4" in message
    assert "'prune.steps'" in message
    assert "mine.yaml:2" in message


def test_aliases_work_where_they_are_few():
    assert parse("a: &size [1, 2]\nb: *size", "mine.yaml").value == {"a": [1, 2], "b": [1, 2]}


def test_a_billion_laughs_are_refused():
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    assert "10000 values" in refusal("\n".join(lines))


def test_an_alias_to_itself_is_refused():
    assert "levels" in refusal("a: &a [*a]")


def test_deep_nesting_is_refused_before_python_gives_up():
    assert "nested deeper" in refusal("[" * 100_000)
    assert parse("[" * (MAX_NESTING - 1) + "]" * (MAX_NESTING - 1), "mine.yaml").value is not None


def test_a_huge_file_is_refused():
    assert "larger than" in refusal("a: " + "x" * MAX_BYTES)


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['true']",
        "a: !!python/name:os.system",
        "a: !!binary aGk=",
        "a: !!set {x}",
        "a: !mine 3",
    ],
)
def test_tags_are_refused(text):
    assert "tag" in refusal(text)


@pytest.mark.parametrize("text", ["3: x", "true: x", "[1, 2]: x", "{a: b}: x", "? - a\n: x"])
def test_keys_are_words(text):
    assert "is not a key" in refusal(text)


@pytest.mark.parametrize(
    ("text", "line", "hint"),
    [
        ("a: 1\n\tb: 2", 2, "tabs"),
        ("model: name: x", 1, "one 'key: value'"),
        ("a: 1\nb: [1, 2\nc: 3", 3, "c: 3"),
        ("a: 1\nb: *nowhere", 2, "undefined alias"),
        ("a: 1\n---\nb: 2", 2, "another document"),
        ("a: 'never closed", 1, "end of stream"),
        ("a: 1\nb: \x07", 2, "control character"),
        ("a: 1\nb: !!int x", 2, "cannot read 'x'"),
        ("a: 1\nb: " + "9" * 5000, 2, "cannot read"),
    ],
)
def test_a_slip_of_the_pen_is_shown_with_its_line(text, line, hint):
    message = refusal(text)
    assert message.startswith(f"mine.yaml:{line}: ")
    assert hint in message


def test_an_error_never_repeats_control_characters_of_the_file():
    message = refusal('"a\\e[31m\\nb": 1\n"a\\e[31m\\nb": 2')
    assert "\x1b" not in message


def test_a_path_reads_as_in_a_recipe():
    assert dotted(("prune", "exclude", 0)) == "prune.exclude[0]"
    assert dotted(("prune",)) == "prune"


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(derandomize=True, deadline=None)
@given(plain)
def test_what_is_dumped_is_parsed_back(value):
    assert parse(dump(value), "mine.yaml").value == value


@pytest.mark.parametrize(
    "word", ["\x85", "a\u2028b", "1e-3", "no", "0o7", "12", "null", "~", "", "2024-01-01", "1_0", "=", "1:30"]
)
def test_text_that_looks_like_something_else_stays_text(word):
    assert parse(dump({"key": word}), "mine.yaml").value == {"key": word}
