from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

import t5x_ext
from t5x_ext.cli.decoding import decode_config, define_decode_flags
from t5x_ext.cli.flags import parse
from t5x_ext.cli.main import VERBS, main
from t5x_ext.cli.messages import UsageError
from t5x_ext.decode import Beam, DecodeConfig, Greedy, MinimumLength, NoRepeatNgrams, Sample, Translator


def run(capsys, command):
    """Runs a command in this process; its standard output."""
    capsys.readouterr()
    assert main(command.split()) == 0
    return capsys.readouterr().out


def test_every_verb_has_help(capsys):
    for verb in VERBS:
        out = run(capsys, f"{verb} --help")
        assert out.startswith(f"usage: t5x_ext {verb} ")
        assert "--json_out=TEXT" in out
        assert "repeat this option" not in out


@pytest.mark.parametrize(
    ("flags", "config"),
    [
        ("", DecodeConfig()),
        ("--beam_size=4 --n_best=2 --alpha=0.6 --length_penalty=gnmt", DecodeConfig(Beam(4, 2, "gnmt", 0.6))),
        ("--strategy=greedy --alpha=0.5", DecodeConfig(Greedy(alpha=0.5))),
        (
            "--strategy=sample --n_best=7 --temperature=0.5 --top_k=9 --top_p=0.9 --seed=-4",
            DecodeConfig(Sample(n_best=7, temperature=0.5, top_k=9, top_p=0.9, seed=-4)),
        ),
        (
            "--max_length_ratio=1.5 --max_length_extra=3 --max_source_length=64 --batch_tokens=99",
            DecodeConfig(max_length_ratio=1.5, max_length_extra=3, max_source_length=64, batch_tokens=99),
        ),
        (
            "--no_repeat_ngrams=3 --minimum_length=2",
            DecodeConfig(constraints=(MinimumLength(2), NoRepeatNgrams(3))),
        ),
        ("--strategy=outside_search.Echo --n_best=3", "Echo(n_best=3, scale=1.0)"),
        ("--strategy=outside_search.LOUD", "Echo(n_best=1, scale=9.0)"),
    ],
)
def test_decode_flags_are_the_fields_of_searches_and_configuration(outside_search, flags, config):
    found = decode_config(parse(define_decode_flags, flags.split()))
    assert (repr(found.search) if isinstance(config, str) else found) == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--strategy=greedy --beam_size=3", "--beam_size does not go with --strategy=greedy"),
        ("--seed=3", "--seed does not go with --strategy=beam"),
        ("--strategy=outside_search.Echo --beam_size=3", "--beam_size does not go with --strategy=outside_search.Echo"),
        ("--strategy=outside_search.LOUD --n_best=2", "--n_best does not go with --strategy=outside_search.LOUD"),
        (
            "--strategy=outside_search.Ecko",
            "--strategy=outside_search.Ecko: outside_search has no 'Ecko'; did you mean ",
        ),
        ("--strategy=nowhere.Echo", "--strategy=nowhere.Echo: cannot import nowhere: No module named 'nowhere'"),
    ],
)
def test_flags_of_other_searches_and_unknown_searches_are_refused(outside_search, flags, message):
    with pytest.raises(UsageError) as error:
        decode_config(parse(define_decode_flags, flags.split()))
    assert str(error.value).startswith(message)


@pytest.fixture
def outside_search(tmp_path, monkeypatch):
    """A module of a user with a search in it."""
    (tmp_path / "outside_search.py").write_text(OUTSIDE_SEARCH)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "outside_search", raising=False)


OUTSIDE_SEARCH = '''
from dataclasses import dataclass

import jax.numpy as jnp

from t5x_ext.decode import Hypotheses


@dataclass(frozen=True)
class Echo:
    """The source is its own translation."""

    n_best: int = 1
    scale: float = 1.0
    rows_per_source = 1

    def __call__(self, model, params, inputs):
        rows, size = inputs.source.shape
        length = min(size, inputs.max_length - inputs.prefix.shape[1])
        words = jnp.where(jnp.arange(length) < inputs.source_lengths[:, None], inputs.source[:, :length], inputs.eos_id)
        tokens = jnp.full((rows, self.n_best, inputs.max_length), inputs.eos_id)
        tokens = tokens.at[:, :, : inputs.prefix.shape[1]].set(inputs.prefix[:, None])
        tokens = tokens.at[:, :, inputs.prefix.shape[1] : inputs.prefix.shape[1] + length].set(words[:, None])
        lengths = jnp.full((rows, self.n_best), inputs.max_length)
        return Hypotheses(tokens, lengths, jnp.full(lengths.shape, self.scale))


LOUD = Echo(scale=9.0)
'''


