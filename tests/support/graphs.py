"""API prompts for the server: the toy, with an adapter and without."""

import io
import json

import numpy as np
from PIL import Image


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
