"""``mc2 curate thresholds``."""

import argparse
from typing import Any

from mc2_hpc.cli.json_result import STDOUT, add_json_flag, write_result


def add_action(actions: Any) -> None:
    """Add the action and its flags."""
    parser = actions.add_parser("thresholds", help="what different --t-en would keep of a matched pool; proposes one")
    parser.add_argument("matched", help="output of match")
    parser.add_argument("--metadata", required=True, help="folder of <lang>.json")
    add_json_flag(parser)
    parser.set_defaults(action=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.curation.propose import propose

    outcomes = propose(arguments.matched, arguments.metadata)
    if arguments.json:
        write_result([outcome.to_dict() for outcome in outcomes], arguments.json)
    if arguments.json != STDOUT:
        print(f"{'--t-en':>9}  tail mass  head entries  English captions kept")
        for one in outcomes:
            head = f"{one.entries_head:,} of {one.entries_matched:,}"
            kept = f"{one.expected_texts:,.0f} of {one.texts:,} ({one.expected_texts / one.texts:.0%})"
            print(f"{one.t_en:>9}  {one.tail_mass:>9.1%}  {head:>12}  {kept}")
        print(f"proposed, with the tail mass closest to the recipe's 6 %: --t-en {outcomes[0].t_en} (or auto)")
    return 0
