"""Recorded trajectories: what online training would visit, with the teacher's predictions, to train from many times.

A folder with `recording.json` (settings, prompts, the shards and their checksums), shards of fp16 safetensors, and the
state of the pool, from which an interrupted recording goes on.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..agd_core.atomic import NotWritten, bytes_of, read_torch, remove_remains, replacing, write_text, write_torch
from ..agd_core.checked import Between, Like, read
from ..agd_core.errors import AGDError
from ..agd_core.seeds import seeded_generator
from . import folder_lock
from .config import TrainConfig
from .finite import non_finite
from .model import Denoiser, ProgressCallback, no_progress
from .pool import Batch, TrajectoryPool, draw_omega

_VERSION = 1
_INDEX, _POOL = "recording.json", "pool.state"
_SHARD_BATCHES = 64
_HALVES, _EXACT = ("x", "cond", "uncond"), ("sigma", "omega", "positive", "negative")
# The settings that decide what is visited; training from a recording takes these from it.
SETTINGS = (
    *("batch", "omega_min", "omega_max", "omega_sampling", "width", "height", "aspect_ratios", "pool", "steps_min"),
    *("steps_max", "schedulers", "solvers", "seed", "held_out", "frames", "sigma_from", "sigma_to"),
)
# Of these, what recordings from before there was such a setting were made with.
_SINCE = {"frames": 1, "sigma_from": 0.0, "sigma_to": 0.0}
# The rule that the trajectories followed. Both predictions are stored, so training may take another for its target.
_FOLLOWED = ("teacher", "interval_sigma_min", "interval_sigma_max", "rescale_phi", "apg_eta", "apg_threshold")
# Of a generator's streams for a seed: those of the guidance scales of later passes begin here, one for each step.
_OMEGAS = 1 << 24


class RecordingError(AGDError, ValueError):
    """A folder that is no usable recording, or not the one that is asked for."""


def size_in_bytes(denoiser: Denoiser, config: TrainConfig, batches: int) -> int:
    """What a recording of so many batches will take on the disk, but for some kilobytes."""
    shapes = [denoiser.latent_shape(width, height) for width, height in config.buckets()]
    values = sum(map(math.prod, shapes)) / len(shapes)
    of_pool = max(config.pool, len(shapes)) * config.batch * 2 * 4 * values  # x and the last prediction, in fp32
    return round(batches * config.batch * (len(_HALVES) * 2 * values + 4 * 2 + 8 * 2) + of_pool)


def checksum_of(path: Path) -> str:
    """A file's sha256, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _settings(config: TrainConfig) -> dict:
    """A range of noise levels only if there is one: recordings from before there was have none."""
    left_out = ("sigma_from", "sigma_to") if config.learns_everywhere else ()
    named = {*SETTINGS, *_FOLLOWED} - {*left_out}
    return {key: value for key, value in config.result_settings().items() if key in named}


class _Shard(TypedDict):
    """A file beside the index: no other can be named."""

    file: Annotated[str, Like(r"shard-[0-9]{5,9}\.safetensors", "shard-00000.safetensors")]
    batches: Annotated[int, Between(1, 1_000_000)]
    bytes: Annotated[int, Between(1, 10**15)]
    sha256: Annotated[str, Like("[0-9a-f]{64}", "64 hexadecimal digits")]


class _Identity(TypedDict):
    """And settings beside, which `Recording.config` checks as such."""

    prompts: tuple[str, ...]
    negative: tuple[str, ...]
    base: str


class _Index(TypedDict):
    """What `recording.json` holds."""

    version: int
    identity: _Identity
    evaluations: Annotated[int, Between(0, 10**15)]
    shards: tuple[_Shard, ...]


