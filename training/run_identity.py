"""What must be equal for a saved run state to be this run's, and how a difference is told."""

import json
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from ..agd_core.errors import AGDError
from ..agd_core.text import logger
from .authors import checkpoint_of
from .config import TrainConfig
from .model import Model
from .older_settings import without_other_kinds
from .recording import checksum_of
from .run_setup import RunOptions
from .run_state import READABLE

log = logger(__name__)

# How a run computes: it may go on with others, which is what the errors of what isn't finite advise.
_MAY_CHANGE = ("learning_rate", "precision")
# What states of earlier versions don't say. They are taken for this run's as far as it goes.
_NOTED_LATER = ("loras", "other_expert", "prediction", "noise_levels", "encoded_prompt")
# What differs, in the user's words, where it is no setting.
_WORDS = {
    "base": "another model",
    "patches": "other LoRAs or other strengths of them",
    "loras": "other LoRAs or other strengths of them",
    "other_expert": "another other expert",
    "prediction": "another noise schedule (a ModelSampling node)",
    "noise_levels": "another noise schedule (a ModelSampling node)",
    "encoded_prompt": "another text encoder or clip skip",
    "prompts": "other prompts",
    "negative": "other negative prompts",
    "start": "another adapter to start from",
    "recording": "another recording",
}
# Lists of numbers that other devices compute with other rounding, and how far they may be apart in the median, of their
# usual size. Rounding makes 1 % of an encoded prompt in bf16; clip skip and other text encoders make 10 % and more.
_TOLERANCES = {"noise_levels": 1e-3, "encoded_prompt": 0.05}
_STEPS, _VALUES = 20, 64  # noise levels, and values of an encoded prompt, that are compared


class DifferentRun(AGDError, ValueError):
    """A saved run state belongs to a run with other settings, or of another version."""


def run_identity(model: Model, prompts: Sequence[str], config: TrainConfig, options: RunOptions) -> dict:
    """What must be equal for a saved run state to be this run's, as JSON data. Encodes a prompt."""
    texts = {"prompts": prompts, "negative": options.negative, "measured": options.held_out or ()}
    identity = config.result_settings() | {name: list(lines) for name, lines in texts.items()}
    identity |= {"base": model.base.fingerprint, "patches": model.base_patches, "prediction": model.base.prediction}
    identity |= model.made_of()
    identity |= {"noise_levels": _rounded(model.denoiser.sigmas("normal", _STEPS))}
    identity |= {"encoded_prompt": _encoded(model, next(prompt for prompt in prompts if prompt.strip()))}
    identity |= {"recording": options.recording.checksum() if options.recording else ""}
    if options.start is not None:
        identity |= {"start": f"{options.start.name}, {checksum_of(checkpoint_of(options.start))[:12]}"}
    return json.loads(json.dumps(identity))


def _encoded(model: Model, prompt: str) -> list[float]:
    """Some values of a prompt's tokens, evenly spread; without the tokens that pad it, where these are zeros."""
    (encoded,) = model.text_encoder.encode([prompt.strip()])
    tokens = model.text_encoder.context(encoded)
    values = tokens[tokens.any(dim=1)].flatten()
    return _rounded(values[:: max(1, len(values) // _VALUES)])


def _rounded(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


def check_same_run(saved: dict[str, Any], identity: dict, folder: object) -> None:
    """Raises `DifferentRun` if the run state that was saved in `folder` is another run's, or another version's.

    Settings that there were none of then had what is the default now.
    """
    if saved["version"] not in READABLE:
        readable = " and ".join(map(str, READABLE))
        raise DifferentRun(
            "A training of this name was begun with another version of AGD: use that one to go on with it, or delete "
            f"its folder to start anew. Details: the states in {folder} are of version {saved['version']}, this AGD "
            f"reads {readable}."
        )
    then = without_other_kinds(saved["identity"])
    then = TrainConfig(kind=then.get("kind", TrainConfig.kind)).result_settings() | then
    if "noise_levels" not in then and "noise_levels" in identity:
        log.warning(
            "AGD: an earlier version began the training in %s and didn't note the LoRAs' strengths, the noise schedule "
            "and the text encoder: it goes on with those of now.",
            folder,
        )
        then |= {name: identity[name] for name in _NOTED_LATER if name in identity}
    changed = differences(then, identity)
    if any(name not in _MAY_CHANGE for name in changed):
        what = dict.fromkeys(_WORDS.get(name, "other settings") for name in changed if name not in _MAY_CHANGE)
        raise DifferentRun(
            f"A training of this name was begun with {' and '.join(what)}: use those to go on with it, or delete its "
            f"folder to start anew. Details: {folder} ({'; '.join(changed.values())})."
        )
    if changed:
        log.warning("AGD: the training in %s goes on with another setting (%s).", folder, "; ".join(changed.values()))


def differences(then: dict, now: dict) -> dict[str, str]:
    """What changed between two runs, by name, a phrase each: "batch: 4 then, 8 now"."""

    def short(value: Any) -> str:
        return f"{len(value)} lines" if isinstance(value, list) and len(json.dumps(value)) > 60 else f"{value!r:.60}"

    phrases = {}
    for key in sorted(now.keys() | then.keys()):
        if _alike(key, then.get(key), now.get(key)):
            continue
        old, new = short(then.get(key)), short(now.get(key))
        phrases[key] = f"{key}: {old} then, {new} now" if old != new else f"{key}: others now"
    if "prompts" in phrases:
        phrases.pop("encoded_prompt", None)  # it is the first of them
    return phrases


def _alike(key: str, then: Any, now: Any) -> bool:
    """Whether they are equal, numbers up to what other devices make of them."""
    if key not in _TOLERANCES or not (_are_numbers(then) and _are_numbers(now) and len(then) == len(now)):
        return then == now
    distance = statistics.median(abs(a - b) for a, b in zip(then, now, strict=True))
    return distance <= _TOLERANCES[key] * statistics.median(map(abs, now))


def _are_numbers(value: Any) -> bool:
    """Whether it is a list of some; a state may be damaged."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, (int, float)) for each in value)
