"""The adapter file: safetensors with a JSON config in the metadata. Loading one runs no code.

The metadata key `agd` holds the adapter's config, what base it was made for and how it was trained; the
`modelspec.*` keys are what other tools show.
"""

import datetime
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from . import older_formats
from .adapter import Adapter
from .atomic import bytes_of, replacing
from .checked import Between, Items, Numeral, OneOf, Printable, depth, read
from .config import AdapterConfig, Architecture, BaseInfo, LayerName
from .errors import AGDError
from .guidance import RULES
from .kinds import KINDS
from .text import first_of, one_line

FORMAT_VERSION = 4
_KEY = "agd"
_LISTED = 8  # offenders named in full in one error
# Characters; the longest that there are have a hundred thousand. Nobody waits for a stranger's file to be read.
_LONGEST_DESCRIPTION, _LONGEST_ERROR, _LONGEST_LINE, _DEEPEST = 4_000_000, 1_000, 2_000, 20
_Positive = Annotated[float, Between(0, 1_000_000)]
_Scale = Annotated[float, Between(1e-6, 1_000_000)]
_Omega = Annotated[str, Numeral(1e-6, 1_000_000)]
_DTYPES = ("F32", "F16", "BF16")
_LONGEST_NAME = 200
_Word = Annotated[str, Printable(100)]
_Side = Annotated[int, Between(1, 1_000_000)]


class AdapterFileError(AGDError, ValueError):
    """A file that is no usable adapter."""


class BasePatches(TypedDict, total=False):
    """What the base was made of besides its own weights; it may say more."""

    patched_weights: Annotated[int, Between(0, 1_000_000_000)]


class TeacherSettings(TypedDict, total=False):
    """The guidance that was learnt and where, of the training's settings, which are all there. See `GuidanceRule`."""

    teacher: Annotated[str, OneOf(RULES)]
    interval_sigma_min: _Positive
    interval_sigma_max: _Positive
    rescale_phi: Annotated[float, Between(0, 1)]
    apg_eta: Annotated[float, Between(0, 1)]
    apg_threshold: _Positive
    sigma_from: _Positive
    sigma_to: _Positive
    frames: Annotated[int, Between(1, 1024)]


class TrainingSummary(TypedDict, total=False):
    """What a training was, as far as anything depends on it: a file may say more, which is only shown."""

    gap_closed: dict[_Omega, Annotated[float, Between(-1_000_000, 1)]]
    gap_closed_se: dict[_Omega, _Positive]
    direction_cosine: dict[_Omega, Annotated[float, Between(-1, 1)]]
    base_patches: BasePatches
    config: TeacherSettings


@dataclass(frozen=True, kw_only=True)
class _About:
    """What an adapter file says besides its adapter's config."""

    base: BaseInfo
    omega_range: tuple[_Scale, _Scale]
    unconditional: Annotated[str, Printable(100_000)] = "empty prompt"  # what f(x, sigma, c_neg) was in training
    # Whether a negative prompt has an effect.
    negative_mode: Annotated[str, OneOf(("used", "ignored"))] = "ignored"
    # (height, width) of the latents it was trained at
    resolutions: Annotated[tuple[tuple[_Side, _Side], ...], Items(0, 1_000)] = ()
    training: dict[_Word, Any] = field(default_factory=dict)  # see `TrainingSummary`


@dataclass(frozen=True, kw_only=True)
class AdapterInfo(_About):
    """Everything an adapter file says of itself besides its weights."""

    config: AdapterConfig


@dataclass(frozen=True)
class _Config:
    """An `AdapterConfig` in a file, where the base's description has the layers themselves."""

    kind: Annotated[str, OneOf(KINDS)]
    settings: dict[str, Any]
    layers: tuple[LayerName, ...]
    prompt_tokens: Annotated[int, Between(1, 1_000_000)]
    vector: Annotated[int, Between(0, 1_000_000)]

    @classmethod
    def of(cls, config: AdapterConfig) -> "_Config":
        layers = tuple(layer.name for layer in config.layers)
        return cls(config.kind.name, asdict(config.kind), layers, config.prompt_tokens, config.vector)

    def for_base(self, base: BaseInfo) -> AdapterConfig:
        """The inverse of `of`. Raises `ValueError` naming what is wrong."""
        layers = {layer.name: layer for layer in base.layers}
        if unknown := [name for name in self.layers if name not in layers]:
            raise ValueError(f"the base has no layers {unknown[:_LISTED]}")
        kind = read(KINDS[self.kind].Config, self.settings, "config.settings")
        own = tuple(layers[name] for name in self.layers)
        return AdapterConfig(own, kind, self.prompt_tokens, self.vector, base.time_channels)