@dataclass
class Recording:
    """A recording in `folder`. `identity` holds its settings, prompts and base; `shards` name, batches, checksum."""

    folder: Path
    identity: dict
    evaluations: int
    shards: list[dict]

    @classmethod
    def open(cls, folder: Path) -> "Recording":
        """Raises `RecordingError` where shards are missing or cut short."""
        try:
            data = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            version = read(dict[str, Any], data, _INDEX).get("version")
            if version != _VERSION:
                raise RecordingError(
                    f"{folder} has recording format {version!r:.20}, this version of AGD reads {_VERSION}."
                )
            read(_Index, data, _INDEX)
            if missing := sorted({*SETTINGS} - _SINCE.keys() - data["identity"].keys()):
                raise ValueError(f"its settings lack {', '.join(missing)}")
        except RecordingError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise RecordingError(
                f"{folder} is no recording ({error!s:.500}); name a folder that `agd record` made."
            ) from error
        found = cls(folder, data["identity"], data["evaluations"], data["shards"])
        for shard in found.shards:
            path = folder / shard["file"]
            size = path.stat().st_size if path.is_file() else 0
            if size != shard["bytes"]:
                raise RecordingError(
                    f"{path} has {size:,} bytes instead of {shard['bytes']:,}; "
                    f"delete {folder} and run `agd record` again, to the same recording."
                )
        return found

    def checksum(self) -> str:
        """One name for all that was recorded."""
        return hashlib.sha256("".join(shard["sha256"] for shard in self.shards).encode()).hexdigest()[:16]

    @property
    def batches(self) -> int:
        return sum(shard["batches"] for shard in self.shards)

    def config(self, config: TrainConfig) -> TrainConfig:
        """`config` with the recording's own settings in place of its."""
        own: dict[str, Any] = dict(_SINCE)
        for key, value in self.identity.items():
            own[key] = tuple(value) if isinstance(value, list) else value
        return replace(config, **{key: own[key] for key in SETTINGS})

    def check_texts(self, own: list[str], positive: list[str], negative: list[str]) -> None:
        """Raises `RecordingError` where a training has other prompts than the recorded ones, `own`, in their order.

        The recorded states say which by number.
        """
        if own != positive or self.identity["negative"] != negative:
            raise RecordingError(
                f"The recording {self.folder} was made with other prompts or negative prompts, or holds out others; "
                "train with the same, or record again."
            )

    def source(self, config: TrainConfig, rows: range) -> "RecordedBatches":
        """What takes the pool's place in training; `rows`: of the batch, those of this process."""
        return RecordedBatches(self, config, rows)

    def check(self, index: int) -> None:
        """Raises `RecordingError` where a shard is not what was written."""
        path = self.folder / self.shards[index]["file"]
        if checksum_of(path) != self.shards[index]["sha256"]:
            raise RecordingError(
                f"{path} is damaged (its checksum differs); "
                f"delete {self.folder} and run `agd record` again, to the same recording."
            )

    def load(self, index: int, place: int) -> dict[str, torch.Tensor]:
        """A batch's tensors, the one at that place of a shard."""
        with safe_open(self.folder / self.shards[index]["file"], framework="pt") as shard:
            return {key: shard.get_tensor(f"{place}.{key}") for key in _HALVES + _EXACT}

    def _save_index(self) -> None:
        data = {
            "version": _VERSION,
            "identity": self.identity,
            "evaluations": self.evaluations,
            "shards": self.shards,
        }
        write_text(self.folder / _INDEX, json.dumps(data, indent=1))


def identity_of(config: TrainConfig, prompts: Sequence[str], negative: Sequence[str], fingerprint: str) -> dict:
    """What must be equal for two recordings to be one."""
    return _settings(config) | {"prompts": list(prompts), "negative": list(negative), "base": fingerprint}


