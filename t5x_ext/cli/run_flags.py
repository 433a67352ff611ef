"""Flags that describe a training run, for the commands that build one: typed flags for the common things, gin for all.

Each typed flag becomes gin statements, so that the resolved configuration in the run folder is complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import flags

from t5x_ext.cli.languages import known_language
from t5x_ext.cli.messages import UsageError

if TYPE_CHECKING:
    from t5x_ext.cli.gin_read import Source
    from t5x_ext.contracts import Corpus
    from t5x_ext.train import Run

DEFAULT_RUN = "runs/two_files.gin"
_ROLES = {"train": "to learn from", "valid": "to measure on during training", "test": "to score at the end"}

RUN_FLAGS = (
    *(f"{role}_{kind}" for role in _ROLES for kind in ("source", "target", "tsv")),
    *("source_language", "target_language", "bidirectional", "vocabulary", "steps", "seed"),
)
"""Typed flags that bind values of a run, `vocab_size` apart."""


def define_run_flags(values: flags.FlagValues) -> None:
    """Declares the flags that `run_from_flags` reads."""
    flags.DEFINE_multi_string(
        "gin_file", [], f"configuration; without one, the packaged {DEFAULT_RUN} for files of your own",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_multi_string(
        "gin", [], "one binding over those of the files, as --gin.Run.steps=100", flag_values=values
    )
    for role, purpose in _ROLES.items():
        about = f"text {purpose}: UTF-8, plain or gzipped, one sentence a line"
        flags.DEFINE_multi_string(f"{role}_source", [], about, flag_values=values)
        flags.DEFINE_multi_string(f"{role}_target", [], f"its translation for --{role}_source", flag_values=values)
        flags.DEFINE_multi_string(
            f"{role}_tsv", [], f"table {purpose}: source and target in two columns, instead of two files",
            flag_values=values,
        )  # fmt: skip
    flags.DEFINE_string("source_language", None, "code of the source text, as en, zh or pt_BR", flag_values=values)
    flags.DEFINE_string("target_language", None, "code of the target text", flag_values=values)
    flags.DEFINE_boolean("bidirectional", None, "learn both directions", flag_values=values)
    flags.DEFINE_string("vocabulary", None, "SentencePiece model or t5x_ext vocab folder to use", flag_values=values)
    flags.DEFINE_integer("vocab_size", None, "pieces of the vocabulary to train", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("steps", None, "updates in total", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("seed", None, "root of every random choice", lower_bound=0, flag_values=values)


def run_from_flags(values: flags.FlagValues) -> tuple[Run, str]:
    """The run that the flags describe, and its resolved configuration.

    Raises:
      UserError: for a mistake in gin or in a value.
      UsageError: for flags that do not go together, and for unknown languages, those of gin files included.
    """
    statements = list(_statements(values))
    if not values.gin_file and not (values.train_source or values.train_tsv):
        raise UsageError("--train_source is missing: give two text files, a --train_tsv, or a --gin_file")

    from t5x_ext.cli.gin_config import build_run

    run, text = build_run(values.gin_file or [DEFAULT_RUN], [*values.gin, *statements])
    for corpus in text_corpora(run):
        for language in corpus.languages:
            known_language(language)
    return run, text


def text_corpora(run: Run) -> tuple[Corpus, ...]:
    """The corpora of a run on text; none of another task."""
    from t5x_ext.data import DataConfig

    data = getattr(run.task, "data", None)
    return (*data.train, *data.valid, *data.test) if isinstance(data, DataConfig) else ()


def check_texts(run: Run) -> None:
    """Reads the text files of a run once from end to end.

    Raises:
      UserError: for a missing or empty file, unequal line counts, bytes that are not UTF-8.
    """
    from t5x_ext.corpora import ParallelText

    for corpus in text_corpora(run):
        if isinstance(corpus, ParallelText):
            for _ in corpus.pairs():
                pass


def _statements(values: flags.FlagValues) -> Iterator[Source]:
    for role in _ROLES:
        yield from _corpora(values, role)
    if not any(getattr(values, f"{role}_{kind}") for role in _ROLES for kind in ("source", "tsv")):
        for name in ("source_language", "target_language"):
            if getattr(values, name):
                raise UsageError(f"--{name} goes with text files (--train_source, ...); there are none here")
    typed = {
        "steps": "train.Run.steps",
        "seed": "train.Run.seed",
        "bidirectional": "data.DataConfig.bidirectional",
        "vocabulary": "data.VocabularyConfig.path",
        "vocab_size": "data.VocabularyConfig.size",
    }
    for name, path in typed.items():
        if getattr(values, name) is not None:
            yield _source(f"--{name}", f"{path} = {getattr(values, name)!r}")


def _corpora(values: flags.FlagValues, role: str) -> Iterator[Source]:
    """Statements that make the corpora of one role from its files."""
    sources, targets, tables = (getattr(values, f"{role}_{kind}") for kind in ("source", "target", "tsv"))
    if len(sources) != len(targets):
        raise UsageError(
            f"--{role}_source is given {len(sources)} times, --{role}_target {len(targets)} times; they go in pairs"
        )
    files = [
        *({"source_path": source, "target_path": target} for source, target in zip(sources, targets)),
        *({"tsv_path": table} for table in tables),
    ]
    if not files:
        return
    for name in ("source_language", "target_language"):
        if not getattr(values, name):
            raise UsageError(f"--{name} is missing: {values[name].help}")
    languages = {name: known_language(getattr(values, name)) for name in ("source_language", "target_language")}
    if len(set(languages.values())) == 1:
        raise UsageError(f"--source_language and --target_language are both {values.source_language}")
    scopes = [f"{role}{number}" for number in range(1, len(files) + 1)]
    lines = [
        f"{scope}/corpora.ParallelText.{name} = {value!r}"
        for scope, paths in zip(scopes, files)
        for name, value in (paths | languages).items()
    ]
    references = "".join(f"@{scope}/corpora.ParallelText(), " for scope in scopes)
    label = f"--{role}_source" if sources else f"--{role}_tsv"
    yield _source(label, *lines, f"data.DataConfig.{role} = ({references})")


def _source(label: str, *lines: str) -> Source:
    from t5x_ext.cli.gin_read import Source

    imports = "from t5x_ext import corpora\nfrom t5x_ext import data\nfrom t5x_ext import train\n"
    return Source(imports + "\n".join(lines), label, is_flag=True, through_macros=True)
