"""Makes the toys' committed weights: `python -m comfyui_agd.examples.toy train vae base cooldown judge dit`.

About an hour on two CPU cores, in bf16 autocast where the CPU has it. Every stage is seeded and appends its
figures to `weights/training_log.json`; `measure.py` then measures the result and writes the model card.
"""

import argparse
import copy
import json
import math
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy.ops
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention_for_device
from safetensors.torch import save_file
from torch import nn
from tqdm import trange

from comfyui_agd.agd_core.comfyui.model.denoiser import computes_bf16

from . import model as toy
from .autoencoder import Autoencoder
from .bases import Base
from .dit import build_dit
from .judge import HEADS, IGNORE, Judge, answers, correct, prompt_accuracy
from .scenes import Scene, draw_scenes, render, training_caption

SEED = 2503
POOL, DROPOUT = 40_000, 0.12
DIT_SCHEDULE = 5000  # steps of the transformer's learning rate to 0
AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16, "enabled": computes_bf16(torch.device("cpu"))}


def initialise(module: nn.Module) -> nn.Module:
    """ComfyUI's layers skip torch's own initialisation; give it back to them."""
    for layer in module.modules():
        for kind in (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding):
            if isinstance(layer, kind):
                kind.reset_parameters(layer)
    return module


class MovingAverage:
    """An exponential moving average of a module's weights, which is `module` in the end.

    Early on it would be mostly the start; there it may follow faster than with `decay`.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay, self.updates = copy.deepcopy(module).requires_grad_(False), decay, 0

    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for mean, live in zip(self.module.parameters(), module.parameters(), strict=True):
            mean.lerp_(live.detach(), 1 - decay)


class Training:
    """AdamW with linear warm-up and cosine decay, gradient clipping at 1, and a moving average of the weights."""

    def __init__(self, modules: list[nn.Module], steps: int, lr: float, decay: float):
        self.modules = nn.ModuleList(modules)
        self.average = MovingAverage(self.modules, decay)
        self.optimiser = torch.optim.AdamW(self.modules.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.99))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda i: min(1, (i + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * min(1, i / steps)))
        )

    def averaged(self, index: int = 0) -> nn.Module:
        """The moving average of the module with this index."""
        return self.average.module[index]

    def step(self, loss: torch.Tensor) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.average.update(self.modules)


def save(state: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file({key: value.detach().half().contiguous() for key, value in state.items()}, path)


def log(folder: Path, stage: str, figures: dict) -> None:
    path = folder / "training_log.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {stage: figures}, indent=2) + "\n")
    print(stage, figures)


def batches(count: int, size: int, seed: int):
    """`count` batches of (scenes, images), from scenes that are not held out."""
    scenes = draw_scenes(POOL, seed, held=False)
    rng = random.Random(seed)
    for i in trange(count, mininterval=10):
        batch = rng.sample(scenes, size)
        yield batch, render(batch, seed=seed * 1_000_003 + i)


def train_vae(folder: Path, steps: int) -> None:
    start, vae = time.time(), Autoencoder(toy.LATENT_CHANNELS)
    training = Training([vae], steps, lr=2e-3, decay=0.99)
    for _, images in batches(steps, 32, SEED):
        x = images * 2 - 1
        with torch.autocast(**AUTOCAST):
            z = vae.encode(x).float()
            # A little noise keeps the latent space smooth, which the diffusion model's own errors need.
            out = vae.decode(z + 0.05 * z.detach().std() * torch.randn_like(z)).float()
        training.step(2 * (out - x).square().mean() + (out - x).abs().mean())
    vae = training.averaged()
    with torch.no_grad():
        vae.normalise(vae.encode(render(draw_scenes(1000, 5, held=False), 5) * 2 - 1))
        images = render(draw_scenes(500, 7, held=True), 7)
        z = vae.encode(images * 2 - 1)
        error = (vae.decode(z).clamp(-1, 1) / 2 + 0.5 - images).square().mean().item()
    save(vae.state_dict(), folder / "vae.safetensors")
    figures = {"psnr_held_out_db": round(-10 * math.log10(error), 2), "latent_std": round(z.std().item(), 3)}
    log(folder, "vae", figures | {"steps": steps, "seconds": round(time.time() - start)})


def load_vae(folder: Path) -> nn.Module:
    return toy.load_vae(folder / "vae.safetensors").first_stage_model.requires_grad_(False)


@torch.no_grad()
@torch.autocast(**AUTOCAST)
def through_autoencoder(vae: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return (vae.decode(vae.encode(images * 2 - 1)).float() / 2 + 0.5).clamp(0, 1)


def train_judge(folder: Path, steps: int) -> None:
    """Half of its pictures have been through the autoencoder and all carry some noise, as samples do."""
    start, vae = time.time(), load_vae(folder)
    judge = Judge()
    training = Training([judge], steps, lr=2e-3, decay=0.995)
    for scenes, images in batches(steps, 64, SEED + 1):
        images = torch.cat([through_autoencoder(vae, images[:16]), images[16:]])
        images = (images + torch.randn_like(images) * torch.rand(len(images), 1, 1, 1) * 0.04).clamp(0, 1)
        wanted = answers(scenes)
        with torch.autocast(**AUTOCAST):
            logits = judge(images)
        loss = sum(F.cross_entropy(logits[name].float(), wanted[name], ignore_index=IGNORE) for name in HEADS)
        training.step(loss)
    judge = training.averaged()
    scenes = draw_scenes(4000, 11, held=True)
    images = render(scenes, 11)
    rebuilt = torch.cat([through_autoencoder(vae, part) for part in images.split(250)])
    each = {name: round(right.float().mean().item(), 4) for name, right in correct(judge, images, scenes).items()}
    save(judge.state_dict(), folder / "judge.safetensors")
    figures = {
        "held_out_accuracy_all_attributes": round(prompt_accuracy(judge, images, scenes), 4),
        "held_out_accuracy_all_attributes_through_vae": round(prompt_accuracy(judge, rebuilt, scenes), 4),
        "held_out_accuracy_each": each,
    }
    log(folder, "judge", figures | {"steps": steps, "seconds": round(time.time() - start)})


def encode_text(text: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """`CLIPTextModel` without its in-place additions, which autograd refuses: (b, n) -> (b, n, c)."""
    inner = text.text_model
    x = inner.embeddings(ids)
    mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu_(1)
    attention = optimized_attention_for_device(x.device, mask=True, small_input=True)
    for layer in inner.encoder.layers:
        x = x + layer.self_attn(layer.layer_norm1(x), mask, attention)
        x = x + layer.mlp(layer.layer_norm2(x))
    return inner.final_layer_norm(x)


def token_ids(captions: list[str]) -> torch.Tensor:
    tokenizer = toy.ToyTokenizer()
    return torch.tensor([[token for token, _ in tokenizer.tokenize_with_weights(c)["toy"][0]] for c in captions])


@dataclass(frozen=True)
class DiffusionStage:
    """A training of the diffusion model under `name`, on `pool` drawings.

    `redraw` makes other pictures of them, (n, 3, h, w) in [0, 1].
    """

    name: str
    steps: int
    batch: int = 64
    pool: int = POOL
    redraw: Callable[[torch.Tensor], torch.Tensor] = lambda images: images


def latents_of(vae: nn.Module, scenes: list[Scene], redraw: Callable) -> torch.Tensor:
    """Drawings of the scenes, encoded: (n, c, h, w)."""
    with torch.no_grad(), torch.autocast(**AUTOCAST):
        firsts = trange(0, len(scenes), 50)
        return torch.cat([vae.encode(redraw(render(scenes[i : i + 50], i)) * 2 - 1).float() for i in firsts])


def noise_prediction_loss(model, text: nn.Module, latents: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """Of a batch of latents (b, c, h, w) and their captions, each at a noise level of its own."""
    t = torch.randint(0, 1000, (len(latents),))
    sigma = model.model_sampling.sigmas[t][:, None, None, None]
    eps = torch.randn(latents.shape)
    x = (latents + sigma * eps) / (sigma**2 + 1).sqrt()
    with torch.autocast(**AUTOCAST):
        predicted = model.diffusion_model(x, t.float(), context=encode_text(text, token_ids(captions)))
    return (predicted.float() - eps).square().mean()


def fit_diffusion(stage: DiffusionStage, folder: Path, model, text: nn.Module, training: Training) -> None:
    """Noise prediction on latents of drawings, with one caption in eight dropped for the unconditional."""
    start, scenes = time.time(), draw_scenes(stage.pool, SEED + 2, held=False)
    latents = latents_of(load_vae(folder), scenes, stage.redraw)
    rng, losses, curve = random.Random(SEED), [], {}
    for i in trange(stage.steps, mininterval=30):
        chosen = torch.randint(0, stage.pool, (stage.batch,))
        captions = [training_caption(scenes[j], rng) if rng.random() > DROPOUT else "" for j in chosen.tolist()]
        loss = noise_prediction_loss(model, text, latents[chosen], captions)
        training.step(loss)
        losses.append(loss.item())
        if (i + 1) % 100 == 0:
            curve[i + 1] = round(sum(losses[-100:]) / 100, 4)
            save(training.averaged(0).state_dict(), folder / "unet.safetensors")
            save(training.averaged(1).state_dict(), folder / "text_encoder.safetensors")
            log(folder, stage.name, {"loss": curve, "steps": i + 1, "seconds": round(time.time() - start)})


def new_text_model() -> nn.Module:
    text = toy.ToyTextModel(toy.TEXT_CONFIG, torch.float32, "cpu", comfy.ops.manual_cast)
    text.text_projection.requires_grad_(False)
    return text


def train_base(folder: Path, steps: int) -> None:
    """Stopped in the middle of its schedule, on purpose: a base that is trained to the end on so few scenes gets
    96 % of the prompts right without guidance (after 9000 steps), and a toy that needs no guidance is too easy."""
    model, text = toy.build_model(), initialise(new_text_model())
    unet = initialise(model.diffusion_model).requires_grad_(True)
    for module in unet.modules():  # residual branches start at zero
        for last in (getattr(module, "proj_out", None), getattr(module, "out_layers", [None])[-1]):
            if last is not None:
                nn.init.zeros_(last.weight)
    training = Training([unet, text], 2 * steps, lr=1e-3, decay=0.9995)
    fit_diffusion(DiffusionStage("base", steps), folder, model, text, training)


def cool_down(folder: Path, steps: int) -> None:
    """A short decay of the learning rate to 0 from the base's saved weights, for cleaner pictures."""
    model, text = toy.build_model(), new_text_model()
    model.load_model_weights(comfy.utils.load_torch_file(str(folder / "unet.safetensors")))
    text.load_state_dict(comfy.utils.load_torch_file(str(folder / "text_encoder.safetensors")))
    unet = model.diffusion_model.requires_grad_(True)
    training = Training([unet, text], steps, lr=3e-4, decay=0.99)
    fit_diffusion(DiffusionStage("cooldown", steps), folder, model, text, training)


