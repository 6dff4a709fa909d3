"""Forks the ranks of jobs from one process that has imported everything: imports cost more than most jobs.

A line of JSON a job comes in (`rank_runs.launch`), a line with the ranks' exit codes goes out. A job is a file with
``main(*arguments)``, and ``warm()`` where it has more to import. A rank that is not done in time is killed.
"""

import gc
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from rank_runs import load
from ranks import leave


def rank(job, asked, number) -> None:
    log = os.open(Path(asked["folder"]) / f"log{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ |= asked["env"] | {"RANK": str(number), "LOCAL_RANK": str(number)}
    torch.set_num_threads(1)
    try:
        job.main(*asked["arguments"])
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    leave()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print
    jobs = {}
    for line in sys.stdin:
        asked = json.loads(line)
        path, deadline, pids = asked["job"], time.monotonic() + asked["seconds"], []
        if path not in jobs:
            jobs[path] = load(Path(path))
            getattr(jobs[path], "warm", lambda: None)()
            gc.collect()
            gc.freeze()  # accelerate collects with every trainer: not what was imported
        for number in (0, 1):
            pid = os.fork()
            if pid == 0:
                rank(jobs[path], asked, number)
            pids.append(pid)
        codes = {}
        while len(codes) < len(pids):
            for pid in set(pids) - codes.keys():
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline or any(codes.values()):  # the other one would wait for it
                for pid in set(pids) - codes.keys():
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        print(json.dumps([codes[pid] for pid in pids]), file=answers, flush=True)


if __name__ == "__main__":
    main()
    leave()
