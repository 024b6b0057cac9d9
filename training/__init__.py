"""Distillation without any UI: rollouts, the trainer, its config and the command line."""
