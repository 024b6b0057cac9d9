"""The base families, a row each: what users call them, and what can't be seen from a model's structure.

A new family whose network is laid out like one of `backbones.LAYOUTS` needs a row here and nothing else
(docs/architecture.md, "A new family").
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """A base family.

    `name`: ComfyUI's class of the model's configuration; `title`: what users call it. `layout`: of the network, one of
    `backbones.LAYOUTS`. Pictures it was made for: `side` pixels each way, of other aspect ratios too where
    `aspect_ratios`. `settings`: of training, where others suit it than most families.

    For networks that are one or several lists of blocks (layout "transformer"): `blocks`: the paths of the lists;
    `prompt_layer`: of the first layer that the prompt's tokens come to; `prompt_linears`: paths in a block of layers
    whose input those tokens are; `time_embedding`: the path of what makes the vector of the timestep, and
    `time_output`, which of its outputs that is, if it has several; `timestep_scale`: the factor that makes its
    timesteps go from 0 to 1000. How the image looks at the prompt, `attention`: in one attention with itself ("joint"),
    apart ("cross"), or in a way that isn't reached (""); `sites`: the lists in whose blocks it does, by default all;
    `prompt_at`: where the prompt's tokens are seen as they come there, a module's output ("txt_in") or its argument
    ("joint_blocks.0:0", "double_blocks.0:txt"); `prompt_last`: whether they are behind the image's.
    """

    name: str
    title: str
    layout: str = "unet"
    side: int = 512
    aspect_ratios: bool = False
    settings: dict = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    prompt_layer: str = ""
    prompt_linears: tuple[str, ...] = ()
    time_embedding: str = ""
    time_output: int | None = None
    timestep_scale: float = 1.0
    attention: str = ""
    sites: tuple[str, ...] = ()
    prompt_at: str = ""
    prompt_last: bool = False


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
    Family(
        "SD3",
        "SD3",
        layout="transformer",
        side=1024,
        blocks=("joint_blocks",),
        prompt_layer="context_embedder",
        time_embedding="t_embedder",
        attention="joint",
        prompt_at="joint_blocks.0:0",
    ),
)


def find_family(name: str) -> Family | None:
    """The row of ComfyUI's class `name`, or None."""
    return next((family for family in FAMILIES if family.name == name), None)


def title_of(name: str) -> str:
    """What users call the family; one that has no row by ComfyUI's name."""
    family = find_family(name)
    return family.title if family is not None else name
