"""Where the base comes from: a checkpoint, a model's separate files, or a Python function."""

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..agd_core.errors import AGDError

LOADER_NODES = "CLIPLoader or DualCLIPLoader"


class BaseSourceError(AGDError, ValueError):
    """What was given is no base, or not one alone."""


class LoadedBase(NamedTuple):
    """ComfyUI's MODEL and CLIP; VAE and the other expert's MODEL, or None; the LoRAs' names."""

    model: Any
    clip: Any
    vae: Any = None
    other_expert: Any = None
    loras: Sequence[str] = ()


class _Kind(NamedTuple):
    """Of a file: what it is called in messages, and ComfyUI's folders in which it may be."""

    title: str
    folders: tuple[str, ...]


_FILES = {
    "checkpoint": _Kind("checkpoint", ("checkpoints",)),
    "diffusion_model": _Kind("diffusion model", ("diffusion_models",)),
    "vae": _Kind("VAE", ("vae",)),
    "other_expert": _Kind("expert", ("diffusion_models", "checkpoints")),
}
_STRONGEST_LORA = 100  # as in ComfyUI's nodes
_TEXT_ENCODER = _Kind("text encoder", ("text_encoders",))
_LORA = _Kind("LoRA", ("loras",))


@dataclass(frozen=True)
class BaseSource:
    """The flags of `agd` that say it, by their names. Files may be named as in ComfyUI's lists.

    `lora`: FILE or FILE:STRENGTH each; `comfyui`: ComfyUI's folder. Raises `BaseSourceError` where they contradict
    each other.
    """

    checkpoint: Path | None = None
    diffusion_model: Path | None = None
    text_encoder: Sequence[Path] = ()
    clip_type: str | None = None
    vae: Path | None = None
    loader: str | None = None
    lora: Sequence[str] = ()
    other_expert: Path | None = None
    base_dtype: str | None = None
    comfyui: Path | None = None

    @classmethod
    def given(cls, args: argparse.Namespace) -> "BaseSource":
        """By flags or the config file."""
        values = {f.name: getattr(args, f.name, None) for f in fields(cls)}
        chosen = {name: value for name, value in values.items() if value is not None}
        # A config file's lists are of texts.
        return cls(**chosen | {"text_encoder": tuple(Path(path) for path in chosen.get("text_encoder", ()))})

    def __post_init__(self):
        given = [name for name in ("checkpoint", "diffusion_model", "loader") if getattr(self, name)]
        if not given:
            raise BaseSourceError(
                "Give the base: --checkpoint FILE, or --diffusion-model FILE with --text-encoder FILE ..., or --loader "
                "MODULE:FUNCTION."
            )
        if len(given) > 1:
            raise BaseSourceError(f"Give the base once: {' or '.join(map(_flag, given))}, not both.")
        if given == ["diffusion_model"]:
            self._check_text_encoder()
        else:
            self._refuse(("text_encoder", "clip_type"), "--diffusion-model; the base has its own text encoder")
        if given == ["loader"]:
            self._refuse(("lora", "base_dtype", "vae"), "files; a --loader function sees to that itself")

        for path, strength in map(lora_of, self.lora):
            if not abs(strength) <= _STRONGEST_LORA:
                raise BaseSourceError(
                    f"The strength of the LoRA {path} is {strength}, but must be from -{_STRONGEST_LORA} to "
                    f"{_STRONGEST_LORA}."
                )

    def _check_text_encoder(self) -> None:
        if not self.text_encoder:
            raise BaseSourceError(
                "A diffusion model's file has no text encoder: give its files, with --text-encoder FILE ..., and their "
                f"--clip-type, the type of ComfyUI's {LOADER_NODES}."
            )
        count = len(self.text_encoder)
        if count > 4:
            raise BaseSourceError(f"ComfyUI takes up to four text encoders' files, not {count}.")
        if count < 3 and not self.clip_type:
            raise BaseSourceError(f"Say how the text encoder is used: --clip-type, as in ComfyUI's {LOADER_NODES}.")

    def _refuse(self, names: Sequence[str], belong_to: str) -> None:
        if wrong := [name for name in names if getattr(self, name)]:
            verb = "belongs" if len(wrong) == 1 else "belong"
            raise BaseSourceError(f"{' and '.join(map(_flag, wrong))} {verb} to {belong_to}.")

    def found(self) -> "BaseSource":
        """With the whole paths of its files. Raises `BaseSourceError` for the first that there isn't."""
        given = ((name, getattr(self, name), kind) for name, kind in _FILES.items())
        files: dict[str, Any] = {name: _find(path, kind) for name, path, kind in given if path is not None}
        loras = [f"{_find(path, _LORA)}:{strength:g}" for path, strength in map(lora_of, self.lora)]
        encoders = tuple(_find(path, _TEXT_ENCODER) for path in self.text_encoder)
        return replace(self, **files, text_encoder=encoders, lora=loras)

    def settings(self) -> dict[str, Any]:
        """For a config file, from which the same base is loaded wherever the command is run."""
        found = self.found()
        values = {f.name: getattr(found, f.name) for f in fields(self)}
        values["comfyui"] = self.comfyui and self.comfyui.absolute()
        values["text_encoder"] = [str(path) for path in found.text_encoder]
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items() if value}

    def load(self, *, with_vae: bool = False) -> LoadedBase:
        """`with_vae`: a checkpoint's own, if no other is given. Raises `ValueError`."""
        if self.loader:
            return LoadedBase(*_function(self.loader)())._replace(other_expert=self._other_expert())
        from ..agd_core.comfyui.model import loading

        found = self.found()
        if found.checkpoint is not None:
            own_vae = with_vae and found.vae is None
            model, clip, vae = loading.load_checkpoint(found.checkpoint, self.base_dtype, with_vae=own_vae)
        elif found.diffusion_model is not None:
            clip, vae = loading.load_text_encoder(found.text_encoder, self.clip_type), None
            model = loading.load_diffusion_model(found.diffusion_model, self.base_dtype)
        vae = loading.load_vae(found.vae) if found.vae is not None else vae
        loras = [lora_of(text) for text in found.lora]
        model, clip = loading.with_loras(model, clip, loras)
        names = [f"{path.name}:{strength:g}" for path, strength in loras]
        return LoadedBase(model, clip, vae, found._other_expert(), names)

    def _other_expert(self) -> Any:
        if self.other_expert is None:
            return None
        from ..agd_core.comfyui.model import loading

        return loading.load_diffusion_model(_find(self.other_expert, _FILES["other_expert"]), self.base_dtype)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _find(path: Path, kind: _Kind) -> Path:
    from ..agd_core.comfyui.folders import find_model_file, model_folders

    found = find_model_file(path, kind.folders)
    if found is None:
        raise BaseSourceError(
            f"There is no {kind.title} {path}, nor one of that name in {', '.join(model_folders(kind.folders))}."
        )
    return found.absolute()


def lora_of(text: str) -> tuple[Path, float]:
    """Of FILE or FILE:STRENGTH."""
    path, _, strength = text.rpartition(":")
    try:
        return (Path(path), float(strength)) if path else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0  # the colon is the path's own


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise BaseSourceError(f"--loader {name} names no function MODULE:FUNCTION ({error}).") from error
