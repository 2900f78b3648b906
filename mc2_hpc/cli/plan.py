"""``mc2 plan``."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mc2_hpc.cli import plan_calibrate
from mc2_hpc.cli.json_result import STDOUT, add_json_flag, write_result
from mc2_hpc.cli.numbers import amount, whole
from mc2_hpc.errors import UserError

if TYPE_CHECKING:
    from mc2_hpc.config import RunConfig
    from mc2_hpc.planning.plan import Plan

SUMMARY = "predict memory, time and cost of a training run, without a GPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, nargs="?", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that override the file's")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="plan two configs beside each other")
    parser.add_argument("--gpus", type=whole(1, 65_536), default=8, help="number of GPUs [8]")
    parser.add_argument("--per-node", type=whole(1, 1024), default=8, help="GPUs of a node [8]")
    parser.add_argument("--gpu", default="h100", help="a100, h100, h200, b200, cpu or a YAML file [h100]")
    parser.add_argument("--network", help="hdr, ndr, ndr-b200, loopback or a YAML file [that of the GPU's usual nodes]")
    parser.add_argument("--price", type=amount, help="of a GPU hour, in any currency")
    parser.add_argument("--caption-tokens", type=amount, default=18.0, help="mean tokens of a caption [18]")
    parser.add_argument("--pair-bytes", type=amount, default=30_000.0, help="mean bytes of a stored pair [30000]")
    parser.add_argument("--advise", action="store_true", help="also trace other settings, and say which gain most")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with plots")
    parser.add_argument(
        "--calibrate",
        type=Path,
        nargs="+",
        metavar="RUN/metrics.jsonl",
        help="fit what --gpu and --network achieve to the steps of these runs, and write files for the next plan",
    )
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.config import load_config
    from mc2_hpc.pages.plots import require_plotting
    from mc2_hpc.planning.advise import alternatives, best_changes
    from mc2_hpc.planning.machines import read_gpu, read_network
    from mc2_hpc.planning.plan import Assumptions, Plan, Total, make_plans, plan_stages
    from mc2_hpc.planning.processes import TraceError

    if arguments.calibrate:
        return plan_calibrate.run(arguments)
    _check(arguments)
    if arguments.html is not None:
        require_plotting("the page of a plan needs", "curation")
    gpu = read_gpu(arguments.gpu)
    network_name = arguments.network or gpu.network
    network = read_network(network_name)
    names = [str(path) for path in arguments.compare or [arguments.config]]
    configs = [load_config(name, arguments.overrides) for name in names]
    others = alternatives(configs[0]) if arguments.advise else {}
    machine: dict[str, Any] = {
        "gpus": arguments.gpus,
        "per_node": arguments.per_node,
        "gpu_name": arguments.gpu,
        "gpu": gpu,
        "network_name": network_name,
        "network": network,
        "assumptions": Assumptions(
            caption_tokens=arguments.caption_tokens, pair_bytes=arguments.pair_bytes, price=arguments.price
        ),
    }
    total: Total | None = None
    outcomes: list[Plan | Exception] = []
    try:
        if staged := _stages(arguments, names, configs):
            plans = plan_stages(staged, **machine)
            total = Total.of(plans)
            names = [f"{names[0]}, stage {place} of {len(plans)}" for place in range(1, len(plans) + 1)]
        else:
            plans, outcomes = make_plans(configs, list(others.values()), **machine)
    except TraceError as error:
        print(f"mc2: {error}", file=sys.stderr)
        return 1
    answered = dict(zip(others, outcomes, strict=True))
    changes = best_changes(plans[0], [(name, plan) for name, plan in answered.items() if isinstance(plan, Plan)])
    failed = {name: str(error) for name, error in answered.items() if isinstance(error, Exception)}
    if arguments.html is not None:
        from mc2_hpc.planning.page import write_plan_page

        write_plan_page(arguments.html, names, plans, total)
    if arguments.json:
        values = [{"config": name, **plan.to_json()} for name, plan in zip(names, plans, strict=True)]
        advice = [
            {"change": name, "step_seconds": plan.step.seconds, "peak_bytes": plan.trace.peak.bytes}
            for name, plan in changes
        ]
        advised = {"changes": advice, "failed": failed} if arguments.advise else None
        summed = None if total is None else dataclasses.asdict(total)
        write_result({"plans": values, "total": summed, "advice": advised}, arguments.json)
    if arguments.json != STDOUT:
        _print(names, plans)
        if total is not None:
            cost = "" if total.money is None else f", cost {total.money:,.0f}"
            print(f"all stages, predicted: {total.days:,.1f} days, {total.gpu_hours:,.0f} GPU hours{cost}")
        if arguments.advise:
            _print_advice(plans[0], changes, failed)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.compare is not None and arguments.config is not None and "=" in str(arguments.config):
        arguments.overrides.insert(0, str(arguments.config))  # the first word that is not a flag
        arguments.config = None
    if (arguments.config is None) == (arguments.compare is None):
        raise UserError("mc2 plan needs a config file, or --compare and two")
    if arguments.compare and arguments.advise:
        raise UserError("--advise is for one config: leave out --compare")
    if arguments.gpus > arguments.per_node and arguments.gpus % arguments.per_node:
        raise UserError(f"--gpus {arguments.gpus} is not a multiple of --per-node {arguments.per_node}")


def _stages(arguments: argparse.Namespace, names: Sequence[str], configs: Sequence["RunConfig"]) -> "RunConfig | None":
    """The config, if it has stages."""
    for name, config in zip(names, configs, strict=True):
        if config.stages and arguments.compare:
            raise UserError(f"{name}: has stages, which are planned beside each other: leave out --compare")
        if config.stages and arguments.advise:
            raise UserError(
                f"{name}: has stages, and --advise is for one step: plan one with stages=[] and its settings"
            )
    return configs[0] if configs[0].stages else None


_GIB, _GB = 1 << 30, 1e9


def _print(names: Sequence[str], plans: Sequence["Plan"]) -> None:
    from mc2_hpc.planning.records import CATEGORIES

    used = [
        each for each in CATEGORIES if each != "teacher" or any(plan.trace.peak.by_category[each] for plan in plans)
    ]
    columns = [_rows(plan, used) for plan in plans]
    width = 26
    if len(names) > 1:
        print(" " * width + "".join(f"{_column(name, plan):>26}" for name, plan in zip(names, plans, strict=True)))
    for label in columns[0]:
        if not label.startswith("#"):
            print(f"{label:<{width}}" + "".join(f"{column.get(label, '-'):>26}" for column in columns))
        else:
            print(label.removeprefix("#"))
    first = plans[0]
    print(f"peaks: {first.gpu.source}")
    print(f"fractions of them: {first.gpu.fractions_source}")
    if first.gpus > 1:
        print(f"network {first.network_name}: {first.network.source}; {first.network.achieved_source}")
    for name, plan in zip(names, plans, strict=True):
        if not plan.fits:
            print(f"{name} does not fit: {plan.cure}")


def _column(name: str, plan: "Plan") -> str:
    if plan.stage is not None:
        return f"stage {plan.stage.number}: {plan.steps:,} steps"
    return Path(name).stem[:24]


def _rows(plan: "Plan", categories: Sequence[str]) -> dict[str, str]:
    """Label and value of every line; a label with ``#`` is a heading.

    Args:
        categories: of memory, that have a line.
    """
    from mc2_hpc.planning.scaling import takes_over

    trace, step = plan.trace, plan.step
    rows = {f"#counted, per rank of {plan.gpus}:": ""}
    for category in categories:
        rows[f"  {category}"] = _memory(trace.peak.by_category[category])
    rows["  peak memory"] = f"{_memory(trace.peak.bytes)}, {trace.peak.phase}"
    scale, unit = (1e12, "TFLOP") if trace.model_flops >= 1e11 else (1e9, "GFLOP")
    rows["  model, executed"] = f"{trace.model_flops / scale:,.1f}, {trace.executed_flops / scale:,.1f} {unit}"
    rows["  through memory"] = f"{trace.total().bytes / _GB:,.0f} GB"
    if plan.pairs_that_fit is not None:
        rows["  pairs per GPU, fit"] = f"{trace.pairs}, about {plan.pairs_that_fit:,}"
    for kind in sorted({each.kind for each in trace.collectives if not each.host}):
        size = sum(each.bytes for each in trace.collectives if each.kind == kind and not each.host)
        rows[f"  {kind}"] = f"{size / _GB:,.3f} GB"
    network = f" and {plan.network_name}" if plan.gpus > 1 else ""
    rows[f"#predicted, on {plan.gpu_name}{network}:"] = ""
    for kernels, seconds in step.compute.items():
        rows[f"  {kernels}"] = f"{seconds * 1e3:,.1f} ms ({step.limits[kernels]})"
    rows["  exposed communication"] = f"{step.exposed * 1e3:,.1f} ms"
    mfu = f", MFU {plan.mfu:.0%}" if plan.gpu.device == "cuda" else ""  # the peak of a CPU is no data sheet's
    rows["  step"] = f"{step.seconds * 1e3:,.1f} ms{mfu}"
    rows["  pairs per second"] = f"{plan.pairs_per_second:,.0f}"
    if plan.gpus > 1:
        ends = [takes_over(plan.scaling(strong=strong)) for strong in (False, True)]
        weak, strong = (f"{gpus:,}" if gpus is not None else "never" for gpus in ends)
        rows["  network-bound from"] = f"{weak} weak, {strong} strong"
    rows["  run"] = f"{plan.days:,.1f} days + {1 / plan.goodput - 1:.1%} lost"
    rows["  GPU hours"] = f"{plan.gpu_hours:,.0f}"
    if plan.money is not None:
        rows["  cost"] = f"{plan.money:,.0f}"
    rows["  checkpoint, stall"] = f"{plan.trace.checkpoint_bytes / _GB:,.1f} GB, {plan.checkpoint_stall:,.1f} s"
    rows["  shards read"] = f"{plan.shard_bytes / 1e12:,.1f} TB"
    rows["  data rate"] = f"{plan.pairs_per_second * plan.assumptions.pair_bytes / _GB:,.2f} GB/s"
    rows["  cores to decode"] = f"{plan.pairs_per_second / plan.assumptions.images_per_core:,.0f}"
    return rows


def _memory(size: float) -> str:
    return f"{size / _GIB:,.2f} GiB" if size >= _GIB / 10 or size == 0 else f"{size / 2**20:,.1f} MiB"


def _print_advice(plan: "Plan", changes: Sequence[tuple[str, "Plan"]], failed: Mapping[str, str]) -> None:
    print("what to change (predicted):" if changes else "no single change is predicted to gain")
    for name, other in changes:
        gain = f"{plan.step.seconds / other.step.seconds - 1:+.1%}"
        print(f"  {name:<24}{gain} pairs per second, peak {other.trace.peak.bytes / _GIB:,.1f} GiB")
    for name, reason in failed.items():
        print(f"  {name:<24}not planned: {reason}")
