"""One thread for each test process: the suite shares few cores, and sums do not depend on their number.

Habits of torch and Python that cost much in deep stacks of a large process are switched off, too.
"""

import gc
import logging
import random

import matplotlib as mpl
import numpy as np
import pytest
import torch

# Programs that tests start, not tests.
collect_ignore_glob = ["*/*_worker.py"]

torch.set_num_threads(1)
mpl.use("Agg")
logging.getLogger("torch.__trace").handlers.clear()  # else each guard of the shape engine comes with its stack as text
if not torch.accelerator.is_available():  # else each seed is kept for devices to come, each time with its stack as text
    torch.cuda.manual_seed_all = torch.xpu.manual_seed_all = torch.mtia.manual_seed_all = lambda seed: None


def pytest_collection_finish():
    """What is imported stays: collecting garbage need not walk through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """What a test draws does not depend on which others ran before it in its process."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (for libraries that draw from it)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    """Whatever a run writes, it writes elsewhere than into the checkout; and nothing asks for a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
