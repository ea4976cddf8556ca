"""The loss, the order of the rows, and TRL's trainer around both."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import torch
from torch import distributed
from torch.nn.functional import cross_entropy, pad
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTTrainer

from helpers import WorkbookError, read_json, write_json
from helpers.data import Collator

COMPLETE = "complete.json"  # in a checkpoint that was written to its end
# Rows are sorted by length within so many batches. More would waste less padding, but then long
# rows of one kind (SQL joins) fill whole batches, and are learnt worse (tests/benchmarks/pool.py).
POOL = 4


# --- the loss

def completion_loss(model, inputs: dict, count=None, summed=None) -> torch.Tensor:
    """Cross-entropy over the scored places, computing the output head only there.

    The head takes a quarter of a small model's arithmetic, and its logits (places x vocabulary)
    most of the memory. A hook in front of it drops the other places inside the model's own forward:
    that works for every architecture and under DistributedDataParallel.

    inputs: a batch of data.Collator or fast.packing.PackedCollator, which has found the places.
    count: what the sum is divided by (default: the scored places here). summed: sums the
    cross-entropy (default: `summed_cross_entropy`).
    """
    if "targets" in inputs:
        places, targets = inputs.get("places", slice(None)), inputs["targets"]
    else:
        places, targets = scored_places(next_tokens(inputs["labels"]))

    def keep_scored(module, arguments):
        return arguments[0].flatten(0, 1)[places], *arguments[1:]

    head = getattr(model, "module", model).get_output_embeddings()
    hook = head.register_forward_pre_hook(keep_scored)
    try:
        logits = model(input_ids=inputs["input_ids"], use_cache=False, **what_hides(inputs)).logits
    finally:
        hook.remove()
    total = (summed or summed_cross_entropy)(logits, targets)
    count = (targets != -100).sum() if count is None else count
    return total / torch.as_tensor(count).clamp(min=1)  # nothing to score: 0, not 0 / 0


def summed_cross_entropy(logits, targets) -> torch.Tensor:
    """Sum of the cross-entropy of (places, vocabulary) against (places,), in float32."""
    return cross_entropy(logits.float(), targets, reduction="sum")


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """The target of each place is its next label, or -100: (rows, length) -> (rows x length,)."""
    return pad(labels[:, 1:], (0, 1), value=-100).flatten()


def scored_places(targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the places that are scored, and their targets."""
    places = (targets != -100).nonzero()[:, 0]
    return places, targets[places]


def what_hides(inputs: dict) -> dict:
    """The padding mask, or for packed documents their positions, and a mask that keeps them apart
    where the batch numbers them. Without it transformers makes one of the positions."""
    if "document" not in inputs:
        return {name: inputs.get(name) for name in ("attention_mask", "position_ids")
                if name in inputs or name == "attention_mask"}
    document = inputs["document"]
    length = document.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document.device).tril()
    same = document[:, None, :, None] == document[:, None, None, :]
    return {"attention_mask": same & causal, "position_ids": inputs["position_ids"]}


# --- the order of the rows

