"""Systems side by side on the same rows: base model, its own chat, baselines and the adapter."""

import contextlib
import functools
import os
import re

import numpy as np
import torch

from helpers import WorkbookError, judges
from helpers.adapters import read_adapter
from helpers.data import Collator, encode
from helpers.generation import generate
from helpers.registry import EMBEDDED
from helpers.scoring import estimate, score, summarise, undecidable
from helpers.sql_databases import query_runs
from helpers.tasks import Task, get_task

CHAT = "base, own chat template"
# Systems that need no model, by task: what each answers to a row.
BASELINES = {"detox": {
    "copied": lambda row: row["toxic"],
    "listed words deleted": lambda row: judges.without_listed_words(row["toxic"]),
    "judge's own words deleted": lambda row: judges.without_judged_words(row["toxic"]),
    "human": lambda row: row["neutral"].strip()}}


def compare(task: Task, model, tokenizer, rows: list[dict[str, str]], progress=None, seed: int = 0,
            only: tuple[str, ...] = (), beams: int = 1) -> dict[str, dict]:
    """Every system on the same rows: base, base in its own chat, adapter, and the task's baselines.

    model: a peft model (its active adapter is the one judged). progress: called with (system,
    prompts done). only: of the systems that generate, those named (default: all). beams: more than
    one for SQL: the adapter again, with the first of so many beams whose query runs.
    Returns for every system ``{"answers": [...], "scores": [{metric: number}, ...], "metrics":
    {metric: Estimate}, "undecidable": number of rows that a metric leaves out}``.
    """
    prompts = _prompts(task, tokenizer, rows)
    if only:
        prompts = {system: asked for system, asked in prompts.items() if system in only}
    answers = {}
    for system, texts in _generate_as(task, model, tokenizer, prompts, progress).items():
        read = chat_answer if system == CHAT else Task.answer
        answers[system] = [read(task, text) for text in texts]
    if beams > 1 and task.metric == "execution":
        texts = generate(model, tokenizer, prompts["adapter"], task.max_new_tokens,
                         num_beams=beams, accept=query_runs,
                         progress=progress and functools.partial(progress, f"{beams} beams"))
        answers[f"adapter, {beams} beams"] = [task.answer(text) for text in texts]
    for system, answer in BASELINES.get(task.name, {}).items():
        answers[system] = [answer(row) for row in rows]
    systems = {system: {"answers": given, "scores": score(task, given, rows)}
               for system, given in answers.items()}
    if task.name == "detox":
        _add_detox_scores(systems, model, tokenizer, rows)
    if task.name == "instruct":
        references = [task.completion(row) for row in rows]
        for name, system in systems.items():
            with _as(model, name):
                _add(system, loss=token_losses(model, tokenizer, prompts[name], references))
    for system in systems.values():
        system["metrics"] = summarise(system["scores"], seed)
        system["undecidable"] = undecidable(system["scores"])
    return systems


def verifiable(task: Task, model, tokenizer, every: int = 1, progress=None,
               seed: int = 0) -> dict[str, dict]:
    """Base, base in its own chat, and adapter on instructions that a program can check, as
    `compare` returns them; metrics: the share passed, in all and by kind."""
    asked = judges.verifiable_instructions()[::every]
    rows = [{"instruction": one.instruction, "input": ""} for one in asked]
    prompts = _prompts(task, tokenizer, rows)
    systems = {}
    for name, answers in _generate_as(task, model, tokenizer, prompts, progress).items():
        passed = {"passed": []}
        for one, answer in zip(asked, answers, strict=True):
            value = float(one.passes(answer))
            passed["passed"].append(value)
            passed.setdefault(one.kind, []).append(value)
        systems[name] = {"answers": answers,
                         "scores": [{"passed": value} for value in passed["passed"]],
                         "metrics": {kind: estimate(some, seed) for kind, some in passed.items()}}
    return systems


