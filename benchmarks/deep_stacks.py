"""In how many blocks of a stack `delta` has to work: on a toy UNet whose stacks have three blocks each, as SDXL's do.

    python benchmarks/deep_stacks.py [--quick] [--trainings N] [--work DIR] [--json FILE] [--device cuda]

SDXL has its 70 cross-attentions in 11 stacks of blocks, the toy one in each of seven. So the toy is made deeper first:
behind each of its blocks come two new ones, which pass their input on, and all is trained on. The adapters of each
table differ in how many of a stack's blocks have `delta` in their attention; the low-rank changes are in all. What is
trained is kept in the work folder. Writes deep_stacks.md and .json.
"""

import argparse
import functools
from pathlib import Path

import torch
from torch import nn

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.ablation import Variant, measure_all, sizes_of, tables
from comfyui_agd.benchmarks.command_line import add_results, add_trainings, add_work, benchmark_parser, work_path
from comfyui_agd.benchmarks.machine import made_on
from comfyui_agd.benchmarks.output import publish
from comfyui_agd.benchmarks.work_folder import WorkFolder, make_once

# `PERCENT` of the base's parameters is what `delta` in all blocks needs.
DEPTH, RANK, PERCENT, NARROW_PERCENT = 3, 4, 8.0, 4.7
_SEED, _RATE, STEPS, _BATCH, _POOL = 2503, 1e-3, 800, 32, 10_000
_DEEP = {
    "transformer_depth": [DEPTH, DEPTH],
    "transformer_depth_middle": DEPTH,
    "transformer_depth_output": [DEPTH] * 4,
}
# Of a transformer block, what it adds to its input by.
_LAST = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")


def deep_base():
    """The toy with stacks of three blocks, as one of its `BASES`."""
    from comfyui_agd.examples.toy.bases import Base
    from comfyui_agd.examples.toy.model import ToyConfig, load_unet

    class DeepConfig(ToyConfig):
        unet_config = ToyConfig.unet_config | _DEEP

    def build():
        return DeepConfig().get_model({})

    load = functools.partial(load_unet, build=build)
    return Base("toy-deep", f"the toy UNet with stacks of {DEPTH} blocks", build, "unet.safetensors", load, "normal")


def trained(base, folder: Path, steps: int) -> Path:
    """The base's weights in `folder`, trained unless they are there."""
    from comfyui_agd.examples.toy import train

    file = folder / base.file

    def make() -> None:
        torch.manual_seed(_SEED)
        model = base.build()
        deepen(model.diffusion_model)
        train.train_on(model, train.fit_diffusion, train.DiffusionStage("deep", steps, _BATCH, _POOL), file, _RATE)

    make_once(folder / f"trained-{steps}", make)
    return file


def deepen(network: nn.Module) -> None:
    """Give it the toy's own weights, and new blocks that add nothing yet."""
    import comfy.utils

    from comfyui_agd.examples.toy.model import WEIGHTS
    from comfyui_agd.examples.toy.train import initialise

    initialise(network)
    for name, module in network.named_modules():
        if name.endswith(_LAST):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    network.load_state_dict(comfy.utils.load_torch_file(str(WEIGHTS / "unet.safetensors")), strict=False)


def variants() -> list[Variant]:
    """By the blocks of each stack that have `delta` in their attention."""
    section, where = "Blocks with delta", {1: "all three", 2: "the first and the last", 3: "the first"}
    found = [Variant(section, name, {"rank": RANK, "attention_every": n}, PERCENT) for n, name in where.items()]
    found.append(Variant(section, "the first, no wider than in all three", found[-1].settings, NARROW_PERCENT))
    return [*found, Variant(section, "none: low_rank alone", {"kind": "low_rank"}, PERCENT)]


def page(rows: list[dict], experiment, made: str) -> str:
    sizes = experiment.sizes
    return f"""# In how many blocks of a stack `delta` has to work

`python benchmarks/deep_stacks.py`, {made}. Written by the command.

Gap closed on {experiment.base.title}, on {sizes.gap_captions} held-out captions: away from the empty prompt, and from
negative prompts that were not trained with; and the distance to CFG's picture, as in [ablation.md](ablation.md). They
have the largest width within {PERCENT:g} % of the base's parameters (*no wider*: {NARROW_PERCENT:g} %), beside low-rank
changes of rank {RANK} in every block, and {sizes.iterations} iterations of batch 16. Errors are over captions and
noise, and over trainings if there were several.

{tables(rows, sizes.gap_omegas)}
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, quick="hardly trained: shows that it runs")
    add_trainings(parser)
    add_work(parser, "deep_stacks")
    add_results(parser, "deep_stacks.md and .json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    use_comfyui(cpu=args.device == "cpu")
    from comfyui_agd.benchmarks.experiment import ToyExperiment
    from comfyui_agd.examples.toy.model import load_clip, load_vae
    from comfyui_agd.examples.toy.sampling import Toy

    work, base = WorkFolder(work_path(args, "deep_stacks")), deep_base()
    weights = trained(base, work.folder / "base", 2 if args.quick else STEPS)
    parts, known = Toy(base, base.load(weights), load_clip(), load_vae()), variants()
    experiment = ToyExperiment(work, sizes_of(args.quick), parts)
    measure_all(lambda captions: experiment, known, [""], args.trainings, usual=known[0])
    rows = work.rows(["cfg", *(variant.stem for variant in known)])
    publish(args, "deep_stacks", page(rows, experiment, made_on(args.device)), rows)


if __name__ == "__main__":
    main()
