"""The study of Vega-MT in its small form: its figures are those of the texts, and its arms differ in what they say."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from matplotlib.image import imread

from t5x_ext.cli.gin_config import build_parts
from t5x_ext.pipeline import Pipeline

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
DIRECTIONS = ("en-de", "de-en", "en-cs", "cs-en")
WORDS = {
    "en": ["a", "the", "dog", "cat", "man", "runs", "sits", "red", "blue", "near", "house", "tree"],
    "de": ["ein", "der", "Hund", "Katze", "Mann", "rennt", "sitzt", "rot", "blau", "am", "Haus", "Baum"],
    "cs": ["jeden", "ten", "pes", "kočka", "muž", "běží", "sedí", "červený", "modrý", "u", "dům", "strom"],
}
# Of the arms one with its control, and one that is scored in two directions only.
FEW = """
from __gin__ import dynamic_registration
from t5x_ext import pipeline
from t5x_ext import vega_mt

include '{arms}'
pipeline.Pipeline.stages = [
    @bitext/pipeline.Texts(), @past/pipeline.Texts(), @dev/pipeline.Texts(), @test/pipeline.Texts(),
    @clean/pipeline.Clean(),
    @pretrain/pipeline.Train(), @pretrain_test/pipeline.Translate(),
    @bit_switch/pipeline.Train(), @bit_switch_test/pipeline.Translate(),
    @onward1/pipeline.Train(), @onward1_test/pipeline.Translate(),
    @scores/pipeline.Evaluate(), @controlled/pipeline.Evaluate(),
]
scores/pipeline.Evaluate.translations = ['pretrain_test', 'onward1_test']
scores/pipeline.Evaluate.baseline = 'pretrain_test'
controlled/pipeline.Evaluate.translations = ['pretrain_test', 'bit_switch_test', 'onward1_test']
controlled/pipeline.Evaluate.baseline = 'pretrain_test'
"""


def write_texts(folder: Path) -> None:
    """Sentences of words in an order that is the same in three languages; as many lines as the small form reads."""
    draw = random.Random(0)
    for stem, lines in (("train", 80), ("val", 8), ("test_2016_flickr", 8)):
        sentences = [draw.choices(range(len(WORDS["en"])), k=6) for _ in range(lines)]
        for language, words in WORDS.items():
            text = "".join(" ".join(words[number] for number in sentence) + " .\n" for sentence in sentences)
            (folder / f"{stem}.{language}").write_text(text, encoding="utf-8")


def bench(folder: Path, *flags: str) -> str:
    """What the script prints; programs that run for seconds are compiled quickly."""
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "bench_vega_mt.py"), "--quick", "--data_dir=.", "--output_dir=out", *flags],
        cwd=folder,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_figures_are_those_of_the_translations(tmp_path):
    write_texts(tmp_path)
    (tmp_path / "few.gin").write_text(FEW.format(arms=SCRIPTS / "vega_mt_arms.gin"), encoding="utf-8")
    bench(tmp_path, "--gin_file=few.gin")
    learn(tmp_path)
    printed = bench(tmp_path, "--gin_file=few.gin", "--json_out=study.json", "--figure_out=study.png")
    found = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    rows = {row["stage"]: row for row in found["controlled"]}
    assert list(rows) == ["pretrain", "bit_switch", "onward1"]
    assert found["seconds"].keys() >= rows.keys()
    assert set(rows["bit_switch"]["bleu"]) == {"en-de", "en-cs"}
    assert 20 < min(rows["onward1"]["bleu"].values()) < max(rows["onward1"]["bleu"].values()) < 90
    for row in rows.values():
        for direction, value in row["bleu"].items():
            assert value == pytest.approx(bleu(tmp_path, row["stage"], direction))
        assert row["mean"] == pytest.approx(np.mean(list(row["bleu"].values())))
    for direction, value in rows["onward1"]["bleu"].items():
        assert rows["onward1"]["difference"][direction]["value"] == pytest.approx(value, abs=0.1)
    mean = f"{rows['onward1']['mean']:.1f} (+{rows['onward1']['mean_difference']['value']:.1f}, "
    assert re.search(rf"^\| no round, updates of one \| P1 pretraining.*{re.escape(mean)}", printed, flags=re.MULTILINE)
    assert (imread(tmp_path / "study.png")[..., :3].min(axis=2) < 0.9).mean() > 0.005


def learn(folder: Path) -> None:
    """Has an arm of two updates say what is worth scoring, ever less so; takes the scores back."""
    for wrong, path in enumerate(sorted((folder / "out/onward1_test").glob("test_*"))):
        reference = (folder / f"test_2016_flickr{path.suffix}").read_text(encoding="utf-8").splitlines()
        lines = [line if number > wrong else line.replace(" ", "  x ", 3) for number, line in enumerate(reference)]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for stage in ("scores", "controlled"):
        shutil.rmtree(folder / "out" / stage)


def bleu(folder: Path, stage: str, direction: str) -> float:
    """By sacreBLEU itself, of the files as they lie there."""
    source, target = direction.split("-")
    pair = f"en-{target if source == 'en' else source}"
    hypothesis = folder / f"out/{stage}_test/test_2016_flickr.{pair}.{direction}.{target}"
    lines = [
        path.read_text(encoding="utf-8").splitlines() for path in (hypothesis, folder / f"test_2016_flickr.{target}")
    ]
    return sacrebleu.corpus_bleu(lines[0], [lines[1]]).score


def settings() -> dict[str, dict[str, str]]:
    """What every stage of the study is bound to, by its name, without scopes."""
    pipeline, texts = build_parts("stages", [str(SCRIPTS / "vega_mt_arms.gin")], root=Pipeline)
    found = {}
    for stage, text in zip(pipeline.stages, texts):
        pairs = re.findall(rf"^{stage.name}/t5x_ext\.(?:\w+\.)*?(\w+\.\w+) = (.*)$", text, flags=re.MULTILINE)
        found[stage.name] = {name: value.replace(f"@{stage.name}/", "@") for name, value in pairs}
    return found


def test_arms_differ_from_their_controls_in_what_they_say():
    bound = settings()
    pairs = {
        ("bit_forward", "pretrain"): {"DataConfig.bidirectional_steps"},
        ("bit_switch", "bit_forward"): {"DataConfig.bidirectional_steps"},
        ("temperature_5", "temperature_1"): {"BatchConfig.temperature"},
        ("temperature_inf", "temperature_1"): {"BatchConfig.temperature"},
        ("cycle0", "cycle"): {"CycleTranslate.tau"},
        ("cycled", "plain"): {"Train.corpora"},
        ("no_cycle", "retrain1"): {"Train.corpora"},
        ("onward1", "no_cycle"): {"Train.corpora", "Train.upsample", "Train.provenance"},
        ("onward2", "onward1"): {"Train.init_from"},
        ("onward1_again", "onward1"): {"Run.seed"},
        ("retrain1_again", "retrain1"): {"Run.seed"},
        ("stay", "retrain2"): {"Train.corpora"},
        ("stay", "retrain1"): {"Train.init_from"},
        ("tuned", "generalise"): {"Train.corpora", "Train.upsample", "Train.provenance", "CheckpointConfig.keep_last"},
        ("further", "finetune"): {"Train.per_direction", "Run.steps", "linear_decay.total_steps"},
    }
    for (one, other), expected in pairs.items():
        names = bound[one].keys() | bound[other].keys()
        different = {name for name in names if bound[one].get(name) != bound[other].get(name)}
        assert {name for name in different if not name.endswith(".name")} == expected, (one, other)


def test_controls_have_as_many_updates():
    bound = settings()
    steps = {name: int(found["Run.steps"]) for name, found in bound.items() if "Run.steps" in found}
    assert steps["further"] == len(DIRECTIONS) * steps["finetune"]
    assert bound["further"]["linear_decay.total_steps"] == bound["further"]["Run.steps"]
    assert steps["onward1"] == steps["onward2"] == steps["retrain1"] == steps["retrain2"]
    assert int(bound["bit_switch"]["DataConfig.bidirectional_steps"]) * 3 == steps["pretrain"]


def test_intervals_are_of_what_bleu_is_summed_from(tmp_path, monkeypatch):
    """The sums give sacreBLEU's score; equal translations differ by nothing; better ones by an interval about it."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import vega_mt_study

    draw = random.Random(1)
    references = [" ".join(draw.choices("abcdefgh", k=9)) for _ in range(60)]
    worse = [line[:-4] + draw.choice(("x y", "g h")) for line in references]
    better = [one if number % 3 else two for number, (one, two) in enumerate(zip(references, worse))]
    lines = {"before": worse, "after": better}
    counts = {}
    for name, text in lines.items():
        counts[name] = vega_mt_study.counts_of(text, references, "en")
        exact = sacrebleu.corpus_bleu(text, [references]).score
        assert vega_mt_study.bleu_of_counts(counts[name].sum(axis=0)) == pytest.approx(exact)
    same = vega_mt_study.differences({"en-de": (counts["before"], counts["before"])})
    assert same["en-de"] == same["mean"] == (0, 0, 0)
    two = vega_mt_study.differences({"en-de": tuple(counts.values()), "de-en": tuple(counts.values())})
    # The lines are the same in both directions, so the second one tells nothing new.
    assert two["mean"] == pytest.approx(two["en-de"])
    assert 0 < two["mean"].low < two["mean"].value < two["mean"].high < 100
