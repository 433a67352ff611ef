"""File translation: lines and order, restart after SIGKILL, refusals that leave nothing behind."""

from __future__ import annotations

import gzip
import itertools
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from t5x_ext.contracts import Direction, UserError
from t5x_ext.decode import (
    Beam,
    DecodeConfig,
    Greedy,
    Hypothesis,
    Score,
    parts,
    score_file,
    translate_file,
    translate_stream,
)
from t5x_ext.decode.files import decode_lines
from t5x_ext.decode.parts import Parts

GREEDY = DecodeConfig(Greedy(), max_length_extra=2, max_length_ratio=1.0)


class Reverser:
    """Stands for a Translator: reverses lines, and kills its process in the chunk that starts at `dies_at`.

    Its hypotheses tell the line number that they were asked for.
    """

    def __init__(self, dies_at: int | None = None):
        self.dies_at = dies_at
        self.chunks: list[tuple[int, int]] = []

    def resolve(self, source_language, target_language):
        return Direction("en", "de")

    def fingerprint(self):
        return "reverser"

    def translate_n_best(self, lines, source, target, config, progress=None, first_line=0):
        if first_line == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.chunks.append((first_line, len(lines)))
        return [
            [Hypothesis(f"{line[::-1]}{n}", -1.0 - n - number, 3) for n in range(config.search.n_best)]
            for number, line in enumerate(lines, first_line)
        ]


def translate(translator, folder, name="out.txt", config=GREEDY, source="in.txt", chunk_lines=4):
    return translate_file(
        translator, folder / source, folder / name, "en", "de", config, chunk_lines=chunk_lines, show_progress=False
    )