def velocity_loss(
    model, latents: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Of rectified flow (Liu et al. 2022), at noise levels as in SD3's training (Esser et al. 2024): logit-normal."""
    sigma = torch.randn(len(latents), generator=generator).sigmoid()
    eps = torch.randn(latents.shape, generator=generator)
    x = torch.lerp(latents, eps, sigma[:, None, None, None])
    with torch.autocast(**AUTOCAST):
        velocity = model.diffusion_model(x, 1000 * sigma, context=context, y=pooled)
    return (velocity.float() - (eps - latents)).square().mean()


def initialise_dit(network: nn.Module) -> None:
    """As DiT begins (Peebles & Xie 2023): every block passes its input on, the last layer gives zero."""
    initialise(network)
    for block in network.joint_blocks:
        for stream in (block.context_block, block.x_block):
            nn.init.zeros_(stream.adaLN_modulation[1].weight)
            nn.init.zeros_(stream.adaLN_modulation[1].bias)
    for layer in (network.final_layer.adaLN_modulation[1], network.final_layer.linear):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for name, parameter in network.named_parameters():
        if name.endswith(("ln_q.weight", "ln_k.weight")):
            nn.init.ones_(parameter)


def load_text_model(folder: Path) -> nn.Module:
    text = new_text_model()
    text.load_state_dict(comfy.utils.load_torch_file(str(folder / "text_encoder.safetensors")))
    return text.requires_grad_(False)


@torch.no_grad()
def encode_captions(text: nn.Module, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (b, m, d) and pooled output (b, d), as ComfyUI's CLIPTextEncode gives them."""
    tokens, _, pooled, _ = text(token_ids(captions))
    return tokens, pooled


def fit_flow(stage: DiffusionStage, folder: Path, model, text: nn.Module, training: Training) -> None:
    """Rectified flow on latents of drawings, with one caption in eight dropped; the text encoder stays as it is."""
    start, scenes = time.time(), draw_scenes(stage.pool, SEED + 2, held=False)
    latents = latents_of(load_vae(folder), scenes, stage.redraw)
    generator, rng, losses, curve = torch.Generator().manual_seed(SEED), random.Random(SEED), [], {}
    for i in trange(stage.steps, mininterval=30):
        chosen = torch.randint(0, stage.pool, (stage.batch,), generator=generator)
        captions = [training_caption(scenes[j], rng) if rng.random() > DROPOUT else "" for j in chosen.tolist()]
        loss = velocity_loss(model, latents[chosen], *encode_captions(text, captions), generator)
        training.step(loss)
        losses.append(loss.item())
        if (i + 1) % 250 == 0 or i + 1 == stage.steps:
            curve[i + 1] = round(sum(losses[-250:]) / len(losses[-250:]), 4)
            save(training.averaged().state_dict(), folder / "dit.safetensors")
            log(folder, stage.name, {"loss": curve, "steps": i + 1, "seconds": round(time.time() - start)})


def train_dit(folder: Path, steps: int) -> None:
    """The rectified-flow transformer, on the text encoder and the autoencoder of the first base.

    Stopped before the middle of its schedule, for the reason that `train_base` has: after 2500 steps it gets 86 %
    of the prompts right without guidance.
    """
    text, model = load_text_model(folder), build_dit()
    initialise_dit(model.diffusion_model)
    model.diffusion_model.requires_grad_(True)
    training = Training([model.diffusion_model], DIT_SCHEDULE, lr=2e-3, decay=0.999)
    fit_flow(DiffusionStage("dit", steps), folder, model, text, training)


# How the network of each of `BASES` learns.
FITS = {"toy": fit_diffusion, "toy-dit": fit_flow}


def fine_tune(base: Base, stage: DiffusionStage, folder: Path) -> Path:
    """That toy's network trained on, into a folder of its own, with the toys' text encoder and autoencoder."""
    model = base.build()
    model.load_model_weights(comfy.utils.load_torch_file(str(toy.WEIGHTS / base.file)))
    return train_on(model, FITS[base.name], stage, folder / base.file, lr=3e-4)


def train_on(model, fit: Callable, stage: DiffusionStage, file: Path, lr: float) -> Path:
    """A network with weights trained on, with the toys' text encoder and autoencoder, into a folder of its own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for name in ("vae.safetensors", "text_encoder.safetensors"):
        shutil.copy(toy.WEIGHTS / name, file.parent)
    text, network = load_text_model(file.parent), model.diffusion_model.requires_grad_(True)
    training = Training([network, text], stage.steps, lr=lr, decay=0.99)
    fit(stage, file.parent, model, text, training)
    save(training.averaged().state_dict(), file)
    return file


STAGES = {
    "vae": (train_vae, 4000),
    "judge": (train_judge, 2000),
    "base": (train_base, 4500),
    "cooldown": (cool_down, 500),
    "dit": (train_dit, 2250),
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="+", choices=tuple(STAGES))
    parser.add_argument("--folder", type=Path, default=toy.WEIGHTS, help="where the weights are written")
    parser.add_argument("--steps", type=int, help="instead of the stage's own number of steps")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        torch.manual_seed(SEED)
        train, steps = STAGES[stage]
        train(args.folder, args.steps or steps)
