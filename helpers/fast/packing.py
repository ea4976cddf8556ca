"""Packed rows: several documents in one row, or one stream cut into rows, instead of padding."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar, enable_progress_bar
from torch.nn.functional import pad
from trl import pack_dataset

from helpers import WorkbookError, probe
from helpers.trainer import next_tokens, scored_places, what_hides

STRATEGIES = {"documents": "bfd", "wrapped": "wrapped"}  # our name: TRL's


def pack(dataset: Dataset, length: int, packing: str) -> Dataset:
    """Rows packed into rows of at most `length` tokens, by TRL.

    "documents": whole documents, best-fit decreasing, whose lengths are in ``seq_lengths``.
    "wrapped": one stream, cut anywhere.
    """
    disable_progress_bar()
    packed = pack_dataset(dataset, length, STRATEGIES[packing])
    enable_progress_bar()
    return packed


def takes_mask(model, name: str, max_length: int) -> bool:
    """Whether a ready mask keeps documents of one row apart (True), or their positions do, of which
    transformers makes a mask for each layer, which waits for the GPU (False).

    Found by trying: the head must be given the same for two documents in a row as for each alone.
    They are longer than sliding windows, which a ready mask would switch off. Raises WorkbookError
    where neither keeps them apart: recurrent layers carry their state on.
    """
    config = model.config.get_text_config(decoder=True).to_dict()
    windows = [2 * value for name, value in config.items() if isinstance(value, int)
               and re.search("window|chunk|local", name) and value < max_length]
    ids = probe.sample_ids(model, 2, min(max_length, max([16, *windows])))
    alone = probe.head_inputs(model, ids).flatten(0, 1)
    numbers = torch.arange(ids.numel(), device=ids.device)[None]
    batch = {"position_ids": numbers % ids.shape[1], "document": numbers // ids.shape[1]}
    for mask in (True, False):
        try:
            packed = probe.head_inputs(model, ids.view(1, -1), **what_hides(batch))[0]
        except WorkbookError:  # of a model that takes no such mask, or no positions
            packed = torch.zeros_like(alone)
        if not probe.apart(packed, alone, model.dtype):
            return mask
        batch.pop("document", None)
    raise WorkbookError(f"packing='documents' cannot be used with {name}: documents in one row "
                        "would see each other. Use packing='none'.")


def most_scored(labels: list[list[int]], rows: int) -> int:
    """The most places that a batch of so many rows can score."""
    counts = sorted(sum(label != -100 for label in row[1:]) for row in labels)
    return sum(counts[-rows:])


@dataclass(frozen=True)
class PackedCollator:
    """Packed rows to a batch of a fixed width.

    Rows with ``seq_lengths`` hold documents that stay apart: ``position_ids`` start at 0 in each,
    and with `mask` (see `takes_mask`) ``document`` numbers them, padding as one more. Other rows
    are one text each and get no mask: padding follows the text, so no token of the text sees it.
    ``places`` are those to score, ``targets`` what each is scored on (-100: nothing), found here
    because looking for them on the GPU would make every step wait. With `rows` and `scored` all
    batches have one shape: rows of padding and places that count for nothing fill it up. Where
    nearly every place is scored, all are taken, and there are no ``places``.
    """

    pad_token_id: int
    width: int
    rows: int = 0
    scored: int = 0
    mask: bool = True

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        nothing = {"input_ids": [], "labels": [], "seq_lengths": []}
        rows = rows + [nothing] * (self.rows - len(rows))
        batch = {"input_ids": torch.full((len(rows), self.width), self.pad_token_id),
                 "labels": torch.full((len(rows), self.width), -100)}
        for i, row in enumerate(rows):
            for name, tensor in batch.items():
                tensor[i, :len(row[name])] = torch.tensor(row[name], dtype=torch.long)
        batch["targets"] = next_tokens(batch["labels"])
        if self.scored < 0.9 * batch["targets"].numel():
            places, targets = scored_places(batch["targets"])
            more = max(0, self.scored - len(places))
            batch["places"] = pad(places, (0, more))
            batch["targets"] = pad(targets, (0, more), value=-100)
        if "seq_lengths" in rows[0]:
            positions, documents = [], []
            for row in rows:
                lengths = [*row["seq_lengths"], self.width - len(row["input_ids"])]
                positions.append(torch.cat([torch.arange(length) for length in lengths]))
                documents.append(torch.repeat_interleave(torch.tensor(lengths)))
            batch["position_ids"] = torch.stack(positions)
            batch |= {"document": torch.stack(documents)} if self.mask else {}
        return batch
