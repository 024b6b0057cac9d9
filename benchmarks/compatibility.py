"""What guidance in one pass makes of other nodes and samplers: how far its pictures are from CFG's with the same node.

    python benchmarks/compatibility.py [--quick] [--only NODE ...] [--adapter FILE] [--json FILE] [--device cuda]

On the toy, at its best omega, 20 steps: latents of held-out captions sampled with CFG and a node, and with
`training-free` (and with an adapter, where one is given) and that node. Beside them the node's own effect, the distance
that it makes to CFG, and CFG with that node at half the steps, which takes as many evaluations. Distances are relative:
the norm of the difference over the norm of what CFG with the node makes of that noise. Writes compatibility.md and
compatibility.json.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.command_line import add_results, benchmark_parser
from comfyui_agd.benchmarks.machine import made_on
from comfyui_agd.benchmarks.output import Figure, publish, with_errors
from comfyui_agd.examples.toy.tables import Column, markdown_table

PICTURES, QUICK = 64, 16
_CAPTIONS_SEED, _NOISE_SEED = 41, 9
# CFGOverride and the attention's replacement are none of guidance; ComfyUI's TSR takes one picture at a time.
_LEFT_OUT = ("CFGOverride", "attn2 replacement", "TSR")
_SAMPLERS = {
    "dpmpp_2m, karras": ("dpmpp_2m", "karras"),
    "euler_ancestral": ("euler_ancestral", "normal"),
    "dpmpp_2m_sde, karras": ("dpmpp_2m_sde", "karras"),
    "heun": ("heun", "normal"),
    "lcm": ("lcm", "normal"),
}


@dataclass(frozen=True)
class Workflow:
    """`patch` puts a node's MODEL in place of the one it is given; `how`: another sampler and scheduler."""

    patch: Callable = lambda model: model
    how: dict[str, str] = field(default_factory=dict)


def workflows() -> dict[str, Workflow]:
    from comfy_extras import nodes_easycache

    from comfyui_agd.tests.support.workflows import NODES

    found = {"none": Workflow()}
    for name, (sampler, scheduler) in _SAMPLERS.items():
        found[name] = Workflow(how={"sampler": sampler, "scheduler": scheduler})
    found |= {name: Workflow(patch) for name, patch in NODES.items() if name not in _LEFT_OUT}
    for name, node in (("EasyCache", nodes_easycache.EasyCacheNode), ("LazyCache", nodes_easycache.LazyCacheNode)):
        found[name] = Workflow(lambda model, node=node: node.execute(model, 0.2, 0.15, 0.95, False).args[0])
    return found


class CaptionedToy:
    """The toy with held-out captions. `latents` samples them, each from its own noise."""

    def __init__(self, pictures: int):
        from comfyui_agd.examples.toy.measure import omega_star
        from comfyui_agd.examples.toy.sampling import Toy, encode, held_out_captions

        self.toy, self.omega, self.pictures = Toy.load(), omega_star(), pictures
        _, captions = held_out_captions(pictures, _CAPTIONS_SEED)
        self.positive, self.negative = encode(self.toy.clip, captions)[0], encode(self.toy.clip, [""])[0]

    def latents(self, model, steps: int, how: dict[str, str]) -> tuple[torch.Tensor, float]:
        """(n, c, h, w), and the evaluations that a picture took."""
        from comfyui_agd.agd_core.comfyui.counting import counted
        from comfyui_agd.examples.toy.sampling import SamplerSettings, sample_latents

        model, counter = counted(model)
        settings = SamplerSettings(self.omega, _NOISE_SEED, steps, **how)
        sampled = sample_latents(model, self.positive, self.negative, settings)
        return sampled["samples"], counter.total / self.pictures


