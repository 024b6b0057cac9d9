"""How many FLOPs an adapter adds to a step, at the true sizes of SD 1.5 and SDXL: counted, so on any machine alike.

    python benchmarks/flops.py [--quick] [--json FILE]

Nothing is computed: the models are on the meta device. A step's time has more in it, on a GPU above all what launching
many small operations costs (`inference.py` measures that). What is needed once per sampling, the keys and values of the
negative prompt, is listed apart.
"""

import argparse
from pathlib import Path

import torch

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.inference import ADAPTERS
from comfyui_agd.benchmarks.output import write_rows

CASES = (("SD 1.5", 512), ("SDXL", 1024))
_TOKENS = 77


def count(name: str, pixels: int) -> list[dict]:
    """A row per adapter."""
    import comfy.model_patcher

    from comfyui_agd.agd_core.adapter import Adapter
    from comfyui_agd.agd_core.comfyui.backbones.unet import describe_base
    from comfyui_agd.agd_core.comfyui.model import tracing
    from comfyui_agd.agd_core.comfyui.model.denoiser import at_sigma, options_of
    from comfyui_agd.agd_core.comfyui.patch import Active, Step, take_part
    from comfyui_agd.agd_core.comfyui.sampling.negatives import Negative, Share
    from comfyui_agd.agd_core.config import AdapterConfig
    from comfyui_agd.agd_core.mixed_precision import MixedPrecision
    from comfyui_agd.tests.support.checkpoints import on_meta

    model, meta = on_meta(name), torch.device("meta")
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=meta, offload_device=meta)
    base, options = describe_base(model), options_of(patcher)
    sizes, shape = model.model_config.unet_config, (4, pixels // 8, pixels // 8)
    pooled = {"y": torch.zeros(1, sizes["adm_in_channels"])} if sizes.get("adm_in_channels") else {}
    context = torch.zeros(1, _TOKENS, sizes["context_dim"])

    def flops(config: AdapterConfig | None, steps: int) -> int:
        """Of so many steps of one sampling."""

        def evaluate(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            own = at_sigma(options, sigma)
            if config is not None:
                adapter = Adapter(config, MixedPrecision)
                negatives = (Share(Negative(context)),) if adapter.uses_negative else ()
                active = Active(adapter, torch.full((1,), 7.0), torch.ones(1), negatives, merged=config.merges)
                own = take_part(own, Step((active,)))
            for _ in range(steps):
                out = model.apply_model(x, sigma, c_crossattn=context, transformer_options=own, **pooled)
            return out

        return tracing.base(model, evaluate, shape, 1).flops

    unguided, rows = flops(None, 1), []
    for method, settings in ADAPTERS.items():
        config = AdapterConfig(sites=base.sites, **settings)
        one, two = flops(config, 1), flops(config, 2)
        with torch.device("meta"):
            parameters = Adapter(config).parameter_count()
        row = {"model": name, "size": f"{pixels}x{pixels}", "method": method, "parameters": parameters}
        row |= {"unguided_flops": unguided, "added_per_step": (two - one) / unguided - 1}
        rows.append(row | {"added_per_sampling": (2 * one - two) / unguided})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="SD 1.5 only")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    use_comfyui(cpu=True)
    rows = [row for case in (CASES[:1] if args.quick else CASES) for row in count(*case)]
    print(f"{'model':<8}{'size':>11}  {'method':<14}{'parameters':>12}{'per step':>10}{'per sampling':>14}")
    for row in rows:
        print(
            f"{row['model']:<8}{row['size']:>11}  {row['method']:<14}{row['parameters']:>12,}"
            f"{row['added_per_step']:>+10.2%}{row['added_per_sampling']:>+14.2%}"
        )
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()
