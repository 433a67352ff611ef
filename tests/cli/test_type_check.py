from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import optax
import pytest

from t5x_ext.cli.languages import known_language
from t5x_ext.cli.messages import UsageError, did_you_mean, one_line
from t5x_ext.cli.type_check import annotations_of, describe, fits
from t5x_ext.contracts import Corpus


class Plain:
    pass


class Shape(Protocol):
    def area(self) -> float: ...


FITS = [
    (1, int), (1, float), (1.5, float), (True, bool), ("a", str), (None, None), (None, int | None), ((), tuple),
    ((1, 2), tuple[int, ...]), ((1, "a"), tuple[int, str]), ([1], Sequence[int]), (("a",), Sequence[str]),
    ({"a": 1}, dict[str, int]), ({"a": 1}, Mapping[str, float]), ("pre", Literal["pre", "post"]), (len, Callable),
    (len, Callable[[Any], int]), (Plain, type[Plain]), (Plain(), Plain), (1, Any), (1, "anything"), (1, Shape),
    (optax.sgd(0.1), optax.GradientTransformation),
]  # fmt: skip

CONTRADICTS = [
    (True, int, "int"), (1.5, int, "int"), ("a", int, "int"), (True, float, "float"), ("1", float, "float"),
    (1, bool, "True or False"), (1, str, "str"), (None, int, "int"), ("a", int | None, "int or None"),
    ([1], tuple[int, ...], "tuple of int"), ((1, "a"), tuple[int, ...], "tuple of int"),
    ((1,), tuple[int, str], "tuple (int, str)"), ("ab", Sequence[str], "sequence of str"),
    ([1], Sequence[str], "sequence of str"), ({"a": "b"}, dict[str, int], "dict of str, int"),
    ("mid", Literal["pre", "post"], "one of 'pre', 'post'"), (1, Literal[True], "one of True"),
    (3, Callable[[int], int], "a function"), (3, Plain, "Plain"), (3, Corpus, "Corpus"),
    (0.1, optax.GradientTransformation, "GradientTransformation"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "hint"), FITS)
def test_fits(value, hint):
    assert fits(value, hint)


@pytest.mark.parametrize(("value", "hint", "words"), CONTRADICTS)
def test_contradictions_in_words(value, hint, words):
    assert not fits(value, hint)
    assert describe(hint) == words


def test_every_item_is_looked_at():
    """Beartype alone checks one item of a container, at random."""
    many = [1] * 50
    assert fits(many, Sequence[int])
    assert not fits([*many, "a"], Sequence[int])
    assert not fits((*many, True), tuple[int, ...] | None)
    assert not fits({**dict.fromkeys(range(50), 1), 50: "a"}, Mapping[int, int])
    assert not fits({"a": [*many, "a"]}, dict[str, list[int]])
    assert not fits(3, Mapping[str, "Unknown"])  # noqa: F821
    assert fits({"a": 3}, Mapping[str, "Unknown"])  # noqa: F821


def test_every_field_of_a_run_can_be_checked():
    from t5x_ext.corpora import ParallelText
    from t5x_ext.data import BatchConfig, DataConfig, VocabularyConfig
    from t5x_ext.models import PRESETS, TransformerConfig
    from t5x_ext.train import CheckpointConfig, EvaluationConfig, Run

    presets = [TransformerConfig, *PRESETS.values()]
    for cls in (
        Run,
        EvaluationConfig,
        CheckpointConfig,
        DataConfig,
        BatchConfig,
        ParallelText,
        VocabularyConfig,
        *presets,
    ):
        assert {field.name for field in dataclasses.fields(cls)} <= set(annotations_of(cls)), cls


def test_annotations_that_cannot_be_read_are_left_out():
    def function(known: int, unknown: NotImportedHere, free) -> None:  # noqa: F821
        pass

    hints = annotations_of(function)
    assert hints["known"] is int
    assert "unknown" not in hints
    assert "free" not in hints


@pytest.mark.parametrize("code", ["en", "de", "zh", "pt_BR", "zh_Hans", "sr_Latn", "qaa", "yue"])
def test_known_languages(code):
    assert known_language(code) == code


@pytest.mark.parametrize(
    ("code", "near"),
    [
        ("German", "de"),
        ("germn", "de"),
        ("DE", "de"),
        ("pt-br", "pt_BR"),
        ("zh-hans", "zh_Hans"),
        ("enn", "en"),
        ("eng", "en"),
    ],
)
def test_unknown_languages_lead_to_the_nearest(code, near):
    with pytest.raises(UsageError, match=rf"unknown language '{code}'; did you mean {near}\b"):
        known_language(code)


def test_nothing_near():
    with pytest.raises(UsageError, match="known are codes such as"):
        known_language("12345")
    assert did_you_mean("x", []) == did_you_mean("x", map(str, range(100))) == ""
    assert one_line("a\n  b\n\n") == "a b"
