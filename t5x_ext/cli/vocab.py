"""Trains one joint SentencePiece vocabulary from text files.

Byte fallback, no normalisation beyond white space, one tag a language. The folder that it writes is what
`t5x_ext train --vocabulary=FOLDER` takes; a file `MODEL.model` from elsewhere works there too.

example: t5x_ext vocab --input=train.en --input=train.de --languages=en,de --size=8000 --output=vocabulary
"""

from __future__ import annotations

from absl import flags

from t5x_ext.cli.field_flags import FieldFlag, define_field_flags, field_values
from t5x_ext.cli.files import check_absent, check_folder, check_writable, report
from t5x_ext.cli.flags import require
from t5x_ext.cli.languages import known_language

_TRAINING = {
    "size": FieldFlag("number of pieces", lower_bound=1),
    "model_type": FieldFlag("kind of model"),
    "character_coverage": FieldFlag(
        "share of characters with pieces of their own; chosen from the text by default",
        lower_bound=0.98,
        upper_bound=1.0,
    ),
    "split_digits": FieldFlag("make every digit a piece of its own"),
    "max_lines": FieldFlag("lines to train on, sampled", lower_bound=1),
    "seed": FieldFlag("of the sample"),
}


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags of `t5x_ext vocab`."""
    flags.DEFINE_multi_string("input", [], "text file, plain or gzipped, UTF-8; required", flag_values=values)
    flags.DEFINE_list("languages", [], "languages that get a tag, separated by commas", flag_values=values)
    flags.DEFINE_string("output", None, "folder for the vocabulary; required", flag_values=values)
    define_field_flags(values, "data.vocabulary", "VocabularyConfig", _TRAINING)
    flags.DEFINE_string("json_out", None, "file for the result as JSON", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs `t5x_ext vocab`."""
    from t5x_ext.corpora.parallel_text import read_lines
    from t5x_ext.data.vocabulary import train_vocabulary

    require(values, "input", "output")
    check_absent(values.output, "--output")
    check_folder(values.output, "--output")
    check_writable(values.json_out, "--json_out")
    languages = [known_language(language) for language in values.languages]
    vocabulary = train_vocabulary(
        (line for path in values.input for line in read_lines(path)),
        languages=languages,
        **field_values(values, _TRAINING),
    )
    vocabulary.save(values.output)
    result = {
        "vocabulary": values.output,
        "size": vocabulary.size,
        "languages": list(vocabulary.languages),
        "fingerprint": vocabulary.fingerprint(),
    }
    report(f"vocabulary of {vocabulary.size:,} pieces: {values.output}", result, values.json_out)
