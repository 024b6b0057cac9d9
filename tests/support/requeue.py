"""What a user changes between one prompt in the queue and the next, and a session that reacts as ComfyUI's does."""

import gc
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    from comfyui_agd.agd_core.comfyui.runtime import find_comfyui

    sys.path.insert(0, str(find_comfyui()))
    settings, results, session, *flags = sys.argv[1:]
    sys.argv[1:] = [*flags, "--disable-all-custom-nodes"]
    import main  # noqa: F401  ComfyUI's own start, without its server: devices, VRAM state, dynamic VRAM

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from safetensors.torch import save_file

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.backbones import describe_base
from comfyui_agd.examples.toy.model import load_unet
from comfyui_agd.tests.support.runtime import TinyUNet, ksampler, patched, random_prompts, tiny
from comfyui_agd.tests.support.small import info_for, randomised

# ComfyUI's flags for how it uses a card's memory.
WAYS = {
    "dynamic": (),  # its default on a card
    "normal": ("--disable-dynamic-vram",),
    "lowvram": ("--disable-dynamic-vram", "--lowvram"),
    "novram": ("--novram",),
    "highvram": ("--highvram",),
    "crowded": ("--disable-dynamic-vram", "--reserve-vram", "1000"),  # GB: no card has room for any weight
}


@dataclass(frozen=True)
class Setting:
    """`base`: the seed of a tiny model, or "toy"; `lora`: a file, on the base before the adapter; `adapter`: a file, or
    None for a bypassed loader."""

    base: int | str = 0
    lora: str | None = None
    adapter: str | None = None
    omega: float = 5.0
    strength: float = 1.0
    prompt: int = 0


def load_base(name: int | str):
    return load_unet() if name == "toy" else tiny(TinyUNet(), seed=name)


def write_adapter(folder: Path, model, seed: int = 0, **config) -> str:
    """An adapter file for `model` that visibly does something."""
    info = info_for(describe_base(model.model), **{"hidden": 8, "encoder_width": 8, "prompt_tokens": 16, **config})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = randomised(Adapter(info.config), seed)
    return str(adapter_file.save(folder / f"adapter_{seed}.safetensors", adapter, info))


def write_lora(folder: Path, model, seed: int) -> str:
    """A LoRA file for `model`, of its attentions, that visibly does something."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, layer in model.model.diffusion_model.named_modules():
        if name.endswith(("to_q", "to_v")):
            out, inside = layer.weight.shape
            state[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(out, 2, generator=generator) / 4
            state[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(2, inside, generator=generator) / 4
    file = folder / f"lora_{seed}.safetensors"
    save_file(state, file)
    return str(file)


class Session:
    """Keeps of the last prompt what the next one does not change, as ComfyUI's cache does."""

    def __init__(self):
        self.setting = self.base = self.model = None

    def queue(self, setting: Setting) -> torch.Tensor:
        last, self.setting = self.setting, setting
        if last is None or last.base != setting.base:
            self.base = self.model = None
            self.base = load_base(setting.base)
        if self.model is None or self._loaders(last) != self._loaders(setting):
            self.model = self.base
            if setting.lora is not None:
                weights = comfy.utils.load_torch_file(setting.lora)
                self.model, _ = comfy.sd.load_lora_for_models(self.base, None, weights, 1.0, 0.0)
            if setting.adapter is not None:
                self.model = patched(self.model, setting.adapter, strength=setting.strength)
        return ksampler(self.model, random_prompts(seed=setting.prompt), cfg=setting.omega)

    @staticmethod
    def _loaders(setting: Setting) -> tuple:
        return setting.lora, setting.adapter, setting.strength


def loaded() -> dict[str, tuple[int, int]]:
    """Bytes loaded and bytes counted of the models that ComfyUI has loaded now, by class."""
    held = [loaded.model for loaded in comfy.model_management.current_loaded_models]
    return {type(patcher.model).__name__: (patcher.loaded_size(), patcher.model_size()) for patcher in held}


def sample_each(settings: list[Setting]) -> list[dict]:
    results = []
    for setting in settings:
        session = Session()
        picture = session.queue(setting)
        # Once more with everything loaded already, as it is for the second prompt in a queue.
        again = session.queue(setting)
        results.append({"picture": picture, "again": again, "loaded": loaded()})
        comfy.model_management.unload_all_models()
    return results


def sample_in_turn(settings: list[Setting]) -> list[dict]:
    """In one session, with the memory that its tensors hold after each prompt."""
    session, results = Session(), []
    for setting in settings:
        picture = session.queue(setting)
        results.append({"picture": picture.clone(), "held": _held_bytes()})
    return results


def _held_bytes() -> int:
    """By torch's tensors: those on a card, or all where there is none."""
    gc.collect()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


# What is asked of a ComfyUI of its own.
_SESSIONS = {"each": sample_each, "in turn": sample_in_turn}


def from_scratch(settings: list[Setting], folder: Path, *flags: str, session: str = "each") -> list[dict]:
    """What `sample_each` gives in a ComfyUI started with `flags`, which has never sampled anything else, or another of
    `_SESSIONS`."""
    asked, results = folder / "settings.json", folder / "results.pt"
    asked.write_text(json.dumps([asdict(setting) for setting in settings]))
    command = [sys.executable, __file__, asked, results, session, *flags]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"Sampling with {' '.join(flags)} failed:\n{ended.stderr[-3000:]}")
    return torch.load(results)


if __name__ == "__main__":
    torch.save(_SESSIONS[session]([Setting(**each) for each in json.loads(Path(settings).read_text())]), results)
