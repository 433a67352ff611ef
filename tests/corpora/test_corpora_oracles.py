"""Tables, tasks and pieces of corpora against lists in memory."""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_ext.contracts import UserError
from t5x_ext.corpora import ParallelText, special_pieces
from t5x_ext.corpora.beam import read_task, read_tasks, sent_corpus, write_tasks
from t5x_ext.corpora.labelled_text import Labelled, LabelledText, class_names, fingerprint, label_numbers
from t5x_ext.corpora.workers import choose_processes, work_in_order

CELL = st.text(st.characters(exclude_characters="\t\n\r\ufeff", exclude_categories=["Cs"]), max_size=5)
ROWS = st.lists(st.tuples(CELL, CELL, CELL.filter(bool)), min_size=1, max_size=6)


# Labelled text


@settings(max_examples=30)
@given(ROWS, st.permutations(["first", "second", "class"]), st.booleans())
def test_any_table_is_read_as_it_was_written_whatever_the_order_of_its_columns(rows, names, header):
    cells = [dict(zip(("first", "second", "class"), row)) for row in rows]
    lines = ["\t".join(row[name] for name in names) for row in cells]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "table.tsv")
        path.write_bytes("".join(f"{line}\n" for line in (["\t".join(names)] if header else []) + lines).encode())
        text = LabelledText(str(path), ("first", "second"), "class", columns=None if header else tuple(names))
        found = text.read()
        assert found == [Labelled(1 + header + index, row[:2], row[2]) for index, row in enumerate(rows)]
        chosen = dataclasses.replace(text, examples=2).read()
        assert chosen == sorted(chosen) or len(rows) < 2, "the order of the file"
        assert set(chosen) <= set(found)
        assert len(chosen) == min(2, len(rows))


def test_every_example_is_chosen_as_often_as_any_other(tmp_path):
    (tmp_path / "table").write_text("text\tlabel\n" + "".join(f"{number}\tx\n" for number in range(6)))
    counts = Counter()
    for seed in range(400):
        counts.update(one.line for one in LabelledText(str(tmp_path / "table"), examples=3, seed=seed).read())
    # 400 draws of probability 1/2: five standard deviations are 50.
    assert set(counts) == set(range(2, 8))
    assert all(abs(count - 200) <= 50 for count in counts.values())


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), min_size=1), st.randoms(use_true_random=False))
def test_numbers_as_classes_are_in_their_order_and_those_of_one_value_in_that_of_text(labels, rng):
    """The order may not be that of a set, which differs from process to process."""
    written = [f"{'0' * zeros}{value}" for value, zeros in labels]
    rng.shuffle(written)
    examples = [Labelled(number, ("x",), label) for number, label in enumerate(written, start=1)]
    classes = class_names(examples)
    assert list(classes) == sorted(set(written), key=lambda label: (int(label), label))
    assert [classes[number] for number in label_numbers(examples, classes, "table")] == written


def test_one_label_that_is_no_number_makes_all_of_them_text():
    examples = [Labelled(1, ("a",), "10"), Labelled(2, ("b",), "9"), Labelled(3, ("c",), "9.5")]
    assert class_names(examples) == ("10", "9", "9.5")
    with pytest.raises(
        UserError, match=r"table, line 3: the label '9\.5' is none of the classes of this task: '10', '9'"
    ):
        label_numbers(examples, ("10", "9"), "table")


@settings(max_examples=40)
@given(ROWS, st.integers(0, 5), st.integers(0, 2))
def test_a_fingerprint_follows_every_cell_and_the_order_but_no_line_number(rows, row, column):
    examples = [Labelled(number, texts, label) for number, (*texts, label) in enumerate(rows)]
    original = fingerprint(examples)
    assert fingerprint([one._replace(line=one.line + 7) for one in examples]) == original
    changed = [list(cells) for cells in rows]
    changed[row % len(rows)][column] += "x"
    assert fingerprint([Labelled(0, texts, label) for *texts, label in changed]) != original
    if rows[::-1] != rows:
        assert fingerprint(examples[::-1]) != original


