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
from comfyui_agd.benchmarks.output import made_on, publish, with_errors

PICTURES, QUICK = 64, 16
_CAPTIONS_SEED, _NOISE_SEED = 41, 9


@dataclass(frozen=True)
class Case:
    """A node of a workflow, `patch(MODEL)`, and how else than usually it is sampled."""

    patch: Callable = lambda model: model
    how: dict[str, str] = field(default_factory=dict)


def cases() -> dict[str, Case]:
    from comfy_extras import nodes_easycache

    from comfyui_agd.tests.support.workflows import NODES

    # CFGOverride and the attention's replacement are none of guidance; ComfyUI's TSR takes one picture at a time.
    left_out = ("CFGOverride", "attn2 replacement", "TSR")
    beside = {name: Case(patch) for name, patch in NODES.items() if name not in left_out}
    samplers = {
        "dpmpp_2m, karras": ("dpmpp_2m", "karras"),
        "euler_ancestral": ("euler_ancestral", "normal"),
        "dpmpp_2m_sde, karras": ("dpmpp_2m_sde", "karras"),
        "heun": ("heun", "normal"),
        "lcm": ("lcm", "normal"),
    }
    nodes = {"EasyCache": nodes_easycache.EasyCacheNode, "LazyCache": nodes_easycache.LazyCacheNode}
    caches = {
        name: Case(lambda model, node=node: node.execute(model, 0.2, 0.15, 0.95, False).args[0])
        for name, node in nodes.items()
    }
    alone = {"none": Case()}
    return (
        alone
        | {name: Case(how=dict(zip(("sampler", "scheduler"), how, strict=True))) for name, how in samplers.items()}
        | beside
        | caches
    )


class Workflow:
    """The toy with held-out captions. `latents` samples them, each from its own noise."""

    def __init__(self, pictures: int):
        from comfyui_agd.examples.toy.measure import omega_star
        from comfyui_agd.examples.toy.sampling import Toy, encode, held_out_captions

        self.toy, self.omega, self.pictures = Toy.load(), omega_star(), pictures
        _, captions = held_out_captions(pictures, _CAPTIONS_SEED)
        self.positive, self.negative = encode(self.toy.clip, captions)[0], encode(self.toy.clip, [""])[0]

    @torch.inference_mode()
    def latents(
        self, model, steps: int, sampler: str = "euler", scheduler: str = "normal"
    ) -> tuple[torch.Tensor, float]:
        """(n, c, h, w), and the evaluations that a picture took."""
        import nodes

        from comfyui_agd.agd_core.comfyui.counting import counted
        from comfyui_agd.examples.toy.scenes import IMAGE_SIZE

        model, counter = counted(model)
        at = nodes.EmptyLatentImage().generate(IMAGE_SIZE, IMAGE_SIZE, self.pictures)[0]
        sampled = nodes.KSampler().sample(
            model, _NOISE_SEED, steps, self.omega, sampler, scheduler, self.positive, self.negative, at, denoise=1.0
        )[0]
        return sampled["samples"], counter.total / self.pictures


def distances(made: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    from comfyui_agd.benchmarks.metrics import mean_and_error

    return mean_and_error((made - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1))


def measure(flow: Workflow, name: str, case: Case, guided: dict[str, Callable], cfg: torch.Tensor) -> list[dict]:
    """A row for CFG with the node, for CFG at half the steps, and for each of `guided` (MODEL -> MODEL)."""
    from comfyui_agd.examples.toy.sampling import STEPS

    def row(method: str, steps: int, evaluations: float, made: torch.Tensor, against: torch.Tensor) -> dict:
        identity = {"model": "toy", "node": name, "method": method, "omega": flow.omega, "steps": steps}
        measured = with_errors({"distance": distances(made, against)})
        return identity | {"evaluations_per_step": round(evaluations / steps, 3), "evaluations": evaluations} | measured

    expected, evaluations = flow.latents(case.patch(flow.toy.model), STEPS, **case.how)
    rows = [row("cfg", STEPS, evaluations, expected, cfg)]
    half, evaluations = flow.latents(case.patch(flow.toy.model), STEPS // 2, **case.how)
    rows.append(row("cfg at half the steps", STEPS // 2, evaluations, half, expected))
    for method, agd in guided.items():
        made, evaluations = flow.latents(case.patch(agd(flow.toy.model)), STEPS, **case.how)
        rows.append(row(method, STEPS, evaluations, made, expected))
    return rows


def page(rows: list[dict], pictures: int, made: str) -> str:
    methods = list(dict.fromkeys(row["method"] for row in rows))[1:]
    by_node: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_node.setdefault(row["node"], {})[row["method"]] = row

    def cell(row: dict) -> str:
        return f"{row['distance']:.3f} ± {row['distance_se']:.3f}"

    heads = [
        "node or sampler",
        "its effect on CFG",
        *(f"{m}: evaluations" if i % 2 else m for m in methods for i in (1, 0)),
    ]
    lines = [heads, ["---"] * len(heads)]
    for name, own in by_node.items():
        cells = [f"{own[m]['evaluations']:.1f}" if i else cell(own[m]) for m in methods for i in (1, 0)]
        lines.append([name, cell(own["cfg"]) if name != "none" else "", *cells])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"""# Beside other nodes: the distance to CFG's picture with the same node

`python benchmarks/compatibility.py`, {made}. Written by the command.

The toy at omega {rows[0]["omega"]:g}, 20 steps, {pictures} pictures. Distances between final latents, relative, with
standard errors: of CFG with the node to CFG without it (its effect), and of each method with the node to CFG with it. A
distance of 0 is CFG's own picture. "none" is the workflow without another node. Of one base, the toy. The adapter
is one of `make demo`, minutes of training.

{text}
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NODE", help="those whose names have one of these")
    parser.add_argument("--quick", action="store_true", help="few pictures: shows that it runs")
    parser.add_argument(
        "--adapter", type=Path, help="of the toy, as `make demo` leaves one; without it there is no column"
    )
    parser.add_argument("--results", type=Path, help="for compatibility.md and .json; default: results, unless quick")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    use_comfyui(cpu=args.device == "cpu")
    from comfyui_agd.agd_core import adapter_file
    from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
    from comfyui_agd.agd_core.comfyui.sampling.training_free import apply_training_free

    guided = {"training-free": apply_training_free}
    if args.adapter:
        info, state = adapter_file.load_state(args.adapter)
        guided["adapter"] = lambda model: apply_adapter(model, info, state, source=args.adapter.name)
    flow = Workflow(QUICK if args.quick else PICTURES)
    cfg, _ = flow.latents(flow.toy.model, 20)
    rows = []
    for name, case in cases().items():
        if not args.only or any(each.lower() in name.lower() for each in args.only):
            rows += measure(flow, name, case, guided, cfg)
            print(
                name,
                *(f"{row['method']} {row['distance']:.3f}" for row in rows if row["node"] == name),
                sep="; ",
                flush=True,
            )
    publish(args, "compatibility", page(rows, flow.pictures, made_on(args.device)), rows)


if __name__ == "__main__":
    main()
