"""How many FLOPs an adapter adds to a step, at the true sizes of SD 1.5 and SDXL: counted, so on any machine alike.

    python benchmarks/flops.py [--quick] [--json FILE]

Nothing is computed, whatever the `--device`: the models are on the meta device. A step's time has more in it, on a GPU
above all what launching many small operations costs (`inference.py` measures that). What is needed once per sampling,
the keys and values of the negative prompt, is listed apart.
"""

from dataclasses import dataclass

import torch

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.command_line import benchmark_parser
from comfyui_agd.benchmarks.inference import ADAPTERS
from comfyui_agd.benchmarks.output import write_rows
from comfyui_agd.examples.toy.tables import Column, console_table

MODELS = (("SD 1.5", 512), ("SDXL", 1024))
_TOKENS = 77
_COLUMNS = (
    Column("model", lambda row: row["model"], -8),
    Column("size", lambda row: row["size"], 11),
    Column("  method", lambda row: f"  {row['method']}", -16),
    Column("parameters", lambda row: f"{row['parameters']:,}", 12),
    Column("per step", lambda row: f"{row['added_per_step']:+.2%}", 10),
    Column("per sampling", lambda row: f"{row['added_per_sampling']:+.2%}", 14),
)


@dataclass
class MetaModel:
    """A model on the meta device, and the FLOPs of its evaluations at a size."""

    name: str
    pixels: int

    def __post_init__(self):
        import comfy.model_patcher

        from comfyui_agd.agd_core.comfyui.backbones import describe_base
        from comfyui_agd.agd_core.comfyui.model.denoiser import options_of
        from comfyui_agd.tests.support.checkpoints import on_meta

        self.model, meta = on_meta(self.name), torch.device("meta")
        patcher = comfy.model_patcher.ModelPatcher(self.model, load_device=meta, offload_device=meta)
        self.base, self.options = describe_base(self.model), options_of(patcher)
        sizes = self.model.model_config.unet_config
        pooled = sizes.get("adm_in_channels")
        self.pooled = {"y": torch.zeros(1, pooled)} if pooled else {}
        self.context = torch.zeros(1, _TOKENS, sizes["context_dim"])

    def flops(self, config, steps: int) -> int:
        """Of so many steps of one sampling with an adapter of this config, or without one."""
        from comfyui_agd.agd_core.comfyui.model import tracing
        from comfyui_agd.agd_core.comfyui.model.denoiser import at_sigma

        def evaluate(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            own = at_sigma(self.options, sigma)
            own = own if config is None else self._with_adapter(own, config)
            how = {"c_crossattn": self.context, "transformer_options": own, **self.pooled}
            for _ in range(steps):
                out = self.model.apply_model(x, sigma, **how)
            return out

        shape = (4, self.pixels // 8, self.pixels // 8)
        return tracing.base(self.model, evaluate, shape, 1).flops

    def _with_adapter(self, options: dict, config) -> dict:
        from comfyui_agd.agd_core.adapter import Adapter
        from comfyui_agd.agd_core.comfyui.guided_step import ActiveAdapter, GuidedStep, with_step
        from comfyui_agd.agd_core.comfyui.sampling.negatives import Negative, WeightedNegative
        from comfyui_agd.agd_core.mixed_precision import MixedPrecision

        adapter = Adapter(config, MixedPrecision)
        negatives = (WeightedNegative(Negative(self.context)),) if adapter.uses_negative else ()
        omega, strength = torch.full((1,), 7.0), torch.ones(1)
        active = ActiveAdapter(adapter, omega, strength, negatives, merged=config.kind.merges)
        return with_step(options, GuidedStep((active,)))


def count(name: str, pixels: int) -> list[dict]:
    """A row per adapter."""
    from comfyui_agd.agd_core.adapter import Adapter
    from comfyui_agd.agd_core.config import AdapterConfig
    from comfyui_agd.agd_core.kinds import kind_config

    model = MetaModel(name, pixels)
    unguided, rows = model.flops(None, 1), []
    for method, settings in ADAPTERS.items():
        config = AdapterConfig(model.base.layers, kind_config(**settings))
        one, two = model.flops(config, 1), model.flops(config, 2)
        with torch.device("meta"):
            parameters = Adapter(config).parameter_count()
        row = {"model": name, "size": f"{pixels}x{pixels}", "method": method, "parameters": parameters}
        row |= {"unguided_flops": unguided, "added_per_step": (two - one) / unguided - 1}
        rows.append(row | {"added_per_sampling": (2 * one - two) / unguided})
    return rows


def main() -> None:
    args = benchmark_parser(__doc__, quick="SD 1.5 only").parse_args()
    use_comfyui(cpu=True)
    rows = [row for model in (MODELS[:1] if args.quick else MODELS) for row in count(*model)]
    print(*console_table(_COLUMNS, rows), sep="\n")
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()
