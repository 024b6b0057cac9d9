"""Adapters of the paper authors' code (arXiv 2503.07274): random ones, what they compute, and their files.

Written from the description of their public code, one attention at a time; nothing here is the project's.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import comfy.utils
import torch
import torch.nn.functional as F
import yaml
from torch import nn

SD21, SDXL = "stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-xl-base-1.0"
Module = dict[str, torch.Tensor]
_OMEGA = "guidance_scale_embedder.net"


@dataclass(frozen=True)
class Authors:
    """Their settings, by their names."""

    arch: str = "attention"
    hidden_dim: int = 8
    use_timestep: bool = True
    use_prompt: bool = True
    base_model: str = SD21
    zero_init: bool = False
    dropout: float = 0.0


def positions(hidden: int) -> torch.Tensor:
    frequencies = torch.tensor([10000 ** (-2 * j / hidden) for j in range(hidden // 2)])
    angles = torch.arange(250)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def shapes(settings: Authors, width: int, context_dim: int, time: int) -> dict[str, tuple[int, ...]]:
    """Of what they keep for one attention, but for the positions."""
    H, additive = settings.hidden_dim, settings.arch == "additive"
    linears = {f"{_OMEGA}.1.net.0": (4 * H, H), f"{_OMEGA}.1.net.{4 if additive else 2}": (H, 4 * H)}
    linears |= {"out_proj.net.0": (H, H), "out_proj.net.4": (width, H)} if additive else {"out_proj": (width, H)}
    linears |= {"timestep_proj": (H, time)} if settings.use_timestep else {}
    linears |= {"prompt_proj": (H, context_dim)} if settings.use_prompt else {}
    norms = {f"{_OMEGA}.2": H} | ({f"{_OMEGA}.1.net.3": 4 * H, "out_proj.net.3": H} if additive else {})
    found: dict[str, tuple[int, ...]] = {f"{_OMEGA}.0.frequencies": (H,), f"{_OMEGA}.0.phases": (H,)}
    for name, (outputs, inputs) in linears.items():
        found |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    for name, size in norms.items():
        found |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    if not additive:
        found |= {"q_proj.weight": (H, width), "k_proj.weight": (H, H), "v_proj.weight": (H, H)}
    return found


def random_module(settings: Authors, width: int, context_dim: int, time: int, generator: torch.Generator) -> Module:
    """Of one attention: all of it random, so that every part matters."""
    module = {}
    for name, shape in shapes(settings, width, context_dim, time).items():
        scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
        module[name] = torch.randn(shape, generator=generator) * scale
    return module | ({} if settings.arch == "additive" else {"pos_enc.pe": positions(settings.hidden_dim)})


def _linear(module: Module, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, module[f"{name}.weight"], module.get(f"{name}.bias"))


def _norm(module: Module, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], module[f"{name}.weight"], module[f"{name}.bias"], 1e-5)


def _fourier(module: Module, s: torch.Tensor) -> torch.Tensor:
    return torch.cos(2 * math.pi * (module[f"{_OMEGA}.0.frequencies"] * s[:, None] + module[f"{_OMEGA}.0.phases"]))


def attention(module: Module, h: torch.Tensor, P: torch.Tensor, omega: torch.Tensor, te: torch.Tensor) -> torch.Tensor:
    """h (b, n, w), P (b, m, d), omega (b,), te (b, e) -> what is added to the attention's output, (b, n, w)."""
    hidden = F.relu(_linear(module, f"{_OMEGA}.1.net.0", _fourier(module, omega)))
    Z = [_norm(module, f"{_OMEGA}.2", _linear(module, f"{_OMEGA}.1.net.2", hidden))[:, None]]
    if "timestep_proj.weight" in module:
        Z.append(_linear(module, "timestep_proj", te)[:, None])
    if "prompt_proj.weight" in module:
        Z.append(_linear(module, "prompt_proj", P))
    tokens = torch.cat(Z, dim=1)
    tokens = tokens + module["pos_enc.pe"][: tokens.shape[1]]
    q, k, v = (_linear(module, f"{name}_proj", x) for name, x in (("q", h), ("k", tokens), ("v", tokens)))
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
    return _linear(module, "out_proj", weights @ v)