@pytest.fixture
def folder(tmp_path):
    lines = [f"{a} dog and {b} cat" if b else "" for a in "abcd" for b in ("", "e", "f")]
    (tmp_path / "in.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_gives_line_for_line_what_its_lines_give(translator, folder):
    report = translate(translator, folder)
    lines = (folder / "in.txt").read_text().split("\n")[:-1]
    expected = translator.translate(lines, "en", "de", GREEDY)
    assert (folder / "out.txt").read_text() == "\n".join(expected) + "\n"
    assert (report.lines, report.resumed_lines, report.processes) == (12, 0, 1)
    assert report.sentences_per_second == pytest.approx(12 / report.seconds)
    assert report.target_tokens_per_second > 0
    assert names(folder) == ["in.txt", "out.txt"]
    stream = translate_stream(translator, (line + "\n" for line in lines), "en", "de", GREEDY, chunk_lines=5)
    assert list(stream) == [line + "\n" for line in expected]


def test_gzip_and_other_line_ends_and_a_last_line_without_one(folder):
    translate(Reverser(), folder)
    content = (folder / "in.txt").read_bytes().replace(b"\n", b"\r\n").rstrip(b"\r\n")
    (folder / "in.gz").write_bytes(gzip.compress(content))
    translate(Reverser(), folder, "zipped.txt", source="in.gz")
    assert (folder / "zipped.txt").read_bytes() == (folder / "out.txt").read_bytes()


def test_chunks_are_of_equal_size(folder):
    translator = Reverser()
    translate(translator, folder, chunk_lines=5)
    assert translator.chunks == [(0, 4), (4, 4), (8, 4)]


def test_a_killed_translation_goes_on_where_it_stopped(folder):
    translate(Reverser(), folder, "whole.txt")
    killed = subprocess.run([sys.executable, __file__, str(folder)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert names(folder) == ["in.txt", "out.txt.parts", "whole.txt"]
    # What was being written when it was killed is not trusted.
    (folder / "out.txt.parts" / "00000002.draft").write_text("half a li")
    (folder / "out.txt.parts" / "joined").write_text("half a fi")
    second = Reverser()
    report = translate(second, folder)
    assert second.chunks == [(8, 4)]
    assert (report.lines, report.resumed_lines) == (4, 8)
    assert (folder / "out.txt").read_bytes() == (folder / "whole.txt").read_bytes()
    assert names(folder) == ["in.txt", "out.txt", "whole.txt"]


@pytest.fixture
def processes(monkeypatch):
    """Runs a function of the process's number in so many threads, each of which takes itself for a process."""

    def run(count, work):
        this, meeting = threading.local(), threading.Barrier(count)

        @contextmanager
        def primary_first(name):
            if this.index > 0:
                meeting.wait()
            yield
            if this.index == 0:
                meeting.wait()

        def begin(index):
            this.index = index
            return work(index)

        monkeypatch.setattr("jax.process_count", lambda: count)
        monkeypatch.setattr("jax.process_index", lambda: this.index)
        monkeypatch.setattr(parts, "barrier", lambda name: meeting.wait())
        monkeypatch.setattr(parts, "primary_first", primary_first)
        with ThreadPoolExecutor(count) as threads:
            results = list(threads.map(begin, range(count)))
        monkeypatch.undo()
        return results

    return run


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_any_number_of_processes_goes_on_where_another_number_stopped(folder, processes, count):
    """Stopped after two of six chunks: the rest is shared evenly, and nothing is translated twice."""
    config = DecodeConfig(Beam(n_best=2))
    translate(Reverser(), folder, "whole.txt", config, chunk_lines=2)

    class Stops(Reverser):
        def translate_n_best(self, *arguments, first_line):
            if first_line == 4:
                raise InterruptedError
            return super().translate_n_best(*arguments, first_line=first_line)

    with pytest.raises(InterruptedError):
        translate(Stops(), folder, config=config, chunk_lines=2)
    translators = [Reverser() for _ in range(count)]
    reports = processes(count, lambda index: translate(translators[index], folder, config=config, chunk_lines=2))
    assert (folder / "out.txt").read_bytes() == (folder / "whole.txt").read_bytes()
    assert names(folder) == ["in.txt", "out.txt", "whole.txt"]
    chunks = [translator.chunks for translator in translators]
    assert sorted(itertools.chain(*chunks)) == [(line, 2) for line in (4, 6, 8, 10)]
    assert max(map(len, chunks)) == -(-4 // count)
    assert {report[:3] for report in reports} == {(8, 4, 24)}
    assert {report.processes for report in reports} == {count}


def test_processes_about_other_work_are_told(folder, monkeypatch):
    assert Parts(folder / "out.txt", {"options": 0, "chunks": 3}, 3).missing() == [0, 1, 2]
    monkeypatch.setattr(parts, "is_primary", lambda: False)
    with pytest.raises(UserError, match="has other work than process 0: options must agree"):
        Parts(folder / "out.txt", {"options": 1, "chunks": 3}, 3).missing()
    with pytest.raises(UserError, match="give an output in a folder that all processes share"):
        Parts(folder / "elsewhere.txt", {"options": 0}, 3).missing()


def test_scores_of_a_file_are_means_over_tokens_and_go_on_where_they_stopped(folder):
    """One number a line, without loss; a language model reads a line as its own source."""

    class Scores(Reverser):
        def resolve(self, source_language, target_language):
            assert source_language == target_language
            return Direction(source_language, target_language)

        def score(self, sources, targets, *languages, **options):
            assert sources == targets
            if len(self.chunks) == self.dies_at:
                raise InterruptedError
            self.chunks.append((len(self.chunks), len(sources)))
            return [Score((-0.1, -len(line) / 3)) for line in sources]

    with pytest.raises(InterruptedError):
        score_file(Scores(dies_at=2), folder / "in.txt", folder / "scores.txt", "en", chunk_lines=4)
    assert not (folder / "scores.txt").exists()
    report = score_file(Scores(), folder / "in.txt", folder / "scores.txt", "en", chunk_lines=4)
    assert (report.lines, report.resumed_lines, report.target_tokens) == (4, 8, 8)
    lines = (folder / "in.txt").read_text().split("\n")[:-1]
    assert list(map(float, (folder / "scores.txt").read_text().splitlines())) == [
        Score((-0.1, -len(line) / 3)).log_prob / 2 for line in lines
    ]


@pytest.mark.parametrize("change", ["input", "options", "record"])
def test_other_work_starts_over(folder, change):
    subprocess.run([sys.executable, __file__, str(folder)], check=False)
    config = GREEDY
    if change == "input":
        (folder / "in.txt").write_text("another text\n" * 12)
    elif change == "options":
        config = DecodeConfig(Beam(beam_size=2))
    else:
        (folder / "out.txt.parts" / "work.json").write_bytes(b'{"format"')
    translator = Reverser()
    assert translate(translator, folder, config=config).resumed_lines == 0
    assert len(translator.chunks) == 3


def test_n_best_lines_are_numbered(folder):
    translate(Reverser(), folder, config=DecodeConfig(Beam(n_best=2)))
    lines = (folder / "out.txt").read_text().splitlines()
    assert len(lines) == 24
    assert lines[10:12] == ["5 ||| tac f dna god b0 ||| -6.000000", "5 ||| tac f dna god b1 ||| -7.000000"]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "in.txt", "no such file"),
        (b"", "in.txt", "empty"),
        (b"good\n\xff\xfe\n", "in.txt", "line 2: not UTF-8"),
        (gzip.compress(b"some text\n" * 100, mtime=0)[:-20], "in.gz", "gzip file is damaged"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, content, name, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = names(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        translate(Reverser(), tmp_path, source=name)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == before


def test_an_output_without_a_folder_is_refused(folder):
    with pytest.raises(UserError, match="in a folder that exists"):
        translate(Reverser(), folder, "missing/out.txt")


def test_standard_input_is_checked_line_by_line():
    assert list(decode_lines([b"one\r\n", b"two"], "standard input")) == ["one", "two"]
    with pytest.raises(UserError, match="standard input, line 2: not UTF-8"):
        list(decode_lines([b"fine\n", b"\xc3\n"], "standard input"))


if __name__ == "__main__":
    translate(Reverser(dies_at=8), Path(sys.argv[1]))
