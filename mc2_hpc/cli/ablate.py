"""``mc2 ablate``."""

import argparse
from pathlib import Path

from mc2_hpc.cli.numbers import whole
from mc2_hpc.errors import UserError

SUMMARY = "train and score the rows of ablation tables, each with several seeds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="YAML ablation files (configs/ablations/)")
    # key=value words may be among the files; this list gets those that come after an option.
    parser.set_defaults(overrides=[])
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder to write [runs/ablations]")
    parser.add_argument("--jobs", type=whole(1), default=1, help="training runs at a time, one thread each [1]")


def run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.ablation.run import ablate
    from mc2_hpc.ablation.tables import markdown
    from mc2_hpc.terminal import progress

    files = [word for word in arguments.files if "=" not in word]
    overrides = [word for word in arguments.files if "=" in word] + arguments.overrides
    if not files:
        raise UserError("name an ablation file, such as configs/ablations/tokenizers.yaml")
    with progress() as report:
        tables = ablate(files, overrides, arguments.out, jobs=arguments.jobs, report=report)
    print(markdown(tables))
    print(f"{arguments.out / 'ablations.md'}, ablations.json and one .png per ablation")
    return 0
