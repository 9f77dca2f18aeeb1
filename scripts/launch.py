"""Start one process a GPU, as torchrun does, without its traceback on top of a stage's own sentence.

Takes torchrun's arguments. A failed process has already said what is wrong; torchrun would add a
traceback of itself, which hides it.
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main()
    except ChildFailedError as failed:
        _, failure = failed.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


if __name__ == "__main__":
    main()
