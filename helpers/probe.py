"""What a loaded model does, found by letting a few tokens through it: no list of architectures.

Whether it is causal, which linear layers text passes through, and whether two documents in one row
stay apart.
"""

from __future__ import annotations

import re
import weakref

import torch
from transformers.pytorch_utils import Conv1D

from helpers import WorkbookError

PASSED = weakref.WeakSet()  # models that `check` found fit
# A token goes to few experts, and which ones is left as it was.
ROUTED = re.compile(r"router|(^|[._])gate$|experts\.\d")


def sample_ids(model, rows: int, length: int) -> torch.Tensor:
    """Ordinary tokens, (rows, length): special ones stand at a vocabulary's ends."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = size // 2 + torch.arange(rows * length) * 7 % (size // 4)
    return ids.view(rows, length).to(model.device)


def head_inputs(model, ids: torch.Tensor, **options) -> torch.Tensor:
    """What the output head is given for token ids (rows, length): (rows, length, hidden). The head
    itself computes one place only. Raises WorkbookError where the model cannot read plain text."""
    seen, head = [], model.get_output_embeddings()

    def keep(module, arguments):
        seen.append(arguments[0])
        return arguments[0][:, -1:], *arguments[1:]

    hook = head.register_forward_pre_hook(keep) if head is not None else None
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False, **options)
    except Exception as error:  # whatever an architecture raises, it is no base model for text
        raise _fails(model, error) from error
    finally:
        if hook:
            hook.remove()
    if len(seen) != 1 or seen[0].shape[:2] != ids.shape:
        raise WorkbookError(f"{model.config.model_type} models cannot be used here, as their "
                            "output head is not one layer behind all others: choose a causal "
                            "language model of text.")
    return seen[0].float()


def _fails(model, error: Exception) -> WorkbookError:
    return WorkbookError(f"{model.config.model_type} models cannot be used here, as this one fails "
                         f"on plain text ({type(error).__name__}: {error!s:.150}): choose another "
                         "base model, or another precision.")


def apart(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two results differ by more than the rounding of `dtype`: on average over the places,
    by more than 0.1% of a place's length (16 bits: 3%)."""
    change = (got - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)
    return not change.mean() < (1e-3 if dtype == torch.float32 else 0.03)


def check(model, max_length: int) -> None:
    """Raise WorkbookError for a model that cannot be trained and asked in batches: one that does
    not read or write plain text, in which a token sees later ones (it would learn to copy), or
    whose answer changes with the padding beside it.

    max_length: of training rows, in tokens. A model that has passed is not asked again.
    """
    if model in PASSED:
        return
    about = f"{model.config.model_type} models cannot be used here"
    ids = sample_ids(model, 1, longer_than(model, "index_topk|keep_window", max_length))
    cut = ids.shape[1] // 4
    short, padding, other = ids[:, cut:], ids[:, :cut], ids.clone()
    other[0, -1] += 1
    batch = torch.cat([ids, other, torch.cat([short, padding], 1)])
    mask = torch.ones_like(batch)
    mask[2, -cut:] = 0
    whole, changed, padded = head_inputs(model, batch, attention_mask=mask)
    alone = head_inputs(model, short)[0]
    if apart(changed[:-1], whole[:-1], model.dtype):
        raise WorkbookError(f"{about}, as in this one a token sees those that follow it: choose a "
                            "causal language model of text.")
    left = torch.cat([padding, short], 1), mask[2:].flip(1)
    written = _written(model, short, torch.ones_like(short)), _written(model, *left)
    if apart(padded[:-cut], alone, model.dtype) or apart(*written, model.dtype):
        raise WorkbookError(f"{about}, as padding beside a text changes what this one makes of it: "
                            "choose another base model.")
    try:
        head_inputs(model.train(), ids)
    finally:
        model.eval()
    PASSED.add(model)


def _written(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The logits, (2, vocabulary), of two tokens as generate computes them; the first is always the
    same one."""
    try:
        answer = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False, num_beams=1,
            pad_token_id=0, prefix_allowed_tokens_fn=lambda row, before: [int(ids[0, -1])],
            output_logits=True, return_dict_in_generate=True)
    except Exception as error:
        raise _fails(model, error) from error
    return torch.cat(answer.logits).float()


def longer_than(model, names: str, max_length: int) -> int:
    """Twice the largest number of the config of such a name that is below a row's length, as far
    as rows go; at least 16 tokens."""
    config = model.config.get_text_config(decoder=True).to_dict()
    numbers = [value for name, value in config.items() if re.search(names, name)
               and isinstance(value, int) and value < max_length]
    return min(max_length, max([16, *(2 * value for value in numbers)]))


def plain_linear_layers(model) -> list[str]:
    """Full names of the linear layers of the blocks that text passes through, as they stand.

    Left out are the output head, layers that text does not reach (of a picture's encoder), routed
    experts and their routers, and items of a list.
    """
    head, plain, hooks = model.get_output_embeddings(), set(), []

    def note(module, arguments, output):
        if isinstance(output, torch.Tensor) and arguments:
            if output.shape[:-1] == arguments[0].shape[:-1]:
                plain.add(module)

    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head:
            hooks.append(module.register_forward_hook(note))
    try:
        head_inputs(model, sample_ids(model, 1, 16))
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name, module in model.named_modules() if module in plain and "." in name
            and not ROUTED.search(name) and not name[-1].isdigit()]


def most_tokens(model) -> int | None:
    """How many tokens a model's positions reach, where its config says so."""
    config = model.config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_seq_len", "max_target_positions")
    found = (getattr(config, name, None) for name in names)
    return next((number for number in found if number and number > 0), None)  # XLNet's is -1


def shares(model) -> tuple[float, float]:
    """Of the weights that are no token's vector: the share that LoRA adapts, and the share that is
    in 4 bits. Experts that are stacked in one tensor are neither."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    every = adapted = packed = 0
    for name, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            if module in tables or "lora_" in name:
                continue
            in_4bit = weight.dtype == torch.uint8
            numbers = weight.numel() * (1 + in_4bit)  # two a byte
            every += numbers
            adapted += numbers * name.endswith(".base_layer")
            packed += numbers * in_4bit
    return adapted / every, packed / every
