"""`python -m comfyui_agd.examples.toy demo|measure|train ...`: the toy's programs, with ComfyUI made importable."""

import importlib
import logging
import os
import sys

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui

PROGRAMS = ("demo", "measure", "train")

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in PROGRAMS:
        sys.exit(f"usage: python -m comfyui_agd.examples.toy {{{','.join(PROGRAMS)}}} ...")
    logging.basicConfig(level=logging.WARNING)
    # Threads of torch that wait by spinning make it several times slower where other programs need the cores as well.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    use_comfyui()
    importlib.import_module(f".{sys.argv[1]}", __package__).main(sys.argv[2:])
