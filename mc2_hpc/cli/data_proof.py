"""``mc2 data proof``."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mc2_hpc.cli.json_result import STDOUT, add_json_flag, write_result

if TYPE_CHECKING:
    from mc2_hpc.training.takedown_proof import ListedSample, Proof

SUMMARY = "prove that a run saw no sample after the step at which its takedown list named it"

_MOST_SHOWN = 20
_DOES_NOT_HOLD = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of a run")
    parser.add_argument(
        "keys", type=Path, nargs="?", metavar="KEYS", help="takedown list of the samples to check [the run's own]"
    )
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    import dataclasses

    from mc2_hpc.data.takedown import read_list
    from mc2_hpc.training.takedown_proof import prove

    proof = prove(arguments.run, read_list(arguments.keys) if arguments.keys is not None else None)
    if arguments.json:
        result = {**dataclasses.asdict(proof), "problems": proof.problems, "holds": not proof.problems}
        write_result(result, arguments.json)
    if arguments.json != STDOUT:
        print("\n".join(_lines(proof)))
    for problem in proof.problems:
        print(f"mc2: {arguments.run}: not proved: {problem}", file=sys.stderr)
    return _DOES_NOT_HOLD if proof.problems else 0


def _lines(proof: "Proof") -> list[str]:
    from mc2_hpc.reading.files import shown

    lines = [f"{shown(proof.run)}, steps 1 to {proof.step}"]
    lines += [f"  {count:,} lines of the list in force after step {step}" for step, count in proof.versions]
    lines += [f"  {_sample(sample)}" for sample in proof.samples[:_MOST_SHOWN]]
    if len(proof.samples) > _MOST_SHOWN:
        lines.append(f"  ... and {len(proof.samples) - _MOST_SHOWN:,} more samples, which --json has")
    lines += [f"  {entry}: names no sample" for entry in proof.without_sample[:_MOST_SHOWN]]
    if len(proof.without_sample) > _MOST_SHOWN:
        lines.append(f"  ... and {len(proof.without_sample) - _MOST_SHOWN:,} more entries that name no sample")
    unreadable = [f"  cannot be read now: {shown(name)}: {why}" for name, why in proof.unreadable.items()]
    lines += unreadable[:_MOST_SHOWN]
    lines.append(
        f"  places of listed samples in the order since then: {proof.left_out:,}; left out by the run: "
        f"{proof.counted:,}"
    )
    if not proof.problems:
        lines.append("proved: none of these samples was seen after the step at which the list named it")
    return lines


def _sample(sample: "ListedSample") -> str:
    from mc2_hpc.reading.files import shown

    name = shown(sample.key) + (f" of source {sample.source}" if sample.source else "")
    listed = "never listed" if sample.in_force_after is None else f"listed after step {sample.in_force_after}"
    times = ", ".join(f"{after + 1}-{by}" for after, by in sample.seen[:4]) + (", ..." if len(sample.seen) > 4 else "")
    seen = f"in steps {times}" if sample.seen else "never"
    return f"{name}: {listed}; came up before {seen}; left out {sample.left_out:,} times since"
