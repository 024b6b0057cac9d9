"""PyTorch's fused attention in place of whichever ComfyUI has chosen: for training, and for what is counted of it.

SageAttention and the like have no gradients, and on a CPU ComfyUI cuts attention into pieces, which would allocate
otherwise than a GPU's.
"""

import comfy.ldm.modules.attention


def fused(function, *args, **kwargs):
    """An `optimized_attention_override`."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


# For transformer_options.
FUSED_ATTENTION = {"optimized_attention_override": fused}
