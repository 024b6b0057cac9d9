"""Adapters that the paper authors' public code wrote (arXiv 2503.07274), read as ours.

They are a folder with `config.yaml` and `checkpoints/0005000.pt`, which holds `{"model": {module: {name: tensor}}}`,
modules by diffusers' paths. Nothing in a file is run.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch

from ..agd_core import adapter_file
from ..agd_core.adapter import Adapter
from ..agd_core.adapter_file import AdapterFileError, AdapterInfo
from ..agd_core.checked import Between, Multiple, Printable, read
from ..agd_core.config import MOST_CHANNELS, AdapterConfig, AdapterLayer, BaseInfo, Linear
from ..agd_core.kinds import kind_config
from ..agd_core.older_formats import unet_layer
from ..agd_core.text import first_of, one_line

SUFFIX = ".pt"
_CONFIG = "config.yaml"
_LONGEST_CONFIG, _SHOWN = 100_000, 200
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PROMPT_TOKENS = 77  # their prompts are cut to one chunk of CLIP's
_OMEGAS = (1.0, 12.0)  # that they train
_KINDS = {"attention": "paper_attention", "additive": "paper_additive"}

# Our names by theirs: of modules with a weight and perhaps a bias, or of buffers. {} is our layer.
_OMEGA, _POSITIONS = "guidance_scale_embedder.net", "pos_enc.pe"
_OF_BOTH = {
    f"{_OMEGA}.0.frequencies": "frequencies",
    f"{_OMEGA}.0.phases": "phases",
    f"{_OMEGA}.1.net.0": "omega_hidden.linear",
    f"{_OMEGA}.2": "omega_norm",
    "timestep_proj": "from_time",
    "prompt_proj": "from_prompt",
}
_OF_ATTENTION = {
    f"{_OMEGA}.1.net.2": "omega_out",
    "q_proj": "to_q.{}",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "out_proj": "to_out.{}",
    _POSITIONS: "positions",
}
_OF_ADDITIVE = {
    f"{_OMEGA}.1.net.3": "omega_hidden.norm",
    f"{_OMEGA}.1.net.4": "omega_out",
    "out_proj.net.0": "hidden.linear",
    "out_proj.net.3": "hidden.norm",
    "out_proj.net.4": "to_out.{}",
}
_NAMES = {"attention": _OF_BOTH | _OF_ATTENTION, "additive": _OF_BOTH | _OF_ADDITIVE}

_Modules = dict[str, dict[str, torch.Tensor]]


class _Transformer(NamedTuple):
    """`theirs`: its path in diffusers' UNet; `ours`: what our layers' names begin with; `depth`: its blocks."""

    theirs: str
    ours: str
    width: int
    depth: int


@dataclass(frozen=True)
class UNetShape:
    """A base of theirs, as far as its adapters depend on it.

    `widths`, `depths`: by level, channels of the image tokens and blocks of a transformer, 0 where there is none;
    `middle`: blocks of the one in the middle; `side`: of the latents of the pictures that it was made for.
    """

    family: str
    prediction: str
    side: int
    context_dim: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    middle: int
    res_blocks: int = 2
    time_channels: int = 1280

    def base(self) -> BaseInfo:
        levels = len(self.widths)
        architecture = {"num_res_blocks": [self.res_blocks] * levels, "time_channels": self.time_channels}
        return BaseInfo(self.family, self.prediction, tuple(self.modules().values()), architecture)

    def modules(self) -> dict[str, AdapterLayer]:
        """Our layer of every cross-attention by their module, in the order of evaluation."""
        found = {}
        for each in self._transformers():
            for k in range(each.depth):
                site = {"name": f"{each.ours}_{k}", "width": each.width, "context_dim": self.context_dim}
                layer = unet_layer(site)
                linears = tuple(Linear(*linear) for linear in layer.pop("linears"))
                found[f"{each.theirs}.transformer_blocks.{k}.attn2"] = AdapterLayer(**layer, linears=linears)
        return found

    def _transformers(self) -> Iterator[_Transformer]:
        r, levels = self.res_blocks, list(zip(self.widths, self.depths, strict=True))
        for i, level in enumerate(levels):
            for j in range(r):
                yield _Transformer(f"down_blocks.{i}.attentions.{j}", f"input_{1 + (r + 1) * i + j}", *level)
        yield _Transformer("mid_block.attentions.0", "middle_0", self.widths[-1], self.middle)
        for i, level in enumerate(reversed(levels)):
            for j in range(r + 1):
                yield _Transformer(f"up_blocks.{i}.attentions.{j}", f"output_{(r + 1) * i + j}", *level)


BASES = {
    "stabilityai/stable-diffusion-2-1": UNetShape(
        "SD20", "V_PREDICTION", 96, 1024, (320, 640, 1280, 1280), (1, 1, 1, 0), 1
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": UNetShape("SDXL", "EPS", 128, 2048, (320, 640, 1280), (0, 2, 10), 10),
}


@dataclass(frozen=True)
class AuthorsConfig:
    """What their `config.yaml` says of an adapter; there are the settings of its training beside it.

    `zero_init` is how it began, which their attention has the wrong way round.
    """

    base_model: Annotated[str, Printable(100)]
    arch: Annotated[str, Printable(100)]
    hidden_dim: Annotated[int, Between(2, MOST_CHANNELS), Multiple(2)]
    dropout: Annotated[float, Between(0, 1)]
    use_timestep: bool
    use_prompt: bool
    zero_init: bool

    @property
    def shape(self) -> UNetShape:
        return BASES[self.base_model]

    def adapter_config(self) -> AdapterConfig:
        base = self.shape.base()
        settings = {"use_timestep": self.use_timestep, "use_prompt": self.use_prompt}
        kind = kind_config(_KINDS[self.arch], hidden=self.hidden_dim, **settings)
        return AdapterConfig(kind.layers_of(base), kind, _PROMPT_TOKENS, time_channels=base.time_channels)


def read_adapter(path: str | Path) -> tuple[AdapterInfo, dict[str, torch.Tensor]]:
    """Info and weights of an adapter file, ours or the authors'. Raises `AdapterFileError`."""
    return load(path) if is_authors(path) else adapter_file.load_weights(path)


