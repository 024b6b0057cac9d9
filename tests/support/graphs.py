"""API prompts for the server: the toy, with an adapter and without, and training one on it."""

import io
import json

import numpy as np
from PIL import Image

from comfyui_agd.training.config import settings_of_kind


def base_graph(
    *,
    cfg: float = 3.0,
    seed: int = 5,
    steps: int = 6,
    prompt: str = "a large red star on a white background",
) -> dict:
    """Toy -> KSampler -> SaveImage; the sampler takes the MODEL of node "toy"."""
    return {
        "toy": {"class_type": "AGDToyLoader", "inputs": {}},
        "positive": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["toy", 1], "text": prompt}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["toy", 1], "text": ""}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "sampler": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["toy", 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["latent", 0],
                "seed": seed,
                "steps": steps,
                "cfg": cfg,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["toy", 2]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "test"}},
    }


def with_adapter(graph: dict, name: str, **settings) -> dict:
    defaults = {"strength": 1.0, "guidance_scale": 0.0, "start_percent": 0.0, "end_percent": 1.0}
    inputs = {"model": ["toy", 0], "adapter_name": name, **defaults, **settings}
    graph = json.loads(json.dumps(graph))
    graph["agd"] = {"class_type": "AGDAdapterLoader", "inputs": inputs}
    graph["sampler"]["inputs"]["model"] = ["agd", 0]
    return graph


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def train_graph(name: str | list, iterations: int = 2, **settings) -> dict:
    """Toy -> AGD Train, with AGD Train Settings of the toy's sizes. `settings`: inputs of either node."""
    own = {key: settings.pop(key) for key in ("prompts", "adapter_name", "card", "quality") if key in settings}
    inputs = {"model": ["toy", 0], "clip": ["toy", 1], "adapter_name": name, "settings": ["settings", 0]}
    inputs |= {"prompts": "a red star\na blue ring", "card": "all that is free", "quality": "normal"} | own
    return {
        "toy": {"class_type": "AGDToyLoader", "inputs": {}},
        "settings": train_settings(iterations, **settings),
        "train": {"class_type": "AGDTrain", "inputs": inputs},
    }


def train_settings(
    iterations: int = 2,
    *,
    kind: str = "delta",
    adapter_size: int = 8,
    rank: int = 0,
    learning_rate: float = 0.01,
    width: int = 64,
    height: int = 64,
    **settings,
) -> dict:
    """AGD Train Settings that suit the toy. A kind has those settings only that are its own."""
    own = {"hidden": {"kind.adapter_size": adapter_size}, "rank": {"kind.rank": max(rank, int(kind == "low_rank"))}}
    of_kind = {name: value for each in settings_of_kind(kind) for name, value in own.get(each, {}).items()}
    inputs = {
        "length": "this many iterations",
        "length.iterations": iterations,
        "kind": kind,
        **of_kind,
        "kind.learning_rate": learning_rate,
        "picture_size": "width and height",
        "picture_size.width": width,
        "picture_size.height": height,
        "picture_size.aspect_ratios": False,
        "guidance_scale_up_to": 6.0,
        "seed": 0,
        "negative": "",
        "prompt_count": 2,
        "start": "a new adapter",
        "batch": 2,
        "reuse": 1,
        "precision": "base",
        "guidance_rule": "cfg",
        "on_policy": 0.0,
        "evaluate_every": 0,
        "patience": 0,
        "preview_every": 0,
        "save_every": 0,
        "frames": 1,
        "noise_levels": "all",
    }
    return {"class_type": "AGDTrainSettings", "inputs": inputs | settings}
