"""A real Slurm on this machine: munged, slurmctld and two slurmd from Debian's packages, in a temporary folder.

tests/conftest.py loads the fixture ``slurm_cluster``. It touches nothing outside its folder, and skips with a reason if
Slurm is not installed or does not start.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo", "setpriv")
NODES = ("n1", "n2")
START_S = 60
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until its old credentials have expired, 120 seconds by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
# One machine acts as both nodes: no control groups, and the sizes below instead of the machine's.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5,sched_min_interval=0,bf_interval=1,requeue_delay=1
ReturnToService=2
JobRequeue=1
KillWait=10
MinJobAge=3600
MessageTimeout=60
TCPTimeout=30
SlurmctldTimeout=120
SlurmdTimeout=300
InactiveLimit=0
Waittime=0
MaxArraySize=1001
UnkillableStepTimeout=120
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=30 State=UP OverSubscribe=FORCE:8
"""


@dataclass(frozen=True)
class SlurmCluster:
    """The cluster's commands; ``env`` is the environment that a process needs to reach it."""

    folder: Path
    env: dict[str, str]
    partition: str = "test"
    nodes: tuple[str, ...] = NODES

    def command(self, *words: str | Path, check: bool = True, cwd: Path | None = None) -> str:
        """Standard output of a Slurm command."""
        result = subprocess.run(
            list(map(str, words)), env=self.env, cwd=cwd, capture_output=True, text=True, timeout=120
        )
        if check and result.returncode:
            pytest.fail(f"{' '.join(map(str, words))}: exit code {result.returncode}\n{result.stdout}{result.stderr}")
        return result.stdout.strip()

    def submit(self, *words: str | Path, cwd: Path | None = None) -> str:
        """Run ``sbatch words...``; returns the job id."""
        return self.command("sbatch", "--parsable", *words, cwd=cwd).split(";")[0]

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of ``scontrol show job``: JobState, ExitCode, Restarts, Reason, ..."""
        text = self.command("scontrol", "show", "job", "--oneliner", job_id).splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_until(self, what: str, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        """Wait until ``condition()``; after ``timeout_s``, fail and name ``what``."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"{what}: not within {timeout_s:.0f} s\n{self.report()}")
            time.sleep(0.1)

    def wait(self, *job_ids: str, timeout_s: float = 300) -> list[dict[str, str]]:
        """Wait until the jobs (for an array's id: all its tasks) have ended; returns Slurm's fields of each."""
        jobs = ",".join(job_ids)
        # A job about to be requeued looks ended for a moment, but the queue still lists it.
        self.wait_until(
            f"end of job {jobs}",
            lambda: (
                all(self.job(job_id)["JobState"] in ENDED for job_id in job_ids)
                and not self.command("squeue", "--noheader", "--jobs", jobs, check=False)
            ),
            timeout_s,
        )
        return [self.job(job_id) for job_id in job_ids]

    def resume_nodes(self) -> None:
        """Make every node available again, whatever a test did to it."""
        for node in self.nodes:
            if not self._at_work(node):
                # A responding node comes back by itself, perhaps just before this command, which then fails.
                self.command("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        self.wait_until("nodes at work", lambda: all(map(self._at_work, self.nodes)))

    def _at_work(self, node: str) -> bool:
        return not any(word in self.node_state(node) for word in ("DOWN", "DRAIN", "NOT_RESPONDING"))

    def node_state(self, node: str) -> str:
        """Such as ``IDLE``, ``MIXED``, ``DOWN``, ``IDLE+COMPLETING``; empty while the controller does not answer."""
        text = self.command("scontrol", "show", "node", "--oneliner", node, check=False)
        return next((word.removeprefix("State=") for word in text.split() if word.startswith("State=")), "")

    def report(self) -> str:
        """Queue, nodes and the last lines of the daemons' logs, for a failing test."""
        parts = [self.command(*words, check=False) for words in (("squeue",), ("sinfo", "--Node", "--long"))]
        parts += [f"{path.name}:\n{_tail(path)}" for path in sorted(self.folder.glob("*.log"))]
        return "\n".join(parts)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Two nodes, ``n1`` and ``n2``, with two CPUs each; leftover jobs are cancelled at the end of the session.

    The cluster is shared: if a test may fail half-way, cancel its jobs and call ``resume_nodes()``.
    """
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        pytest.skip(f"Slurm is not installed (no {', '.join(missing)}): apt-get install slurm-wlm munge")
    with ExitStack() as stack:
        # A short path, because a socket's path has at most 107 characters.
        folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield _start(folder, stack)


def _start(folder: Path, stack: ExitStack) -> SlurmCluster:
    ports = _free_ports(1 + len(NODES))
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    sizes = "CPUs=2 RealMemory=8000 Gres=gpu:8 State=UNKNOWN"
    nodes = [
        f"NodeName={node} NodeHostname={_host()} NodeAddr=127.0.0.1 Port={port} {sizes}"
        for node, port in zip(NODES, ports[1:], strict=True)
    ]
    # Fake GPUs, so that scripts can request them; Slurm needs a device file for each.
    for number in range(8):
        (folder / f"gpu{number}").symlink_to("/dev/null")
    (folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File={folder}/gpu[0-7]\n")
    conf = folder / "slurm.conf"
    conf.write_text(
        _CONF.format(
            host=_host(), controller_port=ports[0], user=getpass.getuser(), folder=folder, nodes="\n".join(nodes)
        )
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment |= {"SLURM_CONF": str(conf), "PATH": _path()}
    cluster = SlurmCluster(folder=folder, env=environment)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    places = [f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key", f"--pid-file={folder}/munged.pid"]
    places += [f"--seed-file={folder}/munged.seed", f"--log-file={folder}/munged.log"]
    # --force: whatever the permissions above, the key is only for this session.
    _daemon(cluster, stack, "munged", "--foreground", "--force", *places)
    _wait_for("munged's socket", cluster, lambda: (folder / "munge.socket").exists())
    _daemon(cluster, stack, "slurmctld", "-D")
    for node in NODES:
        _daemon(cluster, stack, "slurmd", "-D", "-N", node)
    _wait_for("idle nodes", cluster, lambda: all(cluster.node_state(node) == "IDLE" for node in NODES))
    stack.callback(_clear, cluster)  # before the daemons are stopped
    return cluster


def _daemon(cluster: SlurmCluster, stack: ExitStack, *words: str) -> None:
    name = "-".join([words[0], *(word for word in words if word in NODES)])
    log = stack.enter_context(open(cluster.folder / f"{name}.out", "w"))
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *words],  # so that a killed pytest leaves no daemon behind
        env=cluster.env,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    stack.callback(_stop, process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Kill at once: the cluster's state is not needed, and slurmctld 22.05 may take long to react to SIGTERM."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _clear(cluster: SlurmCluster) -> None:
    """Cancel all jobs, then kill the cluster's remaining processes, because steps outlive their slurmd."""
    cluster.command("scancel", "--user", getpass.getuser(), check=False)
    deadline = time.monotonic() + 20
    while cluster.command("squeue", "--noheader", check=False) and time.monotonic() < deadline:
        time.sleep(0.2)
    mark = f"SLURM_CONF={cluster.env['SLURM_CONF']}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            name = (path.parent / "comm").read_text().strip()
            if mark in path.read_bytes().split(b"\0") and name not in ("munged", "slurmctld", "slurmd"):
                os.kill(int(path.parent.name), signal.SIGKILL)
        except OSError:
            continue  # it has ended, or belongs to another user


def _wait_for(what: str, cluster: SlurmCluster, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{path.name}: {_tail(path)}" for path in sorted(cluster.folder.glob("*.[lo][ou][gt]")))
            pytest.skip(f"Slurm did not start: no {what} within {START_S} s\n{logs}")
        time.sleep(0.1)


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def _host() -> str:
    return socket.gethostname().split(".")[0]


def _path() -> str:
    """Daemons are in sbin, which may be missing from a user's PATH."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]
