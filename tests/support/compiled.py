"""Sampling through core's TorchCompileModel, in a process of its own: `compiled.py ATTENTION BACKEND FOLDER CASE ...`.

ATTENTION is `pytorch`, with which the model is one graph, or `sub-quadratic`, which breaks it into several. It has to
be chosen before ComfyUI is imported. Without a CASE all of them are run. Prints JSON: how far each compiled picture is
from the uncompiled one and from the base's, relative to the largest value, the evaluations per prediction, and what
was said.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui

use_comfyui(cpu=True)
from comfy.cli_args import args  # noqa: E402

attention, backend, folder, chosen = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:]
args.use_pytorch_cross_attention = attention == "pytorch"

from comfy.patcher_extension import WrappersMP  # noqa: E402
from comfy_extras.nodes_torch_compile import TorchCompileModel  # noqa: E402

from comfyui_agd.agd_core import adapter_file, forecast  # noqa: E402
from comfyui_agd.agd_core.adapter import Adapter  # noqa: E402
from comfyui_agd.agd_core.comfyui.backbones import describe_base  # noqa: E402
from comfyui_agd.agd_core.comfyui.sampling.training_free import apply_training_free  # noqa: E402
from comfyui_agd.examples.toy.model import ToyConfig  # noqa: E402
from comfyui_agd.tests.support.runtime import ksampler, patched, random_prompts, tiny  # noqa: E402
from comfyui_agd.tests.support.small import info_for, randomised  # noqa: E402
from comfyui_agd.tests.support.workflows import TRAINING_FREE_STEPS  # noqa: E402


class OneLevel(ToyConfig):
    """The smallest UNet that has equal blocks."""

    unet_config = {**ToyConfig.unet_config, "model_channels": 32, "channel_mult": (1,), "num_res_blocks": [1]}
    unet_config |= {"transformer_depth": [1], "transformer_depth_output": [1, 1]}


BASE, PROMPTS = tiny(OneLevel()), random_prompts()


def adapter(name: str, seed: int, **config) -> Path:
    info = info_for(describe_base(BASE.model), hidden=8, encoder_width=8, prompt_tokens=16, **config)
    made = randomised(Adapter(info.config), seed=seed)
    made.unconditional.copy_(PROMPTS.negative[0][0][0])
    return adapter_file.save(folder / f"{name}.safetensors", made, info)


def compile_it(model):
    return TorchCompileModel.execute(model, backend).args[0]


class EvaluationCounter:
    """Rows of the evaluations, counted outside of the compiled graph, against pictures."""

    def __init__(self):
        self.rows = self.pictures = 0

    def __call__(self, model):
        def apply_model(executor, x, *args, **kwargs):
            self.rows += x.shape[0]
            return executor(x, *args, **kwargs)

        def predict_noise(executor, x, *args, **kwargs):
            predicted = executor(x, *args, **kwargs)
            self.pictures += x.shape[0]  # not those of a sampling that begins again
            return predicted

        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "evaluation_counter", apply_model)
        clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "evaluation_counter", predict_noise)
        return clone


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def main() -> None:
    first, second = adapter("first", 1), adapter("second", 2)
    low_rank = adapter("low_rank", 3, kind="low_rank", modulated=True)
    merged = adapter("merged", 4, rank=4)
    theirs, additive = (adapter(kind, 5, kind=kind) for kind in ("paper_attention", "paper_additive"))
    said: list[str] = []
    forecast.TOLERANCE = 1e9  # whatever this model of random weights makes of its steps
    agd = partial(patched, notify=said.append)
    one = compile_it(agd(BASE, first))  # a single compiled MODEL that is sampled again and again
    cases = [  # name, compiled model, the model that it has to equal, cfg
        ("the base", compile_it(BASE), BASE, 5.0),
        ("an adapter", one, agd(BASE, first), 5.0),
        ("another omega", one, agd(BASE, first), 3.0),
        ("cfg 1", one, BASE, 1.0),
        ("another adapter", compile_it(agd(BASE, second)), agd(BASE, second), 5.0),
        ("a low_rank adapter", compile_it(agd(BASE, low_rank)), agd(BASE, low_rank), 5.0),
        ("an adapter in the weights", compile_it(agd(BASE, merged)), agd(BASE, merged), 5.0),
        ("the paper's attention", compile_it(agd(BASE, theirs)), agd(BASE, theirs), 5.0),
        ("the paper's attention at cfg 1", compile_it(agd(BASE, theirs)), agd(BASE, theirs), 1.0),
        ("the paper's additive", compile_it(agd(BASE, additive)), agd(BASE, additive), 5.0),
        ("an adapter again", one, agd(BASE, first), 5.0),
        ("the loader after the compile node", agd(compile_it(BASE), first), agd(BASE, first), 5.0),
        ("training-free", compile_it(apply_training_free(BASE)), apply_training_free(BASE), 5.0),
        ("bypassed", compile_it(BASE), BASE, 5.0),
    ]
    report = {}
    for name, compiled, model, cfg in cases:
        if chosen and name not in chosen:
            continue
        counter = EvaluationCounter()
        sampled = ksampler(counter(compiled), PROMPTS, cfg=cfg, steps=TRAINING_FREE_STEPS)
        report[name] = {
            "error": distance(sampled, ksampler(model, PROMPTS, cfg=cfg, steps=TRAINING_FREE_STEPS)),
            "from_base": distance(sampled, ksampler(BASE, PROMPTS, cfg=cfg, steps=TRAINING_FREE_STEPS)),
            "evaluations": counter.rows / counter.pictures,
        }
    print(json.dumps({"cases": report, "said": said}))


if __name__ == "__main__":
    main()
