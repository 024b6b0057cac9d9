"""The adapter file: safetensors with a JSON config in the metadata. Loading one runs no code.

The metadata key `agd` holds the adapter's config, what base it was made for and how it was trained; the
`modelspec.*` keys are what other tools show.
"""

import datetime
import json
import os
import tempfile
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from . import older_formats
from .adapter import Adapter
from .config import AdapterConfig, AdapterLayer, BaseInfo, Linear
from .errors import AGDError
from .kinds import KINDS, kind_config
from .text import one_line

FORMAT_VERSION = 3
_KEY = "agd"
_LISTED = 8  # offenders named in full in one error


class AdapterFileError(AGDError, ValueError):
    """A file that is no usable adapter."""


@dataclass(frozen=True)
class AdapterInfo:
    """Everything an adapter file says of itself besides its weights."""

    config: AdapterConfig
    base: BaseInfo
    omega_range: tuple[float, float]
    unconditional: str = "empty prompt"  # what f(x, sigma, c_neg) was in training
    negative_mode: str = "ignored"  # whether a negative prompt has an effect: "used" or "ignored"
    resolutions: tuple[tuple[int, int], ...] = ()  # (height, width) of the latents it was trained at
    training: dict = field(default_factory=dict)  # a summary: iterations, evaluations, loss, gap closed, ...


def _config_to_json(config: AdapterConfig) -> dict[str, Any]:
    """The base's description has the layers themselves."""
    return {
        "kind": config.kind.name,
        "settings": asdict(config.kind),
        "layers": [layer.name for layer in config.layers],
        "prompt_tokens": config.prompt_tokens,
        "vector": config.vector,
    }


def _config_from_json(data: dict[str, Any], base: BaseInfo) -> AdapterConfig:
    """The inverse of `_config_to_json`. Raises `ValueError` naming what is wrong."""
    _check_fields("adapter", {"kind", "settings", "layers", "prompt_tokens", "vector"}, data)
    layers = {layer.name: layer for layer in base.layers}
    if data["kind"] in KINDS:
        _check_fields(data["kind"], {f.name for f in fields(KINDS[data["kind"]].Config)}, data["settings"])
    if unknown := [name for name in data["layers"] if name not in layers]:
        raise ValueError(f"the base has no layers {unknown[:_LISTED]}")
    chosen = tuple(layers[name] for name in data["layers"])
    return AdapterConfig(chosen, kind_config(data["kind"], **data["settings"]), data["prompt_tokens"], data["vector"])


def _base_to_json(base: BaseInfo) -> dict[str, Any]:
    layers = [{**vars(layer), "linears": [astuple(linear) for linear in layer.linears]} for layer in base.layers]
    return {**vars(base), "layers": layers}


def _base_from_json(data: dict[str, Any]) -> BaseInfo:
    """The inverse of `_base_to_json`. Raises `ValueError` naming missing or unknown fields."""
    _check_fields("base", {f.name for f in fields(BaseInfo)}, data)
    for layer in data["layers"]:
        _check_fields("layer", {f.name for f in fields(AdapterLayer)}, layer)
    layers = (
        AdapterLayer(**{**layer, "linears": tuple(Linear(*linear) for linear in layer["linears"])})
        for layer in data["layers"]
    )
    return BaseInfo(**{**data, "layers": tuple(layers)})


def _check_fields(what: str, expected: set[str], found: dict[str, Any]) -> None:
    if set(found) != expected:
        missing, unknown = sorted(expected - set(found)), sorted(set(found) - expected)
        raise ValueError(f"{what}: missing fields {missing}, unknown fields {unknown}")