def is_authors(path: str | Path) -> bool:
    """Whether a path, by its looks, is of their code: a `.pt`, or the folder of a run."""
    return Path(path).suffix == SUFFIX or Path(path).is_dir()


def load(path: str | Path) -> tuple[AdapterInfo, dict[str, torch.Tensor]]:
    """A checkpoint of theirs, or the newest in a run's folder, as `adapter_file.load_weights` gives one of ours.

    Raises `AdapterFileError`.
    """
    checkpoint = checkpoint_of(Path(path))
    config = _read_config(_config_beside(checkpoint))
    info = _info(config, checkpoint)
    with torch.device("meta"):
        own = Adapter(info.config).state_dict()
    converter = _Converter(config, own)
    modules = _read_modules(checkpoint)
    if wrong := converter.mismatches(modules):
        raise AdapterFileError(
            "This file of the paper authors' code does not hold the adapter that its config.yaml says: copy both "
            f"again, from one run. Details: {checkpoint}: {first_of(wrong)}."
        )
    return info, converter.weights(modules)


def describe(path: str | Path) -> str:
    """What `agd inspect` prints of their file, or of a run's folder. Raises `AdapterFileError`."""
    info, checkpoint = load(path)[0], checkpoint_of(Path(path))
    return (
        "This is an adapter of the paper authors' code. Put the folder of its run into models/agd, or write it as a "
        f"file of its own: agd import {path} OUTPUT.safetensors\n{adapter_file.describe(info, checkpoint)}"
    )


def _info(config: AuthorsConfig, checkpoint: Path) -> AdapterInfo:
    shape = config.shape
    training = {"imported from": "/".join(checkpoint.parts[-3:])[-100:], "authors' config": asdict(config)}
    return AdapterInfo(
        config=config.adapter_config(),
        base=shape.base(),
        omega_range=_OMEGAS,
        resolutions=((shape.side, shape.side),),
        training=training,
    )


def checkpoint_of(path: Path) -> Path:
    """The file itself, or in the folder of a run of theirs the one of the most steps. Raises `AdapterFileError`."""
    if path.is_file():
        return path
    found = [*path.glob(f"*{SUFFIX}"), *path.glob(f"checkpoints/*{SUFFIX}")]
    if not found:
        raise AdapterFileError(
            f"There is no checkpoint of the paper authors' code in {path}: give the folder that has checkpoints/ and "
            f"{_CONFIG}, or a {SUFFIX} file in it."
        )
    return max(found, key=lambda file: (file.stem.zfill(20), file))


def _config_beside(checkpoint: Path) -> Path:
    places = [folder / _CONFIG for folder in checkpoint.absolute().parents[:2]]
    for place in places:
        if place.is_file():
            return place
    raise AdapterFileError(
        f"{checkpoint} is no adapter that can be used: there is no {_CONFIG}, which the paper authors' code writes "
        "beside its folder of checkpoints. If it is from there, copy the folder of the whole run. Details: looked for "
        f"{' and '.join(map(str, places))}."
    )


def _read_config(path: Path) -> AuthorsConfig:
    """Raises `AdapterFileError`."""
    data = _yaml(path)
    if not isinstance(data, dict):
        raise _refused(path, f"its {_CONFIG} is no list of settings")
    if "base_model" not in data and "cfg_mult" in data:
        raise _refused(path, "it is for DiT-XL/2, a model of ImageNet's classes, and only SD 2.1 and SDXL can have one")
    try:
        config = read(AuthorsConfig, {f.name: data[f.name] for f in fields(AuthorsConfig) if f.name in data}, "config")
    except ValueError as error:
        raise _refused(path, f"{error!s:.500}") from error
    for name, value, known in (("base_model", config.base_model, BASES), ("arch", config.arch, _KINDS)):
        if value not in known:
            raise _refused(path, f"its {name} is {value}, and what can be used is {' or '.join(known)}")
    return config