def test_a_search_from_outside_translates_and_is_evaluated(in_workplace, outside_search, capsys, tmp_path):
    """By its import path in commands, as an object in the library."""
    lines = (in_workplace / "test.en").read_text().splitlines()
    strategy = "--strategy=outside_search.LOUD"
    assert run(capsys, f"translate --run_dir=out --input=test.en {strategy}").splitlines() == lines
    result = run(capsys, f"evaluate --run_dir=out --source=test.en --reference=test.en {strategy} --json_out=-")
    assert json.loads(result)["exact_match"] == 100
    search = sys.modules["outside_search"].Echo()
    assert t5x_ext.load("out").translate(lines, config=DecodeConfig(search)) == lines


def test_train_writes_a_run_folder(in_workplace):
    results = json.loads((in_workplace / "out/results.json").read_text())
    assert results["steps"] == 12
    assert set(results["directions"]) == {"en-de"}
    config = (in_workplace / "out/config.gin").read_text()
    assert "train1/t5x_ext.corpora.ParallelText.source_path = 'train.en'" in config
    assert " at 0x" not in config


def test_the_resolved_configuration_is_a_gin_file_of_the_same_run(in_workplace):
    from t5x_ext.cli.gin_config import build_run

    text = (in_workplace / "out/config.gin").read_text()
    again, same_text = build_run(["out/config.gin"])
    assert same_text == text
    assert again.steps == 12


def test_train_again_says_what_it_has(in_workplace, capsys):
    flags = (
        "train --gin_file=tiny.gin --train_source=train.en --train_target=train.de --valid_source=valid.en "
        "--valid_target=valid.de --test_source=test.en --test_target=test.de --source_language=en --target_language=de"
    )
    results = json.loads(run(capsys, f"{flags} --run_dir=out --json_out=-"))
    assert results["steps"] == 12
    assert results["directions"] == json.loads((in_workplace / "out/results.json").read_text())["directions"]


def test_train_from_another_run(in_workplace, capsys, tmp_path):
    flags = (
        f"train --gin_file=tiny.gin --train_source=train.de --train_target=train.en --source_language=de "
        f"--target_language=en --run_dir={tmp_path}/tuned --init_from=out:8 --steps=1 --gin.Run.log_every=1"
    )
    out = run(capsys, f"{flags} --gin.inverse_sqrt.peak=1e-9 --bidirectional")
    assert "1 updates" in out
    ours = t5x_ext.checkpoints.CheckpointStore(tmp_path / "tuned/checkpoints").restore_params("last")
    theirs = t5x_ext.checkpoints.CheckpointStore("out/checkpoints").restore_params(8)
    np.testing.assert_allclose(ours["decoder"]["final_norm"]["scale"], theirs["decoder"]["final_norm"]["scale"])
    assert t5x_ext.load(str(tmp_path / "tuned"), "last").directions == ("de-en", "en-de")


def test_translate_keeps_lines_and_equals_the_library(in_workplace, capsys, tmp_path):
    expected = t5x_ext.load("out").translate((in_workplace / "test.en").read_text().splitlines())
    run(capsys, f"translate --run_dir=out --input=test.en --output={tmp_path}/hyp.de --json_out={tmp_path}/speed.json")
    assert (tmp_path / "hyp.de").read_text().splitlines() == expected
    assert json.loads((tmp_path / "speed.json").read_text())["lines"] == len(expected) == 12
    assert run(capsys, "translate --run_dir=out --input=test.en").splitlines() == expected


def test_an_ensemble_is_that_of_the_library(in_workplace, capsys):
    run(capsys, "average --run_dir=out --steps=8 --output=eight")
    flags = "--ensemble=out --ensemble_average=probability --checkpoint=last --source=test.en --target=test.de"
    out = run(capsys, f"score --run_dir=eight {flags}")
    members = [Translator.from_run(run_dir, "last") for run_dir in ("eight", "out")]
    shutil.rmtree("eight")
    texts = ((in_workplace / f"test.{code}").read_text().splitlines() for code in ("en", "de"))
    expected = [score.log_prob for score in Translator.ensemble(members, "probability").score(*texts)]
    assert [float(line.split("\t")[0]) for line in out.splitlines()] == pytest.approx(expected, abs=1e-4)


