"""What rows are like, said before training: ``python -m helpers.jobs check rows.jsonl --task sql``.

Nothing here changes a row; `data.load_rows` refuses rows that make training impossible.
"""

from collections import defaultdict

from helpers import base_models
from helpers.data import encode, load_splits, prompt_ids, words
from helpers.recipes import FineTuneConfig
from helpers.tasks import Task, get_task

FINDINGS = {
    "duplicates": "Training rows that repeat another one, and so count twice",
    "contradicted": "Training prompts that have several different targets",
    "leaked": "Validation rows with the prompt of a training row, so that their score flatters",
    "too_long": "Training rows longer than max_length={max_length} tokens, which are left out",
    "cut_targets": "Targets longer than max_new_tokens={max_new_tokens}, which no answer can equal",
    "special": "Rows that hold the text of a special token, which is encoded as plain text",
}


def preflight(task: Task, train: list[dict], validation: list[dict], tokenizer,
              max_length: int) -> dict[str, int]:
    """Count what a reader should know of rows before training.

    Returns "train" and "validation" (rows), "tokens" (of the training rows that fit into
    `max_length`), "scored_tokens" (of their completions, end-of-text tokens included), and the
    counts of FINDINGS. Prompts are compared by their words, in any letter case.
    """
    counts = {"train": len(train), "validation": len(validation), "tokens": 0, "scored_tokens": 0,
              **dict.fromkeys(FINDINGS, 0)}
    targets = defaultdict(list)  # of training, by the prompt's words
    special = [str(one) for one in tokenizer.added_tokens_decoder.values() if one.special]
    for number, row in enumerate([*train, *validation]):
        prompt, target = task.prompt(row), task.completion(row)
        scored = len(encode(tokenizer, [], target)["input_ids"])
        counts["cut_targets"] += scored > task.max_new_tokens
        counts["special"] += any(token in prompt + target for token in special)
        if number >= len(train):
            counts["leaked"] += words(prompt) in targets
            continue
        counts["duplicates"] += target in targets[words(prompt)]
        targets[words(prompt)].append(target)
        length = len(prompt_ids(tokenizer, prompt)) + scored
        counts["too_long"] += length > max_length
        if length <= max_length:
            counts["tokens"] += length
            counts["scored_tokens"] += scored
    counts["contradicted"] = sum(len(set(known)) > 1 for known in targets.values())
    return counts


def describe(counts: dict[str, int], task: Task, max_length: int) -> list[str]:
    """`preflight`'s counts as lines for a person: the sizes, then a line for each finding."""
    lines = ["{train:,} training rows, {validation:,} validation rows; {tokens:,} tokens to train "
             "on, {scored_tokens:,} of them scored.".format(**counts)]
    limits = {"max_length": max_length, "max_new_tokens": task.max_new_tokens}
    for name, sentence in FINDINGS.items():
        if counts[name]:
            lines.append(f"{sentence.format(**limits)}: {counts[name]:,}.")
    if len(lines) == 1:
        lines.append("No duplicates, no contradictions, no leaks between the splits, no row too "
                     "long, no special tokens.")
    return lines


def check_source(task_name: str, source: str, **parameters) -> list[str]:
    """`describe` for all rows of a source of `load_rows`. parameters: base_model, max_length.
    Raises WorkbookError as `load_rows` and `FineTuneConfig` do."""
    config = FineTuneConfig.from_parameters(task=task_name, data=source, **parameters)
    task, (splits, described, _) = get_task(task_name), load_splits(task_name, source)
    tokenizer = base_models.load_tokenizer(config.base_model)
    counts = preflight(task, splits["train"], splits["validation"], tokenizer, config.max_length)
    return [f"{described}, as {config.base_model} reads it:",
            *describe(counts, task, config.max_length)]
