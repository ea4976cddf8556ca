"""The metrics: how generated answers are judged, per row, and summed up with an interval.

SQL is judged by exact match after normalisation (sqlglot) and by execution on databases built to tell two queries
apart; text by chrF (sacrebleu) and ROUGE-L. Every number that is reported comes with a bootstrap interval.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import re
import sqlite3
import time
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from helpers import WorkbookError, judges
from helpers.generation import generate
from helpers.tasks import Task, get_task

logging.getLogger("sqlglot").setLevel(logging.ERROR)  # that a model's text is no query is a score, not a warning

# --------------------------------------------------------------------------------------------------------- intervals


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` rows with its 95% bootstrap interval [low, high]."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


def bootstrap(values: list[float], seed: int = 0, samples: int = 2000) -> Estimate:
    """Mean of per-row values with a 95% percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13)."""
    import numpy as np

    data = np.asarray(values, dtype=float)
    if data.size == 0:
        raise ValueError("bootstrap needs at least one value")
    draws = np.random.default_rng(seed).integers(0, data.size, size=(samples, data.size))
    low, high = np.quantile(data[draws].mean(axis=1), [0.025, 0.975])
    return Estimate(float(data.mean()), float(low), float(high), int(data.size))


# --------------------------------------------------------------------------------------------------------------- SQL


def normalise_sql(query: str) -> str | None:
    """The query in one canonical spelling (case of keywords and names, spacing), or None when it does not parse."""
    import sqlglot
    from sqlglot.errors import SqlglotError
    from sqlglot.optimizer.normalize_identifiers import normalize_identifiers

    try:
        tree = sqlglot.parse_one(query, dialect="sqlite")
        for identifier in tree.find_all(sqlglot.exp.Identifier):
            identifier.set("quoted", False)  # "name" and name are the same column
        return normalize_identifiers(tree, dialect="sqlite").sql(dialect="sqlite", comments=False)
    except (SqlglotError, RecursionError, ValueError):
        return None


def sql_exact(answer: str, reference: str) -> bool:
    """Whether two queries are the same after normalisation."""
    normal = normalise_sql(answer)
    return normal is not None and normal == normalise_sql(reference)


_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_FORBIDDEN_FUNCTIONS = {"load_extension", "randomblob", "zeroblob", "random"}


def run_sql(connection: sqlite3.Connection, query: str, seconds: float = 1.0, max_rows: int = 1000):
    """Run one query of a model: it can only read, for a limited time, and returns a limited number of rows.

    Returns ``(column names, rows)``. Raises sqlite3.Error when the query is wrong, forbidden or too slow.
    """

    def authorise(action, first, second, database, trigger):
        if action == sqlite3.SQLITE_FUNCTION and str(second).lower() in _FORBIDDEN_FUNCTIONS:
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK if action in _READS else sqlite3.SQLITE_DENY

    deadline = time.monotonic() + seconds
    connection.set_authorizer(authorise)
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 1000)
    # The deadline is looked at between SQLite's operations. One operation on long texts (instr, LIKE) can take minutes, and
    # a thousand rows of them a gigabyte: so no text beyond 50 kB, and no pattern beyond 200 characters.
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 50_000)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 200)
    try:
        cursor = connection.execute(query)
        if cursor.description is None:
            raise sqlite3.ProgrammingError("the text is not a query")
        rows = cursor.fetchmany(max_rows)
        return [column[0] for column in cursor.description], rows
    except (sqlite3.Warning, ValueError) as error:  # several statements at once; a NUL character
        raise sqlite3.ProgrammingError(str(error)) from error
    finally:
        connection.set_progress_handler(None, 0)
        connection.set_authorizer(None)


def _schema(context: str) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Tables of a context as (name, [(column, is a number)])."""
    import sqlglot
    from sqlglot import exp

    tables = []
    for tree in sqlglot.parse(context, dialect="sqlite"):
        if isinstance(tree, exp.Create):
            numeric = ("INT", "REAL", "NUM", "FLOAT", "DOUB", "DEC")
            kinds = [(column.name, column.args.get("kind")) for column in tree.find_all(exp.ColumnDef)]
            columns = [(name, kind is not None and kind.sql().upper().startswith(numeric)) for name, kind in kinds]
            tables.append((tree.this.this.name, columns))
    return tables


