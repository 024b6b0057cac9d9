"""benchmarks/compiled_cost.py: kernels of joined operations, counted without values."""

import torch
from torch import nn

from comfyui_agd.agd_core.comfyui.model import tracing
from comfyui_agd.benchmarks import compiled_cost

ROWS, WIDTH, BYTES = 4, 8, 4
LAYER = nn.Linear(WIDTH, WIDTH, bias=False)


def cost(evaluate) -> compiled_cost.Compiled:
    with tracing.without_values(LAYER) as fakes, torch.no_grad():
        return compiled_cost.lowered(*compiled_cost.graph_of(evaluate, (torch.ones(ROWS, WIDTH),)), fakes)


def test_operations_on_each_element_are_one_kernel():
    joined = cost(lambda x: (x * 2 + 1).tanh().exp())
    assert joined == compiled_cost.Compiled(1, 2 * ROWS * WIDTH * BYTES)


def test_changes_in_place_are_joined_as_others_are():
    assert cost(lambda x: x.mul(2).add_(1).tanh_()) == cost(lambda x: (x * 2 + 1).tanh())


def test_a_product_is_a_kernel_that_reads_its_weight():
    assert cost(LAYER) == compiled_cost.Compiled(1, (2 * ROWS * WIDTH + WIDTH * WIDTH) * BYTES)


def test_views_are_none():
    assert cost(lambda x: x.tanh().view(WIDTH, ROWS).t()).launches == 1


def test_attention_is_one_kernel_however_many_results_it_has():
    def attention(x):
        heads = x.view(1, 1, ROWS, WIDTH)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads)

    assert cost(attention).launches == 1
