"""Tables of labelled texts: named columns, and mistakes that are said with file and line."""

from __future__ import annotations

import gzip

import pytest

from t5x_ext.contracts import UserError
from t5x_ext.corpora.labelled_text import LabelledText, class_names, fingerprint, label_numbers


@pytest.fixture
def table(tmp_path):
    def write(text, name="train.tsv"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return str(path)

    return write


def test_columns_are_found_by_their_names(table):
    path = table('label\ttext\n1\tone "quoted text\n0\tanother\u2028line\n')
    examples = LabelledText(path).read()
    assert [(e.line, e.texts, e.label) for e in examples] == [
        (2, ('one "quoted text',), "1"),
        (3, ("another\u2028line",), "0"),
    ]


def test_pairs_and_files_without_a_header(table):
    path = table("7\tit rains\tit is wet\tentailment\n9\ta\tb\tother\n", "pairs.tsv.gz")
    source = LabelledText(path, ("premise", "hypothesis"), "kind", ("index", "premise", "hypothesis", "kind"))
    assert source.read()[0].texts == ("it rains", "it is wet")
    assert class_names(source.read()) == ("entailment", "other")


def test_a_choice_of_examples_is_the_same_for_a_seed(table):
    path = table("text\tlabel\n" + "".join(f"text {i}\t{i % 2}\n" for i in range(100)))
    one, same, other = (LabelledText(path, examples=20, seed=seed).read() for seed in (0, 0, 1))
    assert one == same
    assert one != other
    assert len(one) == 20
    assert [e.line for e in one] == sorted(e.line for e in one)
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert len(LabelledText(path, examples=1000).read()) == 100


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        ("label\ttext\n1\ta\tb\n", {}, r"line 2: 3 columns where there are 2 \(label, text\)"),
        ("label\ttext\n\ta\n", {}, r"line 2: the column 'label' is empty"),
        ("label\ttext\n", {}, "a header and no example"),
        (
            "1\tgood film\n",
            {},
            "names no column 'text'; there are '1', 'good film'; name the columns in LabelledText.col",
        ),
        ("label\tsentence\n1\ta\n", {"text": "sentense"}, "names no column 'sentense'; did you mean 'sentence'"),
        ("1\ta\n", {"columns": ("klass", "text")}, "LabelledText.columns names no column 'label'; there are"),
        ("", {}, "the file is empty"),
    ],
)
def test_mistakes_are_one_line(table, text, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        LabelledText(table(text), **fields).read()
    assert "\n" not in str(caught.value)


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match=r"LabelledText.examples is 0; it must be 1 or more"):
        LabelledText("x", examples=0)
    with pytest.raises(UserError, match=r"LabelledText.text is \('a', 'b', 'c'\)"):
        LabelledText("x", text=("a", "b", "c"))


def test_a_label_that_the_task_does_not_know_is_named_with_its_line(table):
    path = table("label\ttext\n1\ta\n2\tb\n")
    with pytest.raises(UserError, match=r"line 3: the label '2' is none of the classes of this task: '0', '1'"):
        label_numbers(LabelledText(path).read(), ("0", "1"), path)
