"""Every command of the README and of docs/ is run, in order, in one folder; long ones do two updates.

Pages of methods may also have commands that other tests run at a small size; here they are parsed and built.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

import t5x_ext
from t5x_ext.cli.flags import parse
from t5x_ext.cli.run_flags import run_from_flags
from t5x_ext.corpora import CldrCorpus

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
CONFIG = DOCS / "site" / "mkdocs.yml"
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [DOCS / name for name in re.findall(r": ([\w/]+\.md)$", CONFIG.read_text(encoding="utf-8"), flags=re.MULTILINE)]
TEXT = "\n".join([README, *(page.read_text(encoding="utf-8") for page in PAGES)])
# What everyone runs; pages of methods have commands of any size.
GUIDES = "\n".join([README, *(page.read_text(encoding="utf-8") for page in PAGES if page.parent == DOCS)])

# Two updates, saved one by one so that there are checkpoints to average, and little to decode.
_SHORT = {
    "two files": "--steps=2 --gin.CheckpointConfig.every=1 --gin.Translation.max_lines=4",
    "runs/multi30k_en_de.gin": "--steps=2 --gin.Translation.max_lines=4 --gin.DATA_DIR=.",
    "runs/quickstart.gin": "--steps=2 --gin.english_corpora.num_tuples=1500 --gin.english_corpora.valid_per_family=1 "
    "--gin.english_corpora.test_per_family=1",
    # Two small layers on a virtual GPU, as below on four chips.
    "runs/vega_mt_4b7_pipeline": "--topology=h100:1 --gin.Vega4B7.embed_dim=256 --gin.Vega4B7.mlp_dim=512 "
    "--gin.Vega4B7.num_heads=4 --gin.Vega4B7.encoder_layers=2 --gin.Vega4B7.decoder_layers=2 --gin.BatchConfig.rows=4 "
    "--gin.VocabularyConfig.size=2000",
    # Two small layers on four chips; the 4.7B model itself is compiled in tests/plan/test_vega_4b7.py.
    "t5x_ext check": "--topology=v5e:2x2 --gin.Vega4B7.embed_dim=256 --gin.Vega4B7.mlp_dim=512 "
    "--gin.Vega4B7.num_heads=4 --gin.Vega4B7.encoder_layers=2 --gin.Vega4B7.decoder_layers=2 --gin.BatchConfig.rows=16 "
    "--gin.VocabularyConfig.size=2000",
    # All of its stages are run by tests/system/test_vega_mt.py.
    "runs/vega_mt_tiny.gin": "--stages=test",
    # One of two directions to the end; a first model of fewer updates translates every line by an empty one.
    "my.gin": "--gin.PRETRAIN_STEPS=120 --gin.pretrain/CheckpointConfig.every=0 --gin.LM_STEPS=2 --gin.STEPS=2 "
    "--gin.CheckpointConfig.every=1 --gin.PEAK=0.01 --gin.inverse_sqrt.warmup_steps=10 --gin.VocabularyConfig.size=600 "
    "--gin.TransformerConfig.embed_dim=32 --gin.TransformerConfig.mlp_dim=32 --gin.TransformerConfig.num_heads=2 "
    "--gin.TransformerConfig.encoder_layers=1 --gin.TransformerConfig.decoder_layers=1 --gin.BatchConfig.rows=8 "
    "--gin.DecoderConfig.embed_dim=32 --gin.DecoderConfig.mlp_dim=32 --gin.DecoderConfig.num_heads=2 "
    "--gin.DecoderConfig.layers=1 "
    "--gin.BatchConfig.source_length=48 --gin.BatchConfig.target_length=48 --gin.forward/Beam.beam_size=2 "
    "--gin.finetune/Train.directions=\"['en-de']\" --gin.generalise/Train.directions=\"['en-de']\"",
}


def blocks(language: str, text: str = TEXT) -> list[str]:
    return list(dict.fromkeys(re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)))


def lines_of(text: str = TEXT) -> list[str]:
    """The commands of a text, each once; those over several lines, with their backslashes, as one."""
    scripts = "\n".join(blocks("bash", text)).replace("\\\n", " ")
    lines = (line for line in scripts.splitlines() if line and not line.startswith("#"))
    return list(dict.fromkeys(" ".join(line.split("  #")[0].split()) for line in lines))


def commands(start: str) -> list[str]:
    return [line for line in lines_of() if line.startswith(start)]


def is_for_two_files(line: str) -> bool:
    """Needs only files `a` and `b`, or what an earlier command has made of them."""
    return line.startswith(("t5x_ext", "echo")) and not re.search("gin_file| pipeline | check | study ", line)


PIPELINES = {"tiny": "--output_dir=tiny", "mine": "--output_dir=mine"}
SCORES = [line for line in lines_of() if line.startswith("scripts/score_wmt22.py")]
LAUNCHERS = [line for line in lines_of() if line.startswith("scripts/launch_")]
CHECKS = commands("t5x_ext check")
TRAINS = [
    line
    for line in commands("t5x_ext train --gin_file")
    if line in lines_of(GUIDES) or "--gin_file=runs/quickstart.gin" in line
]
RUN_HERE = {
    *filter(is_for_two_files, lines_of(GUIDES)),
    *(line for line in commands("t5x_ext pipeline") if any(folder in line for folder in PIPELINES.values())),
    *(*SCORES, *LAUNCHERS, *CHECKS, *TRAINS, "scripts/quickstart.sh", "scripts/test.sh"),
}
OTHERS = [line for line in lines_of() if line not in RUN_HERE and not line.startswith("pip install ")]


def shell(script: str, folder: Path, as_users_compile: bool = False) -> subprocess.CompletedProcess[str]:
    quickly = {} if as_users_compile else {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={**os.environ, **quickly, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    sizes = {"a": 300, "b": 6, "train": 300, "val": 6, "test_2016_flickr": 6}  # the last three as in Multi30k's folder
    for stem, count in sizes.items():
        pairs = list(CldrCorpus("en", "de", num_tuples=4500).pairs())[-count:]
        for side, language in enumerate(("en", "de")):
            (folder / f"{stem}.{language}").write_text("".join(f"{pair[side]}\n" for pair in pairs), encoding="utf-8")
    return folder


def short(command: str) -> str:
    kind = next((name for name in _SHORT if name in command), "two files")
    return f"{command} {_SHORT[kind]}"


def test_the_readme_opens_with_the_two_commands():
    first = blocks("bash", README)[0].splitlines()
    assert [line.split()[0] for line in first] == ["scripts/quickstart.sh", "scripts/test.sh"]
    assert README.index(first[0]) < 100


def test_the_quickstart_script_trains_decodes_and_scores(folder):
    run_dir = folder / "quickstart"
    script = f"{REPOSITORY}/scripts/quickstart.sh --run_dir={run_dir} {_SHORT['runs/quickstart.gin']}"
    done = shell(script, folder, as_users_compile=True)
    assert re.search(r"^mean +150 ", done.stdout, flags=re.MULTILINE)
    assert all((run_dir / name).exists() for name in ("results.json", "learning_curve.png", "tensorboard"))


def test_the_quickstart_script_takes_another_optimizer_by_one_flag(folder):
    run_dir = folder / "flora"
    small = "--vocab_size=900 --gin.DataConfig.test='()' --gin.Translation.max_lines=0"
    flags = f"--gin_file=optim/flora.gin --run_dir={run_dir} {_SHORT['runs/quickstart.gin']} {small}"
    shell(f"{REPOSITORY}/scripts/quickstart.sh {flags}", folder)
    assert "Run.optimizer = @t5x_ext.optim.flora()" in (run_dir / "config.gin").read_text()
    assert '"step": 2' in (run_dir / "metrics.jsonl").read_text()


def test_commands_for_two_files_and_those_after_them_run(folder):
    in_order = list(filter(is_for_two_files, lines_of(GUIDES)))
    assert len(in_order) >= 12
    for line in in_order:
        done = shell(short(line) if line.startswith("t5x_ext train") else line, folder)
        assert "/train" in line or done.stdout or "--output" in line
    assert len((folder / "b.out.de").read_text().splitlines()) == 6
    assert len((folder / "scores.tsv").read_text().splitlines()) == 6


@pytest.mark.parametrize("command", TRAINS)
def test_commands_with_gin_files_run(command, folder):
    # A model that has hardly learned decodes to the longest length: machine code pays where compiling is a small part.
    as_users_compile = "gin_file=optim/" not in command
    assert "results" in shell(short(command), folder, as_users_compile).stdout


def test_the_small_pipeline_of_the_readme_runs(folder):
    run, audit = [line for line in commands("t5x_ext pipeline") if PIPELINES["tiny"] in line]
    assert re.search(r"^test +corpora +lines 30$", shell(short(run), folder).stdout, flags=re.MULTILINE)
    assert "does not match" not in shell(audit, folder).stdout


def test_a_pipeline_of_ones_own_files_runs_from_raw_text_to_scores_and_back(folder):
    (config,) = blocks("gin")
    (folder / "my.gin").write_text(config)
    (folder / "text").mkdir()
    pairs = iter(CldrCorpus("en", "de", num_tuples=4500).pairs())
    for stem, count in {"train": 240, "mono": 20, "past": 6, "dev": 6, "test": 6}.items():
        for language, lines in zip(("en", "de"), zip(*islice(pairs, count))):
            text = "".join(f"{line}\n" for line in lines)
            (folder / "text" / f"{stem}.{language}").write_text(text, encoding="utf-8")
    plan, run, audit = [line for line in commands("t5x_ext pipeline") if PIPELINES["mine"] in line]
    assert " new " in shell(short(plan), folder).stdout
    done = shell(short(run), folder)
    assert "best_test  test.en-de.en-de" in done.stdout
    assert "scores (scores): " in (found := shell(audit, folder).stdout)
    assert "does not match" not in found


@pytest.mark.parametrize("command", CHECKS)
def test_the_checks_of_the_readme_say_whether_it_fits(command, folder):
    # A plan is read from what the compiler makes of a program.
    assert "fits: " in shell(short(command), folder, as_users_compile="--stage" not in command).stdout


def test_the_scores_of_the_readme_reproduce_what_was_claimed(folder):
    for name, lines in {
        "sources/generaltest2022.en-de.src.en": "a red house\ntwo dogs\n",
        "references/generaltest2022.en-de.ref.A.de": "ein rotes Haus steht hier\nzwei Hunde laufen dort\n",
        "system-outputs/generaltest2022.en-de.hyp.JDExploreAcademy.de": "ein rotes Haus steht\nzwei Hunde laufen\n",
        "system-outputs/generaltest2022.en-de.hyp.Online-B.de": "ein Haus\nHunde laufen dort weg\n",
    }.items():
        path = folder / "wmt22" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines, encoding="utf-8")
    for command in SCORES:
        assert "claims reproduced" in shell(f"{REPOSITORY}/{command}", folder).stdout
    rows = json.loads((folder / "wmt22.json").read_text())
    assert [(row["system"], row["rank"]) for row in rows] == [("JDExploreAcademy", 1), ("Online-B", 2)]


@pytest.mark.parametrize("command", LAUNCHERS)
def test_launchers_of_the_readme_print_what_they_would_do(command, folder):
    assert "--dry_run" in command
    assert "t5x_ext" in shell(f"{REPOSITORY}/{command}", folder).stdout


@pytest.mark.parametrize("command", OTHERS)
def test_commands_that_other_tests_run_have_these_flags_and_settings(command):
    program, *arguments = shlex.split(command)
    if program.startswith("scripts/"):
        found = subprocess.run([sys.executable, REPOSITORY / program, "--helpfull"], capture_output=True, text=True)
        names = [
            re.split("[=.]", argument.removeprefix("--"))[0] for argument in arguments if argument.startswith("--")
        ]
        assert names
        assert [name for name in names if f"--{name}" not in found.stdout and f"--[no]{name}" not in found.stdout] == []
        return
    assert program == "t5x_ext"
    verb, *flags = arguments
    values = parse(importlib.import_module(f"t5x_ext.cli.{verb}").define_flags, flags)
    if verb == "train":
        run_from_flags(values)


def test_the_commands_of_the_table_of_methods_are_those_of_their_pages():
    in_table = re.findall(r"\| `(t5x_ext [^`]+)` \|", README)
    assert len(in_table) >= 5
    assert [command for command in in_table if command not in lines_of()] == []


def test_every_page_is_in_the_navigation_and_links_lead_somewhere():
    assert sorted(PAGES) == sorted(DOCS.rglob("*.md"))
    for page in [REPOSITORY / "README.md", *PAGES]:
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == [], page


def test_the_table_of_plugins_names_what_there_is():
    page = (DOCS / "plugins.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`((?:t5x_ext|optax)[\w.]*\.[A-Za-z_]\w*)`", page))
    assert len(names) >= 20
    for name in names - {"t5x_ext.optim", "t5x_ext.tasks", "t5x_ext.models"}:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_python_of_the_readme_runs(folder, monkeypatch):
    """After the commands above have made the run folder."""
    if not (folder / "out").exists():
        shell(short(commands("t5x_ext train --train_source")[0]), folder)
    monkeypatch.chdir(folder)
    (code,) = blocks("python", README)
    names: dict[str, t5x_ext.decode.Translator] = {}
    exec(code, names)
    assert len(names["translator"].translate(["one", "two"])) == 2
