"""Values of configurations against a checker of their own and against Python; words of messages; places of files."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_ext.cli.files import check_absent, check_folder, check_writable
from t5x_ext.cli.gin_read import Config, Source
from t5x_ext.cli.gin_text import _text
from t5x_ext.cli.languages import known_language
from t5x_ext.cli.messages import UsageError, did_you_mean, one_line
from t5x_ext.cli.texts import read_aligned
from t5x_ext.cli.type_check import describe, fits
from t5x_ext.contracts import UserError

LEAVES = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.sampled_from(["pre", "x ", "3", "%m"])
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2)
    ),
    max_leaves=6,
)
PLAIN = {int: "int", float: "float", str: "str", bool: "True or False", None: "None"}
KINDS = {"sequence": Sequence, "list": list, "dict": dict, "mapping": Mapping}


@st.composite
def hints(draw, depth=2):
    """An annotation, and a function that says by itself whether a value fits."""
    kind = draw(st.sampled_from(["plain", "literal"] + ["sequence", "tuple", "pair", "dict", "union"] * (depth > 0)))
    if kind == "plain":
        plain = draw(st.sampled_from(list(PLAIN)))
        is_number = lambda value, *types: isinstance(value, types) and not isinstance(value, bool)
        checks = {
            int: lambda value: is_number(value, int),
            float: lambda value: is_number(value, int, float),
            None: lambda value: value is None,
        }
        return plain, checks.get(plain, lambda value: isinstance(value, plain)), PLAIN[plain]
    if kind == "literal":
        return Literal["pre", "3"], lambda value: value in ("pre", "3") and isinstance(value, str), "one of 'pre', '3'"
    hint, check, words = draw(hints(depth=depth - 1))
    if kind == "sequence":
        return Sequence[hint], lambda v: isinstance(v, list | tuple) and all(map(check, v)), f"sequence of {words}"
    if kind == "tuple":
        return tuple[hint, ...], lambda v: isinstance(v, tuple) and all(map(check, v)), f"tuple of {words}"
    if kind == "dict":
        inside = lambda value: isinstance(value, dict) and all(map(check, value.values()))
        return dict[str, hint], inside, f"dict of str, {words}"
    other, other_check, other_words = draw(hints(depth=depth - 1))
    if kind == "pair":
        both = lambda value: isinstance(value, tuple) and len(value) == 2 and check(value[0]) and other_check(value[1])
        return tuple[hint, other], both, f"tuple ({words}, {other_words})"
    if hint == other or hint is None or other is None:
        return hint, check, words
    return hint | other, lambda value: check(value) or other_check(value), "?"  # parts may be the same


@settings(max_examples=50)
@given(hints(), VALUES)
def test_a_value_fits_an_annotation_if_every_part_does(hint, value):
    annotation, check, words = hint
    assert fits(value, annotation) == check(value)
    if "?" not in words:
        assert describe(annotation) == words


@settings(max_examples=40)
@given(VALUES)
def test_values_are_written_as_gin_reads_them_and_come_back_from_a_flag(value):
    text = _text(Config(), value)
    assert ast.literal_eval(text) == value
    source = Source.from_flag(f" Run.x = {text} ")
    name, _, written = source.text.partition(" = ")
    assert (name, source.label, source.is_flag) == ("Run.x", "--gin.Run.x", True)
    assert ast.literal_eval(written) == value


@pytest.mark.parametrize("binding", ["Run.x", "Run.x=", "=3", " = ", ""])
def test_a_flag_needs_a_name_and_a_value(binding):
    with pytest.raises(UserError, match=r"--gin\..* needs a value: --gin.NAME=VALUE"):
        Source.from_flag(binding)


# Words


@given(st.text(st.sampled_from("ab \n\r\t\u2028\x0b"), max_size=20))
def test_a_message_is_one_line_with_all_its_words(text):
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert line.split() == text.split()
    assert one_line(line) == line


@given(st.lists(st.text("abcXY", min_size=1, max_size=6), max_size=15), st.text("abcXY", min_size=1, max_size=6))
def test_a_name_leads_to_one_that_exists_or_to_all_of_a_few(choices, name):
    hint = did_you_mean(name, choices)
    known = sorted(set(choices))
    if name in known:
        assert hint == f"; did you mean {name}?"
    elif hint.startswith("; did"):
        assert hint.removeprefix("; did you mean ").removesuffix("?") in known
    else:
        assert hint == (f"; known: {', '.join(known)}" if 0 < len(known) <= 12 else "")
    if name not in known and name.swapcase() in known:
        assert hint.startswith("; did you mean ")


@pytest.mark.parametrize("code", ["pt_BR", "zh_Hant", "zh_Hant_TW", "sr_Latn", "en", "es_419"])
def test_a_code_in_other_case_or_with_hyphens_leads_to_itself(code):
    for spelled in {code.upper(), code.lower(), code.replace("_", "-")} - {code}:
        with pytest.raises(UsageError) as error:
            known_language(spelled)
        assert f"unknown language '{spelled}'; did you mean {code} (" in str(error.value)


# Files


def test_aligned_texts_have_equally_many_lines_or_the_two_that_differ_are_named(tmp_path):
    paths = [str(tmp_path / name) for name in "abc"]
    for path, count in zip(paths, (2, 2, 3)):
        (tmp_path / path).write_text("line\n" * count)
    assert read_aligned(paths[:2]) == [["line"] * 2] * 2
    with pytest.raises(UserError) as error:
        read_aligned(paths)
    assert str(error.value) == f"{paths[0]} has 2 lines but {paths[2]} has 3: line i must be the same everywhere"


def test_where_a_result_cannot_be_written_is_found_before_it_is_computed(tmp_path):
    taken, empty = tmp_path / "taken", tmp_path / "empty"
    taken.write_text("x")
    empty.mkdir()
    for path in (None, "", "-", str(taken), str(tmp_path / "new")):
        check_writable(path, "--out")
    check_absent(str(empty), "--out")
    check_folder(str(empty / "deep" / "down"), "--out")
    for check, path, message in (
        (check_writable, empty, "is a folder; name a file"),
        (check_writable, tmp_path / "no" / "file", f": there is no folder {tmp_path / 'no'}"),
        (check_absent, taken, "exists already; name another place, or remove it"),
        (check_absent, tmp_path, "exists already"),
        (check_folder, taken / "below", f": {taken} is a file, not a folder"),
        (check_writable, "gs://bucket/x", ": give a local path"),
    ):
        with pytest.raises(UsageError) as error:
            check(str(path), "--out")
        assert str(error.value).startswith(f"--out={path}")
        assert message in str(error.value)
