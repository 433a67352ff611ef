"""Files and streams of text: translated in chunks, restartable, order kept."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from t5x_ext.checkpoints import write_json
from t5x_ext.contracts import UserError
from t5x_ext.data.parallel_text import read_lines
from t5x_ext.decode.config import DecodeConfig
from t5x_ext.decode.translator import Hypothesis, Translator

CHUNK_LINES = 4096
"""Lines sorted by length together and finished together."""

FORMAT = 1


class FileReport(NamedTuple):
    """What a file translation did, this process alone."""

    lines: int
    """Lines translated."""
    resumed_lines: int
    """Lines that an earlier, interrupted process had translated."""
    target_tokens: int
    """Tokens of the best translations, ends of sentence and forced prefixes included."""
    seconds: float
    """Wall time, compilation included."""

    @property
    def sentences_per_second(self) -> float:
        """Lines over seconds."""
        return self.lines / self.seconds

    @property
    def target_tokens_per_second(self) -> float:
        """Tokens over seconds."""
        return self.target_tokens / self.seconds


def translate_file(
    translator: Translator,
    input_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    source_language: str | None = None,
    target_language: str | None = None,
    config: DecodeConfig | None = None,
    *,
    chunk_lines: int = CHUNK_LINES,
    show_progress: bool = True,
) -> FileReport:
    """Translates a file line by line; n lines in are n lines out, in order.

    Finished chunks go to `<output>.part`, and `<output>.progress` says how much of it is whole and what it was made
    from: input, options and model. A process that starts again on the same after being killed goes on where the other
    stopped, and ends with the same bytes; one that starts on anything else starts over. `output_path` appears at the
    end, whole, by one rename.

    Args:
      translator: opened model.
      input_path: UTF-8 text with one sentence a line, plain or gzipped.
      output_path: where the translations go. With `config.n_best` above 1 each line of input gives its hypotheses as
        `line number ||| text ||| score`, line numbers from 0 (Moses' n-best format).
      source_language: as in `Translator.translate`.
      target_language: see there.
      config: see there.
      chunk_lines: at most so many lines are sorted, translated and written together.
      show_progress: a progress bar on standard error.

    Raises:
      UserError: for a missing or empty input, bytes that are not UTF-8, or an unknown direction; nothing is written.
    """
    start = time.monotonic()
    config = config or DecodeConfig()
    source, output = os.fspath(input_path), Path(output_path)
    direction = translator.resolve(source_language, target_language)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise UserError(f"{output}: give the path of a file in a folder that exists")
    content, num_lines = _examine(source)
    chunks = _equal_chunks(num_lines, chunk_lines)
    work = {
        "format": FORMAT,
        "input": content,
        "options": dataclasses.asdict(config),
        "direction": "-".join(direction),
        "model": translator.fingerprint(),
        "chunks": [num_lines, len(chunks)],
    }
    part, sidecar = output.with_name(output.name + ".part"), output.with_name(output.name + ".progress")
    done = _Progress.read(sidecar, part, work)
    lines = itertools.islice(read_lines(source), done.lines, None)
    tokens, finished = 0, done.lines
    with (
        part.open("r+b" if done.lines else "wb") as sink,
        tqdm(total=num_lines, initial=done.lines, unit="line", disable=not show_progress) as bar,
    ):
        sink.truncate(done.bytes)
        sink.seek(done.bytes)
        for size in _remaining(chunks, done.lines):
            chunk = list(itertools.islice(lines, size))
            results = translator.translate_n_best(chunk, *direction, config, bar.update, first_line=finished)
            tokens += sum(hypotheses[0].num_tokens for hypotheses in results)
            _append(sink, "".join(format_results(results, finished, config.n_best)))
            finished += size
            write_json(sidecar, _Progress(finished, sink.tell())._asdict() | {"work": work})
    os.replace(part, output)
    sidecar.unlink()
    return FileReport(num_lines - done.lines, done.lines, tokens, time.monotonic() - start)


def translate_stream(
    translator: Translator,
    lines: Iterable[str],
    source_language: str | None = None,
    target_language: str | None = None,
    config: DecodeConfig | None = None,
    *,
    chunk_lines: int = CHUNK_LINES,
) -> Iterator[str]:
    """Output lines, with line ends, for input lines of any number, a chunk at a time: for standard input.

    The format is that of `translate_file`. `chunk_lines=1` answers every line at once.
    """
    config = config or DecodeConfig()
    iterator, finished = iter(lines), 0
    while chunk := [line.rstrip("\r\n") for line in itertools.islice(iterator, chunk_lines)]:
        results = translator.translate_n_best(chunk, source_language, target_language, config, first_line=finished)
        yield from format_results(results, finished, config.n_best)
        finished += len(chunk)


def format_results(results: Iterable[list[Hypothesis]], first_line: int, n_best: int) -> Iterator[str]:
    """One text line for each result; for n_best above 1 the lines of Moses' n-best format."""
    for number, hypotheses in enumerate(results, first_line):
        if n_best == 1:
            yield hypotheses[0].text + "\n"
        else:
            yield from (f"{number} ||| {found.text} ||| {found.score:.6f}\n" for found in hypotheses)


class _Progress(NamedTuple):
    """How much of the part file is whole."""

    lines: int
    bytes: int

    @classmethod
    def read(cls, sidecar: Path, part: Path, work: dict[str, Any]) -> _Progress:
        """What an earlier process on the same work finished; nothing where there was none, or on other work."""
        try:
            record = json.loads(sidecar.read_text())
            done = cls(int(record["lines"]), int(record["bytes"]))
            if record["work"] == work and part.stat().st_size >= done.bytes:
                return done
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return cls(0, 0)


def _append(sink: BinaryIO, text: str) -> None:
    """Writes down to the disk, so that what the progress file counts is there even after a power cut."""
    sink.write(text.encode())
    sink.flush()
    os.fsync(sink.fileno())


def decode_lines(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """Lines of an open stream of UTF-8 bytes, without their ends; `name` is for the message.

    Raises:
      UserError: for a line that is not UTF-8.
    """
    for number, line in enumerate(stream, 1):
        try:
            yield line.rstrip(b"\r\n").decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{name}, line {number}: not UTF-8 ({error.reason}); convert it first") from None


def _examine(path: str) -> tuple[str, int]:
    """SHA-256 of the text and its number of lines; every line is checked, before anything is written."""
    digest, count = hashlib.sha256(), 0
    for line in read_lines(path):
        digest.update(line.encode() + b"\n")
        count += 1
    return digest.hexdigest(), count


def _equal_chunks(num_lines: int, chunk_lines: int) -> list[int]:
    """Sizes that differ by one at most: a small last chunk would ask for batches of another shape."""
    count = -(-num_lines // chunk_lines)
    return [num_lines // count + (index < num_lines % count) for index in range(count)]


def _remaining(chunks: list[int], done_lines: int) -> list[int]:
    starts = itertools.accumulate(chunks, initial=0)
    return [size for start, size in zip(starts, chunks) if start >= done_lines]
