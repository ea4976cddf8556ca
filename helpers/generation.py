"""Generate text: the prompts' completions, in batches."""

from functools import lru_cache


def generate(model, tokenizer, prompts: list[str], max_new_tokens: int, batch_size: int | None = None, stop: str | None = None,
             progress=None, **settings) -> list[str]:
    """Generate one completion per prompt, greedily unless `settings` (of transformers' generate) say otherwise.

    Prompts are sorted by length and padded on the left, so that batches waste little. `stop`: a row ends once it has
    written this text after something else. batch_size: prompts at once; None: 32 on a CPU, 256 on a GPU. progress: called
    with the number of prompts done.
    Returns the completions in the order of the prompts, without special tokens.
    """
    import torch
    from transformers import StoppingCriteriaList

    batch_size = batch_size or (256 if model.device.type == "cuda" else 32)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts: list[str] = [""] * len(prompts)
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id, **settings}
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start:start + batch_size]
            batch = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=False)
            batch = batch.to(model.device)
            width = batch["input_ids"].shape[1]
            if stop:
                options["stopping_criteria"] = StoppingCriteriaList([_stop_at(tokenizer, stop, width)])
            with torch.inference_mode():
                output = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options)
            for i, text in zip(chosen, tokenizer.batch_decode(output[:, width:], skip_special_tokens=True), strict=True):
                texts[i] = text
            if progress:
                progress(min(start + batch_size, len(order)))
    finally:
        tokenizer.padding_side = side
        model.train(was_training)
    return texts


def _stop_at(tokenizer, stop: str, width: int):
    """A stopping criterion per row: the newest token holds `stop` and something else was written before."""
    import torch
    from transformers import StoppingCriteria

    holds = _tokens_holding(tokenizer, stop)

    class StopAt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            table = holds.to(input_ids.device)
            new = table[input_ids[:, width:]]  # True where a token holds the stop text
            done = new[:, -1] & (~new).any(dim=1)
            return done if input_ids.shape[1] > width else torch.zeros_like(done)

    return StopAt()


@lru_cache(maxsize=4)
def _tokens_holding(tokenizer, text: str):
    import torch

    return torch.tensor([text in token for token in tokenizer.batch_decode([[i] for i in range(len(tokenizer))])])
