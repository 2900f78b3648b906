"""``python -m mc2_hpc.jobs.executor_process executor.pik``: run a datatrove executor; see ``executors``."""

import os
import signal
import sys
import threading

import dill
from datatrove.executor import RayPipelineExecutor


def end_with_parent() -> None:
    """Kill this process's group as soon as the other end of standard input closes."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def main(path: str) -> None:
    """Run the executor that the parent process pickled to ``path``."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    with open(path, "rb") as stream:
        executor = dill.load(stream)
    if isinstance(executor, RayPipelineExecutor):
        import ray

        ray.init()
    executor.run()


if __name__ == "__main__":
    main(sys.argv[1])
