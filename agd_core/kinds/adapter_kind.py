"""What every kind of adapter is: the class that a new kind derives from."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..config import AdapterConfig, AdapterLayer, KindConfig, Linear
from .vector import vector_of

if TYPE_CHECKING:
    from ..layers import Guidance


class AdapterKind(nn.Module):
    """All of an adapter's layers, of one kind.

    A new kind is a file with a subclass of this and one of `KindConfig`, and an entry in `kinds.KINDS`. It overrides
    `__init__`, `init_weights`, `prepare`, `zero_initialised`, and, where it adds to what the base computes, some of

    - `after_attention`: to what a block's cross-attention returns. It sets `changes_attention_output`.
    - `inside_attention`: to what the attention to the prompt hands to its output projection, knowing what it makes of
      the negative prompt. Its config says in which layers, `guided`, and that it `uses_negative`.
    - `at_linear`: to what linear layers of the blocks return. It overrides `linears`.

    It may have a `VectorChange` as `vector`, too.

    Shapes: b rows, n image tokens, m prompt tokens, d their channels (`context_dim`), w channels of a layer.
    """

    Config: ClassVar[type[KindConfig]]
    changes_attention_output: ClassVar[bool] = False

    def __init__(self, config: AdapterConfig, operations=nn):
        """`operations`: the class of the layers, torch's, `MixedPrecision` or ComfyUI's."""
        super().__init__()
        self.layer_count = len(config.layers)
        self.vector = vector_of(config, operations)

    @classmethod
    def token_width(cls, config: AdapterConfig) -> int:
        """D: channels of the tokens that the encoders make of omega and t."""
        return getattr(config.kind, "encoder_width", 0)

    def init_weights(self) -> None:
        """Give a new adapter's parameters their values, where they differ from torch's initialisation."""
        if self.vector is not None:
            self.vector.init_weights()

    def prepare(self, guidance: "Guidance", context: torch.Tensor) -> Any:
        """What the layers need that does not depend on the image, for all of them at once, indexed by layer.

        context: (b, m, d). By default nothing.
        """
        return [None] * self.layer_count

    # One of these three is overridden, and what it is for announced; the others are never called.

    def after_attention(self, name: str, h: torch.Tensor, shared: Any) -> torch.Tensor:
        """The attention's normalised input h (b, n, w), and the layer's part of `prepare` -> (b, n, w)."""
        raise NotImplementedError

    def inside_attention(self, name: str, delta: torch.Tensor, h: torch.Tensor, shared: Any) -> torch.Tensor:
        """delta, the attention to the prompt minus that to the negative, and h (b, n, w) -> (b, n, w)."""
        raise NotImplementedError

    def at_linear(self, name: str, path: str, x: torch.Tensor, shared: Any) -> torch.Tensor:
        """What the block's linear layer `path` is given, (b, n, in) -> (b, n, out)."""
        raise NotImplementedError

    def linears(self, layer: AdapterLayer) -> tuple[Linear, ...]:
        """The linear layers of a block that get something added."""
        return ()

    def zero_initialised(self) -> Iterable[nn.Module]:
        """The layers that a new adapter starts at zero."""
        return () if self.vector is None else (self.vector.to_out,)
