"""What models write to learn from, with stand-in models whose translations are known."""

from __future__ import annotations

import hashlib
import math
import random

import pytest
from sacrebleu.metrics.chrf import CHRF
from stand_ins import Given, StandIn, opener, read

from t5x_ext.contracts import UserError
from t5x_ext.corpora.noise import WordNoise
from t5x_ext.decode import DecodeConfig, Greedy, Sample
from t5x_ext.pipeline import Pipeline, PipelineFolder, TextFiles, decoding, execute, workspace
from t5x_ext.pipeline.workspace import SCRATCH
from t5x_ext.vega_mt import CycleTranslate, Synthesize

GREEDY, SAMPLING = DecodeConfig(Greedy()), DecodeConfig(Sample(top_k=10))
PAIRS = (("one", "eins"), ("two", "zwei"), ("", "nichts"))
BITEXT = Given("bitext", texts=(("a", ("en", "de"), PAIRS),))
MONO = Given("mono", texts=(("m", ("de",), (("drei",), ("vier",))),))
MODEL = Given("model", directions=("en-de", "de-en"))


def spelt(source: str, target: str, line: str) -> str:
    """A translation that says what it was made from."""
    return f"{line}>{target}" if line else ""


# Bidirectional self-training


def test_decoded_alike_a_text_serves_both_roles(tmp_path):
    model = StandIn(spelt)
    stage = Synthesize("round", "model", ("bitext", "mono"), forward=GREEDY, backward=GREEDY)
    made = execute(Pipeline((BITEXT, MONO, MODEL, stage)), tmp_path, opener=opener(model=model))["round"]
    assert made.corpora == (
        TextFiles(
            "bitext.a.forward.en-de",
            ("en", "de"),
            ("bitext/a.en", "round/bitext.a.forward.en-de.de"),
            lines=3,
            synthetic="target",
        ),
        TextFiles(
            "bitext.a.forward.de-en",
            ("de", "en"),
            ("bitext/a.de", "round/bitext.a.forward.de-en.en"),
            lines=3,
            synthetic="target",
        ),
        TextFiles(
            "mono.m.forward.de-en",
            ("de", "en"),
            ("mono/m.de", "round/mono.m.forward.de-en.en"),
            lines=2,
            synthetic="target",
        ),
    )
    assert read(tmp_path, "round/bitext.a.forward.en-de.de") == ["one>de", "two>de", ""]
    assert read(tmp_path, "round/mono.m.forward.de-en.en") == ["drei>en", "vier>en"]
    assert model.calls == [("en", "de", 3), ("de", "en", 3), ("de", "en", 2)]
    assert made.counts == {"lines": 8}


def test_parallel_and_monolingual_text_of_one_corpus_may_be_called_the_same(tmp_path):
    mono = Given("mono", texts=(("a", ("de",), (("drei",),)),))
    stage = Synthesize("round", "model", ("bitext", "mono"), forward=GREEDY, backward=GREEDY)
    made = execute(Pipeline((BITEXT, mono, MODEL, stage)), tmp_path, opener=opener(model=StandIn(spelt)))["round"]
    assert [text.lines for text in made.corpora] == [3, 3, 1]
    assert read(tmp_path, made.corpora[1].files[1]) == ["eins>en", "zwei>en", "nichts>en"]
    assert read(tmp_path, made.corpora[2].files[1]) == ["drei>en"]


def test_decoded_differently_each_role_is_a_text_for_one_direction(tmp_path):
    stage = Synthesize("round", "model", ("mono",), forward=GREEDY, backward=SAMPLING)
    made = execute(Pipeline((MONO, MODEL, stage)), tmp_path, opener=opener(model=StandIn(spelt)))["round"]
    forward, backward = made.corpora
    assert (forward.languages, forward.synthetic, forward.one_way) == (("de", "en"), "target", True)
    assert (backward.languages, backward.synthetic, backward.one_way) == (("en", "de"), "source", True)
    # What is real is the target of back-translation and the source of self-training.
    assert forward.file_in("de") == backward.file_in("de") == "mono/m.de"
    assert forward.file_in("en") != backward.file_in("en")


