"""``mc2 doctor``."""

import argparse
import json

SUMMARY = "show what is installed here and whether it works"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="also run the self-checks that take seconds each")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.doctor import examine, to_json

    findings = examine(full=arguments.full)
    if arguments.json:
        print(json.dumps(to_json(findings), indent=2))
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
