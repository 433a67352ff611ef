"""The study of Vega-MT in its small form: its figures are those of the texts, and its arms differ in what they say."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from matplotlib.image import imread

from t5x_ext.cli.gin_config import build_parts, build_run
from t5x_ext.pipeline import Pipeline, Train
from t5x_ext.study import Study

QUICK = Path(__file__).with_name("vega_mt_quick.gin")
ARMS = "runs/vega_mt_multi30k_arms.gin"
STUDY = "studies/vega_mt_multi30k.gin"
DIRECTIONS = ("en-de", "de-en", "en-cs", "cs-en")
WORDS = {
    "en": ["a", "the", "dog", "cat", "man", "runs", "sits", "red", "blue", "near", "house", "tree"],
    "de": ["ein", "der", "Hund", "Katze", "Mann", "rennt", "sitzt", "rot", "blau", "am", "Haus", "Baum"],
    "cs": ["jeden", "ten", "pes", "kočka", "muž", "běží", "sedí", "červený", "modrý", "u", "dům", "strom"],
}
# Of the arms one with its control, and one that is scored in two directions only.
FEW = f"""
from __gin__ import dynamic_registration
from t5x_ext import pipeline
from t5x_ext import vega_mt

include '{ARMS}'
pipeline.Pipeline.stages = [
    @bitext/pipeline.Texts(), @past/pipeline.Texts(), @dev/pipeline.Texts(), @test/pipeline.Texts(),
    @clean/pipeline.Clean(),
    @pretrain/pipeline.Train(), @pretrain_test/pipeline.Translate(),
    @bit_switch/pipeline.Train(), @bit_switch_test/pipeline.Translate(),
    @onward1/pipeline.Train(), @onward1_test/pipeline.Translate(),
]
"""
FEW_STUDY = f"""
from __gin__ import dynamic_registration
from t5x_ext import study

include '{STUDY}'
DATA_DIR = '.'
study.Study.arms = [@pretrain/study.Arm(), @bit_switch/study.Arm(), @onward1/study.Arm()]
study.Study.gin_files = ['few.gin', '{QUICK}']
"""


def write_texts(folder: Path) -> None:
    """Sentences of words in an order that is the same in three languages; as many lines as the small form reads."""
    draw = random.Random(0)
    for stem, lines in (("train", 80), ("val", 8), ("test_2016_flickr", 8)):
        sentences = [draw.choices(range(len(WORDS["en"])), k=6) for _ in range(lines)]
        for language, words in WORDS.items():
            text = "".join(" ".join(words[number] for number in sentence) + " .\n" for sentence in sentences)
            (folder / f"{stem}.{language}").write_text(text, encoding="utf-8")


def run_study(folder: Path) -> dict[str, dict]:
    """The arms that were found, by name; programs that run for seconds are compiled quickly."""
    done = subprocess.run(
        [sys.executable, "-m", "t5x_ext", "study", "--gin_file=study.gin", "--output_dir=out", "--json_out=study.json"],
        cwd=folder,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {arm["name"]: arm for arm in json.loads((folder / "study.json").read_text(encoding="utf-8"))["arms"]}


def test_figures_are_those_of_the_translations(tmp_path):
    write_texts(tmp_path)
    (tmp_path / "few.gin").write_text(FEW, encoding="utf-8")
    (tmp_path / "study.gin").write_text(FEW_STUDY, encoding="utf-8")
    run_study(tmp_path)
    learn(tmp_path)
    arms = run_study(tmp_path)
    assert list(arms) == ["pretrain", "bit_switch", "onward1"]
    assert set(arms["bit_switch"]["values"]) == {"bleu", "bleu/en-de", "bleu/en-cs"}
    for name, arm in arms.items():
        by_direction = {key: value["mean"] for key, value in arm["values"].items() if key != "bleu"}
        assert by_direction == pytest.approx({key: bleu(tmp_path, name, key.split("/")[1]) for key in by_direction})
        assert arm["values"]["bleu"]["mean"] == pytest.approx(np.mean(list(by_direction.values())))
    found = arms["onward1"]["values"]
    assert 20 < min(value["mean"] for value in found.values()) < max(value["mean"] for value in found.values()) < 90
    for value in found.values():
        assert value["against"] == "pretrain"
        resampled = value["resampled"]
        assert resampled["low"] <= resampled["difference"] <= resampled["high"]
        assert resampled["difference"] == pytest.approx(value["mean"], abs=0.1)  # of nothing learned
    table = (tmp_path / "out/table.md").read_text(encoding="utf-8")
    assert re.search(
        r"^\| no round, updates of one +\| P1 pretraining, both directions +\| 1 ", table, flags=re.MULTILINE
    )
    picture = imread(tmp_path / "out/figures/arms_bleu.png")
    assert (picture[..., :3].min(axis=2) < 0.9).mean() > 0.005


def learn(folder: Path) -> None:
    """Has an arm of two updates say what is worth scoring, ever less so; takes back what was measured."""
    stage = folder / "out/arms/pipeline/seed_0/onward1_test"
    for wrong, path in enumerate(sorted(stage.glob("test_*"))):
        reference = (folder / f"test_2016_flickr{path.suffix}").read_text(encoding="utf-8").splitlines()
        lines = [line if number > wrong else line.replace(" ", "  x ", 3) for number, line in enumerate(reference)]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (folder / "out/arms/pipeline/seed_0.measured.json").unlink()


def bleu(folder: Path, stage: str, direction: str) -> float:
    """By sacreBLEU itself, of the files as they are stored."""
    source, target = direction.split("-")
    pair = f"en-{target if source == 'en' else source}"
    hypothesis = folder / f"out/arms/pipeline/seed_0/{stage}_test/test_2016_flickr.{pair}.{direction}.{target}"
    lines = [
        path.read_text(encoding="utf-8").splitlines() for path in (hypothesis, folder / f"test_2016_flickr.{target}")
    ]
    return sacrebleu.corpus_bleu(lines[0], [lines[1]]).score


def test_every_arm_of_the_study_is_a_stage_that_translates_and_has_the_control_of_the_pipeline():
    study, _ = build_run([STUDY], root=Study)
    pipeline, _ = build_run([ARMS], root=Pipeline)
    stages = {stage.name: stage for stage in pipeline.stages}
    assert {arm.part for arm in study.arms} == {name for name in stages if name.endswith("_test")}
    controls = {arm.part: study.baseline_of(arm).part for arm in study.arms if study.baseline_of(arm)}
    assert controls.items() >= stages["controlled"].baseline.items()
    trained = {stage.name for stage in pipeline.stages if isinstance(stage, Train)} - {"lm", "past_lm"}
    assert {arm.name for arm in study.arms} >= trained


def settings() -> dict[str, dict[str, str]]:
    """What every stage of the study is bound to, by its name, without scopes."""
    pipeline, texts = build_parts("stages", [ARMS], root=Pipeline)
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