def _refused(path: Path, why: str) -> AdapterFileError:
    return AdapterFileError(f"This adapter of the paper authors' code can't be used: {why}. Details: {path}.")


def _yaml(path: Path) -> Any:
    try:
        import yaml  # ComfyUI's own requirement, needed for nothing else
    except ImportError as error:
        raise AdapterFileError(f"To read {path}, install the package PyYAML.") from error
    try:
        with path.open("rb") as file:
            return yaml.safe_load(file.read(_LONGEST_CONFIG))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise _refused(path, f"its {_CONFIG} can't be read ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """The beginning of what others' readers say, in a line."""
    return one_line(" ".join(str(error).split())[:_SHOWN])


def _read_modules(path: Path) -> _Modules:
    """Raises `AdapterFileError`."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes torch raise
        raise AdapterFileError(
            f"{path} can't be read as a checkpoint of the paper authors' code: copy it again. Details: "
            f"{type(error).__name__}: {_reason(error)}."
        ) from error
    modules = data.get("model") if isinstance(data, dict) else None
    if not isinstance(modules, dict) or not all(isinstance(module, dict) for module in modules.values()):
        raise AdapterFileError(
            f"{path} is no checkpoint of the paper authors' code: it does not hold 'model' with a table for each of "
            "the base's attentions. If it is of another pack, put it into that pack's folder."
        )
    return modules


class _Place(NamedTuple):
    """Where a tensor of theirs goes: under our `key`, and its `shape`."""

    key: str
    shape: torch.Size


class _Converter:
    """Their tensors, by module, as ours, of all layers. `own`: the weights of such an adapter, without values."""

    def __init__(self, config: AuthorsConfig, own: dict[str, torch.Tensor]):
        self.own, self.names = own, _NAMES[config.arch]
        layers = {layer.name for layer in config.adapter_config().layers}
        modules = config.shape.modules()
        self.places = {
            (module, name): place
            for module, layer in modules.items()
            if layer.name in layers
            for name, place in self._of_module(layer.name)
        }

    def _of_module(self, layer: str) -> Iterator[tuple[str, _Place]]:
        """By their names of one module's tensors."""
        for theirs, ours in self.names.items():
            for end in ("", ".weight", ".bias"):
                key = f"kind.{ours.format(layer)}{end}"
                if key in self.own:
                    shape = self.own[key].shape
                    yield theirs + end, _Place(key, shape if _is_whole(ours) else shape[1:])

    def mismatches(self, modules: _Modules) -> list[str]:
        """What is wrong with a file's modules, a phrase each."""
        found = {(module, name): tensor for module, named in modules.items() for name, tensor in named.items()}
        wrong = [(key, "missing") for key in self.places.keys() - found.keys()]
        wrong += [(key, "unknown") for key in found.keys() - self.places.keys()]
        both = self.places.keys() & found.keys()
        wrong += [(key, why) for key in both if (why := _why_wrong(found[key], self.places[key].shape))]
        if not wrong:
            wrong = [(key, "differs from the first module's") for key in both if not self._is_shared(key, modules)]
        return sorted(one_line(f"{module} {name}: {why}"[:_SHOWN]) for (module, name), why in wrong)

    def _is_shared(self, key: tuple[str, str], modules: _Modules) -> bool:
        """Whether a tensor that we have once is the same in all modules; true of others."""
        module, name = key
        first = next(iter(self.places))[0]
        return name != _POSITIONS or torch.equal(modules[module][name], modules[first][name])

    def weights(self, modules: _Modules) -> dict[str, torch.Tensor]:
        """Of modules without mismatches."""
        parts: dict[str, list[torch.Tensor]] = {}
        for (module, name), place in self.places.items():
            parts.setdefault(place.key, []).append(modules[module][name].detach())
        weights = {
            key: each[0] if each[0].shape == self.own[key].shape else torch.stack(each) for key, each in parts.items()
        }
        return weights | {"unconditional": torch.zeros(self.own["unconditional"].shape)}


def _is_whole(ours: str) -> bool:
    """Whether a tensor of ours is one of theirs: a layer's own, or what all have alike. Others are of all layers."""
    return "{}" in ours or ours == _OF_ATTENTION[_POSITIONS]


def _why_wrong(found: Any, shape: torch.Size) -> str | None:
    if not isinstance(found, torch.Tensor) or found.layout is not torch.strided:
        return f"{type(found).__name__} instead of numbers"
    if found.shape != shape:
        return f"shape {tuple(found.shape)} instead of {tuple(shape)}"
    if found.dtype not in _DTYPES:
        return f"{found.dtype} numbers instead of {', '.join(map(str, _DTYPES))}"
    return None if found.isfinite().all() else "holds NaN or infinity"
