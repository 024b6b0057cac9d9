"""What a run begins with: checked settings, encoded prompts, a new adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..agd_core import adapter_file
from ..agd_core.adapter import Adapter
from ..agd_core.adapter_file import AdapterInfo
from ..agd_core.config import AdapterConfig, BaseInfo
from ..agd_core.mixed_precision import MixedPrecision
from ..agd_core.seeds import seeded_generator
from .authors import read_adapter
from .config import TrainConfig
from .held_out import HeldOutPrompts
from .model import Denoiser, EncodedPrompts, Model, ProgressCallback, TextEncoder, encode
from .options import SettingsError
from .plan import Plan
from .recording import Recording


@dataclass(frozen=True)
class RunOptions:
    """What a run may be given besides its prompts and settings.

    `negative` are the prompts of the unconditional branch, drawn for each trajectory; the default is empty. `held_out`
    are the prompts to measure on, by default some of the run's prompts, which are then not trained with. With `folder`,
    the run keeps its files there: its state is saved every `config.save_every` iterations and whenever it is stopped,
    and if it is called again it goes on from there, to the same result. With `recording`, the states come from there
    instead of from rollouts. `plan` says how many rows are evaluated at once; without one all are, unless the
    config says otherwise. With `start`, an adapter file, the new adapter begins as that one.
    """

    negative: Sequence[str] = ("",)
    held_out: Sequence[str] | None = None
    folder: Path | None = None
    recording: Recording | None = None
    plan: Plan | None = None
    start: Path | None = None


@dataclass(frozen=True)
class Start:
    """An adapter to begin from, and its file."""

    info: AdapterInfo
    weights: dict[str, torch.Tensor]
    file: Path

    @classmethod
    def load(cls, file: Path, base: BaseInfo, config: TrainConfig) -> "Start":
        """For a training of `config` on `base`. Raises `AdapterFileError` where it is of another base, and
        `SettingsError` where the new adapter has no place for its weights.
        """
        start = cls(*read_adapter(file), file)
        adapter_file.check_base(start.info, base, file)
        with torch.device("meta"):  # of any number of tokens: that of the run's prompts isn't known yet
            adapter = Adapter(config.adapter_config(base, start.info.config.prompt_tokens))
        start._weights_for(adapter)
        return start

    def copy_into(self, adapter: Adapter) -> None:
        """Raises `SettingsError` where that one has no place for these weights."""
        adapter.load_state_dict(adapter.state_dict() | self._weights_for(adapter))

    def _weights_for(self, adapter: Adapter) -> dict[str, torch.Tensor]:
        """Those that are copied, by that one's names."""
        own, config, weights = adapter.state_dict(), adapter.config, self.weights
        if self.info.config.kind.name == "scale" and config.kind.name == "delta":
            weights = self._scale_of(config)
        weights = {key: value for key, value in weights.items() if key != "unconditional"}
        if not all(key in own and own[key].shape == value.shape for key, value in weights.items()):
            raise SettingsError(
                f"The adapter {self.file} ({self.info.config.kind.describe()}) can't be the start of one of kind "
                f"{config.kind.describe()}: train the same kind and width, or start a delta adapter from a scale "
                "adapter."
            )
        return weights

    def _scale_of(self, config: AdapterConfig) -> dict[str, torch.Tensor]:
        """A scale adapter's weights as the scale of a delta adapter, which may work in fewer of the layers."""
        own = {layer.name for layer in config.guided_layers}
        kept = [torch.full((layer.width,), layer.name in own) for layer in self.info.config.guided_layers]
        return {"kind.scale.to_scale.weight": self.weights["kind.to_scale.weight"][torch.cat(kept)]}


def check_settings(denoiser: Denoiser, config: TrainConfig, recording: Recording | None) -> None:
    """Raises `ValueError` for settings that can't work with this base, or with a recording."""
    denoiser.check_schedulers(config.schedulers)
    sigmas = denoiser.sigmas("normal", config.steps_max)[:-1]
    low, high = config.interval_sigma_min, config.interval_sigma_max
    if config.teacher == "interval" and not ((sigmas > low) & (sigmas <= high)).any():
        raise ValueError(
            f"No step of a sampling run is guided: its noise levels go from {sigmas[-1]:.3g} to {sigmas[0]:.3g}, the "
            f"interval of guidance from {low:g} to {high:g}; set another interval_sigma_min and interval_sigma_max."
        )
    if recording is not None and config.on_policy:
        raise ValueError(
            "A recording has the teacher's steps only, none of the adapter's: train from one with on_policy 0."
        )


