"""``--json FILE``, the same in every command that has it."""

import argparse
import sys
from pathlib import Path
from typing import Any

STDOUT = "-"


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the result to FILE; with - print it instead of the table")


def write_result(value: Any, where: str) -> None:
    """Write ``value`` as indented JSON to the file ``where``, or to standard output if that is ``-``."""
    from mc2_hpc.storage import to_json_text, write_json

    if where == STDOUT:
        sys.stdout.write(to_json_text(value))
    else:
        write_json(Path(where), value)
