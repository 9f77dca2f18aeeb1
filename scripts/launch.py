"""Start one training process per GPU, as torchrun does, without its traceback after a stage's own message.

    python scripts/launch.py 1 --nproc-per-node 2 scripts/train.py --base results/micro/base.json …

The first argument is the number of machines; the others are torchrun's. With several machines, `srun` starts
this program once on each, and SLURM's variables say which of them this one is. With one, torchrun's
--standalone is used.

It differs from torchrun in two ways. A process that failed has already said what is wrong; torchrun would
print a traceback of its own and hide that. And SIGTERM is passed on to the processes, which stop after
their step and save; torchrun would kill them after 30 seconds.
"""

import contextlib
import logging
import os
import signal
import sys

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# The ports for the rendezvous. The job's number is added, so that jobs on one machine do not meet.
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
    """Pass a signal on to the training processes."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)


def meeting_point(machines: int, environment: dict) -> list[str]:
    """Return torchrun's options for this machine's place among the ``machines`` of a job.

    ``environment``: SLURM's variables. The first machine is the one that called srun, whose address SLURM
    gives to all.
    """
    if machines == 1:
        # By address, because a machine's own name does not always resolve.
        return ["--standalone", "--local-addr=127.0.0.1"]
    return [
        f"--nnodes={machines}",
        f"--node-rank={environment['SLURM_NODEID']}",
        f"--master-addr={environment['SLURM_LAUNCH_NODE_IPADDR']}",
        f"--master-port={FIRST_PORT + int(environment['SLURM_JOB_ID']) % PORTS}",
    ]


if __name__ == "__main__":
    main()
