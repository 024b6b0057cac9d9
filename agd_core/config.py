"""What a base and an adapter are, as data: this is what an adapter file's description holds."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple, TypedDict

from .checked import Between, Items, Like, Multiple, OneOf, Printable, wrong_fields
from .families import title_of

OMEGA_EMBEDDINGS = ("log", "fourier")
MOST_CHANNELS = 512  # of what is inside an adapter layer, and the largest LoRA rank
_MOST_LAYERS, _MOST_LINEARS = 2_000, 10_000  # several times those of the largest bases
# What users call the predictions that have other names in ComfyUI's code.
PREDICTION_NAMES = {
    "EPS": "eps-prediction",
    "V_PREDICTION": "v-prediction",
    "V_PREDICTION_EDM": "v-prediction (EDM)",
    "EDM": "EDM prediction",
    "X0": "x0-prediction",
    "IMG_TO_IMG": "image-to-image prediction",
    "FLOW": "flow matching",
    "FLOW_COSMOS": "flow matching (Cosmos)",
    "V_PREDICTION_DDPM": "v-prediction (CogVideoX)",
}
# What adapter layers are, in words, by the layout of the network.
_LAYERS_OF = {"unet": "cross-attentions", "transformer": "blocks"}


# What a file may say. Channels of a prompt's tokens are many where a text encoder's layers stand side by side.
Channels = Annotated[int, Between(1, 1_000_000)]
InnerChannels = Annotated[int, Between(1, MOST_CHANNELS)]
OptionalInnerChannels = Annotated[int, Between(0, MOST_CHANNELS)]
BlockDistance = Annotated[int, Between(1, 1_000)]  # from one to the next
LayerName = Annotated[str, Printable(200), Like(r"[A-Za-z][A-Za-z0-9_]*_[0-9]+", "input_1_0")]
_Path = Annotated[str, Printable(200), Like(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", "attn1.to_q")]
_Title = Annotated[str, Printable(100)]


class Linear(NamedTuple):
    """A linear layer of a base, which low-rank changes may be for.

    `path`: in its block; `inputs`, `outputs`: channels; `reads_prompt`: whether its input is the prompt's tokens.
    """

    path: _Path
    inputs: Channels
    outputs: Channels
    reads_prompt: bool = False


@dataclass(frozen=True)
class AdapterLayer:
    """A block of the base that gets an adapter.

    `name`: in adapters; `path`: of the block in the base's network; `width`: channels of the image tokens there,
    `context_dim`: of the prompt's tokens; `innermost`: whether it is where the image is smallest, in a UNet's middle;
    `linears`: the block's linear layers in the order of an adapter's weights. Those are compared only where an adapter
    changes them (`backbones.check_adapter`). `reads_prompt`: whether an attention to the prompt is in the block.
    """

    name: LayerName
    path: _Path
    width: Channels
    context_dim: Channels
    innermost: bool = False
    linears: tuple[Linear, ...] = field(default=(), compare=False)
    reads_prompt: bool = True


def every_nth(layers: tuple[AdapterLayer, ...], n: int) -> tuple[AdapterLayer, ...]:
    """Of each stack of blocks that read the prompt the first, and from there every n-th. A stack's blocks are numbered
    under one name: "input_4_0" and "input_4_1" of a UNet, all "joint_blocks_0" ... of a transformer."""
    stacks: dict[str, list[AdapterLayer]] = {}
    for layer in layers:
        if layer.reads_prompt:
            stacks.setdefault(layer.name.rpartition("_")[0], []).append(layer)
    chosen = {layer.name for stack in stacks.values() for layer in stack[::n]}
    return tuple(layer for layer in layers if layer.name in chosen)


@dataclass(frozen=True)
class KindConfig:
    """The settings of one kind of adapter.

    A kind adds its fields, and to `validation_errors` what is wrong with them.
    """

    name: ClassVar[str]

    def __post_init__(self):
        if errors := list(self.validation_errors()):
            raise ValueError(f"This is no valid adapter config: {'; '.join(errors)}.")

    def validation_errors(self) -> Iterator[str]:
        """What can't work, a phrase each."""
        yield from wrong_fields(self)

    @property
    def gain(self) -> bool:
        """Whether what the adapter adds is multiplied by (omega - 1)."""
        return False

    @property
    def acts_at_1(self) -> bool:
        """Whether the adapter acts at omega = 1 too, where others leave the base as it is."""
        return False

    @property
    def uses_time(self) -> bool:
        """Whether it needs the base's own embedding of the timestep."""
        return False

    @property
    def lora_rank(self) -> int:
        """The rank of the changes of the base's linear layers; 0: none."""
        return 0

    @property
    def merges(self) -> bool:
        """Whether, at any one omega, those changes are a LoRA, which the base's weights can have in them."""
        return False

    @property
    def vector_width(self) -> int:
        """Channels inside what changes the vector of the timestep; 0: it stays as it is."""
        return 0

    @property
    def uses_negative(self) -> bool:
        """Whether the negative prompt has an effect."""
        return self.vector_width > 0

    def encoders(self, layers: int) -> int:
        """E: how many encoders of (omega, t) there are, for so many adapter layers."""
        return 0

    def layers_of(self, base: "BaseInfo") -> tuple[AdapterLayer, ...]:
        """Those of a base's layers that an adapter is trained for."""
        return base.layers

    def guided(self, layers: tuple[AdapterLayer, ...]) -> tuple[AdapterLayer, ...]:
        """Those of its layers in whose attention to the prompt an adapter works."""
        return ()

    def describe(self) -> str:
        """A few words for `agd inspect`."""
        return self.name

    def describe_omega(self) -> str:
        """How omega is embedded."""
        return "none"