@pytest.mark.parametrize("backward", [GREEDY, SAMPLING])
def test_noise_is_on_the_sources_of_back_translation_only_and_the_translation_is_kept(tmp_path, backward):
    noise = WordNoise(drop=0.3, seed=5)
    model = StandIn(lambda source, target, line: f"das ist {line} , sagt er" if line else "")
    stage = Synthesize("round", "model", ("bitext",), ("en-de",), GREEDY, backward, noise)
    made = execute(Pipeline((BITEXT, MODEL, stage)), tmp_path, opener=opener(model=model))["round"]
    forward, back = made.corpora
    assert (forward.synthetic, forward.one_way, back.synthetic, back.one_way) == ("target", True, "source", True)
    clean = ["das ist one , sagt er", "das ist two , sagt er", ""]
    assert read(tmp_path, forward.files[1]) == clean
    noisy = read(tmp_path, back.files[0])
    assert noisy == [noise(line, number, "de") for number, line in enumerate(clean)] != clean
    assert noisy[2] == ""
    # What people wrote is as it was, on either side; equal searches are done once.
    assert forward.files[0] == back.files[1] == "bitext/a.en"
    assert read(tmp_path, "bitext/a.en") == [english for english, _ in PAIRS]
    assert len(model.calls) == (1 if backward is GREEDY else 2)
    raw = sorted(path.name for path in (tmp_path / "round").glob("*.de") if "noisy" not in path.name)
    assert [read(tmp_path, f"round/{name}") for name in raw] == [clean] * len(model.calls)


def test_noise_without_back_translation_is_refused():
    with pytest.raises(UserError, match=r"Synthesize\.noise is for the sources of back-translation"):
        Synthesize("round", "model", ("bitext",), backward=None, noise=WordNoise())


def test_one_role_or_one_direction_alone(tmp_path):
    model = opener(model=StandIn(spelt))
    stage = Synthesize("round", "model", ("bitext",), directions=("en-de",), forward=None, backward=SAMPLING)
    (text,) = execute(Pipeline((BITEXT, MODEL, stage)), tmp_path / "one", opener=model)["round"].corpora
    assert (text.languages, text.files[1], text.synthetic) == (("de", "en"), "bitext/a.en", "source")
    with pytest.raises(UserError, match="are both None"):
        Synthesize("round", "model", ("bitext",), forward=None, backward=None)
    none = Synthesize("round", "model", ("mono",), directions=("en-de",))
    with pytest.raises(UserError, match="there is no text to translate in en-de, or all translations are empty"):
        execute(Pipeline((MONO, MODEL, none)), tmp_path / "two", opener=model)
    other = Synthesize("round", "model", ("mono",), directions=("de-cs",))
    with pytest.raises(UserError, match="'model' has no model for de-cs; it has en-de, de-en"):
        execute(Pipeline((MONO, MODEL, other)), tmp_path / "three", opener=model)


def test_what_says_nothing_is_left_out(tmp_path, caplog):
    silent = StandIn(lambda source, target, line: "" if target == "en" else line)
    stage = Synthesize("round", "model", ("bitext", "mono"), forward=GREEDY, backward=GREEDY)
    made = execute(Pipeline((BITEXT, MONO, MODEL, stage)), tmp_path / "some", opener=opener(model=silent))["round"]
    assert [text.name for text in made.corpora] == ["bitext.a.forward.en-de"]
    assert "round/mono.m.forward.de-en.en: skipped, because every translation is empty" in caplog.text
    cycle = CycleTranslate("cycle", "model", "lm", ("mono",), ("de-en",), tau=0.0)
    with pytest.raises(
        UserError, match="stage 'cycle': there is no text to translate in de-en, or all translations are empty"
    ):
        execute(Pipeline((MONO, MODEL, LM, cycle)), tmp_path / "none", opener=opener(model=silent))


