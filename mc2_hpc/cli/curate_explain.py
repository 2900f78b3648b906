"""``mc2 curate explain``: what happens to one caption, and why."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mc2_hpc.cli.json_result import STDOUT, add_json_flag, write_result
from mc2_hpc.cli.numbers import whole
from mc2_hpc.errors import UserError

if TYPE_CHECKING:
    from mc2_hpc.curation.explain import Explanation


def add_action(actions: Any) -> None:
    explain = actions.add_parser("explain", parents=[draw_flags()], help="what happens to one caption, and why")
    explain.add_argument("caption")
    explain.add_argument("--lang", help="its language code [identified]")
    explain.add_argument("--metadata", type=Path, required=True, help="folder of <lang>.json")
    explain.add_argument("--matched", type=Path, help="output of match: its mode, tables and filters are used")
    explain.add_argument("--balance", type=Path, help="output of balance: adds counts, probabilities, the verdict")
    explain.add_argument("--mode", choices=("fixed", "compat"), help="matching rules [the folder's, else fixed]")
    explain.add_argument("--key", help="image key: shows whether it is kept with this seed and epoch")
    add_json_flag(explain)
    explain.set_defaults(action=_explain)


def draw_flags() -> argparse.ArgumentParser:
    """The flags that select a draw, as a parent parser."""
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--seed", type=whole(0), default=0, help="seed of the draws, data.seed in training [0]")
    flags.add_argument("--epoch", type=whole(0), default=0, help="epoch of the draws [0]")
    return flags


def _explain(arguments: argparse.Namespace) -> int:
    from mc2_hpc.curation.explain import explain

    if arguments.key is not None and arguments.balance is None:
        raise UserError("--key shows whether balancing keeps the caption: name the balance folder with --balance")
    explanation = explain(
        arguments.caption,
        arguments.metadata,
        lang=arguments.lang,
        mode=arguments.mode,
        matched=arguments.matched,
        balance=arguments.balance,
        key=arguments.key,
        seed=arguments.seed,
        epoch=arguments.epoch,
    )
    if arguments.json:
        write_result(explanation.to_dict(), arguments.json)
    if arguments.json != STDOUT:
        _show(explanation)
    return 0


def _show(explanation: "Explanation") -> None:
    """Print an explanation as a table."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    source = "" if explanation.lang_from == "given" else f" (identified by {explanation.lang_from})"
    console.print(Text(f"language {explanation.lang or 'unknown'}{source}, mode {explanation.mode}"))
    if explanation.lang_from != "given" and explanation.drop_reason == "language_unknown":
        console.print("name the language with --lang if that is wrong")
    # Spaces are shown, because they affect what matches.
    console.print(Text("looked for in: ").append(explanation.spaced_text.replace(" ", "\u00b7"), "bold"))
    if explanation.matches:
        console.print(_table(explanation))
    for miss in explanation.near_misses:
        console.print(Text(f"near: {miss.entry!r} (entry {miss.id}) {miss.reason}"))
    console.print(Text(_verdict(explanation), _VERDICT_STYLES[explanation.kept]))


_VERDICT_STYLES = {True: "bold green", False: "bold red", None: "bold"}


def _table(explanation: "Explanation") -> Any:
    from rich.table import Table
    from rich.text import Text

    weighed = explanation.keep_probability is not None
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("entry")
    table.add_column("id", justify="right")
    table.add_column("pattern")
    table.add_column("at", justify="right")
    if weighed:
        for name in ("count", "probability", "part"):
            table.add_column(name, justify="left" if name == "part" else "right")
    rarest_first = sorted(explanation.matches, key=lambda match: (-(match.probability or 0), match.id))
    for match in rarest_first:
        places = ", ".join(map(str, match.at[:4])) + (", ..." if len(match.at) > 4 else "")
        cells = [match.entry, str(match.id), match.pattern.replace(" ", "\u00b7"), places]
        if weighed:
            cells += [f"{match.count:,}", f"{match.probability:.3g}", str(match.part)]
        table.add_row(*map(Text, cells))
    return table


def _verdict(explanation: "Explanation") -> str:
    if explanation.drop_reason is not None:
        return f"dropped: {explanation.drop_reason}"
    if explanation.keep_probability is None:
        return f"matches {len(explanation.matches)} entries; --balance shows how likely it is to be kept"
    odds = f"keep probability {explanation.keep_probability:.4g} (t = {explanation.threshold:,})"
    if explanation.draw is None:
        return odds
    verb = "kept" if explanation.kept else "not kept"
    return f"{odds}, draw {explanation.draw:.4f}: {verb} in an epoch that draws this caption for its image"
