"""Run a function in processes of their own: several ranks that talk over gloo, or one that gets killed.

Each is forked from a server that has imported torch and Lightning, and has never run anything: as good as a fresh
process, without the many seconds that the imports take in each.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lightning.pytorch", "lightning_grow"])


def _main(script: str, arguments: list[str], environment: Mapping[str, str], output: Path) -> None:
    """Do in a child process as ``python -m script *arguments > output 2>&1`` does, in that environment."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    gc.freeze()  # what is imported stays: collecting garbage need not walk through it again and again
    os.chdir(output.parent)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    try:
        importlib.import_module(script).main()
    except BaseException:
        traceback.print_exc()
        raise


class _Child:
    """A process that runs the function ``main`` of a module of the tests."""

    def __init__(self, script: str, arguments: tuple[object, ...], output: Path, **environment: str) -> None:
        self._output = output
        words = [str(argument) for argument in arguments]
        self._process = _CONTEXT.Process(target=_main, args=(script, words, {**os.environ, **environment}, output))
        self._process.start()

    def end(self, timeout: float, expected: int = 0) -> str:
        """Wait for the end, and return what was written; fail if the exit code is another one than expected."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self.kill()
        written = self._output.read_text() if self._output.exists() else ""
        assert code == expected, written
        return written

    def kill(self) -> None:
        """End it if it still runs."""
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def run_ranks(script: str, ranks: int, folder: Path, timeout: float = 600) -> list[str]:
    """Run one process for each rank, as ``torchrun`` would, and return what each wrote; fail if one of them does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    shared |= {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": str(ranks)}
    children = [
        _Child(script, (folder,), folder / f"output{rank}.txt", **shared, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(ranks)
    ]
    try:
        return [child.end(timeout) for child in children]
    finally:
        for child in children:
            child.kill()


def run_until_killed(script: str, *arguments: object, timeout: float = 240) -> str:
    """Run a process that ends itself by SIGKILL, and return what it wrote."""
    return _Child(script, arguments, Path("killed.txt").absolute()).end(timeout, -signal.SIGKILL)


def run_once(script: str, *arguments: object, timeout: float = 240) -> str:
    """Run a process to its end, and return what it wrote."""
    return _Child(script, arguments, Path("once.txt").absolute()).end(timeout)
