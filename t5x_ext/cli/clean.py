"""Filters raw text, parallel or of one language: cleaned lines, rules with counts, exact and near duplicates.

Writes files NAME.LANGUAGE and report.json to --output_dir and prints how many pairs each rule dropped. Lines stay in
order. An interrupted command goes on where it stopped, with the same result. Corpora come from flags or from a gin file
that binds filters.Filtering.corpora; rules are the fields of FilterConfig. Of the texts of --held_out, what models are
tested on, no line stays in the corpora of its language, in any letter case, width and punctuation.

With --runner the work is done on Apache Beam, to the same bytes. Its workers must reach --output_dir and the text
files, and need this package: on Flink, Spark and Dataflow name a container image that has it.

example: t5x_ext clean --source=train.en --target=train.de --source_language=en --target_language=de --output_dir=out
example: t5x_ext clean --source=train.en --target=train.de --source_language=en --target_language=de --output_dir=out \\
    --held_out=test.en --held_out=test.de
example: t5x_ext clean --source=news.zh --source_language=zh --output_dir=out \\
    --gin.FilterConfig.max_length=100 --gin.FilterConfig.near_duplicate_similarity=None
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from absl import flags

from t5x_ext.cli.files import check_folder, check_writable, report
from t5x_ext.cli.flags import require
from t5x_ext.cli.languages import known_language
from t5x_ext.cli.messages import UsageError
from t5x_ext.cli.runner_flags import check_runner_flags, define_runner_flags, runner_from_flags
from t5x_ext.storage.remote import is_remote

if TYPE_CHECKING:
    from t5x_ext.cli.gin_read import Source
    from t5x_ext.corpora.filters import Filtering

_IMPORTS = "from t5x_ext import corpora\nfrom t5x_ext.corpora import filters\n"


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags of `t5x_ext clean`."""
    flags.DEFINE_string("output_dir", None, "folder for what is kept; required", flag_values=values)
    flags.DEFINE_multi_string(
        "source", [], "text to filter: UTF-8, plain or gzipped, one sentence a line", flag_values=values
    )
    flags.DEFINE_multi_string(
        "target", [], "its translation for --source; without any, --source is text of one language", flag_values=values
    )
    flags.DEFINE_string("source_language", None, "code of the source text, as en, zh or pt_BR", flag_values=values)
    flags.DEFINE_string("target_language", None, "code of the target text", flag_values=values)
    flags.DEFINE_multi_string(
        "held_out",
        [],
        "text none of whose lines may stay; its name ends in the code of its language, as test.de or test.de.gz",
        flag_values=values,
    )
    flags.DEFINE_multi_string("gin_file", [], "configuration: corpora, rules or both", flag_values=values)
    flags.DEFINE_multi_string("gin", [], "one binding, as --gin.FilterConfig.max_ratio=2", flag_values=values)
    define_runner_flags(values, "filter")
    flags.DEFINE_string("json_out", None, "file for the counts as JSON; - is standard output", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs `t5x_ext clean`."""
    require(values, "output_dir")
    if values.runner is None or not is_remote(values.output_dir):
        check_folder(values.output_dir, "--output_dir")
    check_writable(values.json_out, "--json_out")
    check_runner_flags(values)
    statements = list(_statements(values))
    if not values.gin_file and not values.source:
        raise UsageError("--source is missing: give a text file, two that are aligned, or a --gin_file")

    from t5x_ext.cli.gin_config import build_run
    from t5x_ext.corpora.filters import Filtering, filter_corpora

    filtering, _ = build_run(values.gin_file, [*statements, *values.gin], root=Filtering)
    for corpus in filtering.corpora:
        for language in corpus.languages:
            known_language(language)
    _check_held_out(filtering)
    done = filter_corpora(
        filtering.corpora,
        values.output_dir,
        filtering.config,
        values.num_processes,
        runner_from_flags(values),
        filtering.held_out,
    )
    report(done.table(), done.to_json(), values.json_out)


def _statements(values: flags.FlagValues) -> Iterator[Source]:
    from t5x_ext.cli.gin_read import Source

    if not values.gin_file:
        # Names the rules, so that --gin.FilterConfig... finds them.
        yield Source(_IMPORTS + "filters.Filtering.config = @filters.FilterConfig()", "--source", is_flag=True)
    if corpora := dict(_corpora(values)):
        yield _bound("corpora", "ParallelText", corpora, "--source")
    if values.held_out:
        texts = enumerate(values.held_out, start=1)
        held_out = {f"held_out{number}": {"path": path, "language": _ending(path)} for number, path in texts}
        yield _bound("held_out", "monolingual_text", held_out, "--held_out")


def _bound(field: str, kind: str, scopes: Mapping[str, Mapping[str, str]], flag: str) -> Source:
    """Binds a field of `Filtering` to corpora of a kind, each with arguments in a scope of its own."""
    from t5x_ext.cli.gin_read import Source

    lines = [
        f"{scope}/corpora.{kind}.{name} = {value!r}"
        for scope, values in scopes.items()
        for name, value in values.items()
    ]
    references = "".join(f"@{scope}/corpora.{kind}(), " for scope in scopes)
    return Source("\n".join([_IMPORTS, *lines, f"filters.Filtering.{field} = ({references})"]), flag, is_flag=True)


def _ending(path: str) -> str:
    """The code of a language at the end of a file's name."""
    return known_language(path.removesuffix(".gz").rpartition(".")[2])


def _check_held_out(filtering: Filtering) -> None:
    """Raises UsageError for held-out text in a language that no corpus is in: it would hold out nothing."""
    from t5x_ext.corpora.filters.text import base_language

    languages = dict.fromkeys(language for corpus in filtering.corpora for language in corpus.languages)
    for corpus in filtering.held_out:
        if not {*map(base_language, corpus.languages)} & {*map(base_language, languages)}:
            raise UsageError(
                f"held-out text {corpus.name} is in {corpus.languages[0]}; the corpora are in {', '.join(languages)}"
            )


def _corpora(values: flags.FlagValues) -> Iterator[tuple[str, dict[str, str]]]:
    """A scope for every corpus that the flags name, and the fields of its `ParallelText`."""
    if values.target and len(values.source) != len(values.target):
        raise UsageError(
            f"--source is given {len(values.source)} times, --target {len(values.target)} times; they go in pairs"
        )
    named = ["source_language", *(["target_language"] if values.target else [])]
    for name in ("source_language", "target_language"):
        if getattr(values, name) and not (values.source and name in named):
            raise UsageError(f"--{name} goes with --{name.removesuffix('_language')}, which is not given")
    if values.source:
        require(values, *named)
    languages = [known_language(getattr(values, name)) for name in named if values.source]
    if len(languages) == 2 and languages[0] == languages[1]:
        raise UsageError(f"--source_language and --target_language are both {languages[0]}")
    for number, (source, target) in enumerate(zip(values.source, values.target or values.source), start=1):
        fields = {"source_path": source, "target_path": target}
        yield f"text{number}", fields | {"source_language": languages[0], "target_language": languages[-1]}