@dataclass(frozen=True)
class GainKindConfig(KindConfig):
    """Of a kind that is the base at omega = 1.

    `gain`: multiply what the adapter adds by (omega - 1); the paper (arXiv 2503.07274) doesn't.
    """

    gain: bool = True


@dataclass(frozen=True)
class EncodedKindConfig(GainKindConfig):
    """Of a kind that is told omega and t by an encoder.

    `omega_embedding`: "log" is smooth in log(omega); "fourier", the paper's, has random features of omega.
    `encoder_width`: channels inside the encoder.
    """

    omega_embedding: Annotated[str, OneOf(OMEGA_EMBEDDINGS)] = "log"
    encoder_width: Annotated[int, Between(2, 8_192), Multiple(2)] = 128

    def encoders(self, layers: int) -> int:
        return 1

    def describe_omega(self) -> str:
        return self.omega_embedding if self.encoders(1) else "none"


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter's architecture: the base's layers that it is for, and the kind that it is of, with its settings.

    `prompt_tokens`: the length of a short prompt's context; CLIP's is 77. `vector`: channels of the vector of the
    timestep that modulates the base's blocks; 0: there is none to change. `time_channels`: of the base's own embedding
    of the timestep; 0: there is none to know.
    """

    layers: tuple[AdapterLayer, ...]
    kind: KindConfig
    prompt_tokens: int = 77
    vector: int = 0
    time_channels: int = field(default=0, compare=False)  # the base says it

    def __post_init__(self):
        without_vector = self.kind.vector_width > 0 and not self.vector
        without_time = self.kind.uses_time and not self.time_channels
        checks = {
            f"prompt_tokens is {self.prompt_tokens}, but must be positive": self.prompt_tokens < 1,
            "there are no layers": not self.layers,
            f"there are more than {_MOST_LINEARS:,} linear layers": self._linears() > _MOST_LINEARS,
            "the layers' context_dim differ": len({layer.context_dim for layer in self.layers}) > 1,
            "two layers have the same name": len({layer.name for layer in self.layers}) != len(self.layers),
            "this base has no vector of the timestep that an adapter could change": without_vector,
            "this base has no embedding of the timestep that an adapter could know": without_time,
        }
        if wrong := [message for message, fails in checks.items() if fails]:
            raise ValueError(f"This is no valid adapter config: {'; '.join(wrong)}.")

    def _linears(self) -> int:
        return sum(len(layer.linears) for layer in self.layers)

    @property
    def context_dim(self) -> int:
        return self.layers[0].context_dim

    @property
    def guided_layers(self) -> tuple[AdapterLayer, ...]:
        """Those in whose attention to the prompt the adapter works."""
        return self.kind.guided(self.layers)

    @property
    def guided_widths(self) -> list[int]:
        """Channels of each layer's attention to the prompt, 0 where the adapter doesn't work in it."""
        guided = {layer.name for layer in self.guided_layers}
        return [layer.width if layer.name in guided else 0 for layer in self.layers]

    @property
    def changes_linears(self) -> bool:
        """Whether the linear layers of the base's blocks get something added."""
        return self.kind.lora_rank > 0


class Architecture(TypedDict, total=False):
    """Of a UNet, what adapters depend on besides its layers; a base may say more, which is only kept.

    `time_channels`: of its embedding of the timestep; `num_res_blocks`: blocks of each level on the way down, beside
    the one that leads to the next; on the way up each level has one more.
    """

    time_channels: Annotated[int, Between(1, 1_000_000)]
    num_res_blocks: Annotated[tuple[Annotated[int, Between(0, 1_000)], ...], Items(1, 100)]


@dataclass(frozen=True)
class BaseInfo:
    """What is known of a base model: enough to tell whether an adapter fits it, and to name it in an error.

    Two bases with equal `family`, `prediction` and layers are siblings: an adapter of one loads onto the other.
    More input channels (inpainting) or another noise schedule (zero terminal SNR) keep them siblings: both reach an
    adapter only through `h` and `t`. Another prediction doesn't: the same change of `h` is another guidance there.
    `architecture`: see `Architecture`. `layout`: of its network, by which `backbones.LAYOUTS` names it; `vector`: as in
    `AdapterConfig`. `fingerprint` is for information only: it tells one sibling's weights from another's.
    """

    family: _Title
    prediction: _Title
    layers: Annotated[tuple[AdapterLayer, ...], Items(1, _MOST_LAYERS)]
    architecture: dict[_Title, Any] = field(default_factory=dict)
    fingerprint: _Title = ""
    layout: Annotated[str, OneOf(tuple(_LAYERS_OF))] = "unet"
    vector: Annotated[int, Between(0, 1_000_000)] = 0

    @property
    def family_name(self) -> str:
        return title_of(self.family)

    @property
    def time_channels(self) -> int:
        """As in `AdapterConfig`."""
        return self.architecture.get("time_channels", 0)

    @property
    def prediction_name(self) -> str:
        return PREDICTION_NAMES.get(self.prediction, self.prediction)

    def describe(self) -> str:
        widths = "/".join(map(str, sorted({layer.width for layer in self.layers})))
        layers = f"{len(self.layers)} {_LAYERS_OF.get(self.layout, 'layers')} of width {widths}"
        context = self.layers[0].context_dim if self.layers else 0
        return f"{self.family_name} ({self.prediction}-prediction, {layers}, context {context})"

    def sibling_of(self, other: "BaseInfo") -> bool:
        own, others = ((base.family, base.prediction, base.layers, base.vector) for base in (self, other))
        return own == others
