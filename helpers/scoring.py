"""Scores of generated answers, row by row, and their mean with an interval.

SQL is judged by exact match and by execution (helpers.sql_scoring); text by chrF (sacrebleu) and
ROUGE-L. Every number that is reported comes with a bootstrap interval.
"""

import re
import sqlite3
import time
from dataclasses import dataclass

import numpy as np
from sacrebleu.metrics import CHRF
from sqlglot.errors import SqlglotError

from helpers import WorkbookError
from helpers.generation import generate
from helpers.sql_scoring import sql_exact, sql_execution
from helpers.tasks import Task

_CHRF = CHRF(eps_smoothing=True)


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
    """Mean of per-row values with a 95% percentile bootstrap interval (Efron and Tibshirani 1993,
    chapter 13). Raises ValueError without values."""
    data = np.asarray(values, dtype=float)
    if data.size == 0:
        raise ValueError("bootstrap needs at least one value")
    draws = np.random.default_rng(seed).integers(0, data.size, size=(samples, data.size))
    low, high = np.quantile(data[draws].mean(axis=1), [0.025, 0.975])
    return Estimate(float(data.mean()), float(low), float(high), int(data.size))


def difference(a: list[float], b: list[float], seed: int = 0) -> Estimate:
    """Mean of a - b over the same rows. Pairs share their luck, so its interval is narrower than
    those of a and b."""
    return bootstrap([x - y for x, y in zip(a, b, strict=True)], seed)


def chrf(answer: str, reference: str) -> float:
    """Sentence chrF in [0, 1]: F-score of character n-grams up to 6, beta 2 (Popovic 2015;
    sacrebleu)."""
    return _CHRF.sentence_score(answer, [reference]).score / 100


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L in [0, 1]: F1 of the longest common subsequence of lower-cased words (Lin 2004)."""
    a, b = (re.findall(r"\w+", text.lower()) for text in (answer, reference))
    if not a or not b:
        return 0.0
    lengths = [0] * (len(b) + 1)
    for word in a:
        previous = 0
        for j, other in enumerate(b, start=1):
            longer = previous + 1 if word == other else max(lengths[j], lengths[j - 1])
            previous, lengths[j] = lengths[j], longer
    return 2 * lengths[-1] / (len(a) + len(b))


def exact(answer: str, reference: str) -> float:
    """1.0 when the texts are equal after trimming, else 0.0."""
    return float(answer.strip() == reference.strip())


def score(task: Task, answers: list[str], rows: list[dict[str, str]]) -> list[dict[str, float]]:
    """Per-row metrics of a task's answers: each a number in [0, 1], by metric name.

    A task whose metric is "execution" is scored as SQL, with the tables in the row's `context`; any
    other as text. Raises WorkbookError when a row's own reference query does not run.
    """
    scorer = _sql_scores if task.metric == "execution" else _text_scores
    pairs = zip(answers, rows, strict=True)
    return [scorer(answer, task.completion(row), row) for answer, row in pairs]


def _text_scores(answer: str, reference: str, row: dict[str, str]) -> dict[str, float]:
    return {"exact": exact(answer, reference), "chrf": chrf(answer, reference),
            "rouge_l": rouge_l(answer, reference)}


def _sql_scores(answer: str, reference: str, row: dict[str, str]) -> dict[str, float]:
    try:
        same, valid = sql_execution(answer, reference, row["context"])
    except (sqlite3.Error, SqlglotError) as error:
        raise WorkbookError(f"The reference query {reference[:80]!r} does not run on its own table "
                            f"({error}): correct that validation row or remove it.") from error
    return {"exact": float(sql_exact(answer, reference)), "execution": float(same),
            "valid": float(valid)}


def summarise(scores: list[dict[str, float]], seed: int = 0) -> dict[str, Estimate]:
    """Each metric's mean over the rows, with its interval."""
    return {name: bootstrap([row[name] for row in scores], seed) for name in scores[0]}


def evaluate(task: Task, model, tokenizer, rows: list[dict[str, str]],
             batch_size: int | None = None, progress=None, seed: int = 0) -> dict:
    """Generate an answer for every row, score them, and sum up.

    Returns ``{"metrics": {name: Estimate}, "answers": [...], "scores": [...], "seconds": float,
    "new_tokens": int}``; seconds: of generating.
    """
    start = time.perf_counter()
    texts = generate(model, tokenizer, [task.prompt(row) for row in rows], task.max_new_tokens,
                     batch_size, task.stop, progress)
    seconds = time.perf_counter() - start
    answers = [task.answer(text) for text in texts]
    scores = score(task, answers, rows)
    new_tokens = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    return {"metrics": summarise(scores, seed), "answers": answers, "scores": scores,
            "seconds": seconds, "new_tokens": new_tokens}
