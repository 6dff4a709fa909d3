"""Real processes in a gloo group, for tests: ``run_ranks(worker, 2)`` calls ``worker(rank, world)`` in each."""

import multiprocessing
import os
import sys
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist


def run_ranks(worker, world):
    """Raises what a rank raised. ``worker`` is a function of a module, for it is pickled."""
    shared = ["torch.distributed.fsdp", "hsd_kernels"]  # imported once, not in each rank
    if (model := "transformers.models.qwen3.modeling_qwen3") in sys.modules:
        shared.append(model)
    multiprocessing.set_forkserver_preload(shared)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _rank, args=(world, os.path.join(folder, "store"), worker), nprocs=world, start_method="forkserver"
        )


def leave():
    """The end of a rank that has shown everything: without the interpreter's finalization, in which a gloo thread
    that still lets go of a tensor aborts the process (pytorch/pytorch#190489, seen in this suite)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _rank(rank, world, path, worker):
    torch.set_num_threads(1)
    store = dist.FileStore(path, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        worker(rank, world)
    finally:
        dist.destroy_process_group()
    leave()
