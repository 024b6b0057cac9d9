"""A training job, from settings to the adapter's file: what the node and the command line have in common."""

import dataclasses
import functools
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..agd_core import adapter_file
from ..agd_core.adapter_name import SUFFIX, file_name
from ..agd_core.atomic import remove_remains
from ..agd_core.errors import AGDError
from ..agd_core.output_file import why_not_writable
from ..agd_core.text import one_line
from .config import TrainConfig
from .distributed import Ranks
from .memory import BothPredictions
from .model import EncodedPrompts, Model, ProgressCallback, encode, no_progress
from .plan import ExamplePrompts, Plan, check_system_memory, plan, rows_that_fit
from .pool import TrajectoryPool
from .prompts import fragments, generate_negatives
from .recording import Recording, identity_of, record
from .run_folder import RunFolder, folder_of
from .run_setup import RunOptions, Start, split_prompts
from .trainer import Callbacks, Trained, train

_SURROGATE = re.compile("[\ud800-\udfff]")
_MOST_NEGATIVES = 256  # of either kind


class JobError(AGDError, ValueError):
    """A job that can't succeed, refused before the long work."""


@dataclass(frozen=True)
class Job:
    """`prompts`, `negative`: texts; `output`: the adapter file; its run's folder is beside it.

    Without negatives, adapters that use the negative prompt are trained with varied ones, the others with the empty
    one. `start`: an adapter file to begin from.
    """

    model: Model
    prompts: Sequence[str]
    config: TrainConfig
    output: Path
    negative: Sequence[str] = ()
    recording: Recording | None = None
    start: Path | None = None

    @property
    def folder(self) -> Path:
        return folder_of(self.output)

    @functools.cached_property
    def negatives(self) -> list[str]:
        """The negative prompts to train with: half of them empty, if the adapter uses them.

        With a recording they are the recorded ones, whichever kind they were drawn for.
        """
        if self.recording is not None or not self.config.kind_config().uses_negative:
            return list(self.negative) or [""]
        drawn = [text for text in self.negative if text]
        if not self.negative:
            count = min(_MOST_NEGATIVES, max(1, len(self.prompts) // 2))
            drawn = fragments(self.prompts, count, self.config.seed)
            usual = [text for text in generate_negatives(2 * count, self.config.seed) if text]
            drawn += usual if self._can_encode(usual) else []
        return [""] * max(1, len(drawn)) + drawn

    def _can_encode(self, texts: Sequence[str]) -> bool:
        """Whether the text encoder knows these words; those of small models may know few."""
        words = dict.fromkeys(" ".join(texts).split())
        try:
            self.model.text_encoder.length(" ".join(words))
        except ValueError:
            return False
        return True

    def plan(self, progress: ProgressCallback = no_progress) -> Plan:
        """What the run costs. Raises `DoesNotFit`, or `JobError` where the disk has too little space, or the output is
        somebody else's file; and what `Start.load` does.
        """
        check_replaceable(self.output)
        if self.start is not None:
            Start.load(self.start, self.model.base, self.config)
        progress(0, 1)  # loading the text encoder may take a while
        prompts = ExamplePrompts.of(self.model.text_encoder, self.prompts or [""], self.negatives)
        memory = self._device_memory()
        # Nothing that was recorded is kept to come again.
        config = self.config if self.recording is None else dataclasses.replace(self.config, reuse=1)
        found = plan(self.model, config, memory, prompts, ranks=Ranks().count, progress=progress)
        if self.recording is not None:
            found = dataclasses.replace(found, teacher_evaluations=0, seconds=None)
        otherwise, kept = "keep fewer saves of the run (keep_states)", RunFolder(self.folder).of_unfinished_run()
        check_disk_space(self.folder, found.disk_bytes, otherwise, kept)
        return found

    def _device_memory(self) -> int | None:
        """The bytes that the device has for this job; None is no limit."""
        return round(self.config.memory * 1e9) or self.model.memory.available()

    def run(self, callbacks: Callbacks, planned: Plan | None, settings: dict) -> Trained:
        """Train, and write the file in place of an earlier one at the very end. The run's states are gone then.

        `settings`: what the command line needs besides the trainer's settings, to repeat the run: the base and so on.
        """
        callbacks = dataclasses.replace(
            callbacks, on_start=lambda: self._write_config(settings), on_end=self._write_result
        )
        options = RunOptions(
            negative=self.negatives, folder=self.folder, recording=self.recording, plan=planned, start=self.start
        )
        return train(self.model, self.prompts, self.config, callbacks, options)

    def record(self, batches: int, callbacks: Callbacks) -> Recording:
        """Record so many batches of what this job's training would visit, into the folder `output`."""
        model, config, encoder = self.model, self.config, self.model.text_encoder
        positive = split_prompts(self.prompts, config)[0]
        check_system_memory(ExamplePrompts.of(encoder, positive, self.negatives), model.memory)
        lists = [("positive", positive), ("negative", self.negatives)]
        prompts = EncodedPrompts(*encode(encoder, lists, callbacks.of_phase("encode")))
        encoder.release()
        identity = identity_of(config, self.prompts, self.negatives, model.base.fingerprint)
        shape = model.denoiser.latent_shape(*max(config.buckets(), key=math.prod))  # the largest
        longest = max([*prompts.positive, *prompts.negative], key=encoder.bytes_of)
        rows, reserve = rows_that_fit(model, shape, longest, 2 * config.batch, self._device_memory())
        with model.denoiser.session(memory=reserve):
            both = BothPredictions(model.denoiser, model.memory, rows)
            # Batches that came again would only be kept: none does.
            config = dataclasses.replace(config, reuse=1)
            pool = TrajectoryPool(model.denoiser, prompts, config, range(config.batch), both)
            return record(
                self.output, pool, identity, batches, callbacks.of_phase("record"), callbacks.of_phase("rollout")
            )

    def _write_result(self, trained: Trained) -> None:
        files = RunFolder(self.folder)
        try:
            adapter_file.save(self.output, trained.adapter, trained.info)
        except adapter_file.AdapterFileError as error:
            raise JobError(f"{error} The same training {files.next_run()}.") from error
        files.save_text("report.txt", self.report(trained))
        files.clear()

    def _write_config(self, settings: dict) -> None:
        """`config.toml` and the prompts themselves in the run's folder, from which the run can be repeated."""
        remove_remains(self.output.parent, self.output.name)
        files = RunFolder(self.folder)
        files.save_text("prompts.txt", "".join(f"{prompt}\n" for prompt in self.prompts))
        settings |= {"prompts": str((self.folder / "prompts.txt").absolute()), "verbatim": True}
        settings |= {"negative": self.negatives, "output": str(self.output.absolute())}
        settings |= {"start": str(self.start.absolute())} if self.start else {}
        files.save_text("config.toml", to_toml(settings | self.config.own_settings()))

    def report(self, trained: Trained) -> str:
        """A page about the finished run, for people. The result comes first: a node may show 60 characters of it."""
        training = trained.info.training
        gaps = training.get("gap_closed", {}).values()
        lines = [
            f"Gap closed {sum(gaps) / len(gaps):.0%}, {self.output.name}." if gaps else f"Saved {self.output.name}.",
            f"{trained.adapter.parameter_count():,} parameters, for {trained.info.base.describe()}.",
            f"{training['iterations']} iterations of {training['batch']} noisy latents on {training['prompts']} "
            f"prompts, {training['teacher_evaluations']:,} model evaluations by the teacher, "
            f"{training['seconds'] / 60:.1f} minutes; final loss {training['final_loss']:.4f}.",
        ]
        if self.model.base_patches:
            lines.append(f"Patches of the base: {json.dumps(self.model.base_patches)}.")
        if "gap_closed" in training:
            closed = ", ".join(f"{value:.0%} at cfg {omega}" for omega, value in training["gap_closed"].items())
            lines.append(
                f"Gap closed on prompts that were not trained with ({training['held_out_prompts']}): {closed} "
                f"(step {training['best_step']}, the best)."
            )
        if trained.by_sigma:
            lines.append("By noise level, when last measured:")
            for omega, pairs in trained.by_sigma.items():
                levels = "  ".join(f"{sigma:.2f}: {value:.0%}" for sigma, value in pairs)
                lines.append(f"  cfg {omega}  {levels}")
        return "".join(f"{one_line(line)}\n" for line in lines)


def to_toml(settings: dict) -> str:
    """Flat settings as TOML: strings, numbers, booleans and lists of them; None is left out.

    What no TOML can hold, halves of surrogate pairs, becomes U+FFFD.
    """
    return "".join(f"{key} = {_toml_value(value)}\n" for key, value in settings.items() if value is not None)


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, float):
        return float.__repr__(value)  # infinity and NaN too
    # The rest TOML writes JSON's way, but for one character.
    return _SURROGATE.sub("\ufffd", json.dumps(value, ensure_ascii=False).replace("\x7f", r"\u007f"))


def check_disk_space(folder: Path, needed: int, otherwise: str, kept: Sequence[Path] = ()) -> None:
    """Raises `JobError` where the disk of `folder` has less than `needed` bytes free, of which the files `kept` by the
    same run, stopped before, take a part already.
    """
    needed -= sum(file.stat().st_size for file in kept if file.is_file())
    place = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise JobError(
            f"This needs {needed / 1e9:.1f} GB of disk, but {place} has {free / 1e9:.1f} GB free; make room, choose "
            f"another output, or {otherwise}."
        )


def check_output(output: Path, beside: Callable[[Path], Sequence[Path]] = lambda output: ()) -> None:
    """Raises `JobError` where no adapter file can be written, `AdapterNameError` where the loader can't list it.

    `beside` gives the files that are written with it.
    """
    if not output.name.endswith(SUFFIX):
        raise JobError(f"The output {output} must be a file that ends in {SUFFIX}.")
    file_name(output.name)
    check_writable(output, *beside(output))


def is_adapter(path: Path) -> bool:
    """Whether it is an adapter file, as far as its description tells."""
    try:
        adapter_file.read_info(path)
    except adapter_file.AdapterFileError:
        return False
    return True


def check_replaceable(output: Path, is_own: Callable[[Path], bool] = is_adapter, what: str = "adapter") -> None:
    """Raises `JobError` where there is a file that `is_own` doesn't know as `what`: a checkpoint, say, that a config
    file names."""
    if output.exists() and not is_own(output):
        raise JobError(
            f"{output} is there already and no {what} that a new one could replace: choose another output, or delete "
            "it first."
        )


def check_is_other_file(output: Path, source: Path) -> None:
    """Raises `JobError` where the output is the file to read, by whatever path or link."""
    if output.exists() and source.exists() and output.samefile(source):
        raise JobError(f"The output {output} is the file that is to be read: choose another output.")


def check_writable(*files: Path) -> None:
    """Raises `JobError` for the first that can't be written."""
    if reason := why_not_writable(files):
        raise JobError(f"Choose another output: {reason}.")
