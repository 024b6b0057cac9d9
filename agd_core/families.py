"""The base families, a row each: what users call them, and what can't be seen from a model's structure.

A new family whose network is laid out like one of `backbones.LAYOUTS` needs a row here and nothing else
(docs/architecture.md, "A new family").
"""

from dataclasses import dataclass, field
from functools import partial

from .sound import Sound


@dataclass(frozen=True)
class Family:
    """A base family.

    `name`: ComfyUI's class of the model's configuration; `title`: what users call it. `layout`: of the network, one of
    `backbones.LAYOUTS`. Pictures it was made for: `side` pixels each way, of other aspect ratios too where
    `aspect_ratios`. `settings`: of training, where others suit it than most families.

    For networks that are one or several lists of blocks (layout "transformer"), paths of modules in the network:

    `blocks`: the lists, in the order they run in. `prompt_layer`: the first linear layer that the prompt's tokens come
    to, each of which is `prompt_parts` of its inputs side by side. `time_embedding`: what makes the vector of the
    timestep, which modulates the blocks and the output: [b, e] (or [b, ..., e]). `timestep_scale`: the factor that
    makes the network's timesteps go from 0 to 1000.

    `attention`: how the image reads the prompt: "joint" (its tokens are keys beside the image's) or "cross" (it has an
    attention of its own); "" where it isn't known. `attention_module`: of a block the module that has this attention,
    where it doesn't ask ComfyUI's `optimized_attention_override`. `sites`: those of `blocks` where it does, by default
    all. `prompt_at`: where the prompt's tokens are seen as they come to the attentions, [b, ..., tokens, width]: the
    output of a module, or of "path:argument" an argument that a module gets, by position or by keyword. `prompt_last`:
    joint: its keys come after the image's. `patch`: an image token is of so many latent pixels each way.

    Of the blocks' linear layers, those (or what contains them) that low-rank changes are not for: `left_out`, where
    the rows of a batch are put together otherwise, and `unread`, of a list's last block, what no one looks at any more.
    `sound`: of videos, with a latent of its own. `least_sides`: what a latent's height and width have to be together
    at least.
    """

    name: str
    title: str
    layout: str = "unet"
    side: int = 512
    aspect_ratios: bool = False
    settings: dict = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    prompt_layer: str = ""
    prompt_parts: int = 1
    left_out: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    sound: Sound | None = None
    least_sides: int = 0
    time_embedding: str = ""
    timestep_scale: float = 1.0
    attention: str = ""
    attention_module: str = ""
    sites: tuple[str, ...] = ()
    prompt_at: str = ""
    prompt_last: bool = False
    patch: int = 2


_transformer = partial(Family, layout="transformer", side=1024, aspect_ratios=True)
_joint, _cross = partial(_transformer, attention="joint"), partial(_transformer, attention="cross")
_flux = partial(
    _joint,
    blocks=("double_blocks", "single_blocks"),
    prompt_layer="txt_in",
    time_embedding="time_in",
    timestep_scale=1000.0,
    prompt_at="double_blocks.0:txt",
)
_next_dit = partial(
    _joint,
    blocks=("context_refiner", "noise_refiner", "layers"),
    prompt_layer="cap_embedder.1",
    time_embedding="t_embedder",
    timestep_scale=1000.0,
    sites=("layers",),
    prompt_at="context_refiner.0:0",
)
_hunyuan_video = partial(
    _joint,
    side=960,
    blocks=("txt_in.individual_token_refiner.blocks", "double_blocks", "single_blocks"),
    prompt_layer="txt_in.input_embedder",
    time_embedding="time_in",
    sites=("double_blocks", "single_blocks"),
    prompt_at="double_blocks.0:txt",
)
_wan = partial(
    _cross,
    blocks=("blocks",),
    prompt_layer="text_embedding.0",
    time_embedding="time_embedding",
    prompt_at="text_embedding",
)
_ltx = partial(
    _cross,
    blocks=("transformer_blocks",),
    prompt_layer="caption_projection.linear_1",
    time_embedding="adaln_single.emb",
    timestep_scale=1000.0,
    patch=1,
)
_cosmos = partial(
    _cross,
    blocks=("blocks",),
    prompt_layer="blocks.0.cross_attn.k_proj",
    time_embedding="t_embedding_norm",
    timestep_scale=1000.0,
    prompt_at="blocks.0:2",
)