def _literals(query: str) -> tuple[list[str], list[float], dict[str, list]]:
    """Text and number literals of a query, and the literals that each column is compared with."""
    import sqlglot
    from sqlglot import exp
    from sqlglot.errors import SqlglotError

    try:
        tree = sqlglot.parse_one(query, dialect="sqlite")
    except (SqlglotError, RecursionError, ValueError):
        return [], [], {}
    compared: dict[str, list] = {}
    for comparison in tree.find_all(exp.EQ, exp.NEQ, exp.GT, exp.GTE, exp.LT, exp.LTE, exp.Like, exp.Between, exp.In):
        columns = [column.name.lower() for column in comparison.find_all(exp.Column)]
        for literal in comparison.find_all(exp.Literal):
            for column in columns:
                compared.setdefault(column, []).append(_literal_value(literal))
    values = [_literal_value(literal) for literal in tree.find_all(exp.Literal)]
    return [v for v in values if isinstance(v, str)], [v for v in values if not isinstance(v, str)], compared


def _literal_value(literal):
    if literal.is_string:
        return literal.this.replace("%", "").strip() or "x"
    try:
        number = int(literal.this)
    except ValueError:
        number = float(literal.this)
    return number if -(2**62) < number < 2**62 else float(number)  # SQLite's own integers have 64 bits


_MAKES = {sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_CREATE_INDEX, sqlite3.SQLITE_TRANSACTION, sqlite3.SQLITE_READ,
          sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE}


def _make_tables(connection: sqlite3.Connection, context: str) -> None:
    """Run a row's context, which may come from anywhere: it can make tables in this database and do nothing else."""
    deadline = time.monotonic() + 1
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in _MAKES else sqlite3.SQLITE_DENY)
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 1000)
    try:
        connection.executescript(context)
    except ValueError as error:  # a NUL character
        raise sqlite3.ProgrammingError(str(error)) from error
    finally:
        connection.set_progress_handler(None, 0)
        connection.set_authorizer(None)


