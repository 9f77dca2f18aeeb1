"""A real SLURM cluster on one host: a controller and two nodes with two pretended GPUs each.

Debian's slurmd may run several times on a host, each under a node's name and on a port of its own.
The GPUs are device files, so that SLURM counts, hands out and constrains them; nothing computes on
them. Memory, cores and devices of a job are held in by cgroups (version 1).
"""

import fcntl
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

# SLURM's commands look here when a job's environment was stripped of SLURM_CONF.
SYSTEM = Path("/etc/slurm")
PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "squeue", "scontrol", "scancel")
NODES = {"node1": 17001, "node2": 17002}
CPUS, MEMORY_MB, GPUS = 4, 9000, 2

SLURM_CONF = """
ClusterName=longyarn
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
ProctrackType=proctrack/cgroup
TaskPlugin=task/cgroup,task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/finished.txt
MinJobAge=3600
ReturnToService=2
SlurmdTimeout=10
KillWait=20
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
SlurmdParameters=config_overrides
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
{nodes}
PartitionName=gpu Nodes=node[1-2] Default=YES MaxTime=14400 PriorityTier=1 State=UP
PartitionName=high Nodes=node[1-2] MaxTime=14400 PriorityTier=10 State=UP
"""
NODE = (
    "NodeName={name} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} SocketsPerBoard=1 CoresPerSocket={cpus} "
    "ThreadsPerCore=1 RealMemory={memory} Gres=gpu:pretended:{gpus}"
)
CGROUP_CONF = """
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainRAMSpace=yes
ConstrainCores=yes
ConstrainDevices=yes
"""


def unavailable() -> str | None:
    """Return why no cluster can be started here, or nothing."""
    if os.geteuid() != 0:
        return "starting slurmd needs root"
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=search) is None]
    if missing:
        return f"{', '.join(missing)} not installed (tests/slurm/install does it)"
    if not Path("/sys/fs/cgroup/memory").is_dir():
        return "needs cgroups of version 1 at /sys/fs/cgroup"
    if (SYSTEM / "slurm.conf").exists() and not (SYSTEM / "slurm.conf").is_symlink():
        return f"{SYSTEM}/slurm.conf belongs to a cluster of this machine's own"
    return None


class Cluster:
    """The cluster's processes. Files, logs and sockets lie in ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.processes: dict[str, subprocess.Popen] = {}
        self.environment = os.environ | {
            "SLURM_CONF": str(root / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }

    def start(self) -> None:
        """Write the configuration, start munged, slurmctld and both slurmd, and wait for the nodes."""
        # Ports and /etc/slurm are the machine's: one cluster at a time.
        self.lock = open("/tmp/longyarn-slurm.lock", "w")  # noqa: SIM115 - held until the end
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        (self.root / "state").mkdir(parents=True)
        devices = self.root / "devices"
        devices.mkdir()
        for number in range(GPUS):
            # Major 195 is NVIDIA's; without the driver, opening it fails, which nobody tries.
            os.mknod(devices / f"nvidia{number}", 0o20666, os.makedev(195, number))
        nodes = [
            NODE.format(name=name, port=port, cpus=CPUS, memory=MEMORY_MB, gpus=GPUS)
            for name, port in NODES.items()
        ]
        host = os.uname().nodename
        files = {
            "slurm.conf": SLURM_CONF.format(host=host, root=self.root, nodes="\n".join(nodes)),
            "cgroup.conf": CGROUP_CONF,
            "gres.conf": f"NodeName=node[1-2] Name=gpu Type=pretended File={devices}/nvidia[0-{GPUS - 1}]\n",
        }
        SYSTEM.mkdir(exist_ok=True)
        for name, text in files.items():
            (self.root / name).write_text(text)
            (SYSTEM / name).unlink(missing_ok=True)
            (SYSTEM / name).symlink_to(self.root / name)
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = {
            "key": key,
            "socket": "munge.sock",
            "pid": "munge.pid",
            "log": "munge.log",
            "seed": "seed",
        }
        options = [
            f"--{name}-file={self.root / file}" for name, file in munge.items() if name != "socket"
        ]
        self._spawn(
            "munged",
            ["munged", "--foreground", "--force", f"--socket={self.root}/munge.sock", *options],
        )
        wait_for(lambda: (self.root / "munge.sock").exists(), 10, "munged's socket")
        self._spawn("slurmctld", ["slurmctld", "-D", "-c"])
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.nodes_idle(), 60, "both nodes to register")

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, under a hostname of its own."""
        self._spawn(
            node, ["unshare", "--uts", "sh", "-c", f"hostname {node}; exec slurmd -D -N {node}"]
        )

    def kill_node(self, node: str) -> None:
        """Kill a node's slurmd as a crash would; what its jobs started lives on, as orphans."""
        os.kill(self.processes.pop(node).pid, signal.SIGKILL)

    def nodes_idle(self) -> bool:
        """Tell whether both nodes are up and idle."""
        done = self.run("sinfo", "--noheader", "--Node", "--format=%N %T", check=False)
        return sorted(set(done.split("\n")) - {""}) == [f"{node} idle" for node in NODES]

    def run(self, *command: str, check: bool = True) -> str:
        """Run one of SLURM's commands and return what it printed."""
        done = subprocess.run(
            command, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=60,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    def jobs(self, *options: str) -> list[dict]:
        """Return the jobs that SLURM knows, each with id, comment (the rule), state, nodes and directory."""
        fields = {"id": "%i", "rule": "%k", "state": "%T", "nodes": "%N", "directory": "%Z"}
        lines = self.run("squeue", "--noheader", f"--format={'|'.join(fields.values())}", *options)
        return [dict(zip(fields, line.split("|"), strict=True)) for line in lines.splitlines()]

    def job(self, rule: str, state: str = "RUNNING", within: float = 120) -> dict:
        """Wait for a job of a rule in a state and return it."""
        found: list[dict] = []

        def there() -> bool:
            found[:] = [
                j for j in self.jobs() if j["rule"] == f"rule_{rule}" and j["state"] == state
            ]
            return bool(found)

        wait_for(there, within, f"a job of rule {rule} to be {state}")
        return found[0]

    def show(self, job: str) -> str:
        """Return all that SLURM says of a job."""
        return self.run("scontrol", "show", "job", job)

    def stop(self) -> None:
        """Cancel all jobs and end every process of the cluster."""
        self.run("scancel", "--user=root", check=False)
        queue = ("squeue", "--noheader")
        wait_for(lambda: not self.run(*queue, check=False), 40, "all jobs to end", strict=False)
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        for name in ("slurm.conf", "cgroup.conf", "gres.conf"):
            (SYSTEM / name).unlink(missing_ok=True)
        self.lock.close()

    def _spawn(self, name: str, command: list[str]) -> None:
        log = open(self.root / f"{name}.out", "ab")  # noqa: SIM115 - the process keeps it
        self.processes[name] = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def wait_for(condition, seconds: float, what: str, strict: bool = True) -> None:
    """Wait until a condition holds, or fail naming what was waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.3)
    assert not strict, f"waited {seconds:.0f} s in vain for {what}"
