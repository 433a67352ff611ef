"""The rules of a filtering, and how lines are normalised."""

from __future__ import annotations

from dataclasses import dataclass

from t5x_ext.contracts import Corpus, UserError

KEYS = ("pair", "source", "target")


@dataclass(frozen=True)
class PairRules:
    """Rules that look at one pair at a time, all off. None or False switches a rule off.

    Pairs with an empty side are always dropped. The other rules are tried in the order of `PAIR_RULES`, and the first
    that rejects a pair is counted. A token cache applies them to lines cleaned by `clean_line`.

    Lengths are in words between spaces. Chinese and Japanese have no spaces: their length is the number of characters
    over the average number of characters a word (see `length`), so that one limit fits all languages. Words in other
    scripts within them count as words.

    Attributes:
      max_length: most words of either side.
      max_ratio: words of the longer side over those of the shorter one; applied if the longer side has five or more.
      drop_copies: drop pairs whose sides are equal up to letter case and width. Text of one language that is paired
        with itself consists of such pairs.
      drop_markup: drop lines with tags, entities, templates or wiki links.
      max_repetition: share of a line's word bigrams (character bigrams in Chinese and Japanese) that are repetitions;
        applied to lines of at least ten words. The rule also drops lines that repeat one character ten times in a row.
      min_script_share: share of a line's letters that belong to a script of its language. Compared with Chinese and
        Japanese characters, a word in another script counts as one letter. Placeholders, tags and addresses are
        ignored, here and in the next rule.
      min_language_probability: drop lines with at least 24 bytes of letters (8 Chinese characters) whose most probable
        language is another one, if the probability of their own is below this.
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
    """The rules of `PairRules`, all on, normalisation of lines, and removal of duplicates.

    First every line is normalised: control characters and unusual spaces (`clean_line`), Unicode NFC, entities,
    punctuation. Then the rules are applied to pairs. Last, duplicates are removed from the remaining pairs.

    Little clean text is lost. Each rule for single pairs drops at most 0.3 % of 1,833 sentences of WMT22 (English
    with de, cs, ru, zh, ja) and of 997 of FLORES. Of 795 strings of a user interface each drops at most 0.8 %, except
    for the rules for markup, copies and script.

    Attributes:
      unescape_entities: replace `&amp;` and the like by their characters.
      normalize_punctuation: replace quotes, dashes and the like by their plain forms for the language (see
        `normalize_punctuation`); full-width punctuation is kept in Chinese and Japanese.
      duplicates: what must be unique: `pair`, `source`, `target`, several of them, or nothing. Letter case, width and
        compatibility forms (NFKC) are ignored. The first one is kept. In text of one language all of them mean its
        lines.
      near_duplicate_similarity: Jaccard similarity at which a pair is more likely than not dropped as a near duplicate
        of an earlier one (`near_duplicate_probability` is the curve). It compares sets of character 4-grams, of 2-grams
        in Chinese and Japanese.
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
    """Corpora and the rules that filter them: the root of a gin file for `t5x_ext clean`.

    Attributes:
      corpora: parallel ones, and ones of one language (`corpora.monolingual_text`).
      config: the rules.
      held_out: test sets, parallel or of one language; pairs with one of their lines are dropped.
    """

    corpora: tuple[Corpus, ...]
    config: FilterConfig = FilterConfig()
    held_out: tuple[Corpus, ...] = ()

    def __post_init__(self) -> None:
        if not self.corpora:
            raise UserError("Filtering.corpora: there is no corpus; give at least one")
