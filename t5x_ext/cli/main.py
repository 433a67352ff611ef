"""The `t5x_ext` command: finds the verb, reads its flags, runs it, and turns mistakes into one line and exit code 2."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from t5x_ext.cli.messages import UsageError, did_you_mean, one_line

VERBS = {
    "train": "train a translation model from text files or a gin file; running it again resumes",
    "clean": "filter raw text, parallel or of one language; prints what each rule dropped",
    "vocab": "train a SentencePiece vocabulary from text files",
    "cache": "tokenize the corpora of a run ahead of training; prints counts and disk space",
    "translate": "translate a file or standard input with a trained run",
    "score": "log-probabilities and perplexity of given translations",
    "evaluate": "BLEU, chrF and TER with signatures, paired tests, a score per domain",
    "average": "average several checkpoints of a run into a new run folder",
    "pipeline": "run the stages of a pipeline, from raw text to scores; running it again goes on",
    "study": "compare arms over seeds: runs, a table with tests, pictures, a report; rerun to resume",
    "info": "describe a run folder, a model preset or a gin file: parameters, layers, FLOPs, sizes",
    "check": "compile a run for a TPU topology that is not here: memory, collectives, least step time; search",
    "doctor": "check this machine: versions, devices, gin path, write access",
}

_GOOGLE = "0x1ae0"  # PCI vendor of TPUs
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd")

_MOST_ROWS = 40
"""Of a table of differences; the model of another size differs in everything."""


def run() -> None:
    """The console entry: `t5x_ext VERB --flag=value ...`; ends the process with the verb's exit code."""
    # A console script does not see the current folder, where a user's own modules named in a gin file live.
    sys.path.append(os.getcwd())
    _say_failed_saves_once()
    _leave_absent_tpu_alone()
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Runs one verb.

    Returns:
      0 when done (or what the verb returns), 2 after a user's mistake (one line on standard error), 130 when
      interrupted. Any other exception passes through with its traceback: that is a bug.
    """
    if not arguments or arguments[0] in ("--help", "-help", "-h", "help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(importlib.import_module("t5x_ext").__version__)
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        return _fail("t5x_ext", f"no command '{verb}'" + did_you_mean(verb, VERBS))
    try:
        return _run_verb(verb, rest)
    except KeyboardInterrupt:
        print(f"t5x_ext {verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has left (`| head`); closing standard output later must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if not _is_mistake(error):
            raise
        return _fail(f"t5x_ext {verb}", error)


def _leave_absent_tpu_alone() -> None:
    """Keeps JAX from trying a TPU that is not there, which prints warnings: libtpu may be here for `check` alone."""
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    has_tpu = any(Path(vendor).read_text().strip() == _GOOGLE for vendor in glob("/sys/bus/pci/devices/*/vendor"))
    if not has_tpu and not any(os.path.exists(device) for device in _GPU_DEVICES):
        os.environ["JAX_PLATFORMS"] = "cpu"


def overview() -> str:
    """What `t5x_ext --help` prints: the verbs, one line each."""
    lines = [f"  {verb:<10} {purpose}" for verb, purpose in VERBS.items()]
    return "\n".join(
        ["usage: t5x_ext COMMAND [--flag=value ...]", "", *lines, "", "t5x_ext COMMAND --help shows its flags."]
    )


def _run_verb(verb: str, arguments: Sequence[str]) -> int:
    flags = importlib.import_module("t5x_ext.cli.flags")
    module = importlib.import_module(f"t5x_ext.cli.{verb}")
    if any(argument in flags.HELP for argument in arguments):
        print(flags.help_text(verb, module.__doc__ or "", module.define_flags))
        return 0
    values = flags.parse(module.define_flags, arguments)
    with _log_to_stderr():
        return module.main(values) or 0


class _LogHandler(logging.StreamHandler):
    """Writes lines above a progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record."""
        tqdm = sys.modules.get("tqdm")
        with tqdm.tqdm.external_write_mode(file=self.stream) if tqdm else contextlib.nullcontext():
            super().emit(record)


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Shows what the library logs, as plain lines."""
    logger, handler = logging.getLogger("t5x_ext"), _LogHandler(sys.stderr)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _say_failed_saves_once() -> None:
    """Keeps back what Orbax, asyncio and TensorStore print of every array that a save could not write, for good.

    The first error comes to us, to be said in one line; the others are printed until the process has ended.
    """
    show = sys.unraisablehook

    def show_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_others
    warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_of_a_save)


def _is_not_of_a_save(record: logging.LogRecord) -> bool:
    error, traceback = record.exc_info[1:] if record.exc_info else (None, None)
    places = traceback.tb_frame.f_code.co_filename if traceback else ""
    return "orbax" not in places and "os_error_code=" not in str(error)


def _is_mistake(error: Exception) -> bool:
    # A UserError can only come from code that has loaded contracts; loading it here would start JAX for nothing.
    contracts = sys.modules.get("t5x_ext.contracts")
    return isinstance(error, UsageError) or (contracts is not None and isinstance(error, contracts.UserError))


def _fail(who: str, message: object) -> int:
    """One line; below it the table of differences, where the mistake has one."""
    print(f"{who}: {one_line(message)}", file=sys.stderr)
    rows = str(getattr(message, "details", "")).splitlines()
    if len(rows) > _MOST_ROWS:
        rows = [*rows[:_MOST_ROWS], f"... and {len(rows) - _MOST_ROWS} more"]
    for row in rows:
        print(f"  {row}", file=sys.stderr)
    return 2