def test_translate_standard_input(in_workplace, capsys, monkeypatch):
    stdin = types.SimpleNamespace(buffer=io.BytesIO(b"red tree\n\none\r\n"), isatty=lambda: False)
    monkeypatch.setattr("sys.stdin", stdin)
    out = run(capsys, "translate --run_dir=out --n_best=2 --beam_size=2 --max_length_extra=2")
    assert re.fullmatch(r"(0 \|\|\| .* \|\|\| -\d+\.\d+\n){2}1 \|\|\|  \|\|\| 0\.0+\n(2 \|\|\| .*\n){2}", out)


def test_score_is_the_log_probability_of_the_library(in_workplace, capsys, tmp_path):
    out = run(capsys, f"score --run_dir=out --source=test.en --target=test.de --json_out={tmp_path}/sum.json")
    rows = [line.split("\t") for line in out.splitlines()]
    sources, targets = ((in_workplace / f"test.{code}").read_text().splitlines() for code in ("en", "de"))
    scores = t5x_ext.load("out").score(sources, targets)
    for (log_prob, tokens, perplexity), score in zip(rows, scores, strict=True):
        assert float(log_prob) == pytest.approx(score.log_prob, abs=1e-5)
        assert int(tokens) == score.num_tokens
        assert float(perplexity) == pytest.approx(math.exp(-score.log_prob / score.num_tokens), rel=1e-3)
    summary = json.loads((tmp_path / "sum.json").read_text())
    assert summary["tokens"] == sum(score.num_tokens for score in scores)
    assert summary["perplexity"] == pytest.approx(math.exp(-summary["log_prob"] / summary["tokens"]))


def test_evaluate_files_with_baseline_and_domains(in_workplace, capsys, tmp_path):
    lines = (in_workplace / "valid.de").read_text().splitlines()
    (tmp_path / "worse.de").write_text("".join(line[::-1] + "\n" for line in lines))
    (tmp_path / "domains").write_text("".join(f"{'ab'[i % 2]}\n" for i in range(len(lines))))
    command = (
        f"evaluate --hypothesis=valid.de --reference=valid.de --reference={tmp_path}/worse.de --target_language=de "
        f"--baseline={tmp_path}/worse.de --domains={tmp_path}/domains --ter"
    )
    result = json.loads(run(capsys, f"{command} --json_out=-"))
    assert (result["bleu"], result["exact_match"], result["ter"]) == (pytest.approx(100), 100, 0)
    assert "nrefs:2" in result["signature"]
    assert {name: score["lines"] for name, score in result["domains"].items()} == {"a": 10, "b": 10}
    assert result["baseline"]["BLEU"]["difference"] == pytest.approx(0)  # it equals the second reference
    out = run(capsys, command)
    assert "p = 1.0000" in out
    assert "13a" in out


def test_evaluate_lets_a_run_translate_first(in_workplace, capsys, tmp_path):
    command = f"evaluate --run_dir=out --source=test.en --reference=test.de --output={tmp_path}/hyp.de --json_out=-"
    result = json.loads(run(capsys, command))
    hypotheses = t5x_ext.load("out").translate((in_workplace / "test.en").read_text().splitlines())
    assert (tmp_path / "hyp.de").read_text().splitlines() == hypotheses
    from t5x_ext.evaluate import evaluate_texts

    references = (in_workplace / "test.de").read_text().splitlines()
    assert result == evaluate_texts(hypotheses, references, "de").to_json()


def test_average_is_the_mean_of_the_weights(in_workplace, capsys, tmp_path):
    from t5x_ext.checkpoints import CheckpointStore

    run(capsys, f"average --run_dir=out --steps=8,12 --output={tmp_path}/mean")
    parts = [CheckpointStore("out/checkpoints").restore_params(step) for step in (8, 12)]
    mean = CheckpointStore(tmp_path / "mean/checkpoints").restore_params()
    table = [tree["embedding"]["table"] for tree in (*parts, mean)]
    np.testing.assert_allclose(table[2], (table[0].astype(np.float64) + table[1]) / 2, rtol=1e-6)
    assert len(t5x_ext.load(str(tmp_path / "mean")).translate(["red tree"])) == 1
    by_last = json.loads(run(capsys, f"average --run_dir=out --last=2 --output={tmp_path}/last --json_out=-"))
    assert by_last["steps"] == [8, 12]
    by_best = json.loads(run(capsys, f"average --run_dir=out --best=2 --output={tmp_path}/best --json_out=-"))
    assert by_best["steps"] == [6, 12]  # only these were measured
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last", "mean"]


