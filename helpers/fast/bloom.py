"""BLOOM through torch's fused attention, where documents of a packed row can be kept apart.

transformers computes BLOOM's attention step by step, and every row of a batch as one document.
ALiBi (arXiv:2108.12409, section 3) adds slope_h x (key's place - query's place) to the scores of
head h. A softmax over keys does not change when all scores of a query move by the same amount, so
slope_h x key's place does as well, and packed documents need no positions of their own, only a
mask. Where nothing but the future is hidden, the bias is a product, (slope) . (place), that
`_causal` gives to queries and keys as extra dimensions: no bias is stored, and the kernel that
skips the future half of the scores can be used.
"""

from __future__ import annotations

import functools

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor, dropout_add

from helpers.fast.attention import empty_mask

NAME = "alibi_sdpa"  # under this name attention and mask are registered with transformers


def use_fused_attention(model) -> None:
    """Change a loaded BloomForCausalLM in place. It no longer gives back attention weights."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    backbone = model.transformer
    backbone.config._attn_implementation = NAME
    backbone.build_alibi_tensor = functools.partial(_alibi, backbone)
    backbone.register_forward_pre_hook(_documents, with_kwargs=True)
    for module in backbone.modules():
        if type(module) is torch.nn.LayerNorm:
            module.__class__ = SameTypeNorm
    for block in backbone.h:
        block.self_attention.__class__ = AlibiAttention
        block.mlp.gelu_impl = torch.nn.GELU(approximate="tanh")  # the same formula, fused


@functools.lru_cache(maxsize=8)  # made once: making it in every pass would wait for the GPU
@torch.inference_mode(False)
def slopes(heads: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """ALiBi's slope of each head, (heads,), float32: what transformers adds at the second place."""
    return build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1].to(device)


def bias(allowed: torch.Tensor, heads: int, dtype: torch.dtype, first_query: int = 0):
    """What is added to the scores: ALiBi where `allowed` (rows, 1, queries, keys) is True.

    first_query: the place of the first query among the keys. Distances, unlike places, are exact
    near the query in bfloat16. Every query sees itself, padding too: a softmax over no key has no
    gradient. Returns (rows, heads, queries, keys).
    """
    queries = torch.arange(first_query, first_query + allowed.shape[2], device=allowed.device)
    keys = torch.arange(allowed.shape[3], device=allowed.device)
    distance = keys[None, :] - queries[:, None]
    alibi = slopes(heads, allowed.device)[:, None, None] * distance
    return torch.where(allowed | (distance == 0), alibi.to(dtype), torch.finfo(dtype).min)


def _mask(*arguments, q_offset=0, allow_is_causal_skip=True, dtype=None, config=None, **others):
    """transformers' mask function: its own boolean mask, made into a bias once for all layers."""
    allowed = sdpa_mask(*arguments, q_offset=q_offset, allow_is_causal_skip=False, **others)
    return bias(allowed, config.n_head, dtype, int(q_offset))


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def factors(heads: int, length: int, scaling: float, dtype: torch.dtype, device: torch.device):
    """ALiBi as a product: (heads, 1, 8) and (length, 8), inner products slope x place / scaling.

    Both are sums of parts that bfloat16 holds exactly, the slope as three (24 bits, as in float32),
    the place as 256 x high + low. Eight, as kernels want sizes divisible by 8; scaling, as they
    scale the products.
    """
    rest, parts = slopes(heads) / scaling, []
    for _ in range(3):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    slope = [256 * part for part in parts] + parts + [torch.zeros(heads)] * 2
    place = torch.arange(length)
    place = [place // 256] * 3 + [place % 256] * 3 + [torch.zeros(length)] * 2
    return (torch.stack(slope, dim=-1)[:, None].to(device, dtype),
            torch.stack(place, dim=-1).to(device, dtype))


def _causal(query, key, value, slope, place, scaling: float, dropout: float) -> torch.Tensor:
    """Causal attention with ALiBi as eight more dimensions of query and key.

    (rows, heads, length, size) each, -> (rows, length, heads, size).
    """
    query = torch.cat([query, slope.expand(*query.shape[:3], 8)], dim=-1)
    key = torch.cat([key, place.expand(*key.shape[:3], 8)], dim=-1)
    mixed = scaled_dot_product_attention(query, key, pad(value, (0, 8)), is_causal=True,
                                         dropout_p=dropout, scale=scaling)
    return mixed[..., :-8].transpose(1, 2)


def _attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """(rows, heads, queries, size) -> (rows, queries, heads, size), and no weights."""
    # Under autocast queries have its type, and the bias has the weights'.
    mixed = scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling,
                                         attn_mask=attention_mask.to(query.dtype))
    return mixed.transpose(1, 2), None


class AlibiAttention(BloomAttention):
    """BloomAttention whose mask is the whole bias, ALiBi included. An empty mask means plain causal
    attention; `alibi` then holds the two `factors`."""

    def forward(self, hidden_states, residual, alibi, attention_mask, layer_past=None, **_):
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        dropout = self.attention_dropout.p if self.training else 0.0
        if attention_mask.numel():
            mixed, _ = _attend(self, query, key, value, attention_mask, self.inv_norm_factor,
                               dropout)
        else:
            mixed = _causal(query, key, value, *alibi, self.inv_norm_factor, dropout)
        return dropout_add(self.dense(mixed.flatten(2)), residual, self.hidden_dropout,
                           self.training), None


class SameTypeNorm(torch.nn.LayerNorm):
    """LayerNorm that gives back bfloat16 for bfloat16: autocast's float32 is twice the bytes for
    all that follows. float16's range is too small for what the layers add up."""

    def forward(self, hidden_states):
        if hidden_states.dtype != torch.bfloat16:
            return super().forward(hidden_states)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return super().forward(hidden_states)


def _documents(model, arguments, options):
    """Before the model's forward: a boolean mask (rows, 1, queries, keys) of one's own becomes the
    bias, no mask an empty one."""
    mask = options.get("attention_mask")
    if mask is None:
        return empty_mask(model, arguments, options)
    if mask.dim() == 4 and mask.dtype == torch.bool:
        dtype = model.word_embeddings_layernorm.weight.dtype
        options["attention_mask"] = bias(mask, model.num_heads, dtype)
    return arguments, options


def _alibi(model, mask: torch.Tensor, heads: int, dtype: torch.dtype):
    """What every layer is given as its alibi: `factors` for an empty mask; nothing where the mask
    holds the whole bias."""
    if mask.numel():
        return mask.new_zeros((1, 1, 1))
    if torch.is_autocast_enabled(mask.device.type):
        dtype = torch.get_autocast_dtype(mask.device.type)
    scaling = model.h[0].self_attention.inv_norm_factor
    return factors(heads, mask.shape[3], scaling, dtype, mask.device)
