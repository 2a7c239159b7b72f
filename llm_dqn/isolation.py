"""Keeps what a stranger's code does to the process from reaching the run."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def undisturbed() -> Iterator[None]:
    """Puts back what code inside may have changed for everybody: the global random streams, torch's gradient mode and
    default dtype, and the current folder.
    """
    python, numpy, torch_cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    gradients, dtype, folder = torch.is_grad_enabled(), torch.get_default_dtype(), os.getcwd()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        os.chdir(folder)
