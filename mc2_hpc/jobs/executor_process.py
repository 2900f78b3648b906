"""``python -m mc2_hpc.jobs.executor_process SPEC``: run a datatrove executor; see :class:`~.executors.ExecutorSpec`."""

import json
import os
import signal
import sys
import threading

from mc2_hpc.jobs.executors import ExecutorSpec
from mc2_hpc.jobs.named import from_plain


def end_with_parent() -> None:
    """Kill this process's group as soon as the other end of standard input closes."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def main(words: str) -> None:
    """Run the executor that ``words``, a JSON object, describes."""
    spec: ExecutorSpec = from_plain(json.loads(words), ExecutorSpec, "executor_process")
    if spec.kind != "slurm":  # Slurm ends its own tasks
        threading.Thread(target=end_with_parent, daemon=True).start()
    if spec.kind == "ray":
        import ray

        ray.init()
    spec.make().run()


if __name__ == "__main__":
    main(sys.argv[1])
