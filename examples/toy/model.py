"""The toy model's parts in ComfyUI's own classes: UNetModel, CLIPTextModel and VAE at small size.

Only the sizes and the vocabulary are ours, so everything that works on MODEL, CLIP and VAE works on the toy.
"""

import re
from collections.abc import Callable
from pathlib import Path

import comfy.clip_model
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL

from .autoencoder import Autoencoder
from .scenes import WORDS

WEIGHTS = Path(__file__).parent / "weights"
LATENT_CHANNELS = 12
DOWNSCALE = 8
CONTEXT_DIM = 128
MAX_TOKENS = 16

VOCABULARY = ("<start>", "<end>", *WORDS)

TEXT_CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": CONTEXT_DIM,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": MAX_TOKENS,
    "eos_token_id": 1,
}


class ToyLatent(comfy.latent_formats.LatentFormat):
    """Twelve channels of mean 0 and variance 1 (the autoencoder's own last layer normalises them)."""

    latent_channels = LATENT_CHANNELS
    # For previews: least squares from the latents of 256 scenes to the mean colours of their 8 x 8 patches (in -1..1).
    latent_rgb_factors = [
        [0.233, 0.268, -0.128],
        [0.216, 0.235, 0.187],
        [0.006, 0.006, 0.019],
        [0.239, 0.062, 0.274],
        [-0.085, -0.044, -0.027],
        [-0.241, 0.25, 0.119],
        [-0.032, -0.001, 0.009],
        [-0.07, 0.038, 0.031],
        [-0.25, -0.26, 0.206],
        [0.015, 0.059, 0.051],
        [0.056, -0.009, -0.017],
        [0.011, -0.157, -0.128],
    ]
    latent_rgb_factors_bias = [0.168, -0.039, -0.215]


class ToyConfig(comfy.supported_models_base.BASE):
    """SD's noise schedule and eps-prediction (ComfyUI's defaults), SDXL's transformer blocks."""

    unet_config = {
        "image_size": 32,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "model_channels": 64,
        "num_res_blocks": [1, 1],
        "channel_mult": (1, 2),
        "transformer_depth": [1, 1],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1],
        "context_dim": CONTEXT_DIM,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "legacy": False,
        "dtype": torch.float32,
    }
    unet_extra_config = {"num_heads": -1, "num_head_channels": 32}
    latent_format = ToyLatent

    def __init__(self):
        super().__init__(self.unet_config)

    def inpaint_model(self) -> bool:
        return False  # ComfyUI takes more than four input channels for an inpainting model


class ToyWords:
    """Whole words to ids, in the shape that ComfyUI's `SDTokenizer` asks of a tokenizer."""

    @classmethod
    def from_pretrained(cls, path):
        return cls()

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(VOCABULARY)}

    def __call__(self, text: str) -> dict[str, list[int]]:
        words, known = re.findall(r"[^\s,.;:]+", text.lower()), self.get_vocab()
        unknown = sorted(set(words) - set(WORDS))
        if unknown:
            raise ValueError(
                f"The toy model does not know {', '.join(map(repr, unknown))} in the prompt {text!r}; "
                f"it knows only these words: {', '.join(WORDS)}."
            )
        return {"input_ids": [0, *(known[word] for word in words), 1]}

    def decode(self, ids, skip_special_tokens=True) -> str:
        return " ".join(VOCABULARY[i] for i in ids if i > 1 or not skip_special_tokens)


class _SDToyTokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):
        super().__init__(
            max_length=MAX_TOKENS,
            embedding_directory=embedding_directory,
            embedding_size=CONTEXT_DIM,
            embedding_key="clip_toy",
            tokenizer_class=ToyWords,
            tokenizer_data=tokenizer_data,
        )


class ToyTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):
        super().__init__(embedding_directory, tokenizer_data, clip_name="toy", tokenizer=_SDToyTokenizer)


class ToyTextModel(comfy.clip_model.CLIPTextModel):
    """CLIP's text model over our vocabulary."""

    def __init__(self, config_dict, dtype, device, operations):
        super().__init__(config_dict, dtype, device, operations)
        self.set_input_embeddings(operations.Embedding(len(VOCABULARY), CONTEXT_DIM, dtype=dtype, device=device))


class _SDToyClip(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):
        super().__init__(
            device=device,
            dtype=dtype,
            max_length=MAX_TOKENS,
            textmodel_json_config=dict(TEXT_CONFIG),
            model_class=ToyTextModel,
            special_tokens={"start": 0, "end": 1, "pad": 1},
            model_options=model_options,
        )


class ToyClip(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):
        super().__init__(device, dtype, model_options, clip_name="toy", clip_model=_SDToyClip)


def build_model() -> comfy.model_base.BaseModel:
    """The diffusion model with uninitialised weights, fp32."""
    return ToyConfig().get_model({})


def load_unet(
    path: Path = WEIGHTS / "unet.safetensors", build: Callable[[], comfy.model_base.BaseModel] = build_model
) -> comfy.model_patcher.ModelPatcher:
    """MODEL. `build`: the network that the weights are of."""
    model = build()
    model.load_model_weights(comfy.utils.load_torch_file(str(path)))
    return comfy.model_patcher.CoreModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def load_clip(path: Path = WEIGHTS / "text_encoder.safetensors") -> comfy.sd.CLIP:
    """CLIP."""
    target = comfy.supported_models_base.ClipTarget(ToyTokenizer, ToyClip)
    return comfy.sd.CLIP(target, state_dict=[comfy.utils.load_torch_file(str(path))])


def load_vae(path: Path = WEIGHTS / "vae.safetensors") -> comfy.sd.VAE:
    """VAE, in fp32 (it is too small for the savings of less)."""
    # ComfyUI's VAE only builds autoencoders it knows, so it starts with a minimal one of those, replaced at once.
    sizes = {"double_z": True, "z_channels": LATENT_CHANNELS, "resolution": 64, "in_channels": 3, "out_ch": 3}
    sizes |= {"ch": 32, "ch_mult": [1], "num_res_blocks": 0, "attn_resolutions": [], "dropout": 0.0}
    config = {"embed_dim": LATENT_CHANNELS, "ddconfig": sizes}
    vae = comfy.sd.VAE(sd=AutoencoderKL(**config).state_dict(), config={"params": config}, dtype=torch.float32)
    autoencoder = Autoencoder(LATENT_CHANNELS).eval().requires_grad_(False)
    autoencoder.load_state_dict(comfy.utils.load_torch_file(str(path)))
    vae.first_stage_model, vae.latent_channels = autoencoder, LATENT_CHANNELS
    old = vae.patcher
    vae.patcher = type(old)(autoencoder, load_device=old.load_device, offload_device=old.offload_device)
    return vae


def load() -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """(MODEL, CLIP, VAE), for `agd train --loader comfyui_agd.examples.toy.model:load`."""
    return load_unet(), load_clip(), load_vae()
