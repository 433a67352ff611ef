"""Scores translations: BLEU, chrF and exact match (TER on request), each with sacreBLEU's signature.

Either score a file of translations (--hypothesis), or let a run translate first (--run_dir and --source). With
--baseline, a second file of translations, also tests whether the difference is more than chance.

example: t5x_ext evaluate --hypothesis=out.de --reference=test.de --target_language=de
example: t5x_ext evaluate --run_dir=out --source=test.en --reference=test.de
"""

from __future__ import annotations

from typing import Any

from absl import flags

from t5x_ext.cli.decoding import decode_config, define_decode_flags, define_model_flags, open_translator
from t5x_ext.cli.files import check_writable, report
from t5x_ext.cli.flags import require
from t5x_ext.cli.languages import known_language
from t5x_ext.cli.messages import UsageError
from t5x_ext.storage.files import whole_file

_TOKENIZERS = ["13a", "zh", "ja-mecab", "char", "intl", "none"]
_TESTS = ["bootstrap", "approximate_randomization"]


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags of `t5x_ext evaluate`."""
    flags.DEFINE_string("hypothesis", None, "file of translations to score", flag_values=values)
    flags.DEFINE_multi_string("reference", [], "file of reference translations; required", flag_values=values)
    flags.DEFINE_string("source", None, "file to translate with --run_dir, instead of --hypothesis", flag_values=values)
    flags.DEFINE_string("output", None, "file to keep the translations of --source in", flag_values=values)
    flags.DEFINE_string("baseline", None, "file of another system's translations to test against", flag_values=values)
    flags.DEFINE_enum("test", "bootstrap", _TESTS, "the paired test", flag_values=values)
    flags.DEFINE_string("domains", None, "file with a label for each line; scores each apart", flag_values=values)
    flags.DEFINE_enum(
        "tokenize", None, _TOKENIZERS, "BLEU's tokenizer; by default that of the target language", flag_values=values
    )
    flags.DEFINE_boolean("ter", False, "also translation edit rate, which takes long", flag_values=values)
    flags.DEFINE_string("json_out", None, "file for the scores as JSON; - is standard output", flag_values=values)
    define_model_flags(values)
    define_decode_flags(values)


def main(values: flags.FlagValues) -> None:
    """Runs `t5x_ext evaluate`."""
    from t5x_ext.cli.texts import read_aligned
    from t5x_ext.evaluate import evaluate_domains, evaluate_texts, format_table, paired_test

    _check(values)
    first = values.hypothesis or values.source
    others = [path for path in (values.baseline, values.domains) if path]
    lines, *more = read_aligned([first, *values.reference, *others])
    references, extra = more[: len(values.reference)], dict(zip(others, more[len(values.reference) :]))
    hypotheses, language = (lines, values.target_language) if values.hypothesis else _translate(values, lines)

    options: dict[str, Any] = {"tokenizer": values.tokenize, "with_ter": values.ter}
    scores = evaluate_texts(hypotheses, references, language, **options)
    result: dict[str, Any] = scores.to_json()
    text = format_table({values.hypothesis or values.run_dir: scores}, label="translations")
    if values.domains:
        domains = evaluate_domains(hypotheses, references, extra[values.domains], language, **options)
        result["domains"] = {name: domain.to_json() for name, domain in domains.items()}
        text += "\n\n" + format_table(domains, label="domain")
    if values.baseline:
        tests = paired_test(extra[values.baseline], hypotheses, references, language, kind=values.test, **options)
        result["baseline"] = {name: test.to_json() for name, test in tests.items()}
        text += "\n\n" + "\n".join(_describe(name, test) for name, test in tests.items())
    report(text, result, values.json_out)


def _check(values: flags.FlagValues) -> None:
    require(values, "reference")
    if bool(values.hypothesis) == bool(values.source):
        raise UsageError(
            "give either --hypothesis, a file of translations, or --run_dir and --source to translate first"
        )
    if values.hypothesis and values.run_dir:
        raise UsageError("--run_dir is for --source; --hypothesis is already translated")
    if values.source:
        require(values, "run_dir")
    elif not values.target_language:
        raise UsageError("--target_language is missing: it decides how BLEU cuts the text into words")
    else:
        known_language(values.target_language)
    check_writable(values.output, "--output")
    check_writable(values.json_out, "--json_out")


def _translate(values: flags.FlagValues, lines: list[str]) -> tuple[list[str], str]:
    """The translations of the lines, kept where `--output` says, and their language."""
    decode_config(values)  # mistakes are told before a model is read
    translator = open_translator(values)
    config = decode_config(values, translator.model)
    hypotheses = translator.translate(lines, values.source_language, values.target_language, config)
    if values.output:
        with whole_file(values.output) as file:
            file.writelines(f"{line}\n" for line in hypotheses)
    return hypotheses, translator.resolve(values.source_language, values.target_language).target_language


def _describe(name: str, test: Any) -> str:
    return (
        f"{name}: baseline {test.baseline:.2f}, this {test.system:.2f} ({test.difference:+.2f}), "
        f"p = {test.p_value:.4f}  {test.signature}"
    )