def fill_databases(context: str, queries: list[str], seed: int = 0, databases: int = 6,
                   rows: int = 24) -> list[sqlite3.Connection]:
    """Random in-memory databases with the context's tables, built to tell the queries apart.

    A column that a query compares with a value holds that value in about a third of the rows (so that every condition
    is met by some rows and missed by others, alone and together), neighbours of it (one more, one less, another case),
    and values used for other columns. Keys are drawn from a small range, so that joins meet.
    Raises sqlite3.Error or sqlglot's error when the context is not a list of CREATE TABLE statements.
    """
    tables = _schema(context)
    texts: list[str] = []
    numbers: list[float] = []
    compared: dict[str, list] = {}
    for query in queries:
        found_texts, found_numbers, found = _literals(query)
        texts += found_texts
        numbers += found_numbers
        for column, values in found.items():
            compared.setdefault(column, []).extend(values)
    connections = []
    for index in range(databases):
        rng = random.Random(f"{seed}/{index}")
        connection = sqlite3.connect(":memory:")
        _make_tables(connection, context)
        for table, columns in tables:
            count = rng.randint(rows // 3, rows) if index else rows
            marks = ", ".join("?" * len(columns))
            chosen = [[_random_value(rng, name.lower(), number, compared, texts, numbers) for name, number in columns]
                      for _ in range(count)]
            chosen += rng.choices(chosen, k=count // 2)  # rows that stand twice show a missing or needless DISTINCT
            connection.executemany(f'INSERT INTO "{table}" VALUES ({marks})', chosen)
        connections.append(connection)
    return connections


def _random_value(rng: random.Random, column: str, number: bool, compared, texts, numbers):
    own = compared.get(column, [])
    if own and rng.random() < 0.55:
        return rng.choice(own)
    if own and rng.random() < 0.4:
        value = rng.choice(own)
        if isinstance(value, str):
            return rng.choice([value.upper(), value.lower(), value + "s"])
        return value + rng.choice([-1, 1])
    if number:
        return rng.choice(numbers) if numbers and rng.random() < 0.15 else rng.randint(1, 9)
    if texts and rng.random() < 0.15:
        return rng.choice(texts)
    return rng.choice(["1", "2", "3", "alpha", "beta", "gamma", "delta", "12", "5"])


def sql_execution(answer: str, reference: str, context: str, seed: int = 0) -> tuple[bool, bool]:
    """Whether two queries return the same on every test database.

    Results are compared as multisets of rows, and in order when the reference orders its rows; column names don't count.
    Returns ``(same, valid)``; valid: the answer ran on all databases. Raises sqlite3.Error when the reference itself
    does not run. A database on which the reference returns nothing says little, so those count only if all are so.
    """
    same, valid = True, True
    ordered = re.search(r"\border\s+by\b", reference, re.IGNORECASE) is not None
    for connection in fill_databases(context, [reference, answer], seed):
        try:
            _, expected = run_sql(connection, reference)
            try:
                _, got = run_sql(connection, answer)
            except sqlite3.Error:
                same = valid = False
                break
            same = same and (got == expected if ordered else Counter(map(repr, got)) == Counter(map(repr, expected)))
        finally:
            connection.close()
    return same, valid


# -------------------------------------------------------------------------------------------------------------- text


def chrf(answer: str, reference: str) -> float:
    """Sentence chrF in [0, 1]: F-score of character n-grams up to 6, beta 2 (Popovic 2015; sacrebleu)."""
    return _chrf().sentence_score(answer, [reference]).score / 100


@lru_cache(maxsize=1)
def _chrf():
    from sacrebleu.metrics import CHRF

    return CHRF(eps_smoothing=True)


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L in [0, 1]: F1 of the longest common subsequence of lower-cased words (Lin 2004)."""
    a, b = re.findall(r"\w+", answer.lower()), re.findall(r"\w+", reference.lower())
    if not a or not b:
        return 0.0
    lengths = [0] * (len(b) + 1)
    for word in a:
        previous = 0
        for j, other in enumerate(b, start=1):
            previous, lengths[j] = lengths[j], previous + 1 if word == other else max(lengths[j], lengths[j - 1])
    common = lengths[-1]
    return 2 * common / (len(a) + len(b))


def exact(answer: str, reference: str) -> float:
    """1.0 when the texts are equal after trimming, else 0.0."""
    return float(answer.strip() == reference.strip())


# ------------------------------------------------------------------------------------------------------- a whole task


def score(task: Task, answers: list[str], rows: list[dict[str, str]]) -> list[dict[str, float]]:
    """Per-row metrics of a task's answers: each a number in [0, 1], by metric name.

    Raises WorkbookError when a row's own reference query does not run.
    """
    from sqlglot.errors import SqlglotError

    scored = []
    for answer, row in zip(answers, rows, strict=True):
        reference = task.completion(row)
        if task.name == "sql":
            try:
                same, valid = sql_execution(answer, reference, row["context"])
            except (sqlite3.Error, SqlglotError) as error:
                raise WorkbookError(f"The reference query {reference[:80]!r} does not run on its own table ({error}): correct "
                                    "that validation row or remove it.") from error
            scored.append({"exact": float(sql_exact(answer, reference)), "execution": float(same), "valid": float(valid)})
        else:
            scored.append({"exact": exact(answer, reference), "chrf": chrf(answer, reference),
                           "rouge_l": rouge_l(answer, reference)})
    return scored


def evaluate(task: Task, model, tokenizer, rows: list[dict[str, str]], batch_size: int | None = None, progress=None,
             seed: int = 0) -> dict:
    """Generate an answer for every row, score them, and sum up.

    Returns ``{"metrics": {name: Estimate}, "answers": [...], "scores": [...], "seconds": float, "new_tokens": int}``.
    """
    start = time.perf_counter()
    texts = generate(model, tokenizer, [task.prompt(row) for row in rows], task.max_new_tokens, batch_size, task.stop,
                     progress)
    seconds = time.perf_counter() - start
    answers = [task.answer(text) for text in texts]
    scores = score(task, answers, rows)
    new_tokens = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    return {"metrics": summarise(scores, seed), "answers": answers, "scores": scores, "seconds": seconds,
            "new_tokens": new_tokens}


def summarise(scores: list[dict[str, float]], seed: int = 0) -> dict[str, Estimate]:
    """Each metric's mean over the rows, with its interval."""
    return {name: bootstrap([row[name] for row in scores], seed) for name in scores[0]}


# ---------------------------------------------------------------------------------------------- systems side by side


def check_parameters(parameters: dict) -> None:
    """What the evaluation job checks before a kernel starts. Raises WorkbookError for what cannot be."""
    from helpers import adapters, base_models

    info = adapters.read_adapter(parameters["adapter"], parameters.get("base_model") or base_models.EMBEDDED)
    if not (parameters.get("task") or info.task):
        raise WorkbookError(f"The adapter {info.name} does not say what task it is for: give one with -p task=sql.")
    get_task(parameters.get("task") or info.task)
    for name in ("eval_rows", "instructions"):
        if parameters[name] < 1:
            raise WorkbookError(f"{name} is {parameters[name]}: it must be at least 1.")
    if parameters.get("tried") and not os.path.isdir(parameters["tried"]):
        raise WorkbookError(f"tried is {parameters['tried']!r}, which is not an existing folder of runs.")


def token_losses(model, tokenizer, prompts: list[str], completions: list[str], batch_size: int | None = None) -> list[float]:
    """Mean cross-entropy (nats) per token of each completion and its end-of-text token, given its prompt."""
    import torch

    from helpers.data import Collator, encode

    batch_size = batch_size or (128 if model.device.type == "cuda" else 16)
    rows = [encode(tokenizer, prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    losses, collate = [0.0] * len(rows), Collator(tokenizer.pad_token_id)
    for start in range(0, len(order), batch_size):
        chosen = order[start:start + batch_size]
        batch = {name: tensor.to(model.device) for name, tensor in collate([rows[i] for i in chosen]).items()}
        targets = batch.pop("labels")[:, 1:]
        with torch.inference_mode():
            logits = model(**batch).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none", ignore_index=-100)
        means = each.sum(dim=1) / (targets != -100).sum(dim=1)
        for place, i in enumerate(chosen):
            losses[i] = means[place].item()
    return losses


def chat_prompts(tokenizer, messages: list[str]) -> list[str]:
    """User messages in the tokenizer's own chat template, up to where the model's answer begins."""
    return [tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
            for text in messages]


def chat_answer(task: Task, text: str) -> str:
    """A chat model's answer, as a fair reader takes it: the content of its code block when it wrote one."""
    block = re.search(r"```\w*\n(.*?)(?:```|$)", text, re.DOTALL)
    return task.answer(" ".join(block[1].split()) if block and task.stop else text)


CHAT = "base, own chat template"


def _as(model, system: str):
    """The peft model as that system, for a with block: its active adapter acts in "adapter" alone."""
    return contextlib.nullcontext() if system == "adapter" else model.disable_adapter()


def _generate_as(task: Task, model, tokenizer, prompts: dict[str, list[str]], progress) -> dict[str, list[str]]:
    """What each system writes after its prompts."""
    texts = {}
    for system, asked in prompts.items():
        # Each stops where it will be used: a chat at the end-of-text token, a prompt of the task at the task's stop text.
        with _as(model, system):
            texts[system] = generate(model, tokenizer, asked, task.max_new_tokens, None, None if system == CHAT else task.stop,
                                     progress and functools.partial(progress, system))
    return texts


def _prompts_of(tokenizer, prompts: list[str], messages: list[str]) -> dict[str, list[str]]:
    """The prompts of base and adapter, and of the base model's chat where its tokenizer has a template."""
    chat = {CHAT: chat_prompts(tokenizer, messages)} if tokenizer.chat_template else {}
    return {"base": prompts, **chat, "adapter": prompts}


def compare(task: Task, model, tokenizer, rows: list[dict[str, str]], progress=None, seed: int = 0,
            only: tuple[str, ...] = ()) -> dict[str, dict]:
    """Every system on the same rows: the base model under the task's prompt and in its own chat, baselines, the adapter.

    model: a peft model (its active adapter is the one judged). progress: called with (system, prompts done).
    only: of the systems that generate, those named (default: all).
    Returns for every system ``{"answers": [...], "scores": [{metric: number}, ...], "metrics": {metric: Estimate}}``.
    """
    prompts = _prompts_of(tokenizer, [task.prompt(row) for row in rows], [task.chat(row) for row in rows])
    prompts = {system: asked for system, asked in prompts.items() if not only or system in only}
    systems = {system: {"answers": [chat_answer(task, text) if system == CHAT else task.answer(text) for text in texts]}
               for system, texts in _generate_as(task, model, tokenizer, prompts, progress).items()}
    references = [task.completion(row) for row in rows]
    if task.name == "detox":
        toxic = [row["toxic"] for row in rows]
        systems["copied"] = {"answers": toxic}
        systems["listed words deleted"] = {"answers": [judges.without_listed_words(text) for text in toxic]}
        systems["judge's own words deleted"] = {"answers": [judges.without_judged_words(text) for text in toxic]}
        systems["human"] = {"answers": references}
    for name, system in systems.items():
        system["scores"] = score(task, system["answers"], rows)
        if task.name == "instruct":
            with _as(model, name):
                losses = token_losses(model, tokenizer, prompts[name], references)
            for scores, loss in zip(system["scores"], losses, strict=True):
                scores["loss"] = loss
    if task.name == "detox":
        _add_detox_scores(systems, model, tokenizer, rows)
    for system in systems.values():
        system["metrics"] = summarise(system["scores"], seed)
    return systems


def _add_detox_scores(systems: dict, model, tokenizer, rows: list[dict[str, str]]) -> None:
    """style, similarity, fluency and their product (Logacheva and others 2022, ParaDetox, section 5), per row.

    style: 1 when the classifier finds the answer inoffensive. similarity: to the toxic text. fluency: 1 when the base
    model finds the answer no more surprising, per token, than 95% of the human answers (there is no packaged judge of
    grammar; an empty answer is not fluent).
    """
    import numpy as np

    losses = {}
    with model.disable_adapter():
        for name, system in systems.items():
            answers = system["answers"]
            losses[name] = token_losses(model, tokenizer, [tokenizer.bos_token] * len(answers), answers)
    limit = float(np.quantile(losses["human"], 0.95))
    for name, system in systems.items():
        answers = system["answers"]
        kept = judges.similarity([row["toxic"] for row in rows], answers)
        for scores, answer, chance, same, loss in zip(system["scores"], answers, judges.offensive(answers), kept, losses[name],
                                                      strict=True):
            style, fluency = float(chance < 0.5), float(bool(answer.strip()) and loss <= limit)
            scores.update(style=style, similarity=same, fluency=fluency, joint=style * max(same, 0.0) * fluency)


def verifiable(task: Task, model, tokenizer, every: int = 1, progress=None, seed: int = 0) -> dict[str, dict]:
    """Base, base in its own chat, and adapter on instructions that a program can check, as `compare` returns them."""
    asked = judges.verifiable_instructions()[::every]
    rows = [{"instruction": one.instruction, "input": ""} for one in asked]
    prompts = _prompts_of(tokenizer, [task.prompt(row) for row in rows], [task.chat(row) for row in rows])
    systems = {}
    for name, answers in _generate_as(task, model, tokenizer, prompts, progress).items():
        passed = [float(one.passes(answer)) for one, answer in zip(asked, answers, strict=True)]
        kinds = {kind: [value for value, one in zip(passed, asked, strict=True) if one.kind == kind]
                 for kind in dict.fromkeys(one.kind for one in asked)}
        systems[name] = {"answers": answers, "scores": [{"passed": value} for value in passed],
                         "metrics": {metric: bootstrap(values, seed) for metric, values in {"passed": passed, **kinds}.items()}}
    return systems


def difference(a: list[float], b: list[float], seed: int = 0) -> Estimate:
    """Mean of a - b over the same rows with its interval: pairs share their luck, so it is narrower than two intervals."""
    return bootstrap([x - y for x, y in zip(a, b, strict=True)], seed)
