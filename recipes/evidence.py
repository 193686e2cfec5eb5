# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Does it work? The paper's claim under control: what does the feedback keep that the text loss alone forgets?

    python recipes/evidence.py                       # what `make evidence` runs: three seeds, three arms
    python recipes/evidence.py --full --out runs/evidence_full        # all arms
    python recipes/evidence.py --seeds 3 4 5 --out runs/evidence_again # other seeds: worlds, weights, data, noise
    python recipes/evidence.py --photos photos       # besides, an encoder of labelled photographs

Frozen parts are made once (recipes/study/parts.py). Each seed has a world and an encoder of its own, trained against captions that
name kinds and numbers alone; all its arms begin from the same saved model and see the same batches. Every arm is a process
of one thread; two run at once. The same command goes on after a kill: finished arms are kept. Writes `evidence.html` and
`evidence.json`. docs/evidence.md says why it is made so and what came out.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock

import torch
from trl import TrlParser

from recipes.study.arm_run import run_arm
from recipes.study.parts import make_part, part_names, words_of
from recipes.study.photographs import run_photographs
from recipes.study.report import headline, write_report
from recipes.study.settings import EvidenceArguments
from recipes.study.start import make_encoder, make_start
from recipes.study.summary import TESTED_GRADES
from recipes.whole_files import alone, check_writable

CONFIG = Path(__file__).parent / "configs" / "evidence" / "default.yaml"


def parse(flags: list[str]) -> EvidenceArguments:
    """Parse flags over the configuration file that `--config` names, else over the default one."""
    flags = flags if "--config" in flags else ["--config", str(CONFIG), *flags]
    return TrlParser(EvidenceArguments, allow_abbrev=False).parse_args_and_config(flags)[0]


class Jobs:
    """Runs pieces of the work as processes of one thread, some at a time; where this one is told to end, they end too.

    Args:
        flags: of the recipe, for each of them.
        processes: at once.
        lock: the descriptor of `recipes.whole_files.alone`, which they inherit: they hold the folder even where they outlive this one.
    """

    def __init__(self, flags: list[str], processes: int, lock: int) -> None:
        self.flags, self.pool, self.lock = flags, ThreadPoolExecutor(processes), lock
        self.running: set[subprocess.Popen] = set()
        self.stopped, self.starting = False, Lock()

    def submit(self, job: str, after: Sequence[Future] = ()) -> Future:
        """Run `--job job`, when all of `after`, which were submitted before it, have ended."""
        return self.pool.submit(self._run, job, after)

    def _run(self, job: str, after: Sequence[Future]) -> None:
        for future in after:
            future.result()
        command = [sys.executable, str(Path(__file__).resolve()), *self.flags, "--job", job]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self.starting:  # none starts between the end of the others and the end of this one
            if self.stopped:
                return
            process = subprocess.Popen(command, env=environment, pass_fds=(self.lock,))
            self.running.add(process)
        try:
            if code := process.wait():
                raise RuntimeError(f"The job {job} failed (exit code {code}). The same command goes on from here.")
        finally:
            self.running.discard(process)

    def stop(self) -> None:
        """End what runs; start nothing more."""
        with self.starting:
            self.stopped = True
            self.pool.shutdown(wait=False, cancel_futures=True)
            for process in list(self.running):
                process.terminate()


def run_jobs(arguments: EvidenceArguments, flags: list[str], lock: int) -> None:
    """Make the frozen parts, the start of every seed and then its arms, as far as they are not there.

    Raises:
        RuntimeError: a job failed; the others are ended.
    """
    jobs = Jobs(flags, arguments.processes, lock)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped. The same command goes on from here."))
    words_of(arguments)  # all others read with it
    try:
        parts = [jobs.submit(f"part:{name}") for name in part_names(arguments)]
        encoders = {seed: jobs.submit(f"{seed}:encoder") for seed in arguments.seeds}
        starts = {seed: jobs.submit(f"{seed}:start", [*parts, encoders[seed]]) for seed in arguments.seeds}
        waiting = [*parts, *encoders.values(), *starts.values()]
        if arguments.photos:
            waiting += [jobs.submit(f"{seed}:photographs") for seed in arguments.seeds]
        # "text", the shortest, comes last, so that no process waits long for the other
        for arm in reversed(arguments.arms):
            waiting += [jobs.submit(f"{seed}:{arm}", [starts[seed]]) for seed in arguments.seeds]
        for future in wait(waiting, return_when=FIRST_EXCEPTION).done:
            future.result()
    finally:
        jobs.stop()


def is_done(arguments: EvidenceArguments) -> bool:
    """Whether all results are there."""
    wanted = [*arguments.arms, *(["photographs"] if arguments.photos else [])]
    return all(arguments.finished(seed, name) for seed in arguments.seeds for name in wanted)


def run_job(arguments: EvidenceArguments, what: str, name: str) -> None:
    """Do one piece of the work: "part" and its name, or a seed and one of encoder, start, photographs or an arm."""
    torch.set_num_threads(1)
    if what == "part":
        make_part(arguments, name)
        return
    jobs = {"encoder": make_encoder, "start": make_start, "photographs": run_photographs}
    jobs[name](arguments, int(what)) if name in jobs else run_arm(arguments, int(what), name)


def main(flags: list[str]) -> None:
    """Do one job, or all that is not done, and write the report."""
    arguments = parse(flags)
    if arguments.job:
        run_job(arguments, *arguments.job.split(":"))
        return
    check_writable(arguments.out)
    arguments.check_same()
    if not is_done(arguments):
        busy = "Another run of this recipe, or a job that outlived one, works in it. Wait for it or end it."
        with alone(arguments.out, f"--out {arguments.out}: {busy}") as lock:
            run_jobs(arguments, flags, lock)
    summary = write_report(arguments)
    print("\n".join(headline(summary, grade) for grade in TESTED_GRADES if grade in summary["table"]))
    if summary["photographs"]["arms"]:
        print(headline(summary["photographs"], title="photographs"))
    print("\n".join(f"{verdict}: {text}" for verdict, text in summary["said"]))
    print(f"\nReport: {Path(arguments.out, 'evidence.html').resolve()}")


if __name__ == "__main__":
    main(sys.argv[1:])
