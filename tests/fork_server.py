"""A process that has imported everything a rank needs, and forks one child per command that a test asks for.

    python -m tests.fork_server FD

A launch of ``python -m mc2_hpc.cli train`` spends most of its time importing torch and DeepSpeed; a fork of this
process already has them. ``tests/forking.py`` is the client at the other end of the socket FD. A child leads its own
session, has the request's environment, folder and files, and runs the arguments as ``python`` would. So exit codes,
standard error, signals and process ids are those of a fresh process. Differences: ranks share one hash seed,
``/proc/PID/cmdline`` is this server's, and a child exits after its exit handlers without tearing down every module,
which takes seconds.
"""

import atexit
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

MAX_REQUEST = 1 << 18
"""Bytes; the socket preserves message boundaries."""


def import_everything() -> None:
    """Import everything that ranks import, including what DeepSpeed and PyTorch import in the first step."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    import torch
    import torch._dynamo
    import torch.utils.tensorboard  # noqa: F401

    import mc2_hpc.cli.train
    import mc2_hpc.evaluation.suite
    import mc2_hpc.training.trainer  # noqa: F401

    assert not torch.distributed.is_initialized()
    # A full collection in a child would otherwise look at every object of every module, over half a second each time.
    gc.collect()
    gc.freeze()


def serve(control: socket.socket) -> list[str] | None:
    """Fork for each request until the client is gone, then return ``None``; in a child, return its arguments."""
    with selectors.DefaultSelector() as ready:
        ready.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.data is not None:
                    ready.unregister(key.fd)
                    os.close(key.fd)
                    _report_end(*key.data)
                    continue
                message, files, *_ = socket.recv_fds(control, MAX_REQUEST, 4)
                if not message:
                    return None
                pid = os.fork()
                if pid == 0:
                    control.close()
                    _forget_others(ready)
                    return _become(json.loads(message), files)
                report = socket.socket(fileno=files.pop())
                for file in files:
                    os.close(file)
                _send(report, pid)
                ready.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, report))


def _forget_others(ready: selectors.BaseSelector) -> None:
    """In a child: close the server's handles of its other children."""
    for key in ready.get_map().values():
        if key.data is not None:
            os.close(key.fd)
            key.data[1].close()


def _report_end(pid: int, report: socket.socket) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with report:
        _send(report, code)


def _send(report: socket.socket, number: int) -> None:
    try:
        report.send(str(number).encode())
    except BrokenPipeError:
        pass  # nobody waits for it anymore


def _become(request: dict[str, Any], files: list[int]) -> list[str]:
    """Become the requested process, and return its arguments."""
    import numpy as np
    import torch

    os.setsid()
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    np.random.seed()
    return request["arguments"]


def run_python(arguments: list[str]) -> None:
    """Do what ``python arguments...`` does: ``-m module``, ``-c code`` or a script, followed by its arguments."""
    if arguments[0] == "-m":
        _, module, *rest = arguments
        sys.argv, sys.path[0] = [module, *rest], os.getcwd()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        _, code, *rest = arguments
        sys.argv, sys.path[0] = ["-c", *rest], ""
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    else:
        script, *rest = arguments
        sys.argv, sys.path[0] = [script, *rest], str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")


def leave(error: BaseException | None) -> NoReturn:
    """Exit as the interpreter does after the main module has ended with ``error``."""
    code: object = 0
    if isinstance(error, SystemExit):
        code = error.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    elif error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    assert isinstance(code, int)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    import_everything()
    wanted = serve(socket.socket(fileno=int(sys.argv[1])))
    if wanted is None:
        os._exit(0)
    try:
        run_python(wanted)
    except BaseException as error:
        leave(error)
    leave(None)
