"""Tests of the choice of outputs: what is found, and what is said of a choice that is not there."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from passdeploy.errors import UsageError
from passdeploy.models.chosen_outputs import choose_outputs

Pair = namedtuple("Pair", ["logits", "aux"])
ONE, TWO = torch.ones(1), torch.full((1,), 2.0)


@dataclass
class Result:
    logits: torch.Tensor
    features: tuple[torch.Tensor, ...]


@pytest.mark.parametrize(
    ("outputs", "choice"),
    [
        ((TWO, ONE), 1),
        ([ONE, TWO], -2),
        ({"a": TWO, "b": ONE}, "b"),
        (OrderedDict(out=TWO, aux=ONE), 1),
        ((TWO, {"boxes": ONE}), "1.boxes"),
        ({"a.b": ONE, "a": {"b": TWO}}, "a.b"),
        ({"a": {"b": ONE}}, "a.b"),
        (Pair(ONE, TWO), "logits"),
        (Result(TWO, (TWO, ONE)), "features.1"),
        ((TWO, ONE), lambda outputs: outputs[1]),
    ],
)
def test_one_output_is_found(outputs: object, choice: object):
    assert choose_outputs(outputs, choice) is ONE


def test_several_outputs_and_the_outputs_of_each_image_are_found():
    assert choose_outputs({"a": ONE, "b": TWO, "c": 3}, ["c", "a"]) == [3, ONE]
    images = [{"boxes": ONE, "labels": 1}, {"boxes": TWO, "labels": 2}]
    assert choose_outputs(images, "boxes") == [ONE, TWO]
    assert choose_outputs(images, None) is images


@pytest.mark.parametrize(
    ("outputs", "choice", "words"),
    [
        (ONE, 0, "asks for 0, but the network returns a single tensor there"),
        ((ONE, TWO), 2, "a tuple of 2, with indices 0 to 1"),
        ((), 0, "an empty tuple"),
        ({"out": ONE, "aux": TWO}, "logits", "asks for 'logits', but the network returns a dict with 'out', 'aux'"),
        (Result(ONE, ()), "boxes", "a Result with 'logits', 'features'"),
        ([{"boxes": ONE}, {"boxes": TWO}], "masks", "a list of dictionaries with 'boxes'"),
        ((ONE, {"a": TWO}), "1.b", "a dict with 'a'"),
        (ONE, [], r"outputs=\[\] chooses no outputs"),
        (ONE, 1.5, "outputs=1.5 chooses no outputs"),
        (ONE, [ONE], "chooses no outputs"),
    ],
)
def test_a_choice_that_is_not_there_is_an_error_that_names_what_is(outputs: object, choice: object, words: str):
    with pytest.raises(UsageError, match=words) as error:
        choose_outputs(outputs, choice)
    assert len(str(error.value).splitlines()) <= 3