def additive(module: Module, h: torch.Tensor, P: torch.Tensor, omega: torch.Tensor, te: torch.Tensor) -> torch.Tensor:
    """As `attention`, (b, 1, w)."""
    hidden = F.relu(_linear(module, f"{_OMEGA}.1.net.0", _fourier(module, 1000 * omega)))
    hidden = _norm(module, f"{_OMEGA}.1.net.3", hidden)
    c = _norm(module, f"{_OMEGA}.2", _linear(module, f"{_OMEGA}.1.net.4", hidden))
    if "timestep_proj.weight" in module:
        c = c + _linear(module, "timestep_proj", te)
    if "prompt_proj.weight" in module:
        c = c + _linear(module, "prompt_proj", P.mean(dim=1))
    hidden = _norm(module, "out_proj.net.3", F.relu(_linear(module, "out_proj.net.0", c)))
    return _linear(module, "out_proj.net.4", hidden)[:, None]


FORMULAS = {"attention": attention, "additive": additive}


def places(unet_config: dict) -> dict[str, str]:
    """Paths in ComfyUI's network of the attentions that have an adapter, by theirs in diffusers'.

    Theirs go through as many attentions on the way up as on the way down, where there is one more.
    """
    named, per_block = comfy.utils.unet_to_diffusers(unet_config), unet_config["num_res_blocks"][0]
    found = {}
    for theirs, ours in named.items():
        if theirs.endswith(".attn2.to_q.weight"):
            parts = theirs.split(".")
            if parts[0] != "up_blocks" or int(parts[3]) < per_block:
                found[theirs.removesuffix(".to_q.weight")] = ours.removesuffix(".to_q.weight")
    return found


def random_adapter(settings: Authors, network: nn.Module, unet_config: dict, seed: int = 0) -> dict[str, Module]:
    """By their modules, for ComfyUI's network."""
    generator, time = torch.Generator().manual_seed(seed), network.time_embed[-1].out_features
    found = {}
    for theirs, ours in places(unet_config).items():
        attn2 = network.get_submodule(ours)
        sizes = attn2.to_q.in_features, attn2.to_k.in_features, time
        found[theirs] = random_module(settings, *sizes, generator)
    return found


@contextmanager
def at_work(
    modules: dict[str, Module], settings: Authors, network: nn.Module, unet_config: dict, omega: torch.Tensor
) -> Iterator[None]:
    """Inside, the network's attentions return with it what the formulas add, for omega (b,) or (1,)."""
    embedded: list[torch.Tensor] = []

    def hook(module: Module):
        def add(attn2, args, kwargs, out):
            h, P = args[0], kwargs["context"]
            rows = omega.expand(len(h))
            return out + FORMULAS[settings.arch](module, h, P, rows, embedded[-1])

        return add

    with ExitStack() as hooks:
        handle = network.time_embed.register_forward_hook(lambda module, args, out: embedded.append(out))
        hooks.callback(handle.remove)
        for theirs, ours in places(unet_config).items():
            attn2 = network.get_submodule(ours)
            handle = attn2.register_forward_hook(hook(modules[theirs]), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def write_run(folder: Path, settings: Authors, modules: dict[str, Module], step: int = 5000, **config) -> Path:
    """The folder of a run as their code leaves it; returns the checkpoint. `config`: more settings, or others."""
    checkpoint = folder / "checkpoints" / f"{step:07d}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": modules}, checkpoint)
    training = {"dir": str(folder), "lr": 1e-4, "num_steps": 5000, "seed": None, "verbose": False}
    (folder / "config.yaml").write_text(yaml.dump({**vars(settings), **training, **config}))
    return checkpoint
