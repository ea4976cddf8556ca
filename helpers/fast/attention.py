"""Plain causal attention without a mask of all pairs, for batches whose rows are one text each."""

from __future__ import annotations

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "causal_sdpa"  # under this name the attention is registered with transformers


def use_plain_causal_attention(model) -> bool:
    """Let a batch without a mask mean plain causal attention, in models with torch's attention.

    transformers would look into its positions for packed documents, which waits for the GPU in
    every step and cannot be recorded. An empty mask, (0, 0, 0, length), is passed through to
    `_attend` instead. Returns whether the model was changed: only Llama, and Qwen3 without sliding
    windows, as other models find positions in a mask, or the window that a layer sees.
    """
    config = model.config
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if (config.model_type not in ("llama", "qwen3") or windows
            or config._attn_implementation != "sdpa"):
        return False
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    model.base_model.register_forward_pre_hook(empty_mask, with_kwargs=True)
    return True


def _attend(module, query, key, value, attention_mask, **options):
    """transformers' fused attention, to which an empty mask is none."""
    empty = attention_mask is not None and not attention_mask.numel()
    return sdpa_attention_forward(module, query, key, value, None if empty else attention_mask,
                                  **options)


def empty_mask(model, arguments, options):
    """Before a backbone's forward: no mask, no positions and nothing cached becomes an empty mask,
    which stands for: only the future is hidden."""
    ids = options.get("input_ids", arguments[0] if arguments else None)
    given = [options.get(name) for name in ("attention_mask", "position_ids", "past_key_values")]
    if ids is not None and all(one is None for one in given):
        options["attention_mask"] = torch.empty(0, 0, 0, ids.shape[1], device=ids.device)
    return arguments, options