class LengthSampler(TrainerCallback):
    """Row indices of an epoch: rows of like length share a batch, batches come in random order.

    The order follows from seed and epoch alone. transformers' own length-grouped sampler draws from
    torch's global state, so a resumed run would see other batches than the run that it continues.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate calls no set_epoch where it both skips batches (a resume) and shards.
        self.epoch = int(state.epoch or 0)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        rng = random.Random(f"{self.seed}/{self.epoch}")
        order = rng.sample(range(len(self.lengths)), len(self.lengths))
        pool = POOL * self.batch_size
        batches = []
        for start in range(0, len(order), pool):
            near = sorted(order[start:start + pool], key=self.lengths.__getitem__)
            for first in range(0, len(near), self.batch_size):
                batches.append(near[first:first + self.batch_size])
        short = batches.pop() if len(batches[-1]) < self.batch_size else []  # it must come last
        rng.shuffle(batches)
        return iter([row for batch in [*batches, short] for row in batch])


# --- the trainer

class CompletionTrainer(SFTTrainer):
    """SFTTrainer whose loss skips the prompt's logits and whose batches hold rows of like length.

    bfloat16: compute in bfloat16 under autocast. summed: the cross-entropy, see `completion_loss`.
    patience: training ends after so many evaluations without a lower loss; None: never.
    """

    def __init__(self, *arguments, bfloat16: bool = False, summed=summed_cross_entropy,
                 patience: int | None = None, **options):
        super().__init__(*arguments, **options)
        self.bfloat16, self.summed, self.patience = bfloat16, summed, patience
        self.progress = Progress()
        # TRL 1.16 turns the adapter of a 4-bit base into bfloat16. Steps smaller than its 8 bits of
        # mantissa are then lost, and a resumed run, whose weights load as float32, differs.
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.remove_callback(PrinterCallback)  # Progress prints instead
        self.add_callback(self.progress)

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        # One optimizer step's rows, over all workers and accumulated passes, have like lengths.
        together = (self.args.train_batch_size * self.args.gradient_accumulation_steps
                    * self.accelerator.num_processes)
        lengths = [len(ids) for ids in rows["input_ids"]]
        sampler = LengthSampler(lengths, together, self.args.data_seed)
        self.add_callback(sampler)
        return sampler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.autocast("cuda", torch.bfloat16, enabled=self.bfloat16):
            loss = completion_loss(model, inputs, num_items_in_batch, self.summed)
        # num_items_in_batch counts the tokens of all workers; gradients are averaged over workers.
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict:
        """The mean loss over the scored tokens of the validation rows, shared among the workers.

        transformers' own loop draws a random number, so the dropout after it would differ. Compiled
        blocks run as they are written, or they would be compiled again for the padded rows here.
        """
        rows = sorted(self.eval_dataset, key=lambda row: len(row["input_ids"]))
        size, collate = self.args.train_batch_size, Collator(self.processing_class.pad_token_id)
        batches = self.own_part([rows[first:first + size] for first in range(0, len(rows), size)])
        sums = torch.zeros(2, device=self.args.device)  # cross-entropy, scored tokens
        self.model.eval()
        with (torch.no_grad(), torch.compiler.set_stance("force_eager"),
              torch.autocast("cuda", torch.bfloat16, enabled=self.bfloat16)):
            for some in batches:
                batch = self._prepare_inputs(collate(some))
                sums[0] += completion_loss(self.model, batch, count=1)
                sums[1] += (batch["labels"][:, 1:] != -100).sum()
        self.model.train()
        self.control.should_evaluate = False  # transformers would come again after the last step
        total, count = self.accelerator.reduce(sums).tolist()
        metrics = {"eval_loss": total / count}
        self.log(dict(metrics))
        losses = [loss for _, loss in self.validation_log()]
        since_best = len(losses) - 1 - losses.index(min(losses))
        if self.patience and since_best >= self.patience:
            self.control.should_training_stop = True
        return metrics

    def own_part(self, batches: list) -> list:
        """Those of the validation batches that this worker computes."""
        return batches[self.accelerator.process_index::self.accelerator.num_processes]

    def validation_log(self) -> list[tuple[int, float]]:
        """Steps, and the validation loss after each."""
        return [(entry["step"], entry["eval_loss"]) for entry in self.state.log_history
                if "eval_loss" in entry]


class Progress(TrainerCallback):
    """Prints a line every ten seconds, counts the seconds of all attempts, marks checkpoints that
    are complete, and ends a run that has diverged."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin, self.first_step, self.shown = time.perf_counter(), state.global_step, 0.0
        self.before = 0.0  # seconds of earlier attempts
        if state.global_step:
            self.before = read_json(_checkpoint(args, state) / COMPLETE)["seconds"]

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.begin

    def on_log(self, args, state, control, logs, **kwargs):
        # At every step this would wait for the GPU. In float16 an overflowing gradient is ordinary.
        for name in ("loss", "eval_loss", *(() if args.fp16 else ("grad_norm",))):
            if not math.isfinite(logs.get(name, 0.0)):
                raise WorkbookError(f"Training has diverged: at step {state.global_step} the "
                                    f"{name} is {logs[name]}. Lower learning_rate (now "
                                    f"{args.learning_rate:g}); if it is so from the first steps "
                                    "on, the base model's weights may not be finite.")
        if not state.is_world_process_zero:
            return
        now, left = time.perf_counter(), state.max_steps - state.global_step
        where = f"step {state.global_step:>5}/{state.max_steps}"
        if "eval_loss" in logs:
            print(f"{where}   validation loss {logs['eval_loss']:.3f}", flush=True)
        elif "loss" in logs and (now - self.shown >= 10 or not left):
            self.shown = now
            minutes = left * (now - self.begin) / (state.global_step - self.first_step) / 60
            print(f"{where}   loss {logs['loss']:.3f}   {minutes:.1f} min left", flush=True)

    def on_save(self, args, state, control, **kwargs):
        if distributed.is_initialized():  # a checkpoint holds every rank's random state
            distributed.barrier()
        if state.is_world_process_zero:
            write_json(_checkpoint(args, state) / COMPLETE,
                       {"step": state.global_step, "seconds": self.seconds()})


def _checkpoint(args, state) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None. A killed run can leave a part of one."""
    complete = [path.parent for path in Path(folder).glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)
