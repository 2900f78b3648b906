"""``mc2 curate``: its actions are in the ``curate_*`` modules beside this one."""

import argparse

from mc2_hpc.cli import curate_inspect, curate_sources, curate_stages

SUMMARY = "match captions, set thresholds, write training shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for module in (curate_sources, curate_stages, curate_inspect):
        module.add_actions(actions)


def run(arguments: argparse.Namespace) -> int:
    return arguments.action(arguments)
