"""`agd` in processes that can be killed and cost no start: one that has loaded ComfyUI forks for each command."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path


class Commands:
    """One command at a time; the output of all of them goes to `log`."""

    def __init__(self, log: Path):
        self.log, self.pid, pipe = log, 0, subprocess.PIPE
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a pool of threads would not survive the fork
        command = [sys.executable, __file__, str(log)]
        self.server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def start(self, *args: str) -> None:
        self.server.stdin.write(json.dumps(args) + "\n")
        self.server.stdin.flush()
        self.pid = int(self.server.stdout.readline())

    def wait(self) -> int:
        """The exit status of the command, negative if a signal ended it."""
        return int(self.server.stdout.readline())

    def kill(self) -> int:
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def close(self) -> None:
        self.server.kill()
        self.server.communicate()


def _serve(log: Path) -> None:
    from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
    from comfyui_agd.training import job
    from comfyui_agd.training.cli import main
    from comfyui_agd.training.plan import Plan

    use_comfyui(cpu=True)

    import comfyui_agd.agd_core.comfyui.model.comfy_model
    import comfyui_agd.examples.toy.model  # noqa: F401

    # Planning takes longer than all of a small run.
    job.plan = lambda *_, **__: Plan(0, 0, 0, 0, 4, 8, False, 0, 0, 0, 0, 0, 0, None, None)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            status = main(json.loads(line))
            sys.stdout.flush()
            os._exit(status)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
