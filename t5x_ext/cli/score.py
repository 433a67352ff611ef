"""How probable a trained run finds given translations: forced log-probabilities and perplexity.

Writes one line for each pair: log-probability (natural logarithm, summed over the tokens), number of tokens (language
tag and end of sentence included), and perplexity, separated by tabs.

example: t5x_ext score --run_dir=out --source=test.en --target=test.de --output=scores.tsv
"""

from __future__ import annotations

import math
import sys

from absl import flags

from t5x_ext.cli.decoding import define_batching_flags, define_model_flags, open_translator
from t5x_ext.cli.files import check_writable, output_text, report
from t5x_ext.cli.flags import require
from t5x_ext.cli.messages import UsageError


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags of `t5x_ext score`."""
    define_model_flags(values)
    flags.DEFINE_string("source", None, "source text, one sentence a line; required", flag_values=values)
    flags.DEFINE_string("target", None, "its translation, line by line; required", flag_values=values)
    flags.DEFINE_string("output", "-", "file for the scores of the lines; - is standard output", flag_values=values)
    flags.DEFINE_string("json_out", None, "file for the summary as JSON", flag_values=values)
    define_batching_flags(values)


def main(values: flags.FlagValues) -> None:
    """Runs `t5x_ext score`."""
    from t5x_ext.cli.texts import read_aligned
    from t5x_ext.decode import DecodeConfig, perplexity

    require(values, "run_dir", "source", "target")
    check_writable(values.output, "--output")
    check_writable(values.json_out, "--json_out")
    if values.json_out == "-":
        raise UsageError("--json_out=-: standard output is for the scores; name a file")
    sources, targets = read_aligned([values.source, values.target])
    translator = open_translator(values)
    config = DecodeConfig(max_source_length=values.max_source_length, batch_tokens=values.batch_tokens)
    scores = translator.score(sources, targets, values.source_language, values.target_language, config)
    with output_text(values.output) as file:
        for score in scores:
            file.write(f"{score.log_prob:.6f}\t{score.num_tokens}\t{score.perplexity:.4f}\n")
    result = {
        "lines": len(scores),
        "tokens": sum(score.num_tokens for score in scores),
        "log_prob": math.fsum(score.log_prob for score in scores),
        "perplexity": perplexity(scores),
    }
    print(
        f"{result['lines']:,} lines, {result['tokens']:,} tokens, log-probability {result['log_prob']:.2f}, "
        f"perplexity {result['perplexity']:.3f}",
        file=sys.stderr,
    )
    report("", result, values.json_out)
