"""Start one process a GPU, as torchrun does, without its traceback on top of a stage's own sentence.

Takes the number of machines, then torchrun's arguments. On several machines, `srun` starts this once on
each and SLURM's variables tell which of them it is; on one, torchrun's --standalone applies.

Two things differ from torchrun. A failed process has already said what is wrong; torchrun would add a
traceback of itself, which hides it. And SIGTERM is passed on to the processes, which stop after a step
and save, where torchrun would kill them after 30 seconds.
"""

import contextlib
import logging
import os
import signal
import sys

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# Where the processes meet. Jobs that share a machine must not meet each other: the job's number is added.
FIRST_PORT, PORTS = 20000, 20000


def main() -> None:
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for number in (signal.SIGTERM, signal.SIGURG):
        signal.signal(number, pass_on)
    try:
        machines, *options = sys.argv[1:]
        place = meeting_point(int(machines), os.environ)
        run.main([*place, "--signals-to-handle=SIGINT,SIGQUIT", *options])
    except ChildFailedError as failed:
        _, failure = failed.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


def pass_on(number: int, frame) -> None:
    """Pass a signal on to the processes that were started."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)


def meeting_point(machines: int, environment: dict) -> list[str]:
    """Return torchrun's options for the place of this machine among ``machines`` that srun started.

    The first machine is the one that srun was called on, whose address SLURM gives to all.
    """
    if machines == 1:
        # By address, because a machine's own name does not always lead to it.
        return ["--standalone", "--local-addr=127.0.0.1"]
    return [
        f"--nnodes={machines}",
        f"--node-rank={environment['SLURM_NODEID']}",
        f"--master-addr={environment['SLURM_LAUNCH_NODE_IPADDR']}",
        f"--master-port={FIRST_PORT + int(environment['SLURM_JOB_ID']) % PORTS}",
    ]


if __name__ == "__main__":
    main()
