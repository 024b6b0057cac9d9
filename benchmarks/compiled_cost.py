"""Kernels and memory traffic that an adapter adds to a step where torch.compile joins operations: counted, not timed.

    python benchmarks/compiled_cost.py [--quick] [--json FILE]

At the true sizes of UNets, on tensors without values, whatever the `--device`. (In transformers prompts are looked up
with noise that such a trace can't hold.) Steps are traced into one graph, lowered and joined by PyTorch's own compiler,
inductor, and what it would launch is counted, with the bytes that it would read and write; no code is made of it. It
plans for a CPU, for that needs no card: a GPU's kernels are joined by much the same rules, but not the same ones
(`gpu.py run kernels` counts them there). In a CUDA graph all of a step is one launch, with an adapter as without one,
and only the bytes count.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import fx

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.command_line import add_results, benchmark_parser
from comfyui_agd.benchmarks.machine import made_on
from comfyui_agd.benchmarks.meta_model import MetaModel
from comfyui_agd.benchmarks.output import publish
from comfyui_agd.benchmarks.step_cost import TrueSize, adapters_of, configs_of
from comfyui_agd.examples.toy.tables import Column, markdown_table

SIZES = (TrueSize("SD 1.5", 512, 512), TrueSize("SDXL", 1024, 1024))
METHODS = ("agd", "agd-in-all", "paper-128")  # of those of step_cost.py
_COLUMNS = (
    Column("model", lambda row: row["model"]),
    Column("size", lambda row: row["size"]),
    Column("  method", lambda row: f"  {row['method']}"),
    Column("kernels of an unguided step", lambda row: f"{row['unguided_launches']:,}"),
    Column("GB moved", lambda row: f"{row['unguided_bytes'] / 1e9:.1f}"),
    Column("kernels added", lambda row: f"{row['added_launches']:+d}, {_share(row):+.1%}"),
    Column("bytes added", lambda row: f"{row['added_bytes']:+.2%}"),
    Column("added once per sampling", lambda row: f"{row['launches_per_sampling']:+d}"),
)
_aten = torch.ops.aten
_NOTHING = (_aten.detach.default, _aten.alias.default, _aten.lift_fresh_copy.default)
_RANDOM = (_aten.rand.default, _aten.randn.default)  # a new module's weights


class Compiled(NamedTuple):
    launches: int
    moved_bytes: int


def compiled_cost(model: MetaModel, shape: tuple[int, ...], config, steps: int) -> Compiled:
    """Of so many steps in one graph."""
    from comfyui_agd.agd_core.comfyui.model import tracing

    with tracing.without_values(model.model) as fakes, torch.no_grad():
        inputs = torch.ones(1, *shape), torch.ones(1)
        return lowered(*graph_of(model.steps(shape, config, steps), inputs), fakes)


def graph_of(evaluate: Callable, inputs: tuple[torch.Tensor, ...]) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """Without changes in place, in the operations that the compiler knows; and its inputs, weights among them."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(torch.func.functionalize(evaluate), select_decomp_table(), _allow_non_fake_inputs=True)(*inputs)
    for node in [node for node in traced.graph.nodes if node.target in _NOTHING]:
        node.replace_all_uses_with(node.args[0])
        traced.graph.erase_node(node)
    weights = list(_weights_as_inputs(traced))
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced, [*inputs, *weights]


def _weights_as_inputs(traced: fx.GraphModule) -> Iterator[torch.Tensor]:
    """Each in the order of its placeholder: constants would be looked at, and have no values."""
    last, known = [node for node in traced.graph.nodes if node.op == "placeholder"][-1], {}
    for node in [node for node in traced.graph.nodes if node.op == "get_attr" or node.target in _RANDOM]:
        value, key = (getattr(traced, node.target), node.target) if node.op == "get_attr" else (node.meta["val"], node)
        if key not in known:
            with traced.graph.inserting_after(last):
                last = known[key] = traced.graph.placeholder(f"weight_{node.name}")
            last.meta["val"] = value
            yield value
        node.replace_all_uses_with(known[key])
        traced.graph.erase_node(node)


def lowered(traced: fx.GraphModule, inputs: list[torch.Tensor], fakes) -> Compiled:
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    with V.set_fake_mode(fakes), V.set_debug_handler(DebugContext()):
        post_grad_passes(traced, is_inference=True)
        # In another layout every step would copy the convolutions' weights, which a compiled model does once.
        graph = GraphLowering(traced, inputs, is_inference=True, layout_opt=False)
        with V.set_graph_handler(graph):
            graph.run(*inputs)
            graph._update_scheduler()
            launched = [node for node in graph.scheduler.nodes if _launches(node)]
            return Compiled(len(launched), sum(node.get_read_write_buffers_sizes() for node in launched))


def _launches(node) -> bool:
    """Not what only names memory, or one of several results."""
    from torch._inductor.ir import MultiOutput
    from torch._inductor.scheduler import NopKernelSchedulerNode

    return not isinstance(node, NopKernelSchedulerNode) and not isinstance(node.node, MultiOutput)


def count(at: TrueSize) -> list[dict]:
    """A row per adapter."""
    model = MetaModel(at.name)
    shape = model.latent_shape(at.width, at.height)
    unguided, rows = [compiled_cost(model, shape, None, steps) for steps in (1, 2)], []
    for method, config in configs_of(model.base, adapters_of(model.base)).items():
        if method in METHODS:
            guided = [compiled_cost(model, shape, config, steps) for steps in (1, 2)]
            rows.append({"model": at.name, "size": at.size, "method": method} | _added(unguided, guided))
    return rows


def _added(unguided: list[Compiled], guided: list[Compiled]) -> dict:
    """To a step, and once to a sampling: each of a graph of one step and of one of two, whose second step is free of
    what a graph does once."""
    base, step = (Compiled(*(b - a for a, b in zip(*each, strict=True))) for each in (unguided, guided))
    once = guided[0].launches - unguided[0].launches - (step.launches - base.launches)
    return {
        "unguided_launches": base.launches,
        "unguided_bytes": base.moved_bytes,
        "added_launches": step.launches - base.launches,
        "added_bytes": step.moved_bytes / base.moved_bytes - 1,
        "launches_per_sampling": once,
    }


def _share(row: dict) -> float:
    return row["added_launches"] / row["unguided_launches"]


def page(rows: list[dict]) -> str:
    return f"""# What a compiled step costs

`python benchmarks/compiled_cost.py`, {made_on("cpu")}, PyTorch {torch.__version__.partition("+")[0]}. Counted at true
sizes, on tensors without values, in bf16; no weights, no card. Kernels that inductor would launch for a step traced
into one graph, and bytes that they would read and write, as it plans for a CPU: a GPU's are joined by much the same
rules. In a CUDA graph a step is one launch, and the bytes are what counts. Without torch.compile:
[step_cost.md](step_cost.md).

{markdown_table(_COLUMNS, rows)}
"""


def main() -> None:
    parser = benchmark_parser(__doc__, quick="SD 1.5 only")
    add_results(parser, "compiled_cost.md and .json")
    args = parser.parse_args()
    use_comfyui(cpu=True)
    rows = []
    for at in SIZES[:1] if args.quick else SIZES:
        rows += count(at)
    publish(args, "compiled_cost", page(rows), rows)


if __name__ == "__main__":
    main()