def test_texts_that_are_done_are_not_decoded_again(tmp_path):
    class Killed(BaseException):
        pass

    def kills(source, target, line):
        if (target, line) == ("en", "eins"):
            raise Killed
        return spelt(source, target, line)

    stage = Synthesize("round", "model", ("bitext", "mono"), forward=GREEDY, backward=GREEDY)
    pipeline = Pipeline((BITEXT, MONO, MODEL, stage))
    with pytest.raises(Killed):
        execute(pipeline, tmp_path / "out", opener=opener(model=StandIn(kills)))
    after = StandIn(spelt)
    execute(pipeline, tmp_path / "out", opener=opener(model=after))
    assert after.calls == [("de", "en", 3), ("de", "en", 2)]
    execute(pipeline, tmp_path / "whole", opener=opener(model=StandIn(spelt)))
    artefacts = [(tmp_path / out / "round/artefact.json").read_text() for out in ("out", "whole")]
    assert artefacts[0] == artefacts[1]


# Cycle translation

WORDS = ("der", "das", "Haus", "Hund", "Baum", "alt", "neu", "rot", "geht", "steht", "war", "nicht", "sehr")
LM = Given("lm", directions=("de-de",))


def lines(count: int, seed: int = 0) -> tuple[tuple[str], ...]:
    draw = random.Random(seed)
    return tuple((" ".join(draw.choices(WORDS, k=draw.randint(3, 9))),) for _ in range(count))


def log_prob(line: str) -> float:
    """A score that has nothing to do with the line, but is always the same."""
    return -int.from_bytes(hashlib.sha256(line.encode()).digest()[:4], "little") / 2**32


def there_and_back(source: str, target: str, line: str) -> str:
    """Drops a word, doubles one or changes most, depending on the line; English is German in capitals."""
    if target == "en":
        return line.upper()
    words = line.lower().split()
    change = len(line) % 4
    if change == 0:
        return " ".join(words[:1])
    if change == 1:
        return " ".join([*words, words[0]])
    return " ".join("xyz" if change == 2 else word for word in words)


def cycle(tmp_path, model: StandIn, language_model: StandIn | None, rows, **options):
    mono = Given("mono", texts=(("m", ("de",), rows),))
    stage = CycleTranslate("cycle", "model", "lm", ("mono",), ("de-en",), decode=GREEDY, **options)
    models = {"model": model} | ({} if language_model is None else {"lm": language_model})
    made = execute(Pipeline((mono, MODEL, LM, stage)), tmp_path, opener=opener(**models))["cycle"]
    (text,) = made.corpora
    assert (text.languages, text.synthetic, text.lines) == (("en", "de"), "source", len(rows))
    return list(zip(*(read(tmp_path, file) for file in text.files))), made.counts


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_identity_models_give_the_corpus_unchanged(tmp_path, tau):
    rows = (*lines(20), ("",))
    pairs, counts = cycle(tmp_path, StandIn(), StandIn(log_prob=log_prob), rows, tau=tau)
    assert pairs == [(line, line) for (line,) in rows]
    assert (counts["tried"], counts["replaced"]) == (int(tau * 21), 0)