def token_losses(model, tokenizer, prompts: list[str] | list[list[int]],
                 completions: list[str]) -> list[float]:
    """Mean cross-entropy (nats) per token of each completion and its end-of-text token, given its
    prompt."""
    batch_size = 128 if model.device.type == "cuda" else 16
    rows = [encode(tokenizer, *pair) for pair in zip(prompts, completions, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    losses, collate = [0.0] * len(rows), Collator(tokenizer.pad_token_id)
    for start in range(0, len(order), batch_size):
        chosen = order[start:start + batch_size]
        batch = {name: tensor.to(model.device)
                 for name, tensor in collate([rows[i] for i in chosen]).items()}
        targets = batch.pop("labels")[:, 1:]
        with torch.inference_mode():
            logits = model(**batch).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none",
                                                 ignore_index=-100)
        means = each.sum(dim=1) / (targets != -100).sum(dim=1)
        for i, mean in zip(chosen, means.tolist(), strict=True):
            losses[i] = mean
    return losses


def chat_prompts(tokenizer, messages: list[str]) -> list[list[int]]:
    """Token ids of user messages in the tokenizer's chat template, up to where an answer begins."""
    turns = [[{"role": "user", "content": text}] for text in messages]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def chat_answer(task: Task, text: str) -> str:
    """A chat model's answer, as a fair reader takes it: the content of its code block, if any."""
    block = re.search(r"```\w*\n(.*?)(?:```|$)", text, re.DOTALL)
    return task.answer(" ".join(block[1].split()) if block and task.stop else text)


def check_parameters(parameters: dict) -> None:
    """What the evaluation job checks before a kernel starts. Raises WorkbookError."""
    info = read_adapter(parameters["adapter"], parameters.get("base_model") or EMBEDDED)
    if not (parameters.get("task") or info.task):
        raise WorkbookError(f"The adapter {info.name} does not say what task it is for: give one "
                            "with -p task=sql.")
    get_task(parameters.get("task") or info.task)
    for name in ("eval_rows", "instructions", "beams"):
        if parameters[name] < 1:
            raise WorkbookError(f"{name} is {parameters[name]}: it must be at least 1.")
    if parameters.get("tried") and not os.path.isdir(parameters["tried"]):
        raise WorkbookError(f"tried is {parameters['tried']!r}, which is not an existing folder of "
                            "runs.")


def _prompts(task: Task, tokenizer, rows: list[dict[str, str]]) -> dict[str, list]:
    """What each system is asked: the task's prompt, or a chat if the tokenizer has a template."""
    prompts = {"base": [task.prompt(row) for row in rows]}
    if tokenizer.chat_template:
        prompts[CHAT] = chat_prompts(tokenizer, [task.chat(row) for row in rows])
    return {**prompts, "adapter": prompts["base"]}


def _as(model, system: str):
    """For a with block: the adapter acts in the system "adapter" alone."""
    return contextlib.nullcontext() if system == "adapter" else model.disable_adapter()


def _generate_as(task: Task, model, tokenizer, prompts: dict[str, list],
                 progress) -> dict[str, list[str]]:
    """What each system writes, a chat up to the end-of-text token, others to the stop text."""
    texts = {}
    for system, asked in prompts.items():
        stop = None if system == CHAT else task.stop
        said = progress and functools.partial(progress, system)
        with _as(model, system):
            texts[system] = generate(model, tokenizer, asked, task.max_new_tokens, stop=stop,
                                     progress=said)
    return texts


def _add(system: dict, **metrics: list[float]) -> None:
    """Add a metric's values to a system's scores, row by row."""
    for name, values in metrics.items():
        for scores, value in zip(system["scores"], values, strict=True):
            scores[name] = value


def _add_detox_scores(systems: dict, model, tokenizer, rows: list[dict[str, str]]) -> None:
    """style, similarity, fluency and joint, their product (Logacheva and others 2022, ParaDetox,
    section 5).

    style: 1 when the classifier finds the answer inoffensive. similarity: to the toxic text.
    fluency: 1 when the base model finds the answer no more surprising, per token, than 95% of the
    human answers. An empty answer is not fluent.
    """
    before = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    losses = {}
    with model.disable_adapter():
        for name, system in systems.items():
            losses[name] = token_losses(model, tokenizer, [before] * len(rows), system["answers"])
    limit = float(np.quantile(losses["human"], 0.95))
    for name, system in systems.items():
        answers = system["answers"]
        style = [float(chance < 0.5) for chance in judges.offensive(answers)]
        same = judges.similarity([row["toxic"] for row in rows], answers)
        fluency = [float(bool(answer.strip()) and loss <= limit)
                   for answer, loss in zip(answers, losses[name], strict=True)]
        joint = [s * max(m, 0.0) * f for s, m, f in zip(style, same, fluency, strict=True)]
        _add(system, style=style, similarity=same, fluency=fluency, joint=joint)
