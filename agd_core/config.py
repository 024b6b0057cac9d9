"""What an adapter is made of, as data: this is what the adapter file's metadata holds."""

from dataclasses import asdict, dataclass, field, fields

KINDS = ("cross_attention", "offset", "delta", "low_rank", "scale")
OMEGA_EMBEDDINGS = ("log", "fourier")
# What users call the families and predictions that have other names in ComfyUI's code.
FAMILY_NAMES = {
    "SD15": "SD 1.5",
    "SD15_instructpix2pix": "SD 1.5 InstructPix2Pix",
    "SD20": "SD 2",
    "SD21UnclipL": "SD 2.1 unCLIP L",
    "SD21UnclipH": "SD 2.1 unCLIP H",
    "SD_X4Upscaler": "SD x4 Upscaler",
    "SDXLRefiner": "SDXL Refiner",
    "SDXL_instructpix2pix": "SDXL InstructPix2Pix",
    "SSD1B": "SSD-1B",
    "Segmind_Vega": "Segmind Vega",
    "KOALA_700M": "KOALA 700M",
    "KOALA_1B": "KOALA 1B",
    "LotusD": "Lotus",
    "Stable_Zero123": "Stable Zero123",
}
PREDICTION_NAMES = {
    "EPS": "eps-prediction",
    "V_PREDICTION": "v-prediction",
    "V_PREDICTION_EDM": "v-prediction (EDM)",
    "EDM": "EDM prediction",
    "X0": "x0-prediction",
    "IMG_TO_IMG": "image-to-image prediction",
}


@dataclass(frozen=True)
class Site:
    """One cross-attention of the base that gets an adapter.

    `name` is the place ("input_1_0": block kind, block number, index of the transformer block in it), `width` the
    channels of the attention's input, `context_dim` the channels of the prompt tokens.
    """

    name: str
    width: int
    context_dim: int


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter's architecture. The defaults are ours; the comments give the paper's choice (arXiv 2503.07274)."""

    sites: tuple[Site, ...]
    kind: str = "delta"  # paper: "cross_attention", and "offset"
    hidden: int = 128  # H: width of the adapter's attention or MLP; low_rank: the rank
    gain: bool = True  # multiply the residual by (omega - 1); paper: no
    omega_embedding: str = "log"  # smooth in log(omega); paper: "fourier", random features of omega
    shared_encoder: bool = True  # one omega/t encoder for all sites; paper: one per site
    encoder_width: int = 128  # channels inside the omega/t encoder
    prompt_tokens: int = 77  # length of the context of a short prompt: CLIP's
    modulated: bool = False  # low_rank and delta's rank: m(t, omega); without it they are LoRAs of strength omega - 1
    rank: int = 0  # delta only: of low-rank changes of the blocks' linear layers beside it; 0: none

    def __post_init__(self):
        checks = {
            f"kind {self.kind!r} is none of {', '.join(KINDS)}": self.kind not in KINDS,
            f"omega_embedding {self.omega_embedding!r} is none of {', '.join(OMEGA_EMBEDDINGS)}": (
                self.omega_embedding not in OMEGA_EMBEDDINGS
            ),
            # Four heads, each small enough for fused attention kernels.
            f"hidden is {self.hidden}, but must be a multiple of 4 from 4 to 512": (
                self.kind == "cross_attention" and (self.hidden % 4 != 0 or not 4 <= self.hidden <= 512)
            ),
            f"hidden is {self.hidden}, but must be from 1 to 512": (
                self.kind != "cross_attention" and not 1 <= self.hidden <= 512
            ),
            f"rank is {self.rank}, but must be from 0 to 512": not 0 <= self.rank <= 512,
            f"rank is {self.rank}, but kind {self.kind!r} has none beside it": self.kind != "delta" and self.rank != 0,
            f"kind {self.kind!r} has one encoder for all sites, so shared_encoder must be on": (
                self.kind in ("delta", "low_rank") and not self.shared_encoder
            ),
            "low_rank with neither modulated nor gain would be the same for every omega": (
                self.kind == "low_rank" and not self.modulated and not self.gain
            ),
            f"encoder_width is {self.encoder_width}, but must be even and positive": (
                self.encoder_width < 2 or self.encoder_width % 2 != 0
            ),
            f"prompt_tokens is {self.prompt_tokens}, but must be positive": self.prompt_tokens < 1,
            "there are no sites": not self.sites,
            "the sites' context_dim differ": len({site.context_dim for site in self.sites}) > 1,
            "two sites have the same name": len({site.name for site in self.sites}) != len(self.sites),
        }
        wrong = [message for message, fails in checks.items() if fails]
        if wrong:
            raise ValueError(f"This is no valid adapter config: {'; '.join(wrong)}.")

    @property
    def context_dim(self) -> int:
        return self.sites[0].context_dim

    @property
    def changes_linears(self) -> bool:
        """Whether the linear layers of the base's blocks get something added."""
        return self.kind == "low_rank" or self.rank > 0

    @property
    def merges(self) -> bool:
        """Whether that is, at any one omega, a LoRA, which the weights can have in them."""
        return self.changes_linears and self.gain and not self.modulated

    @property
    def encoders(self) -> int:
        """E: how many encoders of (omega, t) there are."""
        if self.kind == "scale" or (self.kind == "low_rank" and not self.modulated):
            return 0
        return 1 if self.shared_encoder else len(self.sites)


@dataclass(frozen=True)
class BaseInfo:
    """What is known of a base model: enough to tell whether an adapter fits it, and to name it in an error.

    Two bases with equal `family`, `prediction` and sites are siblings: an adapter of one loads onto the other.
    More input channels (inpainting) or another noise schedule (zero terminal SNR) keep them siblings: both reach an
    adapter only through `h` and `t`. Another prediction doesn't: the same change of `h` is another guidance there.
    `fingerprint` tells one sibling's weights from another's, for information only.
    """

    family: str
    prediction: str
    sites: tuple[Site, ...]
    architecture: dict = field(default_factory=dict)
    fingerprint: str = ""

    @property
    def family_name(self) -> str:
        return FAMILY_NAMES.get(self.family, self.family)

    @property
    def prediction_name(self) -> str:
        return PREDICTION_NAMES.get(self.prediction, self.prediction)

    def describe(self) -> str:
        widths = sorted({site.width for site in self.sites})
        return (
            f"{self.family_name} ({self.prediction}-prediction, {len(self.sites)} cross-attentions of width "
            f"{'/'.join(map(str, widths))}, context {self.sites[0].context_dim if self.sites else 0})"
        )

    def sibling_of(self, other: "BaseInfo") -> bool:
        return (self.family, self.prediction, self.sites) == (other.family, other.prediction, other.sites)


def to_json(value) -> dict:
    """A dataclass of this module as plain JSON data."""
    return asdict(value)


def from_json(kind, data: dict):
    """The inverse of `to_json`. Unknown or missing fields raise `ValueError` naming them."""
    known = {f.name for f in fields(kind)}
    if set(data) != known:
        missing, unknown = sorted(known - set(data)), sorted(set(data) - known)
        raise ValueError(f"{kind.__name__}: missing fields {missing}, unknown fields {unknown}")
    return kind(**{**data, "sites": tuple(Site(**site) for site in data["sites"])})
