"""Generation: answers are written in batches, until the model, a text or a person ends them."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from helpers import check_numbers
from helpers.data import prompt_ids
from helpers.fast.writing import quick


@dataclass(frozen=True)
class Settings:
    """How an answer is generated: greedily, unless `sample`.

    top_k: 0 is off; beams: of a beam search (1: none), of which SQL takes the first whose query
    runs; repetition_penalty: Keskar et al. 2019, arXiv:1909.05858, section 4.1 (1: none);
    stop: text that ends an answer ("": none does).
    """

    max_new_tokens: int = 64
    sample: bool = False
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    beams: int = 1
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: str = ""

    def check(self) -> None:
        """Raise WorkbookError that names the first setting which is out of range."""
        check_numbers(self, (
            ("max_new_tokens", 1, 4096), ("temperature", 0.01, 10), ("top_p", 0.01, 1),
            ("top_k", 0, 10_000), ("beams", 1, 16), ("repetition_penalty", 0.5, 5),
            ("seed", 0, 2**32 - 1)))

    def options(self) -> dict:
        """Arguments of transformers' generate: all of them, so that no model's defaults leak in."""
        draw = self if self.sample else Settings(temperature=1.0, top_p=1.0, top_k=50)  # neutral
        return {"max_new_tokens": self.max_new_tokens, "do_sample": self.sample,
                "num_beams": self.beams, "repetition_penalty": float(self.repetition_penalty),
                "temperature": float(draw.temperature), "top_p": float(draw.top_p),
                "top_k": draw.top_k}


@dataclass(frozen=True)
class Answer:
    """One answer. adapter: None is the base model; tokens: without the end-of-text token;
    first_token_seconds and seconds: since its batch began; stopped: by a person."""

    adapter: str | None
    prompt: str
    text: str
    tokens: int
    swap_seconds: float
    first_token_seconds: float
    seconds: float
    stopped: bool

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token, which the prompt's own pass writes; 0 for a single token."""
        after = self.seconds - self.first_token_seconds
        return (self.tokens - 1) / after if self.tokens > 1 and after > 0 else 0.0


def generate(model, tokenizer, prompts: list[str] | list[list[int]], max_new_tokens: int,
             batch_size: int | None = None, stop: str | None = None,
             progress: Callable[[int], None] | None = None, **settings) -> list[str]:
    """One completion per prompt (text or token ids, see data.prompt_ids), in their order.

    Greedy, unless `settings` (of transformers' generate) say otherwise. batch_size: prompts at once
    (None: 32 on a CPU, 256 on a GPU). stop: text that ends a completion. progress: called with the
    number of prompts done.
    """
    batch_size = batch_size or (256 if model.device.type == "cuda" else 32)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, **settings}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts, was_training = [""] * len(prompts), model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start:start + batch_size]
            batch = [prompts[i] for i in chosen]
            answers = write_batch(model, tokenizer, batch, stop or "", **options)
            for i, answer in zip(chosen, answers, strict=True):
                texts[i] = answer.text
            if progress:
                progress(start + len(chosen))
    finally:
        model.train(was_training)
    return texts


def write_batch(model, tokenizer, prompts: list[str] | list[list[int]], stop_text: str = "",
                on_text: Callable[[list[str]], None] | None = None,
                halt: threading.Event | None = None,
                accept: Callable[[str, str], bool] | None = None, **options) -> list[Answer]:
    """Complete prompts in one batch, padded on the left.

    A row ends at one of `end_ids`, or at `stop_text` after something that is not blank; all end
    when `halt` is set. on_text: called with all rows' texts so far after each token. accept: given
    a prompt and a text; of a prompt's beams the most probable that it accepts is the answer, or
    the most probable. options: of transformers' generate.
    """
    asked = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    batch = tokenizer.pad({"input_ids": asked}, padding_side="left", return_attention_mask=True,
                          return_tensors="pt").to(model.device)
    ends = end_ids(model, tokenizer)
    pad, width = tokenizer.pad_token_id, batch["input_ids"].shape[1]
    watch = _Watch(tokenizer, width, stop_text, on_text, halt)
    options = {"pad_token_id": pad, "eos_token_id": sorted(ends) or None, **options}
    beams = options.get("num_beams", 1)
    if accept:
        options["num_return_sequences"] = beams
    with torch.inference_mode(), quick(model, options["pad_token_id"], beams):
        output = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            stopping_criteria=StoppingCriteriaList([watch]), **options)
    seconds, answers, written = time.perf_counter() - watch.start, [], []
    for row in output[:, width:].tolist():
        tokens = next((i for i, token in enumerate(row) if token in ends | {pad}), len(row))
        written.append((tokenizer.decode(row[:tokens], skip_special_tokens=True), tokens))
    each = len(written) // len(prompts)
    for i, prompt in enumerate(prompts):
        found = written[i * each:(i + 1) * each]
        good = (one for one in found if accept and accept(prompt, one[0]))
        text, tokens = next(good, found[0])
        answers.append(Answer(None, prompt, text, tokens, 0.0, watch.first_seconds, seconds,
                              watch.stopped))
    return answers


def end_ids(model, tokenizer) -> set[int]:
    """The tokens that end a text: the tokenizer's and those of the model's generation config."""
    own = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}


class _Watch(StoppingCriteria):
    """Called after each token: tells the texts so far, and says which rows end."""

    def __init__(self, tokenizer, width, stop_text, on_text, halt):
        self.tokenizer, self.width, self.stop_text = tokenizer, width, stop_text
        self.on_text, self.halt, self.stopped = on_text, halt, False
        self.start, self.first_seconds = time.perf_counter(), 0.0

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        """input_ids: [rows, width + tokens written]. Returns [rows], True where a row ends."""
        self.first_seconds = self.first_seconds or time.perf_counter() - self.start
        written = input_ids[:, self.width:]
        if self.on_text:
            self.on_text(self.tokenizer.batch_decode(written, skip_special_tokens=True))
        self.stopped = self.halt is not None and self.halt.is_set()
        done = torch.full((len(written),), self.stopped, device=input_ids.device)
        for row, token in enumerate(written[:, -1].tolist() if self.stop_text else []):
            if _may_end(self.tokenizer, self.stop_text, token):  # else no look at the whole text
                text = self.tokenizer.decode(written[row], skip_special_tokens=True)
                done[row] |= self.stop_text in text.lstrip()
        return done


@lru_cache(maxsize=100_000)
def _may_end(tokenizer, stop_text: str, token: int) -> bool:
    """Whether a token holds the stop text's last character, or bytes that may be a part of it."""
    text = tokenizer.decode([token, token])  # twice: some drop the blank before the first token
    return stop_text[-1] in text or "\ufffd" in text