@dataclass(frozen=True, kw_only=True)
class _Description(_About):
    """The JSON of a file."""

    format_version: int
    config: _Config

    def info(self) -> AdapterInfo:
        """Raises `ValueError`."""
        read(TrainingSummary, self.training, "training")
        read(Architecture, self.base.architecture, "base.architecture")
        about = {f.name: getattr(self, f.name) for f in fields(_About)}
        return AdapterInfo(config=self.config.for_base(self.base), **about)


def _to_metadata(info: AdapterInfo, title: str) -> dict[str, str]:
    prediction = {"EPS": "epsilon", "V_PREDICTION": "v"}.get(info.base.prediction, info.base.prediction.lower())
    about = {f.name: getattr(info, f.name) for f in fields(_About)}
    described = _Description(format_version=FORMAT_VERSION, config=_Config.of(info.config), **about)
    return {
        _KEY: json.dumps(asdict(described)),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{info.base.family.lower()}/agd-adapter",
        "modelspec.implementation": "agd-adapters",
        "modelspec.title": title,
        "modelspec.description": "Guidance distilled into an adapter (AGD): one model evaluation per step.",
        "modelspec.prediction_type": prediction,
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _from_metadata(path: Path, metadata: dict[str, str]) -> AdapterInfo:
    if _KEY not in metadata:
        found = ", ".join(sorted(metadata)[:_LISTED]) or "none"
        raise AdapterFileError(
            "This file is no AGD adapter: choose one that AGD Train or `agd train` made; LoRAs and checkpoints belong "
            f"into their own folders. Details: {path} has no {_KEY!r} in its metadata (found: {found})."
        )
    try:
        return _parse(metadata[_KEY], path)
    except ValueError as error:
        if isinstance(error, AdapterFileError):
            raise
        raise AdapterFileError(
            "This adapter file can't be used, for what it says of itself is wrong: copy or train it again. Details: "
            f"{path}: {str(error)[:_LONGEST_ERROR].rstrip('.')}."
        ) from error


def _parse(text: str, path: Path) -> AdapterInfo:
    """Raises `ValueError` naming what is wrong, or `AdapterFileError` for a newer format."""
    if len(text) > _LONGEST_DESCRIPTION:
        raise ValueError(f"its description has {len(text):,} characters, and at most {_LONGEST_DESCRIPTION:,} are read")
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError("its description is nested too deeply") from None
    if depth(data) > _DEEPEST:
        raise ValueError("its description is nested too deeply")
    version = read(dict[str, Any], data, "its description").get("format_version")
    if read(Annotated[int, Between(1, math.inf)], version, "format_version") > FORMAT_VERSION:
        raise AdapterFileError(
            f"This adapter is of a newer AGD: update the node pack. Details: {path} has format {version}, this "
            f"version reads up to {FORMAT_VERSION}."
        )
    return read(_Description, older_formats.upgraded(data), "its description").info()


def _open(path: Path):
    if not path.is_file():
        raise AdapterFileError(f"There is no adapter file {path}. Choose another, or train one with AGD Train.")
    if path.suffix == ".pt":
        raise AdapterFileError(
            f"This is no adapter file, but one of PyTorch: if the paper authors' code wrote it, import it first, with "
            f"`agd import {path} OUTPUT.safetensors`."
        )
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(
            "This adapter file is damaged or incomplete: copy or train it again. Details: "
            f"{path} ({path.stat().st_size:,} bytes) is not a readable safetensors file: {error}."
        ) from error


def read_info(path: str | Path) -> AdapterInfo:
    """What the file says of itself, without loading its weights. Raises `AdapterFileError`."""
    path = Path(path)
    with _open(path) as file:
        return _from_metadata(path, file.metadata() or {})


def _mismatches(expected: dict[str, torch.Tensor], file: Any) -> list[str]:
    """What is wrong with the weights that an open file has, by their names of today; none of them is loaded."""
    names = {older_formats.name_of_today(name): name for name in file.keys()}  # noqa: SIM118 (it is no dict)
    wrong = [f"{key}: missing" for key in expected.keys() - names.keys()]
    wrong += [f"{key[:_LONGEST_NAME]}: unknown" for key in names.keys() - expected.keys()]
    for key in expected.keys() & names.keys():
        found, shape = file.get_slice(names[key]), list(expected[key].shape)
        if found.get_shape() != shape:
            wrong.append(f"{key}: shape {tuple(found.get_shape())} instead of {tuple(shape)}")
        elif found.get_dtype() not in _DTYPES:
            wrong.append(f"{key}: {found.get_dtype()} numbers instead of {', '.join(_DTYPES)}")
    return sorted(wrong)


def load_weights(path: str | Path) -> tuple[AdapterInfo, dict[str, torch.Tensor]]:
    """Info and weights, checked against each other key by key. Raises `AdapterFileError`."""
    path = Path(path)
    with _open(path) as file:
        info = _from_metadata(path, file.metadata() or {})
        with torch.device("meta"):
            expected = Adapter(info.config).state_dict()
        _refuse(path, _mismatches(expected, file))
        # Copies: the file's own tensors keep it mapped, and Windows replaces no file that is.
        weights = {older_formats.name_of_today(name): file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    _refuse(path, [f"{key}: holds NaN or infinity" for key, value in weights.items() if not value.isfinite().all()])
    return info, weights


def _refuse(path: Path, wrong: list[str]) -> None:
    """Raises `AdapterFileError` where anything is wrong with the weights."""
    if wrong:
        raise AdapterFileError(
            f"This adapter file is damaged: copy or train it again. Details: {path} does not hold the weights that its "
            f"own description asks for: {first_of(wrong)}."
        )


def load(path: str | Path, operations=nn) -> tuple[AdapterInfo, Adapter]:
    """The adapter with its weights, on the CPU. Raises `AdapterFileError`."""
    info, weights = load_weights(path)
    adapter = Adapter(info.config, operations)
    adapter.load_state_dict(weights)
    return info, adapter


def save(path: str | Path, adapter: Adapter, info: AdapterInfo) -> Path:
    """Write the adapter's file, as `write` does. Returns the path."""
    return save_weights(path, adapter.state_dict(), info)


def save_weights(path: str | Path, weights: dict[str, torch.Tensor], info: AdapterInfo) -> Path:
    """As `save`, of an adapter's `state_dict`."""
    return write(path, weights, _to_metadata(info, Path(path).stem))


def write(path: str | Path, weights: dict[str, torch.Tensor], metadata: dict[str, str]) -> Path:
    """Write a file atomically: an earlier one at `path` stays whole until the new one is. Returns the path."""
    path = Path(path)
    # Cloned: weights made by ComfyUI may share storage, which safetensors refuses.
    weights = {key: value.detach().cpu().clone().contiguous() for key, value in weights.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, bytes_of(weights)) as temporary:
            save_file(weights, temporary, metadata=metadata)
    except OSError as error:
        raise AdapterFileError(f"The adapter could not be saved: {error}") from error
    return path


def check_base(info: AdapterInfo, base: BaseInfo, path: str | Path) -> None:
    """Refuse a base that is no sibling of the adapter's own, naming both sides and every layer that differs."""
    if info.base.sibling_of(base):
        return
    theirs, yours = _distinguish(info.base, base)
    differ = sorted({layer.name for layer in set(info.base.layers) ^ set(base.layers)})
    layers = f" Layers that differ: {first_of(differ, separator=', ')}." if differ else ""
    raise AdapterFileError(
        f"This adapter is for {theirs}, your checkpoint is {yours}. Choose an adapter that was made for such a "
        "checkpoint, or train one with AGD Train, or choose 'training-free' in AGD Adapter Loader, which needs none. "
        f"Details: the adapter {path} was made for {info.base.describe()}, but this model is {base.describe()}.{layers}"
    )


def _distinguish(first: BaseInfo, second: BaseInfo) -> tuple[str, str]:
    """Two bases that are no siblings by the names that users know, with as much beside them as tells them apart."""
    names = first.family_name, second.family_name
    if first.prediction != second.prediction:
        return f"{names[0]} with {first.prediction_name}", f"{names[1]} with {second.prediction_name}"
    return names if names[0] != names[1] else (names[0], f"{names[1]} with other layers")


def describe(info: AdapterInfo, path: str | Path) -> str:
    """A page for people: what `agd inspect` prints."""
    with torch.device("meta"):
        parameters = Adapter(info.config).parameter_count()
    (low, high), kind = info.omega_range, info.config.kind
    lines = {
        "file": path,
        "base": info.base.describe(),
        "base fingerprint": info.base.fingerprint,
        "adapter": f"{kind.describe()}, {parameters:,} parameters",
        "gain": "(guidance scale - 1)" if kind.gain else "none",
        "at cfg 1": "acts" if kind.acts_at_1 else "leaves the base as it is",
        "scale embedding": kind.describe_omega(),
        "guidance scale": f"{low:g} to {high:g}",
        "guides away from": info.unconditional or "the negative prompt",
        "negative prompt": info.negative_mode,
        "latent sizes": ", ".join(f"{h}x{w}" for h, w in info.resolutions) or "unknown",
    }
    lines |= {f"training: {key}": json.dumps(value) for key, value in info.training.items()}
    width = max(map(len, lines))
    return "\n".join(f"{key:<{width}}  {one_line(value):.{_LONGEST_LINE}}" for key, value in lines.items())