def test_cache_prepares_what_training_uses_from_a_table_and_a_given_vocabulary(in_workplace, capsys, tmp_path):
    sources, targets = ((in_workplace / f"train.{code}").read_text().splitlines() for code in ("en", "de"))
    (tmp_path / "train.tsv").write_text("".join(f"{s}\t{t}\n" for s, t in zip(sources, targets)))
    trained = run(capsys, f"vocab --input=train.en --input=train.de --size=290 --output={tmp_path}/v --json_out=-")
    flags = (
        f"--gin_file=tiny.gin --train_tsv={tmp_path}/train.tsv --source_language=en --target_language=qaa "
        f"--vocabulary={tmp_path}/v --run_dir={tmp_path}/run --cache_dir={tmp_path}/caches"
    )
    out = run(capsys, f"cache {flags} --preview=2")
    assert "300 of 300 pairs" in out
    assert "row 1, en-qaa: " in out
    assert json.loads(run(capsys, f"cache {flags} --json_out=-"))["rates"] == {"en-qaa": 1.0}
    (cache,) = (tmp_path / "caches").iterdir()
    written = cache.stat().st_mtime_ns
    run(capsys, f"train {flags} --steps=1")
    assert cache.stat().st_mtime_ns == written
    described = json.loads(run(capsys, f"info --run_dir={tmp_path}/run --json_out=-"))
    assert described["vocabulary"] == {"size": json.loads(trained)["size"] + 2, "languages": ["en", "qaa"]}
    assert described["directions"] == ["en-qaa"]


def test_info(in_workplace, capsys):
    described = json.loads(run(capsys, "info --run_dir=out --json_out=-"))
    assert described["checkpoints"] == [6, 8, 12]
    assert described["encoder_layer_map"] == [0, 0]
    assert described["parameters"] == json.loads((in_workplace / "out/results.json").read_text())["parameters"]
    assert "60,915,712" in run(capsys, "info --preset=base")
    assert re.search(r"embed_dim +64\n", run(capsys, "info --gin_file=tiny.gin --gin.VegaTiny.embed_dim=64"))


def test_doctor(capsys, tmp_path, monkeypatch):
    from t5x_ext.cli import doctor

    result = json.loads(run(capsys, f"doctor --run_dir={tmp_path} --json_out=-"))
    states = {finding["name"]: finding["state"] for finding in result["findings"]}
    assert result["ok"]
    assert set(states.values()) <= {"ok", "untested", "absent"}
    assert {"jax", "jaxlib", "flax", "sentencepiece", "devices", "run folder", "gin files"} <= set(states)

    versions = {"jax": "0.10.2", "jaxlib": "0.9.1", "flax": "0.13.0", "optax": "0.1.0"}
    monkeypatch.setattr(doctor.metadata, "version", lambda name: versions.get(name, "1"))
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["flax<0.13,>=0.12.8", "optax>=0.2", "nothere>=1"])
    texts = {finding.name: (finding.state, finding.text) for finding in doctor.packages()}
    assert texts["flax"] == ("untested", "0.13.0 is too new; tested: <0.13,>=0.12.8")
    assert texts["optax"] == ("untested", "0.1.0 is too old; tested: >=0.2")
    assert texts["jaxlib"] == ("broken", "0.9.1 does not belong to jax 0.10.2")
    assert texts["nothere"][0] == "broken"
    assert doctor.write_access("/proc/1/x").state == "broken" or doctor.write_access("/proc/1/x").text


def test_no_tensorflow_in_a_whole_command(workplace, tmp_path):
    script = (
        "import sys; from t5x_ext.cli.main import main; code = main(sys.argv[1:]);"
        "assert 'tensorflow' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", script, "evaluate", "--run_dir=out", "--source=test.en", "--reference=test.de"]
    done = subprocess.run([*command, "--strategy=greedy"], cwd=workplace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "BLEU" in done.stdout
    console = shutil.which("t5x_ext", path=f"{sys.prefix}/bin")
    if console:
        refused = subprocess.run([console, "translate"], cwd=tmp_path, capture_output=True, text=True)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.startswith("t5x_ext translate: --run_dir is missing")
