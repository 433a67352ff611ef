"""Translates a file, or standard input, with a trained run: n lines in, n lines out, in order.

From file to file an interrupted command resumes when it is run again, and processes of one command (--distributed, as
for t5x_ext train) share the lines, on a file system that all of them see. Lines are decoded on all devices of a
process. With --n_best above 1 the output is in Moses' format: line number ||| text ||| score.

example: t5x_ext translate --run_dir=out --input=test.en --output=test.de
example: srun t5x_ext translate --run_dir=out --input=news.de --output=news.en --distributed=slurm --strategy=sample
example: echo 'Good morning.' | t5x_ext translate --run_dir=out
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from t5x_ext.cli.decoding import decode_config, define_decode_flags, define_model_flags, open_translator
from t5x_ext.cli.distributed_flags import define_distributed_flags, join_processes
from t5x_ext.cli.files import check_writable, output_text, report
from t5x_ext.cli.flags import require
from t5x_ext.cli.messages import UsageError

if TYPE_CHECKING:
    from t5x_ext.decode import DecodeConfig, FileReport, Translator


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags of `t5x_ext translate`."""
    define_model_flags(values)
    flags.DEFINE_string("input", "-", "text to translate, one sentence a line; - is standard input", flag_values=values)
    flags.DEFINE_string("output", "-", "file for the translations; - is standard output", flag_values=values)
    flags.DEFINE_string("json_out", None, "file for counts and speed as JSON", flag_values=values)
    flags.DEFINE_integer(
        "chunk_lines", 4096, "lines that are sorted, translated and kept together; fewer where many processes share "
        "few lines", lower_bound=1, flag_values=values,
    )  # fmt: skip
    define_decode_flags(values)
    define_distributed_flags(values)


def main(values: flags.FlagValues) -> None:
    """Runs `t5x_ext translate`."""
    require(values, "run_dir")
    check_writable(values.output, "--output")
    check_writable(values.json_out, "--json_out")
    if values.json_out == "-":
        raise UsageError("--json_out=-: standard output is for translations; name a file")
    from_file_to_file = "-" not in (values.input, values.output)
    if values.distributed != "none" and not from_file_to_file:
        raise UsageError("--distributed: processes share the lines of a file; name --input and --output")
    # Before anything touches a device.
    primary = join_processes(values)
    decode_config(values)  # mistakes are told before a model is read

    from t5x_ext.parallel import failing_together

    with failing_together():
        translator = open_translator(values)
        config = decode_config(values, translator.model)
        if from_file_to_file:
            _translate_file(translator, values, config, primary)
        else:
            report("", _stream(translator, values, config), values.json_out)


def _translate_file(translator: Translator, values: flags.FlagValues, config: DecodeConfig, primary: bool) -> None:
    """Translates from file to file; process 0 says what all have done."""
    from t5x_ext.decode import translate_file
    from t5x_ext.parallel import barrier

    done = translate_file(
        translator,
        values.input,
        values.output,
        values.source_language,
        values.target_language,
        config,
        chunk_lines=values.chunk_lines,
        show_progress=sys.stderr.isatty(),
    )
    if primary:
        report(_summary(done, values), done.to_json(), values.json_out)
    barrier("end")  # the first to leave would wait for the last for seconds only


def _summary(done: FileReport, values: flags.FlagValues) -> str:
    """What a person sees at the end."""
    lines = done.lines + done.resumed_lines
    by = f" by {done.processes} processes" if done.processes > 1 else ""
    idle = done.processes - -(-lines // values.chunk_lines)
    hint = f"; {idle} of them had nothing to do: lower --chunk_lines" if idle > 0 else ""
    return (
        f"{lines:,} lines: {values.output} ({done.sentences_per_second:,.1f} sentences/s, "
        f"{done.target_tokens_per_second:,.0f} target tokens/s{by}{hint})"
    )


def _stream(translator: Translator, values: flags.FlagValues, config: DecodeConfig) -> dict[str, Any]:
    """Translates where input or output is a stream; returns counts and speed."""
    from t5x_ext.decode import translate_stream

    start = time.monotonic()
    # A person who types waits for an answer to every line.
    chunk = 1 if values.input == "-" and sys.stdin.isatty() else values.chunk_lines
    languages = (values.source_language, values.target_language)
    counted = _Counted(_input_lines(values.input))
    with output_text(values.output) as output:
        for line in translate_stream(translator, counted, *languages, config, chunk_lines=chunk):
            output.write(line)
            if chunk == 1:
                output.flush()
    seconds = time.monotonic() - start
    return {"lines": counted.count, "seconds": seconds, "sentences_per_second": counted.count / seconds}


class _Counted(Iterator[str]):
    """Lines, counted as they pass."""

    def __init__(self, lines: Iterator[str]):
        self._lines = lines
        self.count = 0

    def __next__(self) -> str:
        line = next(self._lines)
        self.count += 1
        return line


def _input_lines(path: str) -> Iterator[str]:
    from t5x_ext.corpora import read_lines
    from t5x_ext.decode.files import decode_lines

    if path == "-":
        return decode_lines(sys.stdin.buffer, "standard input")
    for _ in read_lines(path):  # errors in the file are reported before anything is written
        pass
    return read_lines(path)