def test_with_tau_0_it_is_plain_back_translation_and_needs_no_language_model(tmp_path):
    rows = lines(10)
    pairs, counts = cycle(tmp_path, StandIn(there_and_back), None, rows, tau=0.0)
    assert pairs == [(line.upper(), line) for (line,) in rows]
    assert counts == {"lines": 10, "tried": 0, "replaced": 0, "by_length": 0, "by_chrf": 0, "by_score": 0}


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_bad_lines_are_replaced_by_better_ones_that_have_not_drifted(tmp_path, tau, monkeypatch):
    """Against the definition, line by line, over all lines at once and in small pieces."""
    monkeypatch.setattr(decoding, "CHUNK_LINES", 7)
    rows = lines(60)
    pairs, counts = cycle(tmp_path, StandIn(there_and_back), StandIn(log_prob=log_prob), rows, tau=tau)
    threshold = sorted(log_prob(line) for (line,) in rows)[int(tau * 60) - 1]
    expected, found = [], {"lines": 60, "tried": 0, "replaced": 0, "by_length": 0, "by_chrf": 0, "by_score": 0}
    for (line,) in rows:
        z = line.upper()
        other = there_and_back("en", "de", z)
        chosen = line
        if log_prob(line) <= threshold:
            found["tried"] += 1
            if not 0.7 <= len(other) / len(line) <= 1.4:
                found["by_length"] += 1
            elif CHRF().sentence_score(other, [line]).score / 100 < 0.3:
                found["by_chrf"] += 1
            elif log_prob(other) <= log_prob(line):
                found["by_score"] += 1
            else:
                found["replaced"] += 1
                chosen = other
        expected.append((z, chosen))
    assert pairs == expected
    assert counts == found
    assert all(found.values())


def test_scores_go_on_where_they_were_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "CHUNK_LINES", 4)

    class Killed(BaseException):
        pass

    rows = lines(11)
    dear = rows[9][0]

    def kills(line):
        if line == dear:
            raise Killed
        return log_prob(line)

    with pytest.raises(Killed):
        cycle(tmp_path / "out", StandIn(there_and_back), StandIn(log_prob=kills), rows)
    parts = tmp_path / "out" / "cycle" / SCRATCH / "mono.m.cycle.en-de.scores.decoded.parts"
    assert sorted(path.name for path in parts.iterdir()) == ["00000000", "00000001", "work.json"]
    after = StandIn(log_prob=log_prob)
    pairs, counts = cycle(tmp_path / "out", StandIn(there_and_back), after, rows)
    assert after.calls[0] == ("de", "de", 3)
    assert (pairs, counts) == cycle(tmp_path / "whole", StandIn(there_and_back), StandIn(log_prob=log_prob), rows)


def test_scores_are_normalised_by_length(tmp_path):
    class TwoTokens(StandIn):
        def score(self, sources, targets, *languages, **options):
            return [
                one._replace(token_log_probs=one.token_log_probs * 2)
                for one in super().score(sources, targets, *languages)
            ]

    space = workspace.Workspace(
        PipelineFolder(tmp_path), "s", opener=opener(lm=TwoTokens(log_prob=lambda line: -math.pi))
    )
    execute(Pipeline((LM,)), tmp_path)
    (tmp_path / "a.de").write_text("eins\n")
    assert space.score("lm", "a.de", "de", GREEDY, space.scratch("scores")) == [-math.pi]


def test_values_outside_their_range():
    for fields, message in (
        ({"tau": 1.5}, "tau=1.5"),
        ({"min_chrf": -1}, "min_chrf"),
        ({"min_length_ratio": 2}, "first"),
    ):
        with pytest.raises(UserError, match=message):
            CycleTranslate("cycle", "model", "lm", ("mono",), ("de-en",), **fields)


def test_directions_that_cannot_be_are_refused_and_none_is_left_out_unsaid(tmp_path):
    with pytest.raises(UserError, match="direction 'de_en': give two languages"):
        CycleTranslate("cycle", "model", "lm", ("mono",), ("de_en",))
    with pytest.raises(UserError, match="direction 'de_en': give two languages"):
        Synthesize("round", "model", ("mono",), directions=("de_en",))
    cycle = CycleTranslate("cycle", "model", "lm", ("mono",), ("de-en", "cs-en"), tau=0.0)
    with pytest.raises(UserError, match="there is no text to translate in cs-en"):
        execute(Pipeline((MONO, MODEL, LM, cycle)), tmp_path, opener=opener(model=StandIn(spelt)))
