"""``mc2 tokenizer``."""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mc2_hpc.cli.json_result import STDOUT, add_json_flag, write_result
from mc2_hpc.cli.numbers import whole
from mc2_hpc.errors import UserError

if TYPE_CHECKING:
    from mc2_hpc.vocabulary.captions import DrawnCaptions, Quotas
    from mc2_hpc.vocabulary.inspect import LanguageTokens

SUMMARY = "train a tokenizer on a pool, or see how one divides each language"

_STYLES = ("xlmv", "mt5", "gemma")
_COLUMNS = "language  captions  tokens  per word  chars/token  unknown    bytes  truncated"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("pool", help="folder, file or pattern of shards with captions: Parquet or tars")
    common.add_argument("--style", choices=_STYLES, required=True, help="layout of the ids, see docs/data.md")
    common.add_argument("--seed", type=whole(0), default=0, help="seed of the choice of captions [0]")
    train = actions.add_parser("train", parents=[common], help="train a sentencepiece model on a pool's captions")
    train.add_argument("--vocab-size", type=whole(16, 1 << 24), required=True, help="ids of the tokenizer")
    train.add_argument("--out", type=Path, required=True, metavar="FILE", help="sentencepiece model to write")
    train.add_argument("--captions", type=whole(1), default=1_000_000, help="captions to train on [1000000]")
    train.add_argument(
        "--alpha",
        type=_share,
        default=0.3,
        help="a language's share of them is its share of the pool to this power; 1 keeps the pool's shares [0.3]",
    )
    train.add_argument(
        "--coverage", type=_share, default=1.0, help="share of the captions' characters that get an id [1.0]"
    )
    train.set_defaults(action=_train)
    inspect = actions.add_parser(
        "inspect", parents=[common], help="tokens per word, unknown characters and truncation, by language"
    )
    inspect.add_argument("--model", type=Path, required=True, metavar="FILE", help="sentencepiece model")
    inspect.add_argument("--context-length", type=whole(3, 1 << 16), default=77, help="tokens per caption [77]")
    inspect.add_argument("--captions", type=whole(1), default=2_000, help="captions per language to look at [2000]")
    add_json_flag(inspect)
    inspect.set_defaults(action=_inspect)


def run(arguments: argparse.Namespace) -> int:
    return arguments.action(arguments)


def _share(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found <= 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: must be a number above 0 and at most 1")
    return found


def _train(arguments: argparse.Namespace) -> int:
    from mc2_hpc.data.tokenizer import train_tokenizer
    from mc2_hpc.vocabulary.captions import tempered

    if arguments.out.is_dir():
        raise UserError(f"--out {arguments.out}: is a folder; name the file to write")
    drawn = _draw(arguments, tempered(arguments.captions, arguments.alpha))
    texts = [text for captions in drawn.texts.values() for text in captions]
    print(f"training on {len(texts):,} captions in {len(drawn.texts)} languages", file=sys.stderr, flush=True)
    tokenizer = train_tokenizer(
        texts,
        arguments.out,
        vocab_size=arguments.vocab_size,
        style=arguments.style,
        character_coverage=arguments.coverage,
    )
    print(f"{arguments.out}: {tokenizer.vocab_size:,} ids, data.tokenizer_style={arguments.style}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from mc2_hpc.data.tokenizer import Tokenizer
    from mc2_hpc.vocabulary.captions import up_to
    from mc2_hpc.vocabulary.inspect import inspect_tokenizer

    tokenizer = Tokenizer(arguments.model, arguments.style, arguments.context_length)
    drawn = _draw(arguments, up_to(arguments.captions))
    rows = inspect_tokenizer(tokenizer, drawn.texts)
    if arguments.json:
        facts = {"model": str(arguments.model), "style": arguments.style, "vocab_size": tokenizer.vocab_size}
        facts |= {"context_length": arguments.context_length, "languages": [row.to_dict() for row in rows]}
        write_result(facts, arguments.json)
    if arguments.json != STDOUT:
        print(f"{arguments.model}: {tokenizer.vocab_size:,} ids, style {arguments.style}")
        _show(rows, drawn.available)
    return 0


def _draw(arguments: argparse.Namespace, quotas: "Quotas") -> "DrawnCaptions":
    from mc2_hpc.terminal import progress
    from mc2_hpc.vocabulary.captions import draw_captions

    with progress() as report:
        drawn = draw_captions(
            arguments.pool, quotas, seed=arguments.seed, progress=lambda done, total: report("shards", done, total, "")
        )
    for reason, count in drawn.drops.most_common():
        print(f"mc2: skipped: {reason} {count}", file=sys.stderr)
    return drawn


def _show(rows: "Sequence[LanguageTokens]", available: Mapping[str, int]) -> None:
    """Print one line per language, the most frequent in the pool first."""
    print(_COLUMNS)
    for row in sorted(rows, key=lambda row: -available[row.lang]):
        words = "-" if row.tokens_per_word is None else f"{row.tokens_per_word:.2f}"
        print(
            f"{row.lang:<8}  {row.captions:>8,}  {row.tokens_per_caption:>6.1f}  {words:>8}  "
            f"{row.characters_per_token:>11.2f}  {row.unknown:>7.2%}  {row.bytes:>7.2%}  {row.truncated:>9.2%}"
        )
