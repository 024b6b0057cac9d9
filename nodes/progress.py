"""What a node shows of its work while it runs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.utils
from PIL import Image

from ..agd_core.text import logger
from ..training.progress import Progress, ProgressLines
from .common import show_on_node

log = logger(__name__)

_SECONDS_BETWEEN_MESSAGES = 0.2  # a hundred a second would slow the browser down
# Each carries the last preview, which ComfyUI writes as an image file and sends while it does nothing else.
_SECONDS_BETWEEN_PICTURES = 1.0
_LARGEST_PICTURE = 1024  # pixels


class NodeProgress:
    """Shows each phase on the node, in ComfyUI's own bar and in its log, and lets an interrupt through at every report.

    `plan`: lines that are above the phases before training, and below them then.
    """

    def __init__(self, node_id: str):
        self.node_id = node_id
        self.plan: list[str] = []
        self._preview: Image.Image | None = None
        self._lines = ProgressLines(lambda line: log.info("AGD: %s", line))
        self._progress: Progress | None = None  # that was shown last
        self._trained: Progress | None = None  # the last iteration
        self._begun: set[str] = set()
        self._shown = 0.0

    def __call__(self, progress: Progress) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._lines(progress)
        if progress.phase == "train" and progress.step:
            self._trained = progress
        now = time.monotonic()
        # What a phase begins with may take minutes, so that its first report isn't left out.
        between = _SECONDS_BETWEEN_MESSAGES if self._preview is None else _SECONDS_BETWEEN_PICTURES
        if progress.phase not in self._begun or now - self._shown >= between:
            self._begun.add(progress.phase)
            self._shown = now
            self._show(progress)

    def show_preview(self, step: int, image: Image.Image) -> None:
        self._preview = image.convert("RGB")
        self._preview.thumbnail((_LARGEST_PICTURE, _LARGEST_PICTURE))
        if self._progress is not None:
            self._show(self._progress)

    @contextmanager
    def says_where_it_stopped(self) -> Iterator[None]:
        """Inside, an interrupt of a training that has begun leaves on the node how far it came: it can go on."""
        try:
            yield
        except comfy.model_management.InterruptProcessingException:
            if self._trained is not None:
                where = f"iteration {self._trained.step} of {self._trained.total}"
                show_on_node(self.node_id, f"Stopped at {where}. Queue again to go on.")
            raise

    def _show(self, progress: Progress) -> None:
        self._progress = progress
        # Without its picture a message would take an earlier one off the node.
        picture = ("JPEG", self._preview, None) if self._preview is not None else None
        bar = comfy.utils.ProgressBar(progress.total, node_id=self.node_id)
        bar.update_absolute(progress.step, progress.total, picture)
        lines = [progress.describe(), *self.plan] if "train" in self._begun else [*self.plan, progress.describe()]
        show_on_node(self.node_id, "\n\n".join(lines))
