"""`CldrCorpus`: an embedded six-language corpus composed from Unicode CLDR, so that a first run needs no download.

Babel renders every phrase from CLDR's own patterns (dates, units with plural forms, list patterns, locale names, ...),
once a language, from one language-neutral item. So the six sides mean the same by construction. Items are sampled per
family. If two items share a phrase in any language, both are removed: every phrase is unique in its language, each of
the thirty directions is a one-to-one map, and exact match is a fair measure. Test and validation hold out combinations,
not names: a name that training never shows cannot be translated, so bare names are in the training split only.
"""

from __future__ import annotations

import collections
import datetime
import difflib
import functools
import hashlib
import random
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, NamedTuple, TypeAlias

import babel
from babel import Locale, dates, lists, localedata, numbers, units
from babel.core import get_cldr_version

from t5x_ext.contracts import UserError

LANGUAGES = ("en", "de", "cs", "ru", "ja", "zh")
SPLITS = ("train", "valid", "test")
NAMES_FAMILY = "names"
"""The family of bare names, which is in the training split only."""

_FORMAT_VERSION = 1  # Part of the fingerprint: raise it when items, families or rendering change.


def _codes(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Chosen by hand: well known and regular. A test checks that they are distinct in all six languages.
TERRITORIES = _codes(
    "AT AU BE BG BR CA CH CL CN CO CU CZ DE DK DZ EE EG ES ET FI FR GB GE GR HR HU ID IE IL IN IQ IR IS IT JM JO JP KE "
    "KH KR KZ LB LT LV LY MA MG MN MX MY NG NL NO NP NZ OM PE PH PK PL PT PY QA RO RS RU SA SE SI SK SN SY TH TR TZ UA "
    "UG US UY UZ VE VN YE ZA ZM"
)
LANGUAGE_NAMES = _codes(
    "ar bg bn ca cs cy da de el en es et eu fa fi fr ga he hi hr hu hy id is it ja ka kk ko lt lv mn ms ne nl no pl pt "
    "ro ru sk sl sq sr sv sw ta th tr uk ur uz vi zh"
)
CITY_ZONES = _codes(
    "Europe/Paris Europe/London Europe/Berlin Europe/Madrid Europe/Rome Europe/Vienna Europe/Prague Europe/Warsaw "
    "Europe/Budapest Europe/Athens Europe/Moscow Europe/Lisbon Europe/Dublin Europe/Oslo Europe/Stockholm "
    "Europe/Copenhagen Europe/Helsinki Europe/Brussels Europe/Amsterdam Europe/Zurich Europe/Istanbul Europe/Belgrade "
    "Europe/Bucharest Europe/Sofia Europe/Riga Europe/Zagreb Asia/Tokyo Asia/Shanghai Asia/Seoul Asia/Bangkok "
    "Asia/Jakarta Asia/Manila Asia/Karachi Asia/Tehran Asia/Baghdad Asia/Dubai Asia/Beirut Asia/Tashkent "
    "Africa/Cairo Africa/Nairobi Africa/Casablanca Africa/Dakar America/New_York America/Los_Angeles America/Chicago "
    "America/Toronto America/Vancouver America/Havana America/Lima America/Caracas Australia/Sydney"
)
CURRENCIES = _codes("USD EUR GBP JPY CNY CHF CZK PLN RUB INR BRL CAD AUD MXN KRW SEK NOK DKK HUF ZAR EGP UAH")
SYMBOL_CURRENCIES = _codes("USD EUR GBP JPY CNY INR BRL CAD KRW CHF")
UNITS = _codes(
    "length-meter length-kilometer length-centimeter length-millimeter length-mile length-foot length-inch "
    "length-light-year mass-gram mass-kilogram mass-tonne volume-liter volume-milliliter volume-cubic-meter "
    "area-hectare area-square-kilometer area-square-meter temperature-celsius temperature-fahrenheit "
    "speed-kilometer-per-hour speed-meter-per-second energy-kilowatt-hour power-watt power-kilowatt "
    "digital-byte digital-megabyte digital-gigabyte electric-volt frequency-hertz graphics-pixel"
)
DURATION_UNITS = ("duration-week", "duration-day", "duration-hour", "duration-minute", "duration-second")
RELATIVE_UNITS = {
    "year": 365 * 24 * 3600,
    "month": 30 * 24 * 3600,
    "week": 7 * 24 * 3600,
    "day": 24 * 3600,
    "hour": 3600,
    "minute": 60,
    "second": 1,
}

ListStyle: TypeAlias = Literal["standard", "or"]
Item: TypeAlias = tuple[Any, ...]
"""A language-neutral item: numbers, codes and dates."""


class Family(NamedTuple):
    """One kind of phrase."""

    name: str
    weight: float  # share of the table, relative to the other families
    draw: Callable[[_Dice], Item]
    render: Callable[[Locale, Item], str]


class Row(NamedTuple):
    """One row of the table: a phrase in each of `LANGUAGES`, in that order."""

    family: str
    phrases: tuple[str, ...]


class _Dice:
    """Seeded sampling by `random.random()` alone, the only sequence that Python keeps the same across versions."""

    def __init__(self, *seed: object):
        self._random = random.Random("/".join(map(str, seed))).random

    def below(self, stop: int) -> int:
        return int(self._random() * stop)

    def between(self, first: int, last: int) -> int:
        return first + self.below(last - first + 1)

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.below(len(options))]

    def choices(self, options: Sequence[Any], count: int) -> tuple[Any, ...]:
        """Distinct options in random order."""
        picked: list[Any] = []
        while len(picked) < count:
            option = self.choice(options)
            if option not in picked:
                picked.append(option)
        return tuple(picked)

    def shuffled(self, values: Sequence[Any]) -> list[Any]:
        return [value for _, value in sorted(((self._random(), value) for value in values), key=lambda pair: pair[0])]


