"""Sets torch's thread count and quiets transformers before a stage computes."""

import os


def set_up_torch(threads: int) -> None:
    """Set torch's thread count, and silence the progress bars and advice of transformers.

    Sums depend on the number of threads, so it comes from the config and not from --cores.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
