"""Answers on a CPU: products by a faster library, and rows that have ended leave the batch."""

from __future__ import annotations

from contextlib import contextmanager
from functools import wraps

import torch
from peft.tuners import lora
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

SMALL = 64  # columns; of a thinner matrix, as LoRA's are, oneDNN's own start is the larger part
LEAVING = 0.75  # rows leave when at most so many are left: each time the cache is copied


@contextmanager
def quick(model, pad: int, beams: int):
    """A model in eval mode that writes faster, for a with block under torch.inference_mode.

    Only on a CPU. What changes: plain float32 linear layers, and PEFT's LoRA on them with the
    adapters that act when the block begins; results differ by rounding alone. All else, such as
    4-bit weights, DoRA and what has a forward of its own already, stays as it was. With one of
    `beams`, ended rows, which generate goes on with by the token `pad`, leave the batch.
    """
    changed, whole = [], getattr(model, "get_base_model", lambda: model)()
    try:
        if beams == 1 and _may_leave(whole):
            whole.forward = _without_ended(whole, pad)
            changed.append(whole)
        for layer in model.modules():
            forward = None if "forward" in vars(layer) or layer.training else _faster(layer)
            if forward:
                layer.forward = forward
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            del layer.forward


def _faster(layer):
    """A faster forward for a layer; None where there is none."""
    if type(layer) is lora.Linear:
        return _with_adapters(layer) if _plain(layer.base_layer) else None
    return _product(layer) if _plain(layer) else None


def _plain(layer) -> bool:
    """Whether oneDNN can stand for the layer's own product."""
    return (type(layer) is torch.nn.Linear and layer.weight.dtype == torch.float32
            and layer.weight.device.type == "cpu" and min(layer.weight.shape) >= SMALL
            and hasattr(torch.ops.mkldnn, "_linear_pointwise"))  # not in every build of torch


def _product(layer):
    """The forward of a linear layer: torch's own uses MKL, the slower library for this."""
    multiply, weight, bias = torch.ops.mkldnn._linear_pointwise, layer.weight, layer.bias
    return lambda x: multiply(x, weight, bias, "none", [], "")


def _with_adapters(layer):
    """The forward of a LoRA layer: an adapter's part is added in place. PEFT's has a copy more for
    the scaling and one for the sum. None for what is not LoRA as in the paper."""
    acting = [key for key in layer.active_adapters if key in layer.lora_A]
    if layer.merged or layer.disable_adapters or any(
            key in layer.lora_variant or layer.lora_B[key].bias is not None for key in acting):
        return None
    base, usual = layer.base_layer, layer.forward
    parts = [(layer.lora_A[key].weight.T, layer.lora_B[key].weight.T, layer.scaling[key])
             for key in acting]

    def forward(x, *arguments, **options):
        if arguments or options:  # of PEFT's own mixed batches
            return usual(x, *arguments, **options)
        result, rows = base(x), x.reshape(-1, x.shape[-1])
        flat = result.view(-1, result.shape[-1])
        for a, b, scaling in parts:
            torch.addmm(flat, rows @ a, b, alpha=scaling, out=flat)
        return result

    return forward


def _may_leave(model) -> bool:
    """Whether rows can leave a batch: on a CPU, where all that a model keeps of them is
    transformers' usual cache, and no layer has a forward of its own, which may count rows."""
    if (model.device.type != "cpu" or model.training or not model._supports_default_dynamic_cache()
            or any("forward" in vars(layer) for layer in model.modules())
            or type(model)._prepare_cache_for_generation
            is not GenerationMixin._prepare_cache_for_generation):
        return False
    kept = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return bool(kept) and all(type(layer) is DynamicLayer for layer in kept)


def _without_ended(model, pad: int):
    """A model's forward for generate: a row whose token is `pad` leaves; then its logits are 0."""
    usual, rows = model.forward, None  # rows: those that are left, as numbers of the whole batch

    @wraps(usual)  # generate looks at its arguments' names
    def forward(input_ids=None, past_key_values=None, **options):
        nonlocal rows
        options |= {"input_ids": input_ids, "past_key_values": past_key_values}
        tensors = {name: one for name, one in options.items() if isinstance(one, torch.Tensor)}
        if (past_key_values is None or not past_key_values.get_seq_length()  # the prompts
                or any(len(one) != len(input_ids) for one in tensors.values())):
            return usual(**options)
        rows = torch.arange(len(input_ids)) if rows is None else rows
        live = (input_ids[rows, -1] != pad).nonzero()[:, 0]
        if 0 < len(live) <= LEAVING * len(rows):
            past_key_values.batch_select_indices(live)
            rows = rows[live]
        if len(rows) == len(input_ids):
            return usual(**options)
        found = usual(**options | {name: one[rows] for name, one in tensors.items()})
        logits = found.logits.new_zeros(len(input_ids), *found.logits.shape[1:])
        found.logits = logits.index_copy(0, rows, found.logits)
        return found

    return forward
