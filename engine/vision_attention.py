"""Attention of the vision tower: windows and pictures of any length, laid end to end.

PyTorch's own variable-length flash attention takes them in one call. It needs a GPU and numbers of
16 bits; elsewhere transformers calls SDPA once per window. The package flash-attn does the same and
is used where it is installed.
"""

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

NAME = "torch_flash"  # transformers hands over the lengths where a name contains "flash"


def choose(attn: str, dtype: torch.dtype, device: str) -> str:
    """transformers' name of the vision tower's attention. attn: "auto", or such a name.

    dtype: what is computed in, whatever the weights are kept in.
    """
    from transformers.utils import is_flash_attn_2_available

    if attn != "auto":
        return attn
    if not str(device).startswith("cuda") or dtype == torch.float32:
        return "sdpa"
    return "flash_attention_2" if is_flash_attn_2_available() else NAME


def attend(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask=None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **kwargs,
):
    """query, key, value (1, H, L, D) → ((1, L, H, D), None).

    cu_seq_lens_q: (windows + 1,) int32, where each begins and the last one ends. Each attends to
    itself.
    """
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (L, H, D)
    ends, longest = cu_seq_lens_q, max_length_q
    out = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling)
    return out[None], None


AttentionInterface.register(NAME, attend)
