"""BLOOM through torch's fused attention. transformers computes BLOOM's attention step by step, and every row of a batch as one
document; here it is one call of scaled_dot_product_attention, and a mask can keep the documents of a packed row apart.

ALiBi (arXiv:2108.12409, section 3) has no positional embeddings: head h adds slope_h x (key's place - query's place) to its
scores. A softmax over keys does not change when a query's scores all move by the same amount, so a packed document needs
no positions of its own: it only has to be masked from the others.
"""

import torch
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor, dropout_add

NAME = "alibi_sdpa"  # under this name attention and mask are registered with transformers


def slopes(heads: int) -> torch.Tensor:
    """ALiBi's slope of each head, (heads,), float32, as transformers computes them: what it adds at the second place."""
    return build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]


def bias(allowed: torch.Tensor, heads: int, dtype: torch.dtype, first_query: int = 0) -> torch.Tensor:
    """What is added to the scores: ALiBi where `allowed` (rows, 1, queries, keys) is True, -> (rows, heads, queries, keys).

    first_query: the place of the first query among the keys. Distances, not places, so that bfloat16 is exact near the query.
    Every query sees itself, padding too: a softmax over no key at all has no gradient.
    """
    queries = torch.arange(first_query, first_query + allowed.shape[2], device=allowed.device)
    keys = torch.arange(allowed.shape[3], device=allowed.device)
    distance = keys[None, :] - queries[:, None]
    alibi = slopes(heads).to(allowed.device)[:, None, None] * distance
    return torch.where(allowed | (distance == 0), alibi.to(dtype), torch.finfo(dtype).min)


def _mask(*arguments, q_offset=0, allow_is_causal_skip=True, dtype=None, config=None, **others) -> torch.Tensor:
    """transformers' mask function: its own boolean mask, made into a bias once for all layers."""
    allowed = sdpa_mask(*arguments, q_offset=q_offset, allow_is_causal_skip=False, **others)
    return bias(allowed, config.n_head, dtype, int(q_offset))


def _attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """transformers' attention function: query (rows, heads, queries, size), -> (rows, queries, heads, size), and no weights."""
    # Under autocast the norms stay in float32, and so would a bias made from them.
    mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask.to(query.dtype),
                                                             dropout_p=dropout, scale=scaling)
    return mixed.transpose(1, 2), None


class AlibiAttention(BloomAttention):
    """BloomAttention whose mask is the whole bias, ALiBi included."""

    def forward(self, hidden_states, residual, alibi, attention_mask, layer_past=None, use_cache=False, output_attentions=False,
                **_):
        if output_attentions:  # weights are only seen step by step; the bias holds ALiBi already
            return super().forward(hidden_states, residual, torch.zeros_like(alibi), attention_mask, layer_past, use_cache, True)
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        dropout = self.attention_dropout.p if self.training else 0.0
        mixed, _ = _attend(self, query, key, value, attention_mask, self.inv_norm_factor, dropout)
        return dropout_add(self.dense(mixed.flatten(2)), residual, self.hidden_dropout, self.training), None


def _documents(model, arguments, options):
    """Before the model's forward: a boolean mask (rows, 1, queries, keys) of one's own becomes the bias."""
    mask = options.get("attention_mask")
    if mask is not None and mask.dim() == 4 and mask.dtype == torch.bool:
        options["attention_mask"] = bias(mask, model.num_heads, model.word_embeddings_layernorm.weight.dtype)
    return arguments, options


def use_fused_attention(model) -> None:
    """Change a loaded BloomForCausalLM in place: fused attention, masks of one's own, torch's fused GELU (the same formula)."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    backbone = model.transformer
    backbone.config._attn_implementation = NAME
    original = backbone.build_alibi_tensor
    # Every layer is given an alibi that it does not use; the original cannot make one for a mask of four dimensions.
    backbone.build_alibi_tensor = lambda mask, heads, dtype: (
        mask.new_zeros((1, 1, 1)) if mask.dim() == 4 else original(mask, heads, dtype))
    backbone.register_forward_pre_hook(_documents, with_kwargs=True)
    for block in backbone.h:
        block.self_attention.__class__ = AlibiAttention
        block.mlp.gelu_impl = torch.nn.GELU(approximate="tanh")
