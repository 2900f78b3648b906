"""``mc2``: the only place that connects all layers. Each command imports what it needs when it runs."""

import argparse
import errno
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from mc2_hpc import __version__
from mc2_hpc.cli import (
    ablate,
    bench,
    convert,
    curate,
    data,
    doctor,
    eval,
    features,
    merge,
    metadata,
    plan,
    quickstart,
    search,
    status,
    tokenizer,
    train,
)
from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import shown
from mc2_hpc.terminal import log_to_stderr

COMMANDS = {
    "quickstart": quickstart,
    "metadata": metadata,
    "data": data,
    "curate": curate,
    "tokenizer": tokenizer,
    "features": features,
    "plan": plan,
    "train": train,
    "status": status,
    "eval": eval,
    "ablate": ablate,
    "search": search,
    "convert": convert,
    "merge": merge,
    "bench": bench,
    "doctor": doctor,
}
"""One module per command, with ``SUMMARY``, ``add_arguments(parser)`` and ``run(arguments) -> exit code``."""

_LONGEST = 800
"""Characters of an error message; of a longer one, the first and the last half of so many are shown."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 1 failed, 2 bad input (one line on standard error)."""
    if argv is None and sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        # Captions, languages and file names need more than an ASCII or Latin-1 locale can write. Ranks and data workers
        # inherit the variable.
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # captions on an ASCII terminal
    parser = _parser()
    try:
        arguments, rest = parser.parse_known_args(argv)
    except UserError as error:
        _say(error)
        return 2
    rest = _take_late(arguments, rest)
    if rest:
        parser.exit(2, f"mc2: unrecognized arguments: {' '.join(map(shown, rest))}\n")
    log_to_stderr()
    try:
        return arguments.command(arguments) or 0
    except UserError as error:
        if arguments.debug:
            raise
        _say(error)
        return 2
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG or arguments.debug:
            raise
        print(f"mc2: {str(error.filename)[:60]}...: a name that is too long for a file", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mc2: interrupted", file=sys.stderr)
        return 130


def _say(error: UserError) -> None:
    """Print the one line; of a very long one, such as a name of thousands of characters, the beginning and the end."""
    text = str(error)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} [...] {text[-(_LONGEST // 2) :]}"
    print(f"mc2: {text}", file=sys.stderr)


def _take_late(arguments: argparse.Namespace, rest: list[str]) -> list[str]:
    """Give a command the positional words that argparse does not accept after an option: ``key=value`` overrides, and
    a query. Returns the rest."""
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if overrides and hasattr(arguments, "overrides"):
        arguments.overrides += overrides
        rest = [word for word in rest if word not in overrides]
    if len(rest) == 1 and not rest[0].startswith("-") and getattr(arguments, "query", "") is None:
        arguments.query, rest = rest[0], []
    return rest


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments in one line, as the commands do."""

    def error(self, message: str) -> NoReturn:
        found = re.match(r"argument (\S+): (.*: must be .*)", message, flags=re.DOTALL)  # from mc2_hpc.cli.numbers
        message = f"{found[1]} {found[2]}" if found else message.removeprefix("argument ")
        raise UserError(f"{shown(message)}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mc2", description="Worldwide CLIP: metadata, curation, training, evaluation, conversion.")
    parser.add_argument("--version", action="version", version=f"mc2_hpc {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        sub = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_arguments(sub)
        # Also accepted after the command, where people tend to type it.
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        sub.set_defaults(command=module.run)
    return parser