def _to_metadata(info: AdapterInfo, title: str) -> dict[str, str]:
    prediction = {"EPS": "epsilon", "V_PREDICTION": "v"}.get(info.base.prediction, info.base.prediction.lower())
    described = {
        "format_version": FORMAT_VERSION,
        "config": _config_to_json(info.config),
        "base": _base_to_json(info.base),
        "omega_range": info.omega_range,
        "unconditional": info.unconditional,
        "negative_mode": info.negative_mode,
        "resolutions": info.resolutions,
        "training": info.training,
    }
    return {
        _KEY: json.dumps(described),
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
        data = json.loads(metadata[_KEY])
        version = data["format_version"]
        if version > FORMAT_VERSION:
            raise AdapterFileError(
                f"This adapter is of a newer AGD: update the node pack. Details: {path} has format {version}, this "
                f"version reads up to {FORMAT_VERSION}."
            )
        data = older_formats.upgraded(data)
        base = _base_from_json(data["base"])
        return AdapterInfo(
            config=_config_from_json(data["config"], base),
            base=base,
            omega_range=tuple(data["omega_range"]),
            unconditional=data["unconditional"],
            negative_mode=data["negative_mode"],
            resolutions=tuple(map(tuple, data["resolutions"])),
            training=data["training"],
        )
    except AdapterFileError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterFileError(
            f"This adapter file is damaged: copy or train it again. Details: what {path} says of itself can't be used "
            f"({error})."
        ) from error


def _open(path: Path):
    if not path.is_file():
        raise AdapterFileError(f"There is no adapter file {path}. Choose another, or train one with AGD Train.")
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


def _mismatches(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> list[str]:
    wrong = [f"{key}: missing" for key in expected.keys() - found.keys()]
    wrong += [f"{key}: unknown" for key in found.keys() - expected.keys()]
    for key in expected.keys() & found.keys():
        if expected[key].shape != found[key].shape:
            wrong.append(f"{key}: shape {tuple(found[key].shape)} instead of {tuple(expected[key].shape)}")
        elif not found[key].isfinite().all():
            wrong.append(f"{key}: holds NaN or infinity")
    return sorted(wrong)


def load_weights(path: str | Path) -> tuple[AdapterInfo, dict[str, torch.Tensor]]:
    """Info and weights, checked against each other key by key. Raises `AdapterFileError`."""
    path = Path(path)
    with _open(path) as file:
        info = _from_metadata(path, file.metadata() or {})
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    weights = older_formats.rename_weights(weights)
    with torch.device("meta"):
        expected = Adapter(info.config).state_dict()
    wrong = _mismatches(expected, weights)
    if wrong:
        more = f" and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        raise AdapterFileError(
            f"This adapter file is damaged: copy or train it again. Details: {path} does not hold the weights that its "
            f"own description asks for: {'; '.join(wrong[:_LISTED])}{more}."
        )
    return info, weights


def load(path: str | Path, operations=nn) -> tuple[AdapterInfo, Adapter]:
    """The adapter with its weights, on the CPU. Raises `AdapterFileError`."""
    info, weights = load_weights(path)
    adapter = Adapter(info.config, operations)
    adapter.load_state_dict(weights)
    return info, adapter


def save(path: str | Path, adapter: Adapter, info: AdapterInfo) -> Path:
    """Write the adapter's file, as `write` does. Returns the path."""
    return write(path, adapter.state_dict(), _to_metadata(info, Path(path).stem))


def write(path: str | Path, weights: dict[str, torch.Tensor], metadata: dict[str, str]) -> Path:
    """Write a file atomically: an earlier one at `path` stays whole until the new one is. Returns the path."""
    path = Path(path)
    # Cloned: weights made by ComfyUI may share storage, which safetensors refuses.
    weights = {key: value.detach().cpu().clone().contiguous() for key, value in weights.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(weights, temporary, metadata=metadata)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(
            f"The adapter could not be saved as {path} ({error}); make room or choose another place."
        ) from error
    return path


class replacing:
    """`with replacing(path) as temporary`: what is written to `temporary` takes the place of `path` on success."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> str:
        handle, self.temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".part")
        os.close(handle)
        return self.temporary

    def __exit__(self, kind, value, trace) -> None:
        if kind is not None:
            os.unlink(self.temporary)
            return
        with open(self.temporary, "rb+") as file:
            os.fsync(file.fileno())  # or a power cut could leave an empty file under the good one's name
        os.chmod(self.temporary, 0o644)  # mkstemp makes it readable by its owner alone
        os.replace(self.temporary, self.path)


def check_base(info: AdapterInfo, base: BaseInfo, path: str | Path) -> None:
    """Refuse a base that is no sibling of the adapter's own, naming both sides and every layer that differs."""
    if info.base.sibling_of(base):
        return
    theirs, yours = _distinguish(info.base, base)
    differ = sorted({layer.name for layer in set(info.base.layers) ^ set(base.layers)})
    layers = f" Layers that differ: {', '.join(differ)}." if differ else ""
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
        "gain": "(omega - 1)" if kind.gain else "none",
        "omega embedding": getattr(kind, "omega_embedding", "none") if kind.encoders(1) else "none",
        "omega range": f"{low:g} to {high:g}",
        "unconditional": info.unconditional or "the negative prompt",
        "negative prompt": info.negative_mode,
        "latent sizes": ", ".join(f"{h}x{w}" for h, w in info.resolutions) or "unknown",
    }
    lines |= {f"training: {key}": json.dumps(value) for key, value in info.training.items()}
    width = max(map(len, lines))
    return "\n".join(f"{one_line(key):<{width}}  {one_line(value)}" for key, value in lines.items())
