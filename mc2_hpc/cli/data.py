"""``mc2 data``: one module per action."""

import argparse

from mc2_hpc.cli import data_lint, data_pack, data_proof, data_show

SUMMARY = "pack your own images and captions into shards, check and show shards, prove takedowns"

ACTIONS = {
    "pack": data_pack,
    "lint": data_lint,
    "show": data_show,
    "proof": data_proof,
}
"""Each has ``SUMMARY``, ``add_arguments(parser)`` and ``run(arguments) -> exit code``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, module in ACTIONS.items():
        action = actions.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_arguments(action)
        action.set_defaults(action=module.run)


def run(arguments: argparse.Namespace) -> int:
    return arguments.action(arguments)