_SPACES = {0x00A0: " ", 0x202F: " ", 0x2009: " "}


def _tidy(text: str) -> str:
    """NFC, with CLDR's typographic spaces (no-break, narrow no-break, thin) as plain spaces."""
    return unicodedata.normalize("NFC", text.translate(_SPACES))


def _style(dice: _Dice, members: Sequence[Any]) -> ListStyle:
    """The list pattern, `and` or `or`. A single member has no pattern."""
    return dice.choice(("standard", "or")) if len(members) > 1 else "standard"


def _join(locale: Locale, parts: Sequence[str], style: ListStyle) -> str:
    return lists.format_list(parts, style=style, locale=locale)


# --- dates and times -------------------------------------------------------------------------------------------------


def _day(dice: _Dice) -> datetime.date:
    return datetime.date(1950, 1, 1) + datetime.timedelta(dice.below(36_525))  # to the end of 2049


def _draw_date(dice: _Dice) -> Item:
    return _day(dice), dice.choice(("long", "full"))


def _render_date(locale: Locale, item: Item) -> str:
    # Shorter widths are ambiguous or mixed: medium Chinese dates equal long ones, German ones lose the month's name.
    return dates.format_date(item[0], item[1], locale)


def _draw_datetime(dice: _Dice) -> Item:
    minute = dice.below(24 * 60)
    return (datetime.datetime.combine(_day(dice), datetime.time(minute // 60, minute % 60)),)


def _render_datetime(locale: Locale, item: Item) -> str:
    day = dates.format_date(item[0], "long", locale)
    time = dates.format_time(item[0], "short", locale=locale)
    return str(dates.get_datetime_format("long", locale=locale)).replace("{1}", day).replace("{0}", time)


def _draw_period(dice: _Dice) -> Item:
    first = datetime.date(dice.between(1950, 2049), dice.between(1, 12), 1)
    if dice.below(8) == 0:
        return ("yQQQQ", first.replace(month=3 * ((first.month - 1) // 3) + 1))
    month = first.year * 12 + first.month - 1 + dice.between(1, 30)
    return ("yMMMM", first, datetime.date(month // 12, month % 12 + 1, 1))


def _render_period(locale: Locale, item: Item) -> str:
    if len(item) == 2:
        return dates.format_skeleton(item[0], item[1], locale=locale)
    return dates.format_interval(item[1], item[2], item[0], locale=locale)


def _draw_hours(dice: _Dice) -> Item:
    # Different hours, so that the interval pattern's greatest difference is always the hour.
    return tuple(datetime.time(hour, dice.below(60)) for hour in sorted(dice.choices(range(24), 2)))


def _render_hours(locale: Locale, item: Item) -> str:
    return dates.format_interval(item[0], item[1], "Hm", locale=locale)


def _draw_calendar(dice: _Dice) -> Item:
    kind, size = dice.choice((("months", 12), ("months", 12), ("days", 7)))
    members = tuple(sorted(dice.choices(range(size), dice.between(2, 4))))
    return kind, _style(dice, members), members


def _render_calendar(locale: Locale, item: Item) -> str:
    kind, style, members = item
    table = dates.get_month_names if kind == "months" else dates.get_day_names
    names = table("wide", "stand-alone", locale)
    return _join(locale, [names[member + (kind == "months")] for member in members], style)


def _draw_relative(dice: _Dice) -> Item:
    return dice.choice(tuple(RELATIVE_UNITS)), dice.between(2, 200), dice.choice((1, -1))


def _render_relative(locale: Locale, item: Item) -> str:
    unit, count, sign = item
    seconds = sign * count * RELATIVE_UNITS[unit]
    # A threshold above every count keeps babel from switching to the next larger unit.
    return dates.format_timedelta(seconds, unit, threshold=1e9, add_direction=True, format="long", locale=locale)


# --- quantities ------------------------------------------------------------------------------------------------------


def _amount(dice: _Dice) -> Decimal:
    """A whole number below a thousand, or one with one decimal below a hundred."""
    return Decimal(dice.between(1, 999)) if dice.below(3) else Decimal(10 * dice.below(100) + dice.between(1, 9)) / 10


def _unit(locale: Locale, value: Decimal, unit: str) -> str:
    text = units.format_unit(value, unit, "long", locale=locale)
    # If a locale has no long form, babel prints the raw id; CLDR's alias says to take the short form.
    return units.format_unit(value, unit, "short", locale=locale) if unit in text else text


def _draw_measure(dice: _Dice) -> Item:
    return _amount(dice), dice.choice(UNITS)


def _render_measure(locale: Locale, item: Item) -> str:
    return _unit(locale, *item)


def _draw_duration(dice: _Dice) -> Item:
    members = sorted(dice.choices(range(len(DURATION_UNITS)), dice.between(2, 3)))
    return tuple((Decimal(dice.between(1, 59)), DURATION_UNITS[member]) for member in members)


def _render_duration(locale: Locale, item: Item) -> str:
    # The `unit` list style lacks forms in some locales.
    return _join(locale, [_unit(locale, value, unit) for value, unit in item], "standard")


def _draw_percent(dice: _Dice) -> Item:
    shares = dice.choices(range(1, 1001), dice.between(1, 3))
    return _style(dice, shares), tuple(Decimal(share) / 1000 for share in shares)


def _render_percent(locale: Locale, item: Item) -> str:
    style, shares = item
    parts = [numbers.format_percent(share, locale=locale, decimal_quantization=False) for share in shares]
    return _join(locale, parts, style)


def _draw_money(dice: _Dice) -> Item:
    currency = dice.choice(CURRENCIES)
    if numbers.get_currency_precision(currency) and dice.below(2):
        return currency, Decimal(100 * dice.below(1000) + dice.between(1, 99)).scaleb(-2)
    return currency, Decimal(dice.between(2, 20_000))


def _render_money(locale: Locale, item: Item) -> str:
    currency, value = item
    # Plural forms follow the written digits: whole amounts are written without a fraction, others with two digits.
    whole = value == value.to_integral_value()
    return numbers.format_currency(value, currency, locale=locale, format_type="name", currency_digits=not whole)


def _draw_compact(dice: _Dice) -> Item:
    mantissa = dice.between(1, 999) if dice.below(2) else Decimal(dice.between(11, 99)) / 10
    # No thousands (German writes them out) and no trillions.
    return dice.choice(SYMBOL_CURRENCIES), int(mantissa * dice.choice((10**6, 10**9)))


def _render_compact(locale: Locale, item: Item) -> str:
    currency, value = item
    # Two digits keep every mantissa exact where the language counts in units of ten thousand: 713M is 7.13億.
    return numbers.format_compact_currency(value, currency, locale=locale, fraction_digits=2)


# --- names -----------------------------------------------------------------------------------------------------------


def _territory(locale: Locale, code: str) -> str:
    return locale.territories[code]


def _language(locale: Locale, code: str) -> str:
    return locale.languages[code]


def _city(locale: Locale, zone: str) -> str:
    """The exemplar city of a time zone; by CLDR's rule the last part of the zone's id if a locale has no name."""
    return locale.time_zones.get(zone, {}).get("city", zone.rpartition("/")[2].replace("_", " "))


def _currency(locale: Locale, code: str) -> str:
    return numbers.get_currency_name(code, locale=locale)


_NAMES: dict[str, tuple[Callable[[Locale, str], str], tuple[str, ...]]] = {
    "territories": (_territory, TERRITORIES),
    "languages": (_language, LANGUAGE_NAMES),
    "cities": (_city, CITY_ZONES),
    "currencies": (_currency, CURRENCIES),
}


def _render_name(locale: Locale, item: Item) -> str:
    kind, code = item
    return _NAMES[kind][0](locale, code)


def _draw_names(kind: str, dice: _Dice) -> Item:
    codes = dice.choices(_NAMES[kind][1], dice.between(2, 3))
    return _style(dice, codes), kind, codes


def _render_names(locale: Locale, item: Item) -> str:
    style, kind, codes = item
    return _join(locale, [_NAMES[kind][0](locale, code) for code in codes], style)


@functools.cache
def _locale_ids() -> tuple[str, ...]:
    """Ids of the locales that CLDR keeps for the languages and territories above: `de_AT`, `fr_CA`, ..."""
    ids = (f"{language}_{territory}" for language in LANGUAGE_NAMES for territory in TERRITORIES)
    return tuple(locale_id for locale_id in ids if localedata.exists(locale_id))


def _draw_locales(dice: _Dice) -> Item:
    ids = dice.choices(_locale_ids(), dice.between(1, 2))
    return _style(dice, ids), ids


def _render_locales(locale: Locale, item: Item) -> str:
    style, ids = item
    return _join(locale, [_locale_name(locale, locale_id) for locale_id in ids], style)


@functools.cache
def _locale_name(locale: Locale, locale_id: str) -> str:
    return str(Locale.parse(locale_id).get_display_name(locale))


FAMILIES = (
    Family("dates", 1.0, _draw_date, _render_date),
    Family("datetimes", 1.0, _draw_datetime, _render_datetime),
    Family("periods", 1.0, _draw_period, _render_period),
    Family("hours", 0.7, _draw_hours, _render_hours),
    Family("calendar", 0.5, _draw_calendar, _render_calendar),
    Family("relative", 0.7, _draw_relative, _render_relative),
    Family("measures", 1.2, _draw_measure, _render_measure),
    Family("durations", 1.0, _draw_duration, _render_duration),
    Family("percentages", 0.5, _draw_percent, _render_percent),
    Family("money", 1.2, _draw_money, _render_money),
    Family("compact_money", 0.7, _draw_compact, _render_compact),
    Family("territories", 1.8, functools.partial(_draw_names, "territories"), _render_names),
    Family("languages", 1.2, functools.partial(_draw_names, "languages"), _render_names),
    Family("cities", 1.2, functools.partial(_draw_names, "cities"), _render_names),
    Family("locales", 1.3, _draw_locales, _render_locales),
)


# --- the table -------------------------------------------------------------------------------------------------------


def _items(family: Family, count: int, seed: int) -> list[Item]:
    """Distinct items in random order, fewer than `count` if a family has fewer."""
    dice = _Dice("cldr", _FORMAT_VERSION, seed, family.name)
    items: dict[Item, None] = {}
    for _ in range(4 * count):
        items[family.draw(dice)] = None
        if len(items) == count:
            break
    return list(items)


@functools.cache
def _locales() -> tuple[Locale, ...]:
    return tuple(Locale.parse(language) for language in LANGUAGES)


def _render(family: str, render: Callable[[Locale, Item], str], items: Sequence[Item]) -> list[Row]:
    return [Row(family, tuple(_tidy(render(locale, item)) for locale in _locales())) for item in items]


@functools.lru_cache(maxsize=4)
def _table(seed: int, num_tuples: int) -> tuple[Row, ...]:
    """The whole six-language table, each family's rows in random order; no phrase occurs twice in any language."""
    weight = sum(family.weight for family in FAMILIES)
    rows = []
    for family in FAMILIES:
        count = round(num_tuples * family.weight / weight)
        rows += _render(family.name, family.render, _items(family, count, seed))
    names = [(kind, code) for kind, (_, codes) in _NAMES.items() for code in codes]
    rows += _render(NAMES_FAMILY, _render_name, names)
    counts = [collections.Counter(row.phrases[side] for row in rows) for side in range(len(LANGUAGES))]
    return tuple(row for row in rows if all(count[text] == 1 for count, text in zip(counts, row.phrases)))


@functools.lru_cache(maxsize=12)
def _split(seed: int, num_tuples: int, valid: int, test: int, split: str) -> tuple[Row, ...]:
    """Rows of one split, families mixed. Of each family the first rows are test, the next valid, the rest train."""
    part = {"test": slice(test), "valid": slice(test, test + valid), "train": slice(test + valid, None)}[split]
    taken: list[Row] = []
    by_family: dict[str, list[Row]] = {}
    for row in _table(seed, num_tuples):
        by_family.setdefault(row.family, []).append(row)
    for family, rows in by_family.items():
        if family == NAMES_FAMILY:
            taken += rows if split == "train" else []
        else:
            taken += rows[part]
    return tuple(_Dice("cldr", _FORMAT_VERSION, seed, "order", split).shuffled(taken))


@dataclass(frozen=True)
class CldrCorpus:
    """Two sides of the embedded six-language corpus; satisfies `contracts.Corpus`.

    All language pairs share one table, made once a process (seconds), and one split: a phrase of the test or
    validation split occurs in no other split, in any of the six languages.

    Attributes:
      source_language: one of `LANGUAGES` (en, de, cs, ru, ja, zh).
      target_language: another one.
      split: `train`, `valid` or `test`.
      seed: which phrases are sampled. The same seed gives the same corpus in every process and on every machine for
        one version of babel (its CLDR data is part of the fingerprint).
      num_tuples: size of the table in rows. Small families and the removal of ambiguous phrases make it a few per cent
        smaller; bare names add about two hundred rows to training.
      valid_per_family: phrases of each family held out for validation.
      test_per_family: phrases of each family held out for testing.

    Raises:
      UserError: an unknown language or split, equal languages, or a table too small for its held-out phrases.
    """

    source_language: str = "en"
    target_language: str = "de"
    split: str = "train"
    seed: int = 0
    num_tuples: int = 40_000
    valid_per_family: int = 12
    test_per_family: int = 30

    def __post_init__(self) -> None:
        for key in ("source_language", "target_language"):
            _check_choice(key, getattr(self, key), LANGUAGES)
        _check_choice("split", self.split, SPLITS)
        if self.source_language == self.target_language:
            raise UserError(f"CldrCorpus: source and target language are both {self.source_language!r}: give two")
        held_out = self.valid_per_family + self.test_per_family
        if min(self.valid_per_family, self.test_per_family) < 1 or self.num_tuples < 100 * held_out:
            raise UserError(
                f"CldrCorpus.num_tuples={self.num_tuples} with {held_out} phrases of each family held out: "
                f"hold out at least one for each of valid and test, and sample at least {100 * max(held_out, 2)} tuples"
            )

    @property
    def languages(self) -> tuple[str, str]:
        """Language codes of the two sides."""
        return self.source_language, self.target_language

    @property
    def name(self) -> str:
        """`cldr_train`, `cldr_valid` or `cldr_test`."""
        return f"cldr_{self.split}"

    def pairs(self) -> Iterator[tuple[str, str]]:
        """The aligned phrases, in an order fixed by the seed."""
        source, target = (LANGUAGES.index(language) for language in self.languages)
        for row in self._rows():
            yield row.phrases[source], row.phrases[target]

    def families(self) -> list[str]:
        """The family of each pair, aligned with `pairs`: what a per-domain table is broken down by."""
        return [row.family for row in self._rows()]

    def fingerprint(self) -> str:
        """A hash of everything the phrases follow from (babel's and CLDR's versions included); makes no phrases."""
        parts = (_FORMAT_VERSION, babel.__version__, get_cldr_version(), *self._key())
        return hashlib.sha256(repr((*parts, self.split, *self.languages)).encode()).hexdigest()

    def _key(self) -> tuple[int, int, int, int]:
        return self.seed, self.num_tuples, self.valid_per_family, self.test_per_family

    def _rows(self) -> tuple[Row, ...]:
        return _split(*self._key(), self.split)


def english_corpora(
    split: str, seed: int = 0, num_tuples: int = 40_000, valid_per_family: int = 12, test_per_family: int = 30
) -> tuple[CldrCorpus, ...]:
    """English with each of the other five languages; read both ways, these are the ten directions of Vega-MT.

    Args:
      split: as for `CldrCorpus`, like all that follows.
      seed: see there.
      num_tuples: see there.
      valid_per_family: see there.
      test_per_family: see there.
    """
    others = (language for language in LANGUAGES if language != "en")
    sizes = (num_tuples, valid_per_family, test_per_family)
    return tuple(CldrCorpus("en", language, split, seed, *sizes) for language in others)


def _check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"CldrCorpus.{key}={value!r}: one of {', '.join(choices)}{hint}")
