"""What a loaded model does, found by letting a few tokens through it: no list of architectures."""

from __future__ import annotations

import math
import re
import weakref

import torch
from transformers.pytorch_utils import Conv1D

from helpers import WorkbookError

PASSED = weakref.WeakSet()  # models that `check` found fit
# A token goes to few experts, and which ones is left as it was.
ROUTED = re.compile(r"router|(^|[._])gate$|experts\.\d")


def check(model) -> None:
    """Raise WorkbookError for a model that cannot be trained and asked in batches: one that does
    not read or write plain text, in which a token sees later ones (it would learn to copy), or
    whose answer changes with the padding beside it. A model that has passed is not asked again.
    """
    if model in PASSED:
        return
    ids = sample_ids(model, 1, 16)
    short, padding, other = ids[:, :12], ids[:, 12:], ids.clone()
    other[0, -1] += 1
    mask = torch.ones_like(ids.repeat(3, 1))
    mask[2, 12:] = 0
    with torch.no_grad():
        batch = torch.cat([ids, other, ids])
        whole, changed, padded = head_inputs(model, batch, attention_mask=mask)
        alone, written = head_inputs(model, short)[0], _written(model, short, mask[:1, :12])
        left = _written(model, torch.cat([padding, short], 1), mask[2:].flip(1))
        head_inputs(model.train(), ids)  # some do other things then
    model.eval()
    if not torch.isfinite(written).all():
        raise _refusal(model, "its results are not finite numbers, so its weights may not be")
    if apart(changed[:-1], whole[:-1], model.dtype):
        raise _refusal(model, "a token in this one sees those that follow it")
    if apart(padded[:12], alone, model.dtype) or apart(left, written, model.dtype):
        raise _refusal(model, "padding beside a text changes what this one makes of it")
    PASSED.add(model)


def sample_ids(model, rows: int, length: int) -> torch.Tensor:
    """Ordinary tokens, (rows, length): special ones stand at a vocabulary's ends."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = size // 2 + torch.arange(rows * length) * 7 % (size // 4)
    return ids.view(rows, length).to(model.device)


def head_inputs(model, ids: torch.Tensor, **options) -> torch.Tensor:
    """What the output head is given for token ids (rows, length): (rows, length, hidden). The head
    itself computes one place only. Raises WorkbookError where the model cannot read plain text."""
    seen = []

    def keep(module, arguments):
        seen.append(arguments[0])
        return arguments[0][:, -1:], *arguments[1:]

    try:
        hook = model.get_output_embeddings().register_forward_pre_hook(keep)
        with hook, torch.no_grad():
            model(input_ids=ids, use_cache=False, **options)
        return seen.pop().reshape(*ids.shape, -1).float()
    except Exception as error:  # whatever an architecture raises, it is no base model for text
        raise _refusal(model, f"this one fails on plain text ({error!r:.150})") from error


def _written(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The logits, (2, vocabulary), of two tokens as generate computes them; the first is given."""
    try:
        answer = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False, num_beams=1,
            pad_token_id=0, prefix_allowed_tokens_fn=lambda row, before: [int(ids[0, -1])],
            output_logits=True, return_dict_in_generate=True)
        return torch.cat(answer.logits).float()
    except Exception as error:
        raise _refusal(model, f"this one cannot write text ({error!r:.150})") from error


def _refusal(model, reason: str) -> WorkbookError:
    return WorkbookError(f"{model.config.model_type} models cannot be used here, as {reason}: "
                         "choose another base_model, or another precision.")


def apart(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two results differ by more than the rounding of `dtype`: on average over the places,
    by more than 0.1% of a place's length (16 bits: 15%).

    On one H200 rounding in bfloat16 alone moved 8B shapes by up to 4% and the embedded base by 3%;
    documents that see each other move both by 50% and more.
    """
    change = (got - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)
    return not change.mean() < (1e-3 if dtype == torch.float32 else 0.15)


def plain_linear_layers(model) -> list[str]:
    """Full names of the linear layers of the blocks that text passes through.

    Left out are the output head, layers that text does not reach (of a picture's encoder), routed
    experts and their routers, and items of a list.
    """
    plain, hooks = set(), []

    def note(module, arguments, output):
        if arguments and getattr(output, "shape", ())[:-1] == arguments[0].shape[:-1]:
            plain.add(module)

    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            hooks.append(module.register_forward_hook(note))
    try:
        head_inputs(model, sample_ids(model, 1, 16))
    finally:
        for hook in hooks:
            hook.remove()
    plain.discard(model.get_output_embeddings())
    return [name for name, module in model.named_modules() if module in plain and "." in name
            and not ROUTED.search(name) and not name[-1].isdigit()]


def most_tokens(model) -> int | None:
    """How many tokens a model's positions reach, where its config says so."""
    config = model.config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_seq_len", "max_target_positions")
    found = (getattr(config, name, None) for name in names)
    return next((number for number in found if number and number > 0), None)  # XLNet's is -1


def shares(model) -> tuple[float, float]:
    """Of the weights that are no token's vector: the share that LoRA adapts, and that in 4 bits."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    every = adapted = packed = 0
    for name, module in model.named_modules():
        state = getattr(module, "quant_state", None)  # shared weights are packed in another type
        for kind, weight in module.named_parameters(recurse=False):
            if module not in tables and "lora_" not in name:
                in_4bit = state is not None and kind == "weight"
                numbers = math.prod(state.shape) if in_4bit else weight.numel()
                every += numbers
                adapted += numbers * name.endswith(".base_layer")
                packed += numbers * in_4bit
    return adapted / every, packed / every
