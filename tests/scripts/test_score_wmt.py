"""Scores of a small folder of systems against direct calls of sacreBLEU, and Vega-MT's scores against its paper."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import score_wmt
import score_wmt22
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from t5x_ext.evaluate import paired_test

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "wmt22"
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

GERMAN = ["ein Haus , das rot ist", "zwei Hunde laufen schnell weg", "", "der Mann liest ein Buch vor"]
ENGLISH = ["a house that is red", "two dogs are running away fast", "nothing", "the man reads out a book"]
JAPANESE = ["赤い家があります", "二匹の犬が走っています", "何もありません", "男が本を読んでいます"]

TEXTS = {
    "references/generaltest2022.en-de.ref.A.de": GERMAN,
    "references/generaltest2022.en-de.ref.B.de": ["ein rotes Haus", "zwei Hunde laufen", "", "ein Mann liest ein Buch"],
    "references/generaltest2022.en-ja.ref.A.ja": JAPANESE,
    "sources/generaltest2022.en-de.src.en": ENGLISH,
    "sources/generaltest2022.en-ja.src.en": ENGLISH,
    "system-outputs/generaltest2022.en-de.hyp.JDExploreAcademy.de": [
        "ein Haus , das rot war",
        "zwei Hunde laufen weg",
        "",
        "der Mann liest ein Buch vor",
    ],
    "system-outputs/generaltest2022.en-de.hyp.Online-B.de": ["das Haus ist rot", "Hunde laufen schnell weg", "x", ""],
    "system-outputs/generaltest2022.en-de.hyp.A.1.de": ["das Haus ist rot", "Hunde laufen schnell weg", "x", ""],
    "system-outputs/generaltest2022.en-ja.hyp.JDExploreAcademy.ja": [*JAPANESE[:3], "男が本を読みます"],
    # No reference: not one of the ten directions, either.
    "system-outputs/generaltest2022.en-fr.hyp.Online-B.fr": ["une maison", "deux chiens", "rien", "un livre"],
}


def write(folder, texts, end="\n"):
    for name, lines in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes("".join(line + end for line in lines).encode())


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "wmt", TEXTS)
    return tmp_path / "wmt"


def run(folder, *arguments, script=score_wmt22):
    defaults = score_wmt22.WMT22 if script is score_wmt22 else score_wmt.ANY_YEAR
    out = folder.parent / "scores.json"
    code = score_wmt.run(
        f"{script.__name__}.py",
        script.__doc__,
        defaults,
        [f"--data_dir={folder}", f"--json_out={out}", "--jobs=1", *arguments],
    )
    return code, json.loads(out.read_text()) if out.exists() else None


def direct(system, references, tokenizer="13a"):
    return (
        BLEU(tokenize=tokenizer).corpus_score(system, references).score,
        CHRF().corpus_score(system, references).score,
    )


def output(direction, system):
    return TEXTS[f"system-outputs/generaltest2022.{direction}.hyp.{system}.{direction[3:]}"]


def reference(direction, name):
    return TEXTS[f"references/generaltest2022.{direction}.ref.{name}.{direction[3:]}"]


def test_every_output_is_scored_as_sacrebleu_does(folder, capsys):
    code, rows = run(folder)
    assert code == 0
    assert [(row["direction"], row["reference"], row["system"], row["rank"]) for row in rows] == [
        ("en-de", "A", "JDExploreAcademy", 1),
        ("en-de", "A", "A.1", 2),  # of equal score and rank
        ("en-de", "A", "Online-B", 2),
        ("en-de", "B", "JDExploreAcademy", 1),
        ("en-de", "B", "A.1", 2),
        ("en-de", "B", "Online-B", 2),
        ("en-de", "all", "JDExploreAcademy", 1),
        ("en-de", "all", "A.1", 2),
        ("en-de", "all", "Online-B", 2),
        ("en-ja", "A", "JDExploreAcademy", 1),
    ]
    for row in rows:
        names = ["A", "B"] if row["reference"] == "all" else [row["reference"]]
        sets = [reference(row["direction"], name) for name in names]
        tokenizer = "char" if row["direction"] == "en-ja" else "13a"
        assert (row["bleu"], row["chrf"]) == direct(output(row["direction"], row["system"]), sets, tokenizer)
        assert f"nrefs:{len(sets)}|" in row["signature"]
        assert f"tok:{tokenizer}|" in row["signature"]
        assert set(row) == {"direction", "system", "reference", "bleu", "chrf", "signature", "rank"}
    printed = capsys.readouterr()
    assert "en-fr: no reference, so its 1 outputs are left out" in printed.err
    assert "no domains by line are known of en-de, en-ja" in printed.out
    assert printed.out.count("not given") == 8
    assert "0 of 10 claims reproduced" in printed.out


def test_gzip_line_ends_links_and_processes_change_nothing(folder, capsys):
    _, rows = run(folder)
    other = folder.parent / "other"
    write(other, TEXTS, end="\r\n")
    for path in sorted(other.rglob("*en-de*")):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    linked = folder.parent / "linked"
    linked.mkdir()
    for name in ("references", "sources", "system-outputs"):
        (linked / name).symlink_to(other / name)
    out = folder.parent / "two.json"
    command = [SCRIPTS / "score_wmt22.py", f"--data_dir={linked}", f"--json_out={out}", "--jobs=2"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text()) == rows
    assert done.stdout == capsys.readouterr().out


def test_claims_and_the_official_table(folder, capsys):
    score = direct(output("en-de", "JDExploreAcademy"), [reference("en-de", "B")])[0]
    other = direct(output("en-de", "Online-B"), [reference("en-de", "A")])[1]
    table = [
        "pair\tsystem\tid\tis_constrained\tmetric\tscore",
        f"en-de\tJDExploreAcademy\t1\tTRUE\tbleu-B\t{score}",
        "en-de\tJDExploreAcademy\t1\tTRUE\tCOMET-B\t0.5",
        f"en-de\tOnline-B\t2\tFALSE\tchrf-A\t{other + 1}",
    ]
    write(folder, {"automatic-scores.tsv": table})
    run(folder, f"--claim=en-de.B={score + 0.04:.4f}", "--claim=en-ja.A=1", "--claim=de-en.A=2", "--tokenizer=ja=none")
    printed = capsys.readouterr().out.splitlines()
    assert "automatic-scores.tsv: 2 scores compared, greatest difference 1.0000" in printed
    assert f"  en-de Online-B chrf-A: {other:.2f}, automatic-scores.tsv says {other + 1:.2f}" in printed
    rows = {line.split()[0]: line.split()[1:] for line in printed if line}
    chars = direct(output("en-de", "JDExploreAcademy"), [reference("en-de", "B")])[1]
    assert rows["en-de"] == ["B", f"{score + 0.04:.2f}", f"{score:.2f}", "-0.040", f"{chars:.2f}", "1/3", "1/1"]
    assert rows["de-en"] == ["A", "2.00", "not", "given", *"----"]
    assert rows["en-ja"][2] == f"{direct(output('en-ja', 'JDExploreAcademy'), [JAPANESE], 'none')[0]:.2f}"
    assert "1 of 3 claims reproduced to 0.05" in printed


def test_domains_of_a_table_and_of_xml(folder, capsys):
    labels = {"domains/en-de.txt": ["news\tdoc1", "social\tdoc2", "news\tdoc1", "news\tdoc3"]}
    write(folder, labels)
    _, rows = run(folder, "--domains=domains/{source}-{target}.txt", "--direction=en-de")
    printed = capsys.readouterr().out
    assert "no domains" not in printed
    kept = [0, 2, 3]
    for row in rows:
        if row["reference"] == "all":
            assert "domains" not in row
            continue
        lines, sets = output("en-de", row["system"]), reference("en-de", row["reference"])
        expected = direct([lines[i] for i in kept], [[sets[i] for i in kept]])
        news = row["domains"]["news"]
        assert (news["bleu"], news["chrf"], news["lines"]) == (*expected, 3)
        assert row["domains"]["social"]["lines"] == 1

    segments = '<src><p><seg id="1">a</seg></p><p><seg id="2">b</seg></p></src><ref><p><seg id="1"/></p></ref>'
    documents = f'<doc id="x" domain="news">{segments}</doc><doc id="social_ru_1">{segments}</doc>'
    write(folder, {"xml/wmttest2022.en-de.all.xml": [f"<dataset><collection>{documents}</collection></dataset>"]})
    _, rows = run(folder, "--direction=en-de")
    assert {name: domain["lines"] for name, domain in rows[0]["domains"].items()} == {"news": 2, "social": 2}
    assert rows[0]["domains"]["social"]["bleu"] == direct(output("en-de", "JDExploreAcademy")[2:], [GERMAN[2:]])[0]
    assert "en-de JDExploreAcademy    news" in capsys.readouterr().out


@pytest.mark.parametrize("test", ["bootstrap", "approximate_randomization"])
def test_differences_are_tested_on_the_claimed_reference(folder, test, capsys):
    arguments = ["--direction=en-de", "--against=Online-B", "--claim=en-de.B=1", f"--test={test}", "--seed=3"]
    _, rows = run(folder, *arguments)
    with_tests = [row for row in rows if "against" in row]
    assert [(row["system"], row["reference"]) for row in with_tests] == [("JDExploreAcademy", "B")]
    systems = [output("en-de", name) for name in ("Online-B", "JDExploreAcademy")]
    expected = paired_test(*systems, reference("en-de", "B"), "de", kind=test, seed=3)
    found = with_tests[0]["against"]["Online-B"]
    assert found == {name: result.to_json() for name, result in expected.items()}
    assert f"p = {expected['BLEU'].p_value:.4f}".split()[-1] in capsys.readouterr().out
    assert run(folder, *arguments)[1] == rows


def test_layouts_of_other_years(tmp_path, capsys):
    write(
        tmp_path / "metrics",
        {
            "system-outputs/en-de/one.txt": GERMAN,
            "system-outputs/en-de/refA.txt": GERMAN,
            "system-outputs/zh_Hans-pt_BR/one.txt": ["um livro"],
            "references/en-de.refA.txt": GERMAN,
            "references/zh_Hans-pt_BR.refA.txt": ["um livro"],
        },
    )
    patterns = ["--systems=system-outputs/{source}-{target}/{system}.txt", "--exclude=ref*", "--exclude=nobody"]
    patterns.append("--references=references/{source}-{target}.{reference}.txt")
    code, rows = run(tmp_path / "metrics", *patterns, script=score_wmt)
    assert code == 0
    assert [(row["direction"], row["system"], row["reference"]) for row in rows] == [
        ("en-de", "one", "refA"),
        ("zh_Hans-pt_BR", "one", "refA"),
    ]
    assert rows[0]["bleu"] == pytest.approx(100)

    write(tmp_path / "old", {"newstest2014-deen-ref.en": ENGLISH, "newstest2014.uedin.3.de-en": ENGLISH[::-1]})
    old = ["--systems=newstest*.{system}.{source}-{target}", "--references=newstest????-{source}{target}-ref.{target}"]
    _, rows = run(tmp_path / "old", *old, script=score_wmt)
    assert [(row["direction"], row["system"], row["reference"]) for row in rows] == [("de-en", "uedin.3", "ref")]
    assert rows[0]["bleu"] == direct(ENGLISH[::-1], [ENGLISH])[0]

    write(tmp_path / "wmt23", {name.replace("2022", "2023"): lines for name, lines in TEXTS.items()})
    _, rows = run(tmp_path / "wmt23", script=score_wmt)
    assert "tok:ja-mecab" in rows[-1]["signature"]
    assert "claims" not in capsys.readouterr().out


def one_line(text, *words):
    (line,) = text.splitlines()
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("texts", "arguments", "words"),
    [
        ({"system-outputs/generaltest2022.en-de.hyp.Z.de": ["x"]}, [], ["hyp.Z.de has 1 lines but", "src.en has 4"]),
        ({"references/generaltest2022.en-de.ref.C.de": ["x"] * 5}, [], ["ref.C.de has 5 lines but", "src.en has 4"]),
        ({"system-outputs/generaltest2022.en-de.hyp.Z.de": []}, [], ["hyp.Z.de: the file is empty"]),
        ({"references/generaltest2022.en-de.ref.A.de.gz": GERMAN}, [], ["ref.A.de and", "keep one of them"]),
        ({}, ["--direction=en-fr"], ["the pattern of references"]),
        ({}, ["--direction=de-en"], ["no system outputs for de-en; there are outputs for en-de, en-fr, en-ja"]),
        ({}, ["--systems={source}-{target}.{systems}"], ["{systems} is no placeholder", "{system}"]),
        ({}, ["--references=ref.{target}"], ["{source} is missing"]),
        ({}, ["--systems=x/{source}-{target}.{system}"], ["no file matches x/{source}-{target}.{system}"]),
        ({}, ["--data_dir=nowhere"], ["nowhere: there is no such folder"]),
        ({}, ["--claim=en-de=3"], ["--claim=en-de=3: expected", "en-de.A=37.79"]),
        ({}, ["--claim=en-de.A=3", "--system="], ["--system is missing"]),
        ({}, ["--tokenizer=char"], ["--tokenizer=char: expected language=tokenizer"]),
        ({}, ["--tokenizer=ja=chars"], ["tokenizer='chars'", "'char'"]),
        ({}, ["--against=Nobody"], ["both JDExploreAcademy and Nobody"]),
        ({}, ["--official=no.tsv"], ["no.tsv"]),
        ({"automatic-scores.tsv": ["pair\tsystem", "en-de\tx"]}, [], ["automatic-scores.tsv, line 2"]),
        ({"domains.en-de": ["news"]}, ["--domains=domains.{source}-{target}"], ["domains.en-de has 1 lines"]),
        ({"xml/wmttest2022.en-de.all.xml": ["<a>"]}, [], ["all.xml: not a complete XML file"]),
        ({}, ["--comet_model=no.ckpt"], ["no.ckpt: there is no such COMET model"]),
        ({"m.ckpt": ["x"]}, ["--comet_model=m.ckpt", "--sources="], ["COMET needs the sources of en-de"]),
        ({"m.ckpt": ["x"]}, ["--comet_model=m.ckpt", "--comet_python=no/python"], ["no/python: cannot be run"]),
    ],
)
def test_mistakes_are_one_line(folder, texts, arguments, words, monkeypatch, capsys):
    write(folder, texts)
    monkeypatch.chdir(folder)
    code, rows = run(folder, *arguments)
    assert code == 2
    assert rows is None
    errors = capsys.readouterr().err.replace("en-fr: no reference, so its 1 outputs are left out\n", "")
    one_line(errors, "score_wmt22.py: ", *words)


COMET = """
import os
try:
    import significance
