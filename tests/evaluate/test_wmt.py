"""Folders of many systems in many directions: what patterns find, ranks, order, and the texts that belong together."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_ext.contracts import UserError
from t5x_ext.evaluate import (
    ALL_REFERENCES,
    DirectionTexts,
    Layout,
    bleu,
    chrf,
    compare_systems,
    evaluate_domains,
    evaluate_texts,
    main_reference,
    paired_test,
    read_directions,
    score_directions,
)

LAYOUT = Layout("out/{source}-{target}.{system}", "ref/{source}-{target}.{reference}", "src/{source}-{target}", "")
LINES = ["the cat sat on the mat", "a dog ran to the house", "it is raining in the town"]


def write_file(folder, name, lines):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def noisy(lines, rate, seed):
    rng = random.Random(seed)
    return [" ".join("x" if rng.random() < rate else word for word in line.split()) for line in lines]


@pytest.fixture
def folder(tmp_path):
    """Two systems from English to German, of which one also translates back; two references one way, one the other."""
    for name, lines in {
        "out/en-de.b": LINES,
        "out/en-de.a": noisy(LINES, 0.3, 1),
        "out/de-en.a": noisy(LINES, 0.3, 2),
        "ref/en-de.B": LINES,
        "ref/en-de.A": noisy(LINES, 0.1, 3),
        "ref/de-en.A": LINES,
        "src/en-de": LINES[::-1],
    }.items():
        write_file(tmp_path, name, lines)
    return tmp_path


# Reading


def test_texts_are_found_by_their_names_and_sorted(folder):
    back, forth = read_directions(folder, LAYOUT)
    assert (back.name, forth.name) == ("de-en", "en-de")
    assert list(forth.systems) == ["a", "b"]
    assert list(forth.references) == ["A", "B"]
    assert forth.systems["b"] == forth.references["B"] == LINES
    assert (forth.sources, back.sources) == (LINES[::-1], None)
    assert forth.domains is None


def test_a_gzipped_file_is_the_same_text(folder):
    plain = read_directions(folder, LAYOUT)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert read_directions(folder, LAYOUT) == plain


def test_only_and_exclude_are_subsets_of_all(folder):
    everything = {direction.name: direction for direction in read_directions(folder, LAYOUT)}
    assert read_directions(folder, LAYOUT, only=["en-de"]) == [everything["en-de"]]
    without = {direction.name: direction for direction in read_directions(folder, LAYOUT, exclude=["a"])}
    assert list(without) == ["en-de"], "nobody else translates back"
    assert list(without["en-de"].systems) == ["b"]
    assert without["en-de"].references == everything["en-de"].references
    assert [list(one.systems) for one in read_directions(folder, LAYOUT, exclude=["[b-z]"])] == [["a"], ["a"]]


def test_a_pattern_without_the_name_of_a_reference_has_one_a_direction(folder):
    write_file(folder, "gold.en-de", LINES)
    found = read_directions(folder, dataclasses.replace(LAYOUT, references="gold.{source}-{target}"))
    assert [list(direction.references) for direction in found] == [[], ["ref"]]
    assert found[0].reference_sets() == {}
    assert score_directions(found[:1]) == []


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_domains_are_the_first_column_of_a_table(folder, suffix):
    write_file(folder, f"domains/en-de{suffix}", ["news\t1", "chat", "news\t\t3"])
    layout = dataclasses.replace(LAYOUT, domains="domains/{source}-{target}")
    assert read_directions(folder, layout)[1].domains == ["news", "chat", "news"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_domains_of_xml_are_those_of_the_documents_a_segment_of_the_source_each(folder, suffix):
    document = (
        '<dataset><collection><doc domain="news" id="x_1"><src lang="en"><p><seg id="1">a</seg></p></src>'
        '<ref lang="de"><p><seg id="1">b</seg></p></ref></doc><doc id="social_ru_197"><src><seg>a</seg></src></doc>'
        "</collection><doc><src><seg>a</seg></src></doc></dataset>"
    )
    write_file(folder, f"xml/en-de.xml{suffix}", [document])
    layout = dataclasses.replace(LAYOUT, domains="xml/{source}-{target}.xml")
    assert read_directions(folder, layout)[1].domains == ["news", "social", "unknown"]
    write_file(folder, f"xml/en-de.xml{suffix}", [document[:-12]])
    with pytest.raises(UserError, match=r"en-de\.xml(\.gz)?: not a complete XML file"):
        read_directions(folder, layout)


@pytest.mark.parametrize(
    ("pattern", "path", "fields"),
    [
        ("{source}-{target}.{system}", "zh_Hans-en.a.b-c", ("zh_Hans", "en", "a.b-c")),
        ("{system}/{source}2{target}", "x y/fil2pt_BR", ("fil", "pt_BR", "x y")),
        ("*/{system}.{source}-{target}.{target}", "v1/s.en-de.de", ("en", "de", "s")),
        ("?-{system}_{source}{target}", "0-s_ende", ("en", "de", "s")),
        ("?-{system}_{source}-{target}", "10-s_en-de", None),
        ("{system}.{source}-{target}", "s.english-de", None),
        ("{system}.{source}-{target}", "below/s.en-de", None),
        ("out[1]/{system}.{source}-{target}", "out[1]/s.en-de", ("en", "de", "s")),
        ("a+b/{system}.{source}-{target}", "a+b/s.en-de", ("en", "de", "s")),
    ],
)
def test_patterns_mean_what_they_say(tmp_path, pattern, path, fields):
    write_file(tmp_path, path, LINES)
    layout = Layout(pattern, "", "", "")
    if fields is None:
        with pytest.raises(UserError, match="no file matches"):
            read_directions(tmp_path, layout)
        return
    (found,) = read_directions(tmp_path, layout)
    assert (found.source, found.target, *found.systems) == fields


def test_a_repeated_placeholder_stands_for_the_same_text(tmp_path):
    write_file(tmp_path, "en-de.s.de", LINES)
    write_file(tmp_path, "en-fr.s.de", LINES)
    assert [
        one.name for one in read_directions(tmp_path, Layout("{source}-{target}.{system}.{target}", "", "", ""))
    ] == ["en-de"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"systems": "out/{source}-{target}"}, r"pattern out/{source}-{target}: {system} is missing"),
        ({"systems": "out/{source}.{system}"}, r"{target} is missing"),
        ({"references": "ref/{target}"}, r"pattern ref/{target}: {source} is missing"),
        ({"systems": "out/{source}-{target}.{sytem}"}, r"{sytem} is no placeholder; there are {source}, {target}, "),
        ({"systems": "no/{source}-{target}.{system}"}, r"no file matches no/{source}-{target}.{system}"),
    ],
)
def test_patterns_that_cannot_be_used_are_named(folder, change, message):
    with pytest.raises(UserError) as error:
        read_directions(folder, dataclasses.replace(LAYOUT, **change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_does_not_belong_together_is_named_with_both_files(folder):
    with pytest.raises(UserError, match=r"no system outputs for en-fr; there are outputs for de-en, en-de"):
        read_directions(folder, LAYOUT, only=["en-fr"])
    write_file(folder, "out/en-de.c", LINES[:2])
    with pytest.raises(UserError, match=r"out/en-de\.c has 2 lines but .*src/en-de has 3: line i must be the same"):
        read_directions(folder, LAYOUT)
    write_file(folder, "out/en-de.b.gz", LINES)
    with pytest.raises(UserError, match=r"en-de\.b and .*en-de\.b\.gz match the pattern .* as the same text"):
        read_directions(folder, LAYOUT)
    with pytest.raises(UserError, match=r"absent: there is no such folder"):
        read_directions(folder / "absent", LAYOUT)


# Scoring


@pytest.fixture(scope="module")
def directions():
    """Systems that get worse from `a` to `d`, of which `c` and `d` are equal, against two references."""
    rng = random.Random(0)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    references = [" ".join(rng.choices(words, k=9)) for _ in range(12)]
    worst = noisy(references, 0.5, 7)
    systems = {"d": worst, "c": worst, "b": noisy(references, 0.3, 6), "a": noisy(references, 0.1, 5)}
    both = {"A": references, "B": noisy(references, 0.2, 8)}
    domains = ["news", "chat", "news"] * 4
    forth = DirectionTexts("en", "de", systems, both, domains=domains)
    return [forth, DirectionTexts("de", "en", {"a": references}, {"A": references})]


def test_every_system_is_scored_against_each_reference_and_all_of_them(directions):
    results = score_directions(directions)
    assert len(results) == 4 * 3 + 1
    forth = directions[0]
    for result in results[:-1]:
        references = (
            [*forth.references.values()] if result.reference == ALL_REFERENCES else [forth.references[result.reference]]
        )
        lines = forth.systems[result.system]
        assert result.scores == evaluate_texts(lines, references, "de")
        if result.reference == ALL_REFERENCES:
            assert result.domains == {}
        else:
            assert result.domains == evaluate_domains(lines, references, forth.domains, "de")
            assert list(result.domains) == ["chat", "news"]


def test_ranks_are_competition_ranks_and_results_are_in_their_order(directions):
    results = score_directions(directions)
    assert [(one.system, one.rank) for one in results[:4]] == [("a", 1), ("b", 2), ("c", 3), ("d", 3)]
    for (_, _), group in itertools.groupby(results, key=lambda one: (one.direction, one.reference)):
        members = list(group)
        values = [one.scores.bleu.value for one in members]
        assert values == sorted(values, reverse=True)
        assert [one.rank for one in members] == [1 + sum(other > value for other in values) for value in values]


def test_results_do_not_depend_on_the_order_of_systems(directions):
    forth = directions[0]
    shuffled = dataclasses.replace(forth, systems=dict(sorted(forth.systems.items())))
    assert score_directions([shuffled, directions[1]]) == score_directions(directions)


def test_tokenizers_are_by_language_and_serve_its_regions(directions):
    line = ["我喜欢猫。"]
    texts = [DirectionTexts("en", target, {"s": line}, {"A": line}) for target in ("zh_TW", "zh", "de")]
    signatures = [one.scores.bleu.signature for one in score_directions(texts, {"zh": "char", "zh_TW": "none"})]
    assert [name in signature for name, signature in zip(("tok:none", "tok:char", "tok:13a"), signatures)] == [True] * 3
    signature = score_directions(texts[:1], {"zh": "char"})[0].scores.bleu.signature
    assert "tok:char" in signature
    with pytest.raises(UserError, match=r"tokenizer='chars': one of .*; did you mean 'char'\?"):
        score_directions(texts, {"zh": "chars"})


def test_json_has_the_numbers_and_domains_where_they_are_known(directions):
    first, *_, last = score_directions(directions)
    fields = first.to_json()
    lines, reference = directions[0].systems[first.system], directions[0].references[first.reference]
    assert fields["bleu"] == bleu(lines, reference).value
    assert fields["chrf"] == chrf(lines, reference).value
    assert (fields["direction"], fields["system"], fields["reference"], fields["rank"]) == ("en-de", "a", "A", 1)
    assert sum(domain["lines"] for domain in fields["domains"].values()) == len(lines)
    assert last.to_json()["bleu"] == pytest.approx(100)
    assert "domains" not in last.to_json()


# Comparing


def test_comparisons_are_paired_tests_of_the_same_lines(directions):
    few = lambda texts: {name: lines[:4] for name, lines in texts.items()}
    forth = dataclasses.replace(directions[0], systems=few(directions[0].systems), domains=None)
    forth = dataclasses.replace(forth, references=few(forth.references))
    (found,) = compare_systems([forth, directions[1]], "a", ["d"], references={"en-de": "B"}, seed=3)
    assert (found.direction, found.system, found.other, found.reference) == ("en-de", "a", "d", "B")
    assert found.metrics == paired_test(forth.systems["d"], forth.systems["a"], forth.references["B"], "de", seed=3)
    assert found.metrics["BLEU"].difference > 0


def test_systems_without_a_common_direction_are_not_compared(directions):
    with pytest.raises(UserError, match="no direction with a reference has outputs of both a and z"):
        compare_systems(directions, "a", ["b", "z"])
    unscored = [dataclasses.replace(one, references={}) for one in directions]
    with pytest.raises(UserError, match="no direction with a reference has outputs of both a and b"):
        compare_systems(unscored, "a", ["b"])
    assert compare_systems(unscored, "a", []) == []


@given(st.sets(st.text("ABC", min_size=1), min_size=1), st.text("ABC", min_size=1))
def test_the_main_reference_is_the_named_one_if_it_exists_else_the_first(names, wanted):
    direction = DirectionTexts("en", "de", {}, {name: [] for name in names})
    assert main_reference(direction) == sorted(names)[0]
    chosen = main_reference(direction, {"en-de": wanted, "de-en": "never"})
    assert chosen == (wanted if wanted in names else sorted(names)[0])


@settings(max_examples=20)
@given(st.lists(st.sampled_from(["all", "A", "B"]), min_size=1, max_size=3, unique=True))
def test_sets_of_references_are_each_alone_and_all_together(names):
    direction = DirectionTexts("en", "de", {}, {name: [name] for name in names})
    sets = direction.reference_sets()
    for name in names:
        assert sets[name] == [[name]], "a reference that is called 'all' keeps its name"
    assert set(sets) == ({*names, "all"} if len(names) > 1 else set(names))
    if len(names) > 1 and "all" not in names:
        assert sets["all"] == [[name] for name in names]
