"""Run a function in processes of their own: several ranks that talk over gloo, or one that gets killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command(script: str, *arguments: object) -> list[str]:
    """Return a command line that runs a module of the tests with warnings as errors off and one thread."""
    return [sys.executable, "-m", script, *map(str, arguments)]


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of a child process."""
    return (
        os.environ
        | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
        | extra
    )


def run_ranks(script: str, ranks: int, *arguments: object, timeout: float = 600) -> list[str]:
    """Run one process for each rank, as ``torchrun`` would, and return what each wrote; fail if one of them does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    shared |= {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": str(ranks)}
    children = [
        subprocess.Popen(
            command(script, *arguments),
            env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [child.communicate(timeout=timeout)[0] for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.communicate()
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output
    return outputs


def run_until_killed(script: str, *arguments: object, timeout: float = 240) -> str:
    """Run a process that ends itself by SIGKILL, and return what it wrote."""
    done = subprocess.run(
        command(script, *arguments), env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    return done.stdout


def run_once(script: str, *arguments: Sequence[object] | object, timeout: float = 240) -> str:
    """Run a process to its end, and return what it wrote."""
    done = subprocess.run(
        command(script, *arguments), env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