except ImportError:
    pass
else:
    raise RuntimeError("a module of t5x_ext stands in the way")


class Model:
    def predict(self, samples, batch_size, gpus):
        print("noise on standard output")
        assert (batch_size, gpus) == (2, 0)
        scores = [len(s["mt"]) / (1 + len(s["ref"])) + s["src"].count("a") for s in samples]
        return type("Prediction", (), {"scores": scores, "system_score": sum(scores) / len(scores)})


def load_from_checkpoint(path):
    assert os.path.isabs(path)
    if not open(path).read().startswith("weights"):
        raise ValueError("not a model")
    return Model()
"""


@pytest.fixture
def comet_python(tmp_path, monkeypatch):
    """An interpreter with a stand-in for `unbabel-comet`, named by a relative path."""
    write(tmp_path, {"packages/comet/__init__.py": [COMET], "good.ckpt": ["weights"], "bad.ckpt": ["x"]})
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/packages exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return "./python"


def test_comet_is_computed_by_another_python(folder, comet_python, capfd):
    arguments = ["--comet_model=good.ckpt", f"--comet_python={comet_python}", "--comet_batch_size=2"]
    code, rows = run(folder, *arguments, "--direction=en-de")
    printed = capfd.readouterr()
    assert code == 0, printed.err
    for row in rows:
        if row["reference"] == "all":
            assert "comet" not in row
            continue
        lines = zip(ENGLISH, output("en-de", row["system"]), reference("en-de", row["reference"]))
        expected = sum(len(mt) / (1 + len(ref)) + src.count("a") for src, mt, ref in lines) / 4
        assert row["comet"] == pytest.approx(expected)
        assert f"{expected:.4f}" in printed.out
    assert "noise" not in printed.out


def test_comet_says_what_it_lacks_or_that_it_failed(folder, comet_python, capfd):
    assert run(folder, "--comet_model=good.ckpt", "--direction=en-de") == (2, None)
    one_line(capfd.readouterr().err, "COMET needs unbabel-comet", sys.executable, "pip install unbabel-comet")
    assert run(folder, "--comet_model=bad.ckpt", f"--comet_python={comet_python}", "--direction=en-de") == (2, None)
    errors = capfd.readouterr().err
    assert "ValueError: not a model" in errors
    assert "COMET failed with exit code 1; see its output above" in errors.splitlines()[-1]


def measured(tmp_path, *arguments):
    if not DATA.is_dir():
        pytest.skip(f"the shared data folder is not there: {DATA}")
    out = tmp_path / "scores.json"
    options = [f"--data_dir={DATA}", f"--json_out={out}", "--jobs=1", *arguments]
    assert score_wmt.run("score_wmt22.py", score_wmt22.__doc__, score_wmt22.WMT22, options) == 0
    rows = json.loads(out.read_text())
    return {(row["direction"], row["reference"]): row for row in rows if row["system"] == "JDExploreAcademy"}


def check_claims(rows, directions):
    claims = [claim.partition("=") for claim in score_wmt22.WMT22.claims]
    claims = [(*where.split("."), float(bleu)) for where, _, bleu in claims if where[:5] in directions]
    assert len(claims) == len(directions)
    for direction, name, bleu in claims:
        assert rows[direction, name]["bleu"] == pytest.approx(bleu, abs=0.05)


@pytest.mark.realdata
def test_two_claims_of_vega_mt_are_reproduced(tmp_path, capsys):
    directions = ["en-ja", "ru-en"]
    check_claims(measured(tmp_path, f"--direction={','.join(directions)}"), directions)
    printed = capsys.readouterr().out
    assert "2 of 2 claims reproduced to 0.05" in printed
    assert "automatic-scores.tsv: 8 scores compared, greatest difference 0.000" in printed


@pytest.mark.realdata
@pytest.mark.slow
def test_ten_claims_of_vega_mt_are_reproduced(tmp_path, capsys):
    check_claims(measured(tmp_path), [claim[:5] for claim in score_wmt22.WMT22.claims])
    assert "10 of 10 claims reproduced to 0.05" in capsys.readouterr().out
