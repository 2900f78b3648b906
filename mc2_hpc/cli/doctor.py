"""``mc2 doctor``."""

import argparse

from mc2_hpc.cli.json_result import STDOUT, add_json_flag, write_result

SUMMARY = "show what is installed here and whether it works"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="also run the self-checks that take seconds each")
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.doctor import examine, to_json

    findings = examine(full=arguments.full)
    if arguments.json:
        write_result(to_json(findings), arguments.json)
    if arguments.json == STDOUT:
        return 0
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("component", "status", "version", "self-check, or what to do")
    colour = {"ok": "green", "missing": "yellow", "broken": "red"}
    for finding in findings:
        status = f"[{colour[finding.status]}]{finding.status}[/]{' (shallow)' if finding.shallow else ''}"
        table.add_row(finding.component, status, finding.version, escape(finding.detail))
    Console().print(table)
    return 0
