"""The embedded corpus: one-to-one, disjoint, reproducible, and right in six languages."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from decimal import Decimal

import pytest

from t5x_ext.contracts import Corpus, UserError
from t5x_ext.corpora import cldr
from t5x_ext.corpora.cldr import LANGUAGES, NAMES_FAMILY, SPLITS, CldrCorpus

TEN_DIRECTIONS = [pair for x in LANGUAGES[1:] for pair in (("en", x), (x, "en"))]
FAMILY = {family.name: family for family in cldr.FAMILIES}


def rows(split, **sizes):
    return CldrCorpus(split=split, **sizes)._rows()


def small(**changes):
    return CldrCorpus(**{"num_tuples": 1000, "valid_per_family": 2, "test_per_family": 4, **changes})


def render(family, *item):
    return [cldr._tidy(FAMILY[family].render(locale, item)) for locale in cldr._locales()]


def test_satisfies_the_corpus_contract():
    corpus = CldrCorpus("ja", "ru", split="test")
    assert isinstance(corpus, Corpus)
    assert (corpus.languages, corpus.name) == (("ja", "ru"), "cldr_test")
    assert len(list(corpus.pairs())) == len(corpus.families()) == 30 * len(cldr.FAMILIES)
    assert list(corpus.pairs()) == list(corpus.pairs())


def test_size_families_and_names():
    per_split = {split: rows(split) for split in SPLITS}
    assert sum(map(len, per_split.values())) >= 20_000
    assert sum(len(codes) for _, codes in cldr._NAMES.values()) >= 150
    for split in ("valid", "test"):
        assert set(Counter(row.family for row in per_split[split])) == set(FAMILY)
        assert len(set(Counter(row.family for row in per_split[split]).values())) == 1
    train = Counter(row.family for row in per_split["train"])
    assert set(train) == {*FAMILY, NAMES_FAMILY}
    assert min(count for family, count in train.items() if family != NAMES_FAMILY) > 1000


def test_every_phrase_is_unique_in_its_language_so_all_directions_are_one_to_one():
    everything = [row for split in SPLITS for row in rows(split)]
    for side, language in enumerate(LANGUAGES):
        assert len({row.phrases[side] for row in everything}) == len(everything), language


def test_no_direction_shares_a_source_phrase_between_splits():
    for source, target in TEN_DIRECTIONS:
        sources = [{pair[0] for pair in CldrCorpus(source, target, split).pairs()} for split in SPLITS]
        assert all(first.isdisjoint(second) for first, second in itertools.combinations(sources, 2))


def test_rendering_is_one_to_one_before_any_filtering():
    drawn = sum(len(cldr._items(family, 300, 7)) for family in cldr.FAMILIES)
    kept = [
        row for family in cldr.FAMILIES for row in cldr._render(family.name, family.render, cldr._items(family, 300, 7))
    ]
    for side in range(len(LANGUAGES)):
        assert len({row.phrases[side] for row in kept}) == drawn


def test_names_are_distinct_in_every_language():
    for locale in cldr._locales():
        names = [name(locale, code) for name, codes in cldr._NAMES.values() for code in codes]
        assert [name for name, count in Counter(names).items() if count > 1] == []


@pytest.mark.parametrize("split", ["valid", "test"])
def test_held_out_phrases_are_made_of_words_that_training_shows(split):
    for side in range(4):  # the languages that put spaces between words
        seen = {word for row in rows("train") for word in re.findall(r"[^\W\d_]+", row.phrases[side])}
        assert {word for row in rows(split) for word in re.findall(r"[^\W\d_]+", row.phrases[side])} <= seen


def test_text_is_tidy():
    for row in rows("train"):
        for text in row.phrases:
            assert text == text.strip() == unicodedata.normalize("NFC", text)
            assert not re.search(r"[\u00a0\u202f\u2009\t\n{}]|  |[a-z]+-[a-z]+-", text), text
            assert 1 < len(text) < 100


# Read by hand: case forms, plural classes and word order are those that a speaker expects.
RENDERED = {
    ("dates", datetime.date(2014, 3, 5), "full"): [
        "Wednesday, March 5, 2014", "Mittwoch, 5. März 2014", "středa 5. března 2014",
        "среда, 5 марта 2014 г.", "2014年3月5日水曜日", "2014年3月5日星期三",
    ],
    ("datetimes", datetime.datetime(2014, 3, 5, 0, 7)): [
        "March 5, 2014, 12:07 AM", "5. März 2014, 00:07", "5. března 2014 0:07",
        "5 марта 2014 г., 00:07", "2014年3月5日 0:07", "2014年3月5日 00:07",
    ],
    ("periods", "yMMMM", datetime.date(2014, 3, 1), datetime.date(2014, 5, 1)): [
        "March – May 2014", "März–Mai 2014", "březen–květen 2014", "март – май 2014 г.",
        "2014年3月～5月", "2014年3月至5月",
    ],
    ("relative", "hour", 3, -1): [
        "3 hours ago", "vor 3 Stunden", "před 3 hodinami", "3 часа назад", "3 時間前", "3小时前",
    ],
    ("measures", Decimal(5), "length-kilometer"): [
        "5 kilometers", "5 Kilometer", "5 kilometrů", "5 километров", "5 キロメートル", "5公里",
    ],
    ("measures", Decimal("2.5"), "temperature-celsius"): [
        "2.5 degrees Celsius", "2,5 Grad Celsius", "2,5 stupně Celsia", "2,5 градуса Цельсия",
        "摂氏 2.5 度", "2.5摄氏度",
    ],
    ("durations", (Decimal(1), "duration-week"), (Decimal(21), "duration-hour")): [
        "1 week and 21 hours", "1 Woche und 21 Stunden", "1 týden a 21 hodin", "1 неделя и 21 час",
        "1 週間、21 時間", "1周和21小时",
    ],
    ("money", "CZK", Decimal(1202)): [
        "1,202 Czech korunas", "1.202 Tschechische Kronen", "1 202 českých korun", "1 202 чешские кроны",
        "1,202チェコ コルナ", "1,202捷克克朗",
    ],
    ("money", "CZK", Decimal("3.50")): [
        "3.50 Czech korunas", "3,50 Tschechische Kronen", "3,50 české koruny", "3,50 чешской кроны",
        "3.50チェコ コルナ", "3.50捷克克朗",
    ],
    ("compact_money", "EUR", 713_000_000): [
        "€713M", "713 Mio. €", "713 mil. €", "713 млн €", "€7.13億", "€7.13亿",
    ],
    ("territories", "or", "territories", ("FR", "JP", "CZ")): [
        "France, Japan, or Czechia", "Frankreich, Japan oder Tschechien", "Francie, Japonsko nebo Česko",
        "Франция, Япония или Чехия", "フランス、日本、またはチェコ", "法国、日本或捷克",
    ],
    ("locales", "standard", ("fr_CA",)): [
        "French (Canada)", "Französisch (Kanada)", "francouzština (Kanada)", "французский (Канада)",
        "フランス語 (カナダ)", "法语 (加拿大)",
    ],
}  # fmt: skip


@pytest.mark.parametrize("item", RENDERED, ids=lambda item: f"{item[0]}-{item[1]}")
def test_rendering(item):
    assert render(*item) == RENDERED[item]


def test_same_seed_same_corpus_in_another_process_with_other_hashes():
    program = (
        "import hashlib; from t5x_ext.corpora.cldr import CldrCorpus as C;"
        "c = C('de', 'zh', num_tuples=1000, valid_per_family=2, test_per_family=4);"
        "print(c.fingerprint(), hashlib.sha256(repr([*c.pairs(), *c.families()]).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "LC_ALL": "C", "TZ": "Asia/Tokyo", "JAX_PLATFORMS": "cpu"}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    corpus = small(source_language="de", target_language="zh")
    content = hashlib.sha256(repr([*corpus.pairs(), *corpus.families()]).encode()).hexdigest()
    assert other.stdout.split() == [corpus.fingerprint(), content]


def test_seed_changes_phrases_and_fingerprint():
    first, second = small(), small(seed=1)
    assert list(first.pairs()) != list(second.pairs())
    assert first.fingerprint() != second.fingerprint()


def test_fingerprints_differ_whatever_differs():
    corpora = [small(), small(split="test"), small(source_language="cs"), small(target_language="cs")]
    corpora += [small(num_tuples=1001), small(valid_per_family=3), small(test_per_family=5)]
    assert len({corpus.fingerprint() for corpus in corpora}) == len(corpora)
    assert small().fingerprint() == small().fingerprint()


def test_fingerprint_follows_the_data_version(monkeypatch):
    before = small().fingerprint()
    monkeypatch.setattr(cldr.babel, "__version__", "0.0")
    assert small().fingerprint() != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_language": "fr"}, "source_language='fr': one of en, de, cs, ru, ja, zh"),
        ({"split": "tset"}, "did you mean 'test'"),
        ({"target_language": "en"}, "both 'en'"),
        ({"num_tuples": 500}, "at least 600 tuples"),
        ({"test_per_family": 0}, "at least one"),
    ],
)
def test_mistakes_are_one_line(changes, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        small(**changes)
    assert "\n" not in str(error.value)
