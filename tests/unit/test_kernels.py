"""benchmarks/kernels.py: what is counted as inside an adapter."""

import pytest
import torch
from torch import nn

from comfyui_agd.benchmarks.kernels import kernels_of, kernels_per_step, marked

CPU = torch.device("cpu")


class Doubler(nn.Module):
    """Of an adapter what is called of it: one operator to prepare, two for each layer."""

    def prepare(self, x):
        return x.sin()

    def add_after_attention(self, x):
        return (x + x).mul(self.prepare(x))

    def add_inside_attention(self, x):
        return x

    add_at_linear = add_inside_attention


@pytest.fixture
def adapter():
    return Doubler()


def test_operators_inside_the_adapter_are_counted_once(adapter):
    x = torch.ones(4)

    def run():
        h = adapter.add_after_attention(x.exp())
        return adapter.prepare(h).exp()

    found = kernels_of(run, CPU, adapter)
    assert (found["all"].count, found["inside"].count) == (6, 4)
    assert 0 < found["inside"].seconds < found["all"].seconds


def test_of_a_step_is_what_the_second_one_adds(adapter):
    x = torch.ones(4)

    def sample(steps):
        h = x.exp().exp()  # once per sampling
        for _ in range(steps):
            h = adapter.prepare(h).exp()

    row = kernels_per_step(sample, CPU, adapter)
    assert (row["kernels_per_step"], row["kernels_inside"]) == (2, 1)
    assert kernels_per_step(sample, CPU).keys() == {"kernels_per_step", "kernel_seconds_per_step"}


def test_the_adapter_is_left_as_it_was(adapter):
    with marked(adapter):
        assert "prepare" in vars(adapter)
    assert "prepare" not in vars(adapter)