# Tasks for workers


@settings(max_examples=25)
@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=9), st.integers(1, 4), st.booleans())
def test_tasks_of_a_corpus_hold_its_pairs_once_in_order(pairs, size, readable):
    @dataclasses.dataclass
    class InMemory:
        name = "memory"

        def pairs(self):
            return iter(pairs)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "table")
        path.write_bytes("".join(f"{source}\t{target}\n" for source, target in pairs).encode())
        table = ParallelText(tsv_path=str(path), source_language="en", target_language="de")
        corpus = table if readable else InMemory()
        where, count = write_tasks(corpus, epath.Path(folder), size)
        tasks = read_tasks(where)
        read = [read_task(task, sent_corpus(corpus), folder) for task in tasks]
    assert count == len(pairs)
    assert [task.number for task in tasks] == list(range(-(-len(pairs) // size)))
    assert [tuple(pair) for chunk in read for pair in chunk] == pairs
    assert [len(chunk) for chunk in read[:-1]] == [size] * (len(read) - 1)


def test_an_empty_corpus_has_no_tasks(tmp_path):
    corpus = type("Nothing", (), {"name": "nothing", "pairs": lambda self: iter(())})()
    with pytest.raises(UserError, match="nothing: the corpus is empty"):
        write_tasks(corpus, epath.Path(tmp_path), 3)
    assert not list(tmp_path.iterdir())


def test_work_in_this_process_is_lazy_and_in_order():
    taken = []

    def tasks():
        for number in range(4):
            taken.append(number)
            yield number, 10

    results = work_in_order(lambda base: lambda x, y: base + x * y, (5,), tasks(), 1)
    assert [next(results), next(results)] == [5, 15]
    assert taken == [0, 1]
    assert list(results) == [25, 35]


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.one_of(st.none(), st.integers(1, 99)))
def test_small_corpora_get_one_process_and_a_number_that_is_given_is_kept(pairs, worth, asked):
    chosen = choose_processes(pairs, worth, asked)
    assert chosen == asked if asked is not None else 1 <= chosen <= 16
    if asked is None and pairs <= worth:
        assert chosen == 1


# Languages and markers

LANGUAGE = st.from_regex(r"[A-Za-z]{2,8}([-_][A-Za-z0-9]{2,8}){0,2}", fullmatch=True)


@settings(max_examples=40)
@given(LANGUAGE)
def test_the_piece_of_a_language_leads_back_to_it(language):
    piece = special_pieces.tag_piece(language)
    assert special_pieces.tag_language(piece) == language
    assert special_pieces.tag_language(piece[1:]) is None
    assert special_pieces.tag_language(f"{piece}x") is None


@pytest.mark.parametrize("code", ["", "e", "en ", "en\n", "en__de", "-en", "en-", "日本", "toolonglanguage", "en_x"])
def test_what_is_no_code_of_a_language_is_refused(code):
    with pytest.raises(UserError) as error:
        special_pieces.tag_piece(code)
    assert str(error.value) == f"language code {code!r}: give a code such as 'en', 'zh' or 'pt_BR'"


@given(st.text("ABZ09az_<", max_size=4))
def test_markers_are_capital_letters_and_digits(marker):
    valid = marker[:1] in tuple("ABZ") and all(letter in "ABZ09" for letter in marker)
    if valid:
        assert special_pieces.check_marker(marker) == marker
    else:
        with pytest.raises(UserError, match="give capital letters and digits, as BT for the piece <BT>"):
            special_pieces.check_marker(marker)


def test_a_choice_of_examples_does_not_disturb_other_random_numbers(tmp_path):
    (tmp_path / "table").write_text("text\tlabel\na\tx\nb\ty\n")
    random.seed(3)
    expected = random.Random(3).random()
    LabelledText(str(tmp_path / "table"), examples=1).read()
    assert random.random() == expected