FAMILIES = (
    Family("SD15", "SD 1.5"),
    Family("SD15_instructpix2pix", "SD 1.5 InstructPix2Pix"),
    Family("Stable_Zero123", "Stable Zero123"),
    Family("SD20", "SD 2", side=768),
    Family("SD21UnclipL", "SD 2.1 unCLIP L", side=768),
    Family("SD21UnclipH", "SD 2.1 unCLIP H", side=768),
    Family("LotusD", "Lotus"),
    Family("SD_X4Upscaler", "SD x4 Upscaler", settings={"rank": 0}),  # its blocks have no self-attention
    Family("SDXL", "SDXL", side=1024, aspect_ratios=True),
    Family("SDXL_instructpix2pix", "SDXL InstructPix2Pix", side=1024, aspect_ratios=True),
    Family("SDXLRefiner", "SDXL Refiner", side=1024, aspect_ratios=True),
    Family("SSD1B", "SSD-1B", side=1024, aspect_ratios=True),
    Family("Segmind_Vega", "Segmind Vega", side=1024, aspect_ratios=True),
    Family("KOALA_700M", "KOALA 700M", side=1024, aspect_ratios=True),
    Family("KOALA_1B", "KOALA 1B", side=1024, aspect_ratios=True),
    _joint(
        "SD3",
        "SD 3 / 3.5",
        blocks=("joint_blocks",),
        prompt_layer="context_embedder",
        time_embedding="t_embedder",
        prompt_at="joint_blocks.0:0",
    ),
    _joint(
        "AuraFlow",
        "AuraFlow",
        blocks=("double_layers", "single_layers"),
        prompt_layer="cond_seq_linear",
        time_embedding="t_embedder",
        timestep_scale=1000.0,
        prompt_at="double_layers.0:0",
    ),
    _cross(
        "PixArtSigma",
        "PixArt Sigma",
        blocks=("blocks",),
        prompt_layer="y_embedder.y_proj.fc1",
        left_out=("cross_attn.kv_linear",),
        time_embedding="t_embedder",
        attention_module="cross_attn",
        prompt_at="y_embedder",
        least_sides=66,  # of smaller ones its positions are not finite
    ),
    _cross(
        "HunyuanDiT",
        "Hunyuan-DiT",
        blocks=("blocks",),
        prompt_layer="blocks.0.attn2.kv_proj",
        time_embedding="t_embedder",
        attention_module="attn2",
        prompt_at="blocks.0:2",
    ),
    _flux("Flux", "Flux"),
    _flux("FluxSchnell", "Flux without guidance"),
    _flux("Chroma", "Chroma", time_embedding="distilled_guidance_layer"),
    _flux("Flux2", "FLUX.2", patch=1),
    _next_dit("Lumina2", "Lumina 2"),
    _next_dit("ZImage", "Z-Image"),
    _joint(
        "QwenImage",
        "Qwen-Image",
        side=1328,
        blocks=("transformer_blocks",),
        prompt_layer="txt_in",
        time_embedding="time_text_embed",
        timestep_scale=1000.0,
        prompt_at="transformer_blocks.0:encoder_hidden_states",
        unread=("txt_mlp", "attn.add_q_proj", "attn.to_add_out"),
    ),
    _hunyuan_video("HunyuanVideo", "HunyuanVideo"),
    _hunyuan_video("HunyuanVideo15", "HunyuanVideo 1.5", patch=1),
    _wan("WAN21_T2V", "Wan 2.1 / 2.2 text to video", side=640),
    _wan("WAN21_I2V", "Wan 2.1 / 2.2 image to video", side=640),
    _wan("WAN22_T2V", "Wan 2.2 5B", side=960),
    _ltx("LTXV", "LTX-Video", side=640, prompt_at="transformer_blocks.0:context"),
    # A part for the video and one for the sound, whose latent has a step for each picture of the video at 25 a second.
    _ltx(
        "LTXAV",
        "LTX-2",
        side=960,
        prompt_parts=2,
        prompt_at="transformer_blocks.0:v_context",
        sound=Sound(channels=8, bins=16, per_frame=8),
    ),
    _joint(
        "HiDream",
        "HiDream",
        blocks=("double_stream_blocks", "single_stream_blocks"),
        prompt_layer="caption_projection.0.linear",  # as wide as the last one, which gets them
        time_embedding="t_embedder",
        prompt_at="double_stream_blocks.0:text_tokens",
        prompt_last=True,
        left_out=("block.ff_i.experts",),
    ),
    _cosmos("CosmosT2IPredict2", "Cosmos-Predict2"),
    _cosmos("Anima", "Anima"),
    _joint(
        "Omnigen2",
        "OmniGen2",
        blocks=("context_refiner", "noise_refiner", "layers"),
        prompt_layer="time_caption_embed.caption_embedder.1",
        time_embedding="time_caption_embed.timestep_embedder",
        timestep_scale=1000.0,
        sites=("layers",),
        prompt_at="context_refiner.0:0",
    ),
    _cross(
        "Kandinsky5",
        "Kandinsky 5",
        side=640,
        blocks=("text_transformer_blocks", "visual_transformer_blocks"),
        prompt_layer="text_embeddings.in_layer",
        time_embedding="time_embeddings",
        sites=("visual_transformer_blocks",),
        prompt_at="visual_transformer_blocks.0:1",
    ),
    _joint(
        "CogVideoX_T2V",
        "CogVideoX",
        side=576,
        blocks=("blocks",),
        prompt_layer="patch_embed.text_proj",
        time_embedding="time_embedding_linear_2",
        prompt_at="blocks.0:encoder_hidden_states",
    ),
    _joint(
        "ErnieImage",
        "ERNIE-Image",
        blocks=("layers",),
        prompt_layer="text_proj",
        time_embedding="time_embedding",
        attention_module="self_attention",
        prompt_at="text_proj",
        prompt_last=True,
        patch=1,
    ),
    _joint(
        "Krea2",
        "Krea 2",
        blocks=("txtfusion.refiner_blocks", "blocks"),
        prompt_layer="txtfusion.layerwise_blocks.0.attn.wq",
        prompt_parts=12,  # of the text encoder's layers
        time_embedding="tmlp",
        timestep_scale=1000.0,
        sites=("blocks",),
        prompt_at="txtmlp",
    ),
    _joint(
        "Lens",
        "Lens",
        blocks=("transformer_blocks",),
        prompt_layer="txt_in",
        time_embedding="time_text_embed",
        timestep_scale=1000.0,
        prompt_at="transformer_blocks.0:encoder_hidden_states",
        prompt_last=True,
        patch=1,
        unread=("txt_mlp", "attn.to_add_out"),
    ),
)


def find_family(name: str) -> Family | None:
    """The row of ComfyUI's class `name`, or None."""
    return next((family for family in FAMILIES if family.name == name), None)


def title_of(name: str) -> str:
    """What users call the family; one that has no row by ComfyUI's name."""
    family = find_family(name)
    return family.title if family is not None else name
