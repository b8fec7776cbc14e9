"""A SLURM of this machine alone: munged, slurmctld and a slurmd for each of four pretended nodes.

Everything lives in a temporary folder and speaks on 127.0.0.1; the GPUs are plain files that SLURM hands out
by number. Nodes n1 and n2 are the partition `main`. On n3 and n4, jobs of `urgent` preempt those of `low`,
which get SIGTERM and then some time to save.
"""

import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
NODES = ("n1", "n2", "n3", "n4")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# nothing that needs cgroups, systemd or an account of its own
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
MinJobAge=3600
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=low Nodes=n3,n4 MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n3,n4 MaxTime=INFINITE State=UP PriorityTier=10
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=16 ThreadsPerCore=1 RealMemory=1000 Gres=gpu:4"
)


class CannotRunError(Exception):
    """Why there can be no SLURM here."""


def install() -> None:
    """Debian's packages, if they are not there. Raises CannotRunError if they cannot be had."""
    if not _missing():
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise CannotRunError(f"no {', '.join(_missing())}, and no root with apt-get to install it")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update"],
        ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if _missing():
        raise CannotRunError(f"apt-get did not install {', '.join(_missing())}: {done.stderr.strip()[-300:]}")


def _missing() -> list[str]:
    return [name for name in PROGRAMS if _find(name) is None]


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """Started on entry, stopped on exit."""

    def __enter__(self) -> "Cluster":
        install()
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)  # munge refuses a socket that others cannot reach
        self._configure()
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            self._start()
        except CannotRunError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._processes:
            subprocess.run(["scancel", f"--user={os.geteuid()}"], env=self.environment, check=False)
            self._wait(lambda: not self.run("squeue", "--noheader"), 40)
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """A job's record: JobState, Restarts, ExitCode, .."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job)))

    def wait_for(self, job: str, *states: str, seconds: float = 300) -> dict[str, str]:
        """A job's record once it is in one of the states; AssertionError if that takes longer."""
        assert self._wait(lambda: self.job(job)["JobState"] in states, seconds), self.job(job)
        return self.job(job)

    @staticmethod
    def _wait(condition, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.2)
        return True

    def _configure(self) -> None:
        host = socket.gethostname().split(".")[0]
        sockets = [socket.socket() for _ in range(1 + len(NODES))]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
        for one in sockets:
            one.close()
        nodes = [NODE.format(name=n, host=host, port=p) for n, p in zip(NODES, ports[1:], strict=True)]
        text = CONFIGURATION.format(
            host=host,
            ports=ports,
            user=pwd.getpwuid(os.geteuid()).pw_name,
            folder=self.folder,
            nodes="\n".join(nodes),
        )
        (self.folder / "slurm.conf").write_text(text)
        version = [int(n) for n in re.findall(r"\d+", self._output("slurmd", "-V"))[:2]]
        plugin = "disabled" if version >= [23, 11] else "cgroup/v1"  # loaded whether used or not
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-3]\n")
        for name in ("gpu0", "gpu1", "gpu2", "gpu3"):
            (self.folder / name).touch()
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)

    def _output(self, *command: str) -> str:
        path = _find(command[0])
        assert path is not None
        return subprocess.run([path, *command[1:]], capture_output=True, text=True, check=True).stdout

    def _start(self) -> None:
        here = self.folder
        self._daemon(
            "munged", "--foreground", f"--key-file={here}/munge.key", f"--socket={here}/munge.socket",
            f"--pid-file={here}/munged.pid", f"--log-file={here}/munged.log",
            f"--seed-file={here}/munged.seed",
        )  # fmt: skip
        if not self._wait((here / "munge.socket").exists, 10):
            raise CannotRunError(f"munged does not start: {self._last_words()}")
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        if not self._wait(self._ready, 30):
            raise CannotRunError(f"SLURM does not start: {self._last_words()}")

    def _daemon(self, *command: str) -> None:
        path = _find(command[0])
        assert path is not None
        with (self.folder / "daemons.log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    [path, *command[1:]], env=self.environment, stdout=log, stderr=log, start_new_session=True
                )
            )

    def _ready(self) -> bool:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%N %T"],
            env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        states = dict(line.split() for line in done.stdout.splitlines())
        return set(states) == set(NODES) and set(states.values()) == {"idle"}

    def _last_words(self) -> str:
        logs = sorted(self.folder.glob("*.log"))
        lines = [
            line for log in logs for line in log.read_text(errors="replace").splitlines() if "rror" in line
        ]
        return " | ".join(lines[-3:]) or "no word why"