def record(
    folder: Path,
    pool: TrajectoryPool,
    identity: dict,
    batches: int,
    progress: ProgressCallback,
    of_pool: ProgressCallback = no_progress,
) -> Recording:
    """Roll out `batches` batches into `folder`, going on from what is there. Call it inside the denoiser's session.

    `progress(done, batches)` may raise to stop, and so may `of_pool`, by which the pool reports; whole shards are kept.
    Raises `FolderInUse` where another process records.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock.held(folder):
        remove_remains(folder)
        recording = _resumed(folder, pool, identity)
        progress(recording.batches, batches)
        while recording.batches < batches:
            rolled = []
            for _ in range(min(_SHARD_BATCHES, batches - recording.batches)):
                batch = pool.next(0, of_pool)
                recording.evaluations += pool.advance(batch, batch.target, 0.0)
                rolled.append(batch)
                progress(recording.batches + len(rolled), batches)
            _append(recording, rolled, pool)
    return recording


def can_go_on(folder: Path) -> bool:
    """Whether something was recorded there."""
    return (folder / _POOL).exists()


def _resumed(folder: Path, pool: TrajectoryPool, identity: dict) -> Recording:
    if not can_go_on(folder):
        return Recording(folder, identity, 0, [])
    try:
        saved = read_torch(folder / _POOL)
        then = dict(saved["identity"])
    except Exception as error:  # whatever a damaged file makes torch raise
        raise RecordingError(f"{folder / _POOL} is damaged; delete {folder} to record anew.") from error
    if then != identity:
        changed = sorted(key for key in identity if then.get(key) != identity[key])
        raise RecordingError(
            f"{folder} is a recording with other settings ({', '.join(changed)}); "
            "use the settings of then to go on with it, or another folder."
        )
    try:
        pool.load_state_dict(saved["common"], saved["lanes"])
        recording = Recording(folder, identity, saved["evaluations"], saved["shards"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise RecordingError(f"{folder / _POOL} is no recording's; delete {folder} to record anew.") from error
    recording._save_index()  # killed between the two files, it would lack the last shard
    return recording


def _append(recording: Recording, rolled: list[Batch], pool: TrajectoryPool) -> None:
    """Write a shard, then the state that says so: killed in between, the shard is written again."""
    name = f"shard-{len(recording.shards):05d}.safetensors"
    path, tensors = recording.folder / name, dict[str, torch.Tensor]()
    for i, batch in enumerate(rolled):
        tensors |= {f"{i}.{key}": getattr(batch, key).half() for key in _HALVES}
        tensors |= {f"{i}.{key}": getattr(batch, key) for key in _EXACT}
    if wrong := next(non_finite(tensors, "shard"), None):
        raise RecordingError(
            f"A latent of the recording is too large for fp16, in which it is kept ({wrong} of {path}): train without "
            "a recording."
        )
    tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
    try:
        with replacing(path, bytes_of(tensors)) as temporary:
            save_file(tensors, temporary)
        _append_written(recording, len(rolled), path, pool)
    except NotWritten as error:
        raise RecordingError(
            f"The recording could not be written; the same command goes on. Details: {error}"
        ) from error


def _append_written(recording: Recording, batches: int, path: Path, pool: TrajectoryPool) -> None:
    size, checksum = path.stat().st_size, checksum_of(path)
    recording.shards.append({"file": path.name, "batches": batches, "bytes": size, "sha256": checksum})
    shared, per_row = pool.state_dict()
    saved: dict[str, Any] = {"common": shared, "lanes": per_row, "identity": recording.identity}
    saved |= {"evaluations": recording.evaluations, "shards": recording.shards}
    write_torch(recording.folder / _POOL, saved)
    recording._save_index()


class RecordedBatches:
    """Takes the pool's place in training. The first pass gives what online training would have visited, in its order;
    each further one comes shuffled, with other omegas. It keeps no state: a step's batch follows from its number."""

    def __init__(self, recording: Recording, config: TrainConfig, rows: range):
        self.recording, self.config, self.rows = recording, config, rows
        self._checked: set[int] = set()
        self._places = [(i, j) for i, shard in enumerate(recording.shards) for j in range(shard["batches"])]

    def next(self, step: int, progress: ProgressCallback = no_progress) -> Batch:
        epoch, at = divmod(step, len(self._places))
        if epoch > 0:
            order = seeded_generator(self.config.seed, epoch)
            at = int(torch.randperm(len(self._places), generator=order)[at])
        index, place = self._places[at]
        if index not in self._checked:
            self.recording.check(index)
            self._checked.add(index)
        own = slice(self.rows.start, self.rows.stop)
        values = {key: value[own] for key, value in self.recording.load(index, place).items()}
        if wrong := next(non_finite(values, f"batch {place}"), None):
            raise RecordingError(
                f"The recording has NaN or infinity in it: delete {self.recording.folder} and record again, in bf16 or "
                f"fp32 if it was in fp16 (--base-dtype). Details: {wrong} of {self.recording.shards[index]['file']}."
            )
        values |= {key: values[key].float() for key in _HALVES}
        if epoch > 0:
            # Of the whole batch, so that a row's doesn't depend on how many processes share it.
            generator = seeded_generator(self.config.seed, _OMEGAS + step)
            values["omega"] = torch.stack([draw_omega(self.config, generator) for _ in range(self.config.batch)])[own]
        return Batch.from_tensors(values, self.config.rule)

    def restore_generators(self) -> None:
        pass

    def advance(self, batch: Batch, student: torch.Tensor, progress: float) -> int:
        return 0

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return {}, {}

    def load_state_dict(self, shared: dict[str, torch.Tensor], per_row: dict[str, torch.Tensor]) -> None:
        pass
