"""What a corpus must satisfy to be kept, and in what form its lines are kept."""

from __future__ import annotations

from dataclasses import dataclass

from t5x_ext.contracts import Corpus, UserError

KEYS = ("pair", "source", "target")


@dataclass(frozen=True)
class PairRules:
    """Rules that look at one pair at a time, all off. None or False switches a rule off.

    Pairs with an empty side are always dropped. The other rules are tried in the order of `PAIR_RULES`, and the first
    that speaks against a pair is counted. A token cache applies them to lines cleaned by `clean_line`.

    Lengths are in words between spaces. Chinese and Japanese have none: their length is the number of characters over
    the characters that a word has on average (see `length`), so that one limit fits all languages; words of other
    letters in them count as such.

    Attributes:
      max_length: words of either side.
      max_ratio: words of the longer side, where it has five or more, over those of the shorter one.
      drop_copies: pairs whose sides are equal but for letter case and width. Text of one language that is paired with
        itself consists of such pairs.
      drop_markup: lines with tags, entities, templates or wiki links.
      max_repetition: share of a line's word pairs (character pairs in Chinese and Japanese) that have occurred in it
        before; lines of at least ten words. The rule also drops lines that repeat one character ten times in a row.
      min_script_share: share of a line's letters that belong to a script of its language; against Chinese and Japanese
        characters a word of other letters counts as one. Placeholders, tags and addresses have no letters, for this
        rule and the next.
      min_language_probability: lines of some length (24 bytes of letters: 8 Chinese characters) that look more like
        another language and are in theirs with less than this probability.
    """

    max_length: float | None = None
    max_ratio: float | None = None
    drop_copies: bool = False
    drop_markup: bool = False
    max_repetition: float | None = None
    min_script_share: float | None = None
    min_language_probability: float | None = None

    def __post_init__(self) -> None:
        self._check("max_length", 1, float("inf"))
        self._check("max_ratio", 1, float("inf"))
        for name in ("max_repetition", "min_script_share", "min_language_probability"):
            self._check(name, 0, 1)

    def _check(self, name: str, least: float, most: float) -> None:
        value = getattr(self, name)
        if value is not None and not least <= value <= most:
            limit = f"{least} or more" if most == float("inf") else f"{least} to {most}"
            raise UserError(f"{type(self).__name__}.{name}={value}: must be {limit}, or None to switch the rule off")


@dataclass(frozen=True)
class FilterConfig(PairRules):
    """The rules of a filtering: those of `PairRules`, all on, changes of lines, and duplicates.

    Every line is first cleaned: control characters and odd spaces (`clean_line`), Unicode NFC, entities, punctuation.
    Then rules look at pairs. Duplicates are sought among the pairs that no other rule drops.

    Little clean text is lost. Each rule for single pairs drops at most 0.3 % of 1,833 sentences of WMT22 (English
    with de, cs, ru, zh, ja) and of 997 of FLORES, and of 795 strings of a program's interface, apart from markup,
    copies and lines in the other script, at most 0.8 %.

    Attributes:
      unescape_entities: `&amp;` and its like become the characters that they stand for.
      normalize_punctuation: quotes, dashes and the like become their plain forms, as the language writes them
        (`normalize_punctuation`); full-width punctuation of Chinese and Japanese stays.
      duplicates: what may occur once only: `pair`, `source`, `target`, several of them, or nothing. Letter case, width
        and compatibility forms (NFKC) make no difference. The first one is kept. In text of one language all of them
        mean its lines.
      near_duplicate_similarity: Jaccard similarity from which a pair is more likely than not taken for a repetition of
        an earlier one (`near_duplicate_probability` is the whole curve); of sets of character 4-grams, 2-grams in
        Chinese and Japanese.
    """

    max_length: float | None = 250
    max_ratio: float | None = 3.0
    drop_copies: bool = True
    drop_markup: bool = True
    max_repetition: float | None = 0.5
    min_script_share: float | None = 0.5
    min_language_probability: float | None = 0.1
    unescape_entities: bool = True
    normalize_punctuation: bool = True
    duplicates: tuple[str, ...] = ("pair",)
    near_duplicate_similarity: float | None = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("near_duplicate_similarity", 0.5, 0.98)
        for key in self.duplicates:
            if key not in KEYS:
                raise UserError(f"FilterConfig.duplicates={self.duplicates!r}: {key!r} is none of {', '.join(KEYS)}")


@dataclass(frozen=True)
class Filtering:
    """Corpora and the rules they are filtered by: what a gin file for `t5x_ext clean` describes.

    Attributes:
      corpora: parallel ones, and ones of one language (`corpora.monolingual_text`).
      config: the rules.
      held_out: likewise, what models are tested on: none of its lines stays in the corpora.
    """

    corpora: tuple[Corpus, ...]
    config: FilterConfig = FilterConfig()
    held_out: tuple[Corpus, ...] = ()

    def __post_init__(self) -> None:
        if not self.corpora:
            raise UserError("Filtering.corpora: there is no corpus; give at least one")
