"""Several processes that train one adapter together (`torchrun`): each evaluates its share of every batch."""

import datetime
import os
from collections.abc import Iterable

import torch
import torch.distributed as dist


class Ranks:
    """This process among `count`. All collective calls are made by every rank in the same order; alone they are free.

    A context manager for whoever started the process: left, there is no group any more. A process that ends with one
    is now and then aborted by the group's own threads.

    Rank r's rows of a batch are a block of it, so that what a row does never depends on how many ranks there are.
    """

    def __init__(self):
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        if self.count > 1 and not dist.is_initialized():
            # Rank 0 measures and saves while the others wait; none of them may take the others for dead.
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))

    @property
    def first(self) -> bool:
        """Whether this is the rank that measures, saves and reports."""
        return self.rank == 0

    def rows(self, batch: int) -> range:
        """The rows of a batch of `batch` that are this rank's. Raises `ValueError` if they can't be shared alike."""
        if batch % self.count:
            raise ValueError(f"A batch of {batch} can't be shared by {self.count} processes; make it a multiple.")
        each = batch // self.count
        return range(self.rank * each, (self.rank + 1) * each)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add up the gradients of all ranks, in one message."""
        if self.count > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            flat = self.sum(torch.cat([g.flatten() for g in gradients]))
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def any(self, value: bool) -> bool:
        """Whether it is true on any rank."""
        return value if self.count == 1 else self.sum(torch.tensor(int(value))).item() > 0

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """All ranks' rows (CPU, a batch's rows first), in order, on the first rank; on the others their own."""
        if self.count == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.count)] if self.first else None
        dist.gather(rows.contiguous(), parts)
        return torch.cat(parts) if self.first else rows

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """The first rank's values (CPU), on every rank, in place."""
        if self.count > 1:
            dist.broadcast(values, src=0)
        return values

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_) -> None:
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()
