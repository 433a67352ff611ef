"""absl flags of one verb, parsed so that a mistake is one line: what, where, what would be right."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Callable, Sequence

from absl import flags

from t5x_ext.cli.messages import UsageError, did_you_mean

HELP = ("--help", "-help", "-h", "--helpfull", "--helpshort")
_GIN = re.compile(r"^--?gin\.(?P<binding>.*)$", re.DOTALL)


def parse(define_flags: Callable[[flags.FlagValues], None], arguments: Sequence[str]) -> flags.FlagValues:
    """The values of a verb's flags.

    `--gin.NAME=VALUE` is absl's `--gin=NAME=VALUE` written as a gin binding; verbs that read gin define that flag.

    Raises:
      UsageError: for an unknown flag, a value of the wrong type, a missing value, a stray argument, or a flag that
        stays empty though its help says that it is required.
    """
    values = flags.FlagValues()
    define_flags(values)
    try:
        leftover = values(["t5x_ext", *(_GIN.sub(r"--gin=\g<binding>", argument) for argument in arguments)])[1:]
    except flags.UnrecognizedFlagError as error:
        raise UsageError(_unknown(error, values)) from None
    except flags.IllegalFlagValueError as error:
        raise UsageError(_illegal(str(error), values)) from None
    except flags.Error as error:
        raise UsageError(str(error)) from None
    if leftover:
        raise UsageError(f"unexpected argument '{leftover[0]}'; flags are written --name=value")
    return values


def require(values: flags.FlagValues, *names: str) -> None:
    """Raises UsageError naming the first of these flags that was not given."""
    for name in names:
        if getattr(values, name) in (None, "", []):
            raise UsageError(f"--{name} is missing: {about(values[name])}")


def help_text(verb: str, description: str, define_flags: Callable[[flags.FlagValues], None]) -> str:
    """What `t5x_ext VERB --help` prints: the verb's description and its flags with their defaults."""
    values = flags.FlagValues()
    define_flags(values)
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    lines = [f"usage: t5x_ext {verb} [--flag=value ...]", "", description.strip(), "", "flags:"]
    for name in values:
        flag = values[name]
        head = "gin.NAME=VALUE" if name == "gin" else f"[no]{name}" if flag.boolean else f"{name}={_kind(flag)}"
        default = "" if flag.default in (None, "", []) else f" (default: {flag.default})"
        lines.append(f"  --{head}")
        lines += textwrap.wrap(about(flag) + default, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def about(flag: flags.Flag) -> str:
    """A flag's own description, without what absl adds for lists and choices."""
    text = re.sub(r"^<[^>]*>: ", "", flag.help or "").split(";\n    repeat this option")[0]
    return text.removesuffix("\n    (a comma separated list)")


def _kind(flag: flags.Flag) -> str:
    choices = getattr(flag.parser, "enum_values", None)
    kind = "|".join(choices) if choices else {"int": "N", "float": "X"}.get(flag.parser.flag_type(), "TEXT")
    return f"{kind} (repeatable)" if isinstance(flag, flags.MultiFlag) else kind


def _unknown(error: flags.UnrecognizedFlagError, values: flags.FlagValues) -> str:
    name = error.flagname
    if name == "gin":
        return "this command reads no gin bindings; see its --help for the flags that it has"
    bare = name.removeprefix("no") if name.startswith("no") and name[2:] in values else name
    return f"unknown flag --{name}" + did_you_mean(bare, list(values), most=0).replace("mean ", "mean --")


def _illegal(message: str, values: flags.FlagValues) -> str:
    match = re.match(r"flag --(?P<name>\w+)=(?P<value>.*?): (?P<reason>.*)$", message, re.DOTALL)
    if match is None:
        return message
    flag = values[match["name"]]
    expected = "true or false" if flag.boolean else flag.parser.syntactic_help
    reason = f"expected {expected}" if expected else match["reason"]
    return f"--{match['name']}={match['value']}: {reason}"
