"""Scores of generated answers, row by row, and their mean with a 95% interval."""

import re
import sqlite3
import time
from dataclasses import dataclass

import numpy as np
from sacrebleu.metrics import CHRF
from scipy.stats import binomtest
from sqlglot.errors import SqlglotError

from helpers import WorkbookError
from helpers.generation import generate
from helpers.sql_scoring import sql_exact, sql_execution
from helpers.tasks import Task

_CHRF = CHRF(eps_smoothing=True)
# Thai and Lao, Burmese, Khmer, Japanese, Chinese
_NO_SPACES = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
              "\U00020000-\U0003ffff")


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` rows with its 95% interval [low, high]; method: "wilson" or "bootstrap"."""

    value: float
    low: float
    high: float
    n: int
    method: str = "bootstrap"

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


def estimate(values: list[float], seed: int = 0) -> Estimate:
    """Mean of per-row values: with Wilson's interval if each is 0 or 1, else a bootstrap one."""
    return wilson(values) if set(values) <= {0.0, 1.0} else bootstrap(values, seed)


def wilson(values: list[float]) -> Estimate:
    """A share of rows with Wilson's score interval (1927), which holds for few rows too: that of 0
    of 100 is [0, 0.037], where a bootstrap says [0, 0]. Raises ValueError without values."""
    k, n = int(sum(values)), len(values)
    low, high = binomtest(k, n).proportion_ci(method="wilson")
    return Estimate(k / n, float(low), float(high), n, "wilson")


def bootstrap(values: list[float], seed: int = 0, samples: int = 2000) -> Estimate:
    """Mean of per-row values with a 95% percentile bootstrap interval (Efron and Tibshirani 1993,
    chapter 13). Raises ValueError without values."""
    data = np.asarray(values, dtype=float)
    if data.size == 0:
        raise ValueError("bootstrap needs at least one value")
    draws = np.random.default_rng(seed).integers(0, data.size, size=(samples, data.size))
    low, high = np.quantile(data[draws].mean(axis=1), [0.025, 0.975])
    return Estimate(float(data.mean()), float(low), float(high), int(data.size))


def difference(a: list[float | None], b: list[float | None], seed: int = 0) -> Estimate:
    """Mean of a - b over the same rows, by bootstrap. Pairs share their luck, so the interval is
    narrower. A row that either lacks (None) is left out; without rows: NaN in [-1, 1]."""
    pairs = [x - y for x, y in zip(a, b, strict=True) if None not in (x, y)]
    return bootstrap(pairs, seed) if pairs else Estimate(float("nan"), -1.0, 1.0, 0)


def chrf(answer: str, reference: str) -> float:
    """Sentence chrF in [0, 1]: F-score of character n-grams up to 6, beta 2 (Popovic 2015)."""
    return _CHRF.sentence_score(answer, [reference]).score / 100


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L in [0, 1]: F1 of the longest common subsequence of lower-cased words (Lin 2004), or
    of characters in scripts that write no spaces between words."""
    a, b = _words(answer), _words(reference)
    if not a or not b:
        return 0.0
    lengths = [0] * (len(b) + 1)
    for word in a:
        previous = 0
        for j, other in enumerate(b, start=1):
            longer = previous + 1 if word == other else max(lengths[j], lengths[j - 1])
            previous, lengths[j] = lengths[j], longer
    return 2 * lengths[-1] / (len(a) + len(b))


def _words(text: str) -> list[str]:
    return re.findall(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+", text.lower())


def score(task: Task, answers: list[str],
          rows: list[dict[str, str]]) -> list[dict[str, float | None]]:
    """Per-row metrics of a task's answers: each a number in [0, 1], by metric name.

    A task whose metric is "execution" is scored as SQL, on the tables of the row's `context`.
    A row's execution is None, whatever the answer, where the test databases cannot tell its
    reference from other queries. Raises WorkbookError when the reference does not run.
    """
    scorer = _sql_scores if task.metric == "execution" else _text_scores
    pairs = zip(answers, rows, strict=True)
    return [scorer(answer, task.completion(row), row) for answer, row in pairs]


def undecidable(scores: list[dict[str, float | None]]) -> int:
    """The number of rows that a metric leaves out."""
    return sum(None in row.values() for row in scores)


def summarise(scores: list[dict[str, float | None]], seed: int = 0) -> dict[str, Estimate]:
    """Each metric's mean over the rows that have it, with its interval. A metric that no row has
    is left out."""
    means = {}
    for name in scores[0]:
        if values := [row[name] for row in scores if row[name] is not None]:
            means[name] = estimate(values, seed)
    return means


def evaluate(task: Task, model, tokenizer, rows: list[dict[str, str]], progress=None,
             seed: int = 0) -> dict:
    """Generate an answer for every row, score them, and sum up: ``{"metrics": {name: Estimate},
    "undecidable": number of rows that a metric leaves out, "answers": [...], "scores": [...],
    "seconds": of generating, "new_tokens": number}``."""
    start = time.perf_counter()
    texts = generate(model, tokenizer, [task.prompt(row) for row in rows], task.max_new_tokens,
                     stop=task.stop, progress=progress)
    seconds = time.perf_counter() - start
    answers = [task.answer(text) for text in texts]
    scores = score(task, answers, rows)
    new_tokens = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    return {"metrics": summarise(scores, seed), "undecidable": undecidable(scores),
            "answers": answers, "scores": scores, "seconds": seconds, "new_tokens": new_tokens}


def _text_scores(answer: str, reference: str, row: dict[str, str]) -> dict[str, float | None]:
    return {"exact": float(answer.strip() == reference.strip()),
            "chrf": chrf(answer, reference), "rouge_l": rouge_l(answer, reference)}


def _sql_scores(answer: str, reference: str, row: dict[str, str]) -> dict[str, float | None]:
    try:
        same, valid = sql_execution(answer, reference, row["context"])
    except (sqlite3.Error, SqlglotError) as error:
        raise WorkbookError(f"The reference query {reference[:80]!r} does not run on its own table "
                            f"({error}): correct that validation row or remove it.") from error
    return {"exact": float(sql_exact(answer, reference, row["context"])),
            "execution": None if same is None else float(same), "valid": float(valid)}