def split_prompts(prompts: Sequence[str], config: TrainConfig) -> tuple[list[str], list[str]]:
    """(training, held-out). At most a fifth is held out, and a lone prompt never. Raises where there is none."""
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError("There are no prompts to train with; give at least one line of text.")
    count = min(config.held_out, len(prompts) // 5)
    order = torch.randperm(len(prompts), generator=seeded_generator(config.seed)).tolist()
    return [prompts[i] for i in order[count:]], [prompts[i] for i in order[:count]]


@dataclass(frozen=True)
class RunTexts:
    """`positive`: the prompts to train with; `held_out`: to measure on."""

    positive: list[str]
    negative: list[str]
    held_out: list[str]

    @classmethod
    def split(cls, prompts: Sequence[str], config: TrainConfig, options: RunOptions) -> "RunTexts":
        """Raises `RecordingError` where a recording was made with others."""
        positive, held_out = list(prompts), list(options.held_out or ())
        if options.held_out is None:
            positive, held_out = split_prompts(prompts, config)
        negative, recording = list(options.negative), options.recording
        if recording is not None:
            recording.check_texts(split_prompts(recording.identity["prompts"], config)[0], positive, negative)
        return cls(positive, negative, held_out)

    def describe_unconditional(self) -> str:
        """For the adapter's file."""
        distinct = sorted(dict.fromkeys(self.negative), key=bool)  # an empty one first
        if not any(distinct):
            return "empty prompt"
        if len(distinct) == 1:
            return f"negative prompt {distinct[0]!r}"
        if distinct[0]:
            return f"{len(distinct)} negative prompts of training"
        return f"empty prompt, and {len(distinct) - 1} negative prompts of training"


@dataclass(frozen=True)
class RunPrompts:
    """`RunTexts` encoded. `unconditional`: the tokens (m, d) that stand in where a workflow has no negative prompt;
    `shortest`: the fewest tokens of a prompt.
    """

    training: EncodedPrompts
    held_out: HeldOutPrompts
    unconditional: torch.Tensor
    shortest: int

    @classmethod
    def encode(cls, texts: RunTexts, encoder: TextEncoder, progress: ProgressCallback) -> "RunPrompts":
        """The text encoder is released."""
        shown = texts.held_out or texts.positive[:1]
        lists = [("positive", texts.positive), ("negative", texts.negative), ("positive", shown)]
        positive, negative, shown = encode(encoder, lists, progress)
        unconditional = negative[texts.negative.index("") if "" in texts.negative else 0]
        encoder.release()
        return cls(
            EncodedPrompts(positive, negative),
            HeldOutPrompts(shown[: len(texts.held_out)], negative, shown[0], unconditional),
            encoder.context(unconditional),
            min(len(encoder.context(prompt)) for prompt in [*positive, *negative]),
        )


def new_adapter(config: AdapterConfig, seed: int, unconditional: torch.Tensor, device: torch.device) -> Adapter:
    """`unconditional`: its prompt tokens (m, d). Raises `ValueError` where they are not as the adapter's layers say."""
    if unconditional.shape[1] != config.context_dim:
        raise ValueError(
            f"This model's prompts have {unconditional.shape[1]} channels, and the layer that was taken for the first "
            f"to get them has {config.context_dim}: its family needs a row in agd_core/families.py first "
            '(docs/architecture.md, "A new family").'
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = Adapter(config, MixedPrecision).to(device)
    adapter.get_buffer("unconditional").copy_(unconditional[: config.prompt_tokens])  # of a long prompt its beginning
    return adapter


def describe_adapter(adapter: Adapter, model: Model, config: TrainConfig, texts: RunTexts) -> AdapterInfo:
    """What the adapter's file says, but for its training."""
    sizes = [model.denoiser.latent_shape(width, height)[-2:] for width, height in config.buckets()]
    return AdapterInfo(
        config=adapter.config,
        base=model.base,
        omega_range=(config.omega_min, config.omega_max),
        unconditional=texts.describe_unconditional(),
        negative_mode="used" if adapter.uses_negative else "ignored",
        resolutions=tuple(dict.fromkeys((height, width) for height, width in sizes)),
    )
