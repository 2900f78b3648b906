"""``mc2 plan --calibrate``."""

import argparse
import sys
from pathlib import Path

from mc2_hpc.cli.json_result import STDOUT, write_result
from mc2_hpc.errors import UserError


def run(arguments: argparse.Namespace) -> int:
    """Fit, and write ``gpu.yaml`` and, if a run had several ranks, ``network.yaml`` beside the first run's rows."""
    from mc2_hpc.planning.calibrate import calibrate, read_measured, trace_measured, write_machine
    from mc2_hpc.planning.machines import read_gpu, read_network
    from mc2_hpc.planning.processes import TraceError

    if arguments.config is not None or arguments.compare is not None or arguments.advise or arguments.html:
        raise UserError("--calibrate takes runs only; plan with the file that it writes: mc2 plan CONFIG --gpu FILE")
    gpu = read_gpu(arguments.gpu)
    network = read_network(arguments.network or gpu.network)
    runs = [read_measured(path) for path in arguments.calibrate]
    try:
        traces = trace_measured(runs, gpu.device, per_node=arguments.per_node)
    except TraceError as error:
        print(f"mc2: {error}", file=sys.stderr)
        return 1
    found = calibrate(runs, traces, gpu, network, per_node=arguments.per_node)
    folder = arguments.calibrate[0].parent
    flags: dict[str, Path] = {"--gpu": folder / "gpu.yaml"}
    write_machine(flags["--gpu"], found.gpu)
    if found.network_seen:
        flags["--network"] = folder / "network.yaml"
        write_machine(flags["--network"], found.network)
    if arguments.json:
        values = {name: getattr(found.gpu, name) for name in ("products", "attention", "memory")}
        values["network"] = found.network.achieved if found.network_seen else None
        fits = [
            {"run": str(run.path), "measured": run.seconds, "fitted": seconds}
            for run, seconds in zip(runs, found.predicted, strict=True)
        ]
        files = {flag.removeprefix("--"): str(path) for flag, path in flags.items()}
        write_result({"fractions": values, "step_seconds": fits, "files": files}, arguments.json)
    if arguments.json != STDOUT:
        before, after = gpu, found.gpu
        for name in ("products", "attention", "memory"):
            print(f"{name:<12}{getattr(before, name):.3g} of the peak before, {getattr(after, name):.3g} now")
        if found.network_seen:
            print(f"{'network':<12}{network.achieved:.3g} of the peak before, {found.network.achieved:.3g} now")
        for run, seconds in zip(runs, found.predicted, strict=True):
            print(f"{run.path}: {run.seconds:.4g} s a step measured, {seconds:.4g} s fitted")
        print("plan with", " ".join(f"{flag} {path}" for flag, path in flags.items()))
    return 0