def distances(made: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    from comfyui_agd.examples.toy.standard_errors import mean_and_error

    return mean_and_error((made - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1))


def measure(toy: CaptionedToy, name: str, flow: Workflow, guided: dict[str, Callable], cfg: torch.Tensor) -> list[dict]:
    """A row for CFG with the node, for CFG at half the steps, and for each of `guided` (MODEL -> MODEL)."""
    from comfyui_agd.examples.toy.sampling import STEPS

    def row(method: str, steps: int, evaluations: float, made: torch.Tensor, against: torch.Tensor) -> dict:
        identity = {"model": "toy", "node": name, "method": method, "omega": toy.omega, "steps": steps}
        measured = with_errors({"distance": distances(made, against)})
        return identity | {"evaluations_per_step": round(evaluations / steps, 3), "evaluations": evaluations} | measured

    base = toy.toy.model
    expected, evaluations = toy.latents(flow.patch(base), STEPS, flow.how)
    rows = [row("cfg", STEPS, evaluations, expected, cfg)]
    half, evaluations = toy.latents(flow.patch(base), STEPS // 2, flow.how)
    rows.append(row("cfg at half the steps", STEPS // 2, evaluations, half, expected))
    for method, agd in guided.items():
        made, evaluations = toy.latents(flow.patch(agd(base)), STEPS, flow.how)
        rows.append(row(method, STEPS, evaluations, made, expected))
    return rows


def columns_of_methods(rows: list[dict]) -> list[Column]:
    """Of a node's rows by method: (node, {method: row})."""
    distance = Figure("distance", "distance")

    def effect(named: tuple[str, dict[str, dict]]) -> str:
        return distance.text(named[1]["cfg"]) if named[0] != "none" else ""

    columns = [Column("node or sampler", lambda named: named[0]), Column("its effect on CFG", effect)]
    for method in list(dict.fromkeys(row["method"] for row in rows))[1:]:
        columns += [
            Column(f"{method}: evaluations", lambda named, method=method: f"{named[1][method]['evaluations']:.1f}"),
            Column(method, lambda named, method=method: distance.text(named[1][method])),
        ]
    return columns


def page(rows: list[dict], pictures: int, made: str) -> str:
    by_node: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_node.setdefault(row["node"], {})[row["method"]] = row
    return f"""# Beside other nodes: the distance to CFG's picture with the same node

`python benchmarks/compatibility.py`, {made}. Written by the command.

The toy at omega {rows[0]["omega"]:g}, 20 steps, {pictures} pictures. Distances between final latents, relative, with
standard errors: of CFG with the node to CFG without it (its effect), and of each method with the node to CFG with it. A
distance of 0 is CFG's own picture. "none" is the workflow without another node. Of one base, the toy. The adapter
is one of `make demo`, minutes of training.

{markdown_table(columns_of_methods(rows), by_node.items())}
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, quick="few pictures: shows that it runs")
    parser.add_argument("--only", nargs="+", metavar="NODE", help="those whose names have one of these")
    adapter = "of the toy, as `make demo` leaves one; without it there is no column"
    parser.add_argument("--adapter", type=Path, help=adapter)
    add_results(parser, "compatibility.md and .json")
    return parser.parse_args(argv)


def one_evaluation_methods(adapter: Path | None) -> dict[str, Callable]:
    """What guides a MODEL in one evaluation per step, by name."""
    from comfyui_agd.agd_core import adapter_file
    from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
    from comfyui_agd.agd_core.comfyui.sampling.training_free import apply_training_free

    if adapter is None:
        return {"training-free": apply_training_free}
    info, weights = adapter_file.load_weights(adapter)
    return {
        "training-free": apply_training_free,
        "adapter": lambda model: apply_adapter(model, info, weights, source=adapter.name),
    }


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    use_comfyui(cpu=args.device == "cpu")
    guided, toy = one_evaluation_methods(args.adapter), CaptionedToy(QUICK if args.quick else PICTURES)
    cfg, _ = toy.latents(toy.toy.model, 20, {})
    rows = []
    for name, flow in workflows().items():
        if not args.only or any(each.lower() in name.lower() for each in args.only):
            own = measure(toy, name, flow, guided, cfg)
            print(name, *(f"{row['method']} {row['distance']:.3f}" for row in own), sep="; ", flush=True)
            rows += own
    publish(args, "compatibility", page(rows, toy.pictures, made_on(args.device)), rows)


if __name__ == "__main__":
    main()
