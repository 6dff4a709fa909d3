"""A queue of runs, each a process of its own and one JSON file when it is done. A killed queue goes on where it was."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsd.files import replacing


@dataclass(frozen=True)
class Job:
    """``work()`` returns what goes into ``key``.json, beside ``asked``, which says what it is the result of.

    ``needs``: the key of the job that must be done before.
    """

    key: str
    asked: Mapping[str, Any]
    work: Callable[[], Mapping[str, Any]]
    needs: str | None = None


def drain(folder: Path, jobs: Sequence[Job], workers: int, say: Callable[[str], None] = print) -> list[str]:
    """Do what is not done, in order, ``workers`` at a time. Returns the keys of the jobs that failed.

    What a job prints is in ``folder/logs``. Raises ValueError where ``folder`` holds another job's result.
    """
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    waiting = [job for job in jobs if result(folder, job) is None]
    say(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are done")
    pending, failed = {job.key for job in waiting}, []
    context = multiprocessing.get_context("fork")  # the imports, 6 s of CPU, are paid once
    running: dict[str, Any] = {}
    try:
        while waiting or running:
            for key in [key for key, process in running.items() if process.exitcode is not None]:
                ok = running.pop(key).exitcode == 0
                pending.discard(key)
                if not ok:
                    failed.append(key)
                say(f"{time.strftime('%H:%M:%S')} {'done' if ok else 'FAILED'} {key}; {len(pending)} left")
            for job in [job for job in waiting if job.needs in failed]:
                waiting.remove(job)
                pending.discard(job.key)
                failed.append(job.key)
                say(f"FAILED {job.key}: it needs {job.needs}")
            ready = next((job for job in waiting if job.needs not in pending), None)
            if ready is None or len(running) >= workers:
                time.sleep(0.05)
                continue
            waiting.remove(ready)
            running[ready.key] = context.Process(target=_child, args=(folder, ready, os.getpid()))
            running[ready.key].start()
    finally:
        for process in running.values():  # Ctrl-C
            process.terminate()
    return failed


def result(folder: Path, job: Job) -> dict[str, Any] | None:
    """What the job left, None if it is not done."""
    path = folder / f"{job.key}.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    asked = json.loads(json.dumps(job.asked))
    if found["asked"] != asked:
        raise ValueError(f"{path}: expected the result of {asked}, got that of {found['asked']}; choose another --out")
    return found


def _child(folder: Path, job: Job, parent: int) -> None:
    os.setsid()  # Ctrl-C reaches the queue alone, which then ends its runs
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with (folder / "logs" / f"{job.key}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            found = {"asked": job.asked, **job.work()}
            with replacing(folder / f"{job.key}.json") as part:
                part.write_text(json.dumps(found))
        except BaseException:
            traceback.print_exc(file=log)
            log.flush()
            os._exit(1)
    os._exit(0)


def _end_with(parent: int) -> None:
    """A run whose queue was killed would be in the way of the next queue's."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
