"""Several processes that train one adapter, as torchrun starts them. As a script: one of those processes."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch


@dataclass
class Finished:
    """What a process of several left: its exit status, its output, what it trained (None if it was stopped)."""

    status: int
    output: str
    trained: dict | None


def free_port() -> int:
    with socket.socket() as at:
        at.bind(("127.0.0.1", 0))
        return at.getsockname()[1]


def train_together(count: int, folder: Path, stop: int = 0, phase: str = "train", **settings) -> list[Finished]:
    """`count` ranks on the analytic host, stopped after the step `stop` of that phase; `settings` differ from
    `analytic.CONFIG`."""
    task = {"folder": str(folder), "stop": stop, "phase": phase, "settings": settings}
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(count):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, json.dumps({**task, "result": f"{folder}.{count}.{rank}"})]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True))
    finished = []
    try:
        for rank, process in enumerate(processes):
            output, result = process.communicate(timeout=120)[0], Path(f"{folder}.{count}.{rank}")
            finished.append(Finished(process.returncode, output, torch.load(result) if result.exists() else None))
    finally:
        for process in processes:
            process.kill()
    return finished


def _train(task: dict) -> None:
    from comfyui_agd.tests.support.analytic import CONFIG, PROMPTS, AnalyticModel, reported, stop_after, weights
    from comfyui_agd.training.distributed import Ranks
    from comfyui_agd.training.run_setup import RunOptions
    from comfyui_agd.training.trainer import Callbacks, train

    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in task["settings"].items()}
    # One rank alone is stopped, as by a signal that the others don't get.
    stopped = task["stop"] and os.environ["RANK"] == "1"
    with Ranks():
        trained = train(
            AnalyticModel(),
            PROMPTS,
            replace(CONFIG, **settings),
            stop_after(task["stop"], task["phase"]) if stopped else Callbacks(),
            options=RunOptions(folder=Path(task["folder"])),
        )
    torch.save({**reported(trained), "weights": weights(trained)}, task["result"])


if __name__ == "__main__":
    _train(json.loads(sys.argv[1]))
