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

    For networks that are one or several lists of blocks (layout "transformer"): `blocks`: the attributes with the
    lists; `prompt_layer`: the path of the first layer that the prompt's tokens come to; `prompt_linears`: paths in a
    block of layers whose input those tokens are; `time_embedding`: the path of what makes the vector of the timestep;
    `timestep_scale`: the factor that makes its timesteps go from 0 to 1000.
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
    timestep_scale: float = 1.0


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
)


def find_family(name: str) -> Family | None:
    """The row of ComfyUI's class `name`, or None."""
    return next((family for family in FAMILIES if family.name == name), None)


def title_of(name: str) -> str:
    """What users call the family; one that has no row by ComfyUI's name."""
    family = find_family(name)
    return family.title if family is not None else name
