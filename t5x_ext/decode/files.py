"""Files and streams of text: translated and scored in chunks, restartable, order kept."""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
from tqdm import tqdm

from t5x_ext.contracts import UserError
from t5x_ext.corpora.parallel_text import read_lines
from t5x_ext.decode.config import DecodeConfig
from t5x_ext.decode.parts import Parts
from t5x_ext.decode.translator import Hypothesis, Progress, Translator
from t5x_ext.parallel import is_primary

CHUNK_LINES = 4096
"""Lines sorted by length together and finished together."""

FORMAT = 2

_Make: TypeAlias = Callable[[Sequence[str], int, Progress], tuple[Iterable[str], int]]
"""From lines and the number of the first to the text they give, with line ends, and how many tokens were made."""


class FileReport(NamedTuple):
    """What a translation or scoring of a file did, all its processes together."""

    lines: int  # translated, or scored
    resumed_lines: int  # that earlier, interrupted processes had done
    target_tokens: int  # of the first translations, or those scored; ends of sentence and forced prefixes included
    seconds: float  # wall time of the slowest process, compilation included
    processes: int  # that took part

    @property
    def sentences_per_second(self) -> float:
        """Lines over seconds."""
        return self.lines / self.seconds

    @property
    def target_tokens_per_second(self) -> float:
        """Tokens over seconds."""
        return self.target_tokens / self.seconds

    def to_json(self) -> dict[str, float]:
        """All of it by name, speed included."""
        speed = ("sentences_per_second", "target_tokens_per_second")
        return {**self._asdict(), **{name: getattr(self, name) for name in speed}}


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

    Finished chunks are kept in the folder `<output>.parts`, together with what they were made from: input, options and
    model. Processes that start again on the same after being killed resume with the chunks that are missing, and end
    with the same bytes; on anything else they start over. `output_path` appears at the end, whole, by one rename.

    The processes of a run that `parallel.initialize_distributed` has joined share the chunks out among them; each needs
    a translator on devices of its own (`make_mesh(config, jax.local_devices())`), and all of them one file system. They
    exchange nothing while they translate, and may be more or fewer than those that were killed.

    Chunks depend on `chunk_lines` and the input alone, and sampling on line numbers: neither the number of processes
    nor restarts change the output. Another mesh, or other devices, may round scores differently.

    Args:
      translator: opened model.
      input_path: UTF-8 text with one sentence a line, plain or gzipped.
      output_path: where the translations go. With an `n_best` above 1 each line of input gives its hypotheses as
        `line number ||| text ||| score`, line numbers from 0 (Moses' n-best format).
      source_language: as in `Translator.translate`.
      target_language: see there.
      config: see there.
      chunk_lines: at most so many lines are sorted, translated and written together.
      show_progress: a progress bar on standard error, about the lines of process 0, which shows it.

    Raises:
      UserError: for a missing or empty input, bytes that are not UTF-8, or an unknown direction, and nothing is
        written; where processes do not agree about the work.
    """
    config = config or translator.default_config
    direction = translator.resolve(source_language, target_language)

    def translate(lines: Sequence[str], first: int, progress: Progress) -> tuple[Iterable[str], int]:
        results = translator.translate_n_best(lines, *direction, config, progress, first_line=first)
        tokens = sum(hypotheses[0].num_tokens for hypotheses in results)
        return format_results(results, first, config.search.n_best), tokens

    work = {
        "options": config.to_json(),
        "direction": direction.name,
        "model": translator.fingerprint(),
    }
    return _make_file(translate, input_path, output_path, work, chunk_lines, show_progress)


def score_file(
    translator: Translator,
    input_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    language: str,
    config: DecodeConfig | None = None,
    *,
    chunk_lines: int = CHUNK_LINES,
) -> FileReport:
    """Writes how probable a language model finds each line of a file, as restartable and shared as `translate_file`.

    Each line of output is a number, the log-probability of a line over the number of its tokens (`Score`), in nats,
    written so that it is read back without loss.

    Args:
      translator: an opened language model.
      input_path: as in `translate_file`.
      output_path: see there.
      language: that of the text.
      config: gives `max_source_length` and `batch_tokens`; the rest does not matter.
      chunk_lines: at most so many lines are sorted, scored and written together.

    Raises:
      UserError: as `translate_file`.
    """
    config = config or DecodeConfig()
    direction = translator.resolve(language, language)

    def score(lines: Sequence[str], first: int, progress: Progress) -> tuple[Iterable[str], int]:
        scores = translator.score(lines, lines, *direction, config, progress)
        return (f"{one.log_prob / one.num_tokens!r}\n" for one in scores), sum(one.num_tokens for one in scores)

    work = {
        "scores": [config.max_source_length, config.batch_tokens],
        "direction": direction.name,
        "model": translator.fingerprint(),
    }
    return _make_file(score, input_path, output_path, work, chunk_lines, show_progress=False)


def _make_file(
    make: _Make,
    input_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    work: Mapping[str, Any],
    chunk_lines: int,
    show_progress: bool,
) -> FileReport:
    """Makes one file of another chunk by chunk, see `translate_file`; `work` says what decides its bytes."""
    start = time.monotonic()
    source, output = os.fspath(input_path), Path(output_path)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise UserError(f"{output}: give the path of a file in a folder that exists")
    content, num_lines = _examine(source)
    chunks = _equal_chunks(num_lines, chunk_lines)
    work = {"format": FORMAT, "input": content, "chunks": [num_lines, len(chunks)], **work}
    parts = Parts(output, work, len(chunks))
    missing = parts.missing()
    own = missing[jax.process_index() :: jax.process_count()]
    lines, tokens = sum(chunks[index] for index in own), 0
    with tqdm(total=lines, unit="line", disable=not (show_progress and is_primary())) as bar:
        for index, first, chunk in _read_chunks(source, chunks, set(own)):
            text, made = make(chunk, first, bar.update)
            parts.write(index, "".join(text))
            tokens += made
    told = parts.finish({"lines": lines, "tokens": tokens, "seconds": time.monotonic() - start})
    total = lambda name: int(sum(counts[name] for counts in told))
    resumed = num_lines - sum(chunks[index] for index in missing)
    seconds = max(counts["seconds"] for counts in told)
    return FileReport(total("lines"), resumed, total("tokens"), seconds, len(told))


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
    config = config or translator.default_config
    iterator, finished = iter(lines), 0
    while chunk := [line.rstrip("\r\n") for line in itertools.islice(iterator, chunk_lines)]:
        results = translator.translate_n_best(chunk, source_language, target_language, config, first_line=finished)
        yield from format_results(results, finished, config.search.n_best)
        finished += len(chunk)


def format_results(results: Iterable[list[Hypothesis]], first_line: int, n_best: int) -> Iterator[str]:
    """One text line for each result; for n_best above 1 the lines of Moses' n-best format."""
    for number, hypotheses in enumerate(results, first_line):
        if n_best == 1:
            yield hypotheses[0].text + "\n"
        else:
            yield from (f"{number} ||| {found.text} ||| {found.score:.6f}\n" for found in hypotheses)


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


def _read_chunks(path: str, sizes: Sequence[int], wanted: Set[int]) -> Iterator[tuple[int, int, list[str]]]:
    """Number, first line's number and lines of each chunk that is wanted, in order."""
    lines, starts = read_lines(path), itertools.accumulate(sizes, initial=0)
    for index, (start, size) in enumerate(zip(starts, sizes)):
        chunk = list(itertools.islice(lines, size))
        if index in wanted:
            yield index, start, chunk
