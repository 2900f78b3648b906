"""``mc2 curate fetch``: its flags are the fields of ``FetchOptions``."""

import argparse
from typing import Any

from mc2_hpc.cli.curate_engine import engine_flags, engine_of, run_plan
from mc2_hpc.cli.numbers import seconds, whole


def add_action(actions: Any) -> None:
    """Add the action and its flags."""
    parser = actions.add_parser(
        "fetch",
        parents=[engine_flags()],
        help="download the images of a pool from the addresses in its `source` column",
    )
    parser.add_argument("pool", help="folder of <shard>.parquet with key, text and source")
    _add_images(parser.add_argument_group("images"))
    _add_limits(parser.add_argument_group("limits per worker"))
    parser.set_defaults(action=_run)


def _add_images(group: Any) -> None:
    group.add_argument(
        "--resize",
        type=whole(16, 65_500),
        metavar="PIXELS",
        help="shrink larger images to this longest side, as JPEGs [keep the original files]",
    )
    group.add_argument("--max-bytes", type=whole(1, 1 << 30), metavar="N", help="largest response, in bytes [16777216]")
    group.add_argument(
        "--opt-out",
        nargs="*",
        metavar="DIRECTIVE",
        help="X-Robots-Tag directives to obey; an empty list obeys none [noai noimageai noindex noimageindex none]",
    )
    group.add_argument("--user-agent", metavar="TEXT", help="User-Agent header to send [mc2_hpc/VERSION]")
    group.add_argument(
        "--allow-addresses",
        nargs="+",
        metavar="NETWORK",
        help="private networks to allow connections to, such as 10.1.0.0/16 [none]",
    )


def _add_limits(group: Any) -> None:
    group.add_argument("--connections", type=whole(1, 10_000), metavar="N", help="connections at a time [256]")
    group.add_argument(
        "--host-connections", type=whole(1, 10_000), metavar="N", help="connections to one host at a time [4]"
    )
    group.add_argument(
        "--host-rate", type=whole(0, 10**6), metavar="N", help="requests per second to one host; 0 for no limit [20]"
    )
    group.add_argument("--max-redirects", type=whole(0, 20), metavar="N", help="redirects to follow for one image [5]")
    group.add_argument(
        "--connect-timeout", type=seconds, metavar="S", help="seconds to resolve a host and connect to it [10]"
    )
    group.add_argument("--timeout", type=seconds, metavar="S", help="seconds for a whole request [30]")
    group.add_argument("--max-wait", type=seconds, metavar="S", help="longest Retry-After to wait for, in seconds [60]")
    group.add_argument(
        "--retries", type=whole(0, 100), metavar="N", help="times to try again when a server is busy [3]"
    )


def _run(arguments: argparse.Namespace) -> int:
    from dataclasses import fields

    from mc2_hpc.curation.fetch import plan_fetch
    from mc2_hpc.curation.fetching.options import FetchOptions

    engine = engine_of(arguments)
    given = {one.name: getattr(arguments, one.name) for one in fields(FetchOptions)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    options = FetchOptions(**{name: value for name, value in given.items() if value is not None})
    run_plan(plan_fetch(arguments.pool, arguments.out, options), engine)
    return 0
