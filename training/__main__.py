"""`python -m comfyui_agd.training`: the `agd` command, as torchrun starts it."""

from .cli import main

raise SystemExit(main())
