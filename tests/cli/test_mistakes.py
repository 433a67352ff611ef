"""Every bad input that a user can give: one line on standard error, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil

import pytest

from t5x_ext.cli.main import main

TRAIN = "train --gin_file=tiny.gin --source_language=en --target_language=de --run_dir=new"
PAIR = "--train_source=train.en --train_target=train.de"
DECODE = "translate --run_dir=out --output=new"


def snapshot(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*")}


def complaint(capfd, command):
    """The one line of a refused command."""
    capfd.readouterr()
    assert main(command.split()) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    verb = command.split()[0]
    assert captured.err.startswith(f"t5x_ext {verb}: ")
    return captured.err.removeprefix(f"t5x_ext {verb}: ").rstrip("\n")


@pytest.fixture(scope="module")
def bad_place(workplace, tmp_path_factory):
    """A copy of the workplace with everything in it that a user can get wrong."""
    place = tmp_path_factory.mktemp("bad") / "place"
    shutil.copytree(workplace, place)
    lines = (place / "train.en").read_text().splitlines(keepends=True)
    (place / "short.en").write_text("".join(lines[:-3]))
    (place / "latin.en").write_bytes("".join(lines[:2]).encode() + "café\n".encode("latin-1"))
    (place / "empty.en").write_bytes(b"")
    (place / "broken.en.gz").write_bytes(b"\x1f\x8b broken")
    (place / "words.model").write_text("no model")
    (place / "nothing").mkdir()
    shutil.copytree(place / "out", place / "other_vocabulary")
    assert main(f"vocab --input={place}/train.de --size=290 --output={place}/vocabulary".split()) == 0
    shutil.rmtree(place / "other_vocabulary/vocabulary")
    shutil.copytree(place / "vocabulary", place / "other_vocabulary/vocabulary")
    shutil.copytree(place / "out", place / "other_model")
    record = json.loads((place / "out/model.json").read_text())
    record["model"]["mlp_dim"] = 96
    (place / "other_model/model.json").write_text(json.dumps(record))
    (place / "not_json").mkdir()
    (place / "not_json/model.json").write_text("{")
    return place


MISTAKES = {
    # Files
    f"{TRAIN} --train_source=trian.en --train_target=train.de": "trian.en: no such file",
    f"{TRAIN} --train_source=nothing --train_target=train.de": "nothing: is a folder",
    f"{TRAIN} --train_source=short.en --train_target=train.de": "short.en has 297 lines but train.de has 300",
    f"{TRAIN} {PAIR} --valid_source=short.en --valid_target=valid.de": "short.en has 297 lines but valid.de has 20",
    f"{TRAIN} {PAIR} --test_source=short.en --test_target=test.de": "short.en has 297 lines but test.de has 12",
    f"{TRAIN} --train_source=latin.en --train_target=train.de": "latin.en, line 3: not UTF-8",
    f"{TRAIN} --train_source=empty.en --train_target=train.de": "empty.en: the file is empty",
    f"{TRAIN} --train_source=broken.en.gz --train_target=train.de": "broken.en.gz, after line 0: the gzip file is ",
    f"{TRAIN} --train_tsv=train.en": "train.en, line 1: 1 tab-separated column(s), 2 are needed",
    f"{TRAIN} --train_source=train.en": "--train_source is given 1 times, --train_target 0 times; they go in pairs",
    f"{TRAIN} {PAIR} --vocabulary=words.model": "words.model: not a SentencePiece model",
    f"{TRAIN} {PAIR} --vocabulary=nowhere.model": "nowhere.model: no such SentencePiece model file",
    f"train {PAIR} --run_dir=new": "--source_language is missing: ",
    f"{TRAIN}": "--source_language goes with text files",
    "train --run_dir=new": "--train_source is missing: give two text files, a --train_tsv, or a --gin_file",
    f"train --gin_file=tiny.gin {PAIR}": "--run_dir is missing: ",
    # Languages
    f"{TRAIN} {PAIR} --source_language=xx": "unknown language 'xx'",
    f"{TRAIN} {PAIR} --source_language=german": "unknown language 'german'; did you mean de (German)?",
    f"{TRAIN} {PAIR} --source_language=pt-br": "unknown language 'pt-br'; did you mean pt_BR",
    f"{TRAIN} {PAIR} --source_language=de": "--source_language and --target_language are both de",
    f"{DECODE} --input=test.en --target_language=xx": "unknown language 'xx'",
    f"{DECODE} --input=test.en --target_language=fr": "?-fr is not a direction of this model; it translates en-de",
    # Flags
    f"{TRAIN} {PAIR} --stesp=3": "unknown flag --stesp; did you mean --steps?",
    f"{TRAIN} {PAIR} --steps=many": "--steps=many: expected a positive integer",
    f"{TRAIN} {PAIR} extra": "unexpected argument 'extra'; flags are written --name=value",
    f"{TRAIN} {PAIR} --keep_optimizer": "--keep_optimizer goes with --init_from",
    f"{DECODE} --input=test.en --gin.A.b=3": "this command reads no gin bindings",
    f"{DECODE} --input=test.en --strategy=baem": "--strategy=baem: there is no such search; did you mean beam?",
    f"{DECODE} --input=test.en --n_best=9": "n_best = 9: a beam_size of 5 gives at most 5",
    # gin
    "train --gin_file=tyni.gin --run_dir=new": "there is no gin file 'tyni.gin'; did you mean tiny.gin?",
    f"{TRAIN} {PAIR} --gin.Run.stesp=3": "--gin.Run.stesp: 'Run' has no parameter 'stesp'; did you mean step?",
    f"{TRAIN} {PAIR} --gin.Rnu.steps=3": "--gin.Rnu.steps: the run has no 'Rnu'; did you mean Run?",
    f"{TRAIN} {PAIR} --gin.Run.steps=soon": "--gin.Run.steps: Run.steps is int, not 'soon'",
    f"{TRAIN} {PAIR} --gin.models.Base.embed_dim=64": "--gin.models.Base.embed_dim: nothing in this run uses",
    f"{TRAIN} {PAIR} --gin.VegaTiny.num_heads=5": "--gin.VegaTiny.num_heads: VegaTiny.num_heads is 5; it must ",
    f"{TRAIN} {PAIR} --gin.VegaTiny.remat=som": "--gin.VegaTiny.remat: VegaTiny.remat is one of 'none', 'full', ",
    # Folders
    f"train --gin_file=tiny.gin --source_language=en --target_language=de {PAIR} --run_dir=train.en": "--run_dir=",
    f"{TRAIN} {PAIR} --json_out=nowhere/x.json": "--json_out=nowhere/x.json: there is no folder",
    f"{TRAIN} {PAIR} --json_out=gs://bucket/x.json": "--json_out=gs://bucket/x.json: give a local path",
    f"{DECODE} --input=test.en --output=gs://bucket/x": "--output=gs://bucket/x: give a local path",
    "average --run_dir=out --last=1 --output=gs://bucket/x": "--output=gs://bucket/x: give a local path",
    f"{TRAIN} {PAIR} --run_dir=out": "out holds a run with ",
    f"{TRAIN} {PAIR} --init_from=nowhere": "nowhere does not exist",
    f"{TRAIN} {PAIR} --init_from=out:7": "--init_from=out:7: no such checkpoint; finished steps: [6, 8, 12]",
    f"{TRAIN} {PAIR} --init_from=other_model": "--init_from=other_model holds another model: mlp_dim is 96 there",
    f"{TRAIN} {PAIR} --init_from=out --vocab_size=99": "--init_from brings its own vocabulary",
    f"{TRAIN} {PAIR} --init_from=out --target_language=fr": "--init_from=out: its vocabulary has no tag for fr",
    "translate --input=test.en": "--run_dir is missing: ",
    "translate --run_dir=nowhere --input=test.en": "nowhere does not exist",
    "translate --run_dir=nothing --input=test.en": "nothing is not the folder of a run",
    "translate --run_dir=not_json --input=test.en": "not_json/model.json is not a model record",
    "translate --run_dir=other_vocabulary --input=test.en": "other_vocabulary/vocabulary is not the vocabulary ",
    "translate --run_dir=out --input=test.en --checkpoint=7": "no whole checkpoint of step 7",
    "translate --run_dir=out --input=test.en --checkpoint=beste": "checkpoint 'beste': must be best, last or a step",
    f"{DECODE} --input=tset.en": "tset.en: no such file",
    f"{DECODE} --input=empty.en": "empty.en: ",
    f"{DECODE} --input=latin.en": "latin.en, line 3: not UTF-8",
    "translate --run_dir=out --distributed=auto --input=test.en": "--distributed: processes share the lines of a file",
    f"{DECODE} --input=test.en --mesh_fsdp=2": "MeshConfig(data=-1, fsdp=2, tensor=1, slices=1) does not fit 1 devices",
    "translate --run_dir=out --input=latin.en": "latin.en, line 3: not UTF-8",
    "translate --run_dir=out --input=test.en --output=nowhere/x": "--output=nowhere/x: there is no folder",
    "score --run_dir=out --source=test.en": "--target is missing: ",
    "score --run_dir=out --source=short.en --target=train.de": "short.en has 297 lines but train.de has 300",
    "evaluate --hypothesis=test.de --reference=valid.de --target_language=de": "test.de has 12 lines but valid.de",
    "evaluate --hypothesis=test.de --reference=test.de": "--target_language is missing",
    "evaluate --hypothesis=test.de --target_language=de": "--reference is missing",
    "evaluate --reference=test.de --target_language=de": "give either --hypothesis",
    "evaluate --hypothesis=test.de --reference=test.de --target_language=de --tokenize=14a": "--tokenize=14a: value ",
    "evaluate --hypothesis=test.de --reference=test.de --target_language=de --domains=train.de": "test.de has 12 lines",
    "average --run_dir=out --output=new": "give one of --last, --best and --steps",
    "average --run_dir=out --last=9 --output=new": "--last=9: out has 3 finished checkpoints",
    "average --run_dir=out --best=9 --output=new": "--best=9: out has 2 measured checkpoints",
    "average --run_dir=out --steps=6,7 --output=new": "--steps=6,7: there is no checkpoint of step 7",
    "average --run_dir=out --last=2 --output=other_model": "--output=other_model exists already",
    "info": "give one of --run_dir, --preset and --gin_file",
    "info --preset=bsae": "--preset=bsae is unknown; did you mean base?",
    "info --gin_file=optim/adam.gin": (
        "--gin_file=optim/adam.gin binds no Translation.model and no LanguageModeling.model"
    ),
    "info --run_dir=nothing": "nothing is not the folder of a run",
    "vocab --input=train.en": "--output is missing: ",
    "vocab --input=empty.en --output=new": "empty.en: the file is empty",
    "vocab --input=train.en --size=9 --output=new": "vocabulary: size 9 is too small",
    "vocab --input=train.en --languages=xx --output=new": "unknown language 'xx'",
    "cache --run_dir=new --gin_file=tiny.gin": "tiny.gin:11: DataConfig.train has no value",
    "doctor --json_out=nowhere/x.json": "--json_out=nowhere/x.json: there is no folder",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(bad_place, monkeypatch, capfd, command):
    monkeypatch.chdir(bad_place)
    before = snapshot(bad_place)
    assert complaint(capfd, command).startswith(MISTAKES[command])
    assert snapshot(bad_place) == before


def test_weights_of_another_model_come_with_a_table(bad_place, monkeypatch, capfd):
    monkeypatch.chdir(bad_place)
    assert main(["translate", "--run_dir=other_model", "--input=test.en", "--output=new"]) == 2
    error, head, *rows = capfd.readouterr().err.splitlines()
    assert error.startswith(
        "t5x_ext translate: the checkpoint belongs to another model or optimizer: different: decoder/"
    )
    assert head.split() == ["array", "in", "the", "checkpoint", "wanted"]
    assert all(row.split()[0].split("/")[0] in ("encoder", "decoder") and "96" in row for row in rows)
    assert not (bad_place / "new").exists()


def test_standard_input_that_is_not_text(bad_place, monkeypatch, capfd):
    import io
    import types

    monkeypatch.chdir(bad_place)
    stdin = types.SimpleNamespace(buffer=io.BytesIO(b"one\ncaf\xe9\n"), isatty=lambda: False)
    monkeypatch.setattr("sys.stdin", stdin)
    assert complaint(capfd, "translate --run_dir=out").startswith("standard input, line 2: not UTF-8")
