# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Scripts in processes of their own that do not import torch, transformers and diffusers again, which takes seconds.

A process of the standard library's fork server has imported these libraries and nothing else: neither a package of this
project nor a test, so that what a script imports of them, it imports anew. Where those imports themselves are what a test
is about (order of imports, variables that they read, an installed wheel), it starts a fresh interpreter instead.
"""

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from functools import cache
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import torch

LIBRARIES = [
    *("torch", "transformers", "diffusers", "accelerate", "datasets", "peft", "trl", "torch.distributed.fsdp"),
    *("transformers.trainer", "transformers.modeling_utils", "transformers.image_processing_backends"),
    *("transformers.models.convnext.modeling_convnext", "transformers.models.llama.modeling_llama"),
    *("diffusers.models.modeling_utils", "diffusers.models.unets.unet_2d_condition"),
    *("diffusers.models.autoencoders.autoencoder_kl", "diffusers.schedulers"),
]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(LIBRARIES)


@dataclass
class Script:
    """A script that runs, or has run.

    Attributes:
        process: its process; `kill()` sends SIGKILL.
        out, err: files with all that it has written so far.
    """

    process: ForkServerProcess
    out: Path
    err: Path

    @property
    def returncode(self) -> int | None:
        """Exit status as of `subprocess`: None while it runs, -9 after SIGKILL."""
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        return self.out.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self.err.read_text(encoding="utf-8")

    def wait(self, timeout: float) -> "Script":
        """Wait for the end; after `timeout` seconds kill the process and raise TimeoutError with what it wrote."""
        self.process.join(timeout)
        if self.returncode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"A script did not end within {timeout} s.\n{self.stdout[-3000:]}{self.stderr[-3000:]}")
        return self


def start_script(
    *argv: str | Path, logs: Path, cwd: Path | None = None, name: str = "script", **environment: str
) -> Script:
    """Start `python SCRIPT ARGUMENTS...` or `python -c CODE ARGUMENTS...`.

    Args:
        argv: what would stand behind `python`.
        logs: folder for `<name>.out` and `<name>.err`, made if it is absent.
        cwd: working directory, this process's own if not given.
        environment: variables beside and over those of this process, PYTHONPATH included.
    """
    logs.mkdir(parents=True, exist_ok=True)
    files = [logs / f"{name}.out", logs / f"{name}.err"]
    for file in files:
        file.write_bytes(b"")
    place = str(cwd or Path.cwd())
    words = [str(word) for word in argv]
    process = SERVER.Process(target=_become, args=(words, files, place, os.environ | environment, _paths()))
    process.start()
    return Script(process, *files)


def run_script(*argv: str | Path, timeout: float = 240, **options: str | Path) -> Script:
    """Run a script to its end; see `start_script`."""
    return start_script(*argv, **options).wait(timeout)


def run_ranks(*argv: str | Path, logs: Path, timeout: float = 240, **options: str | Path) -> list[Script]:
    """Run a script as two processes of one group, with the variables that torchrun sets, to their ends.

    When one fails the other is killed, as torchrun does.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        start_script(*argv, logs=logs, name=f"rank{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **group, **options)
        for rank in range(2)
    ]
    deadline = time.monotonic() + timeout
    try:
        while None in (codes := [rank.returncode for rank in ranks]) and not any(codes):
            multiprocessing.connection.wait([rank.process.sentinel for rank in ranks if rank.returncode is None], 1)
            if time.monotonic() > deadline:
                break
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()
    return ranks


@cache
def _paths() -> list[str]:
    """Where a fresh interpreter looks for modules, besides PYTHONPATH and the script's folder."""
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import json, sys; print(json.dumps(sys.path[1:]))"
    return json.loads(subprocess.check_output([sys.executable, "-c", code], env=bare))


def _become(words: list[str], files: list[Path], cwd: str, environment: dict[str, str], paths: list[str]) -> None:
    """Be what `python <words>` is."""
    for descriptor, file in enumerate(files, start=1):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)
    os.chdir(cwd)
    multiprocessing.set_start_method(None, force=True)  # the script's own processes start in the usual way
    multiprocessing.current_process().name = "MainProcess"
    np.random.seed()  # the server's state is that of all its processes
    os.environ.clear()
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    given = [place for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place]
    if words[0] == "-c":
        sys.argv, sys.path = ["-c", *words[2:]], ["", *given, *paths]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path = words, [str(Path(words[0]).resolve().parent), *given, *paths]
        runpy.run_path(words[0], run_name="__main__")
