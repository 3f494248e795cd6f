"""One thread for each test process: the suite shares few cores, and sums do not depend on their number."""

import matplotlib as mpl
import pytest
import torch

# Programs that tests start, not tests.
collect_ignore_glob = ["*/*_worker.py"]

torch.set_num_threads(1)
mpl.use("Agg")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    """Whatever a run writes, it writes elsewhere than into the checkout; and nothing asks for a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
