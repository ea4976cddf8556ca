"""From a checked `FineTuneConfig` to an adapter: TRL's SFTTrainer set up well, resumable, published atomically.

``fine_tune(config, run_dir)`` trains in this process, or, with more than one worker, in a group of processes that
``helpers.workers`` starts as ``python -m helpers.fine_tuning <run_dir>``. Either way the training state is in
``run_dir/checkpoints`` and the result in ``run_dir/trained``. `publish` then writes the adapter's folder in one step.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from helpers import WorkbookError, base_models, cards, check_numbers, data, tasks
from helpers.data import Collator

ROOT = Path(__file__).resolve().parent.parent

# A preset is what the parameters left at 0 or "" become. `reference` is the recipe of the demo that this workbook grew
# from: every token is scored, documents are packed end to end at 1,024 tokens, one epoch count and share per task.
PRESETS: dict[str, dict] = {
    "default": dict(precision="4bit", rank=16, alpha=32, dropout=0.0, learning_rate=2e-3, schedule="cosine", epochs=1.0,
                    max_rows=640, data_fraction=1.0, batch_size=8, gradient_accumulation=1, max_length=512,
                    packing="none", optimizer="adamw_torch", completion_only=True),
    "full_data": dict(precision="full", rank=8, alpha=16, dropout=0.0, learning_rate=2e-3, schedule="cosine",
                      epochs=4.0, max_rows=-1, data_fraction=1.0, batch_size=32, gradient_accumulation=1,
                      max_length=1024, packing="documents", optimizer="adamw_torch", completion_only=True),
    "reference": dict(precision="4bit", rank=16, alpha=32, dropout=0.05, learning_rate=2e-4, schedule="constant",
                      epochs=1.0, max_rows=-1, data_fraction=1.0, batch_size=1, gradient_accumulation=4,
                      max_length=1024, packing="wrapped", optimizer="paged_adamw_32bit", completion_only=False),
}
KINDS = {"str": (str, "text"), "int": (int, "a whole number"), "float": ((int, float), "a number"),
         "bool": (bool, "True or False")}
REFERENCE_TASKS = {"instruct": dict(data_fraction=0.3, epochs=1.0), "sql": dict(epochs=2.0), "detox": dict(epochs=4.0)}


@dataclass(frozen=True)
class FineTuneConfig:
    """Everything that decides a fine-tuning run. Build it with `from_parameters`, which fills in the preset and checks.

    Sizes: max_rows (-1: all rows of the split), max_length in tokens, batch_size in rows per worker and forward pass.
    packing: "none" pads rows of like length; "documents" puts several into one row of max_length tokens, where each sees
    only itself; "wrapped" cuts one long stream into rows, documents and all (the reference's way).
    compile: torch.compile for the transformer blocks, and for packed rows on one GPU a step as one recorded CUDA graph; it
    pays on a GPU in runs of minutes.
    alpha scales the update by alpha / rank (LoRA, arXiv:2106.09685, section 4.1).
    """

    task: str
    base_model: str = base_models.EMBEDDED
    data: str = "practice"
    preset: str = "default"
    precision: str = ""
    rank: int = 0
    alpha: int = 0
    dropout: float = -1.0
    target_modules: str = ""
    learning_rate: float = 0.0
    schedule: str = ""
    epochs: float = 0.0
    max_steps: int = 0
    max_rows: int = 0
    data_fraction: float = 0.0
    batch_size: int = 0
    gradient_accumulation: int = 0
    max_length: int = 0
    packing: str = ""
    optimizer: str = ""
    completion_only: bool | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    checkpoint_steps: int = 20
    seed: int = 0

    @classmethod
    def from_parameters(cls, **parameters) -> FineTuneConfig:
        """A complete, checked config. Parameters at 0, "" or None take the preset's value.

        Raises WorkbookError that names the first parameter which is unknown or out of range.
        """
        unknown = set(parameters) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise WorkbookError(f"parameter {sorted(unknown)[0]!r} is unknown to fine-tuning.")
        for field in dataclasses.fields(cls):
            kind, value = field.type.removesuffix(" | None"), parameters.get(field.name)
            if value is not None and (isinstance(value, bool) != (kind == "bool") or not isinstance(value, KINDS[kind][0])):
                raise WorkbookError(f"{field.name} is {value!r}: it must be {KINDS[kind][1]}.")
        task = tasks.get_task(parameters.get("task", ""))
        name = parameters.get("preset") or "default"
        if name not in PRESETS:
            raise WorkbookError(f"preset {name!r} is unknown: use one of {', '.join(PRESETS)}.")
        preset = {**PRESETS[name], **(REFERENCE_TASKS.get(task.name, {}) if name == "reference" else {})}
        given = {key: value for key, value in parameters.items()
                 if value not in (0, "", None) or key == "seed" or isinstance(value, bool)}
        if given.get("dropout", 0) == -1.0:
            del given["dropout"]
        config = cls(**{**preset, **given, "preset": name})
        config.check()
        return config

    def check(self) -> None:
        """Raise WorkbookError for the first value that cannot work; nothing is loaded or created."""
        tasks.get_task(self.task)
        base_models.resolve(self.base_model)
        check_numbers(self, (("rank", 1, 1024), ("alpha", 1, 4096), ("batch_size", 1, 65536), ("max_length", 8, 131072),
                             ("gradient_accumulation", 1, 65536), ("checkpoint_steps", 1, 10**9), ("seed", 0, 2**32 - 1),
                             ("dropout", 0.0, 0.9), ("learning_rate", 1e-8, 1.0), ("epochs", 1e-6, 10_000),
                             ("data_fraction", 1e-9, 1.0), ("max_steps", 0, 10**9)))
        if self.max_rows < 1 and self.max_rows != -1:
            raise WorkbookError(f"max_rows is {self.max_rows}: it must be at least 1, or -1 for all rows.")
        for name, allowed in (("precision", ("4bit", "full")), ("schedule", ("cosine", "constant", "linear")),
                              ("optimizer", ("adamw_torch", "paged_adamw_32bit")),
                              ("packing", ("none", "documents", "wrapped"))):
            if getattr(self, name) not in allowed:
                raise WorkbookError(f"{name} is {getattr(self, name)!r}: use {' or '.join(allowed)}.")
        known = self.data == "practice" or self.data == "hub" or self.data.startswith("hub:")
        if not known and not os.path.isfile(os.path.expanduser(self.data)):
            raise WorkbookError(f"data is {self.data!r}, which is not an existing file: give a .jsonl or .jsonl.gz file, "
                                "'practice' or 'hub'.")
        if self.data == "practice" and self.task not in ("instruct", "sql", "detox"):
            raise WorkbookError(f"task {self.task!r} has no practice data: give a .jsonl file with data=….")


def check_parameters(parameters: dict) -> dict:
    """What a job checks before a kernel starts: the notebook's parameters make a valid config and a free output folder.

    Returns the whole config: what the parameters left at 0 or "" stand for."""
    names = {f.name for f in dataclasses.fields(FineTuneConfig)}
    config = FineTuneConfig.from_parameters(**{k: v for k, v in parameters.items() if k in names})
    if parameters.get("workers_on"):
        from helpers.workers import read_place

        read_place(parameters["workers_on"])
    if int(parameters.get("eval_rows") or 1) < 1:
        raise WorkbookError(f"eval_rows is {parameters['eval_rows']}: it must be at least 1.")
    if parameters.get("adapter_dir") and not parameters.get("resume"):
        check_free(Path(parameters["adapter_dir"]))
    return dataclasses.asdict(config)


def check_free(folder: Path) -> None:
    """Raise WorkbookError when `folder` already holds something: an adapter is never overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WorkbookError(f"The output folder {folder} already exists and is not empty: choose another adapter_dir or "
                            "remove it.")


# ---------------------------------------------------------------------------------------------------------- training


def fine_tune(config: FineTuneConfig, run_dir: Path, workers: int = 1, resume: bool = False, workers_on: str = "") -> dict:
    """Train an adapter and leave it in ``run_dir/trained``; return what happened as a dict (also result.json there).

    With ``workers > 1`` as many processes train together, on this host or where ``workers_on`` says (see
    helpers.workers.read_place). ``resume`` goes on from the newest
    complete checkpoint of ``run_dir``; without it a run folder that already holds training is refused.
    Raises WorkbookError for bad data, a full disk, too little memory, or a run that was made with another config.
    """
    run_dir = Path(run_dir)
    settings = {**dataclasses.asdict(config), "workers": workers}
    known = run_dir / "config.json"
    if known.is_file() and resume:
        before = json.loads(known.read_text())
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            raise WorkbookError(f"The run in {run_dir} was made with {changed[0]}={before.get(changed[0])!r}, not "
                                f"{settings[changed[0]]!r}: resume it unchanged or start a new one.")
    elif (run_dir / "checkpoints").exists() and not resume:
        raise WorkbookError(f"The output folder {run_dir} already holds a training run: resume it or choose another.")
    with base_models.disk_errors(run_dir, "the training run"):
        run_dir.mkdir(parents=True, exist_ok=True)
        cards.write_json(known, settings)
    base_models.fetch(config.base_model)  # once, before several workers ask for it
    if workers == 1 and not workers_on:
        return train(config, run_dir)
    from helpers.workers import launch, plan

    logs = run_dir.resolve() / "workers"
    launch(plan("helpers.fine_tuning", [str(run_dir.resolve())], workers, logs, workers_on), logs)
    return json.loads((run_dir / "trained" / "result.json").read_text())


def train(config: FineTuneConfig, run_dir: Path) -> dict:
    """The training itself, in this process, which may be one of several workers (torch.distributed's environment).

    The loss is the mean cross-entropy over the completion's tokens of the whole batch. Returns the result as a dict on
    every rank; rank 0 writes ``run_dir/trained``.
    """
    import torch
    from transformers import set_seed

    set_seed(config.seed)
    task = tasks.get_task(config.task)
    rows = data.load_rows(config.task, config.data, "train", None if config.max_rows == -1 else config.max_rows,
                          config.data_fraction, config.seed)
    model, tokenizer = base_models.load(config.base_model, config.precision)
    limit = getattr(model.config, "max_position_embeddings", None) or config.max_length
    if config.max_length > limit:
        raise WorkbookError(f"max_length is {config.max_length} tokens, and {config.base_model} reads at most {limit}: "
                            "lower max_length.")
    encoded, left_out = data.encode_rows(tokenizer, task, rows.rows, config.max_length)
    if left_out and is_main():
        print(f"{left_out} of {len(rows.rows)} rows are longer than max_length={config.max_length} tokens and left out.")
    trainer = make_trainer(config, model, tokenizer, encoded, run_dir)
    world = trainer.accelerator.num_processes
    if is_main():
        print(f"Training on {len(encoded):,} rows of {rows.source}, {trainer.args.max_steps:,} steps of "
              f"{config.batch_size * config.gradient_accumulation * world} rows, {world} worker{'s' * (world > 1)}, "
              f"{base_models.hardware()}, weights {config.precision}, computing in {base_models.best_dtype()}.", flush=True)
    checkpoint = last_checkpoint(run_dir / "checkpoints")
    if checkpoint and is_main():
        print(f"Going on from {checkpoint.name}.", flush=True)
    try:
        with base_models.disk_errors(run_dir, "a checkpoint"):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise WorkbookError(f"The GPU's memory is too small for batch_size={config.batch_size} and max_length="
                            f"{config.max_length}: lower batch_size (and raise gradient_accumulation by the same factor), "
                            "or lower max_length.") from error
    finally:
        trainer.recording = None  # a graph keeps its memory, and the trainer that it knows keeps the graph
    return _finish_training(config, trainer, run_dir, rows, len(encoded), left_out, world)


def is_main() -> bool:
    """Whether this process is rank 0, the one that prints and saves."""
    return int(os.environ.get("RANK", "0")) == 0


def make_trainer(config: FineTuneConfig, model, tokenizer, encoded: list[dict], run_dir: Path):
    """The base model with a fresh LoRA adapter inside TRL's SFTTrainer.

    Where it differs from TRL's defaults: rows come tokenized by `data.encode_rows` (so training sees the prompt tokens
    that generation will), gradient checkpointing is off unless asked for, rows of like length share a batch, and the
    output head only computes the positions that are scored.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig

    modules = [name.strip() for name in config.target_modules.split(",") if name.strip()]
    found = base_models.lora_target_modules(model)
    if missing := [name for name in modules if name not in found]:
        raise WorkbookError(f"target_modules names {missing[0]!r}, which {config.base_model} does not have: it has "
                            f"{', '.join(found)}.")
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, bias="none",
                      task_type="CAUSAL_LM", target_modules=modules or found)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    model = get_peft_model(model, lora)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows_a_step = config.batch_size * config.gradient_accumulation * world
    packed = config.packing != "none"
    if config.packing == "documents":
        _refuse_mixed_documents(model, config.base_model)
    dataset = dataset_of(config, encoded)
    if config.packing == "wrapped":
        from helpers.fast import recorded

        recorded.use_plain_causal_attention(model.get_base_model())
    steps = config.max_steps or max(1, math.ceil(config.epochs * len(dataset) / rows_a_step))
    cuda, dtype = torch.cuda.is_available(), base_models.best_dtype()
    # About 100 losses a run; a checkpoint stands where one was logged, or a resumed run would log the mean of fewer steps.
    most = min(config.checkpoint_steps, max(1, steps // 100))
    logged = max(n for n in range(1, most + 1) if config.checkpoint_steps % n == 0)
    arguments = SFTConfig(
        output_dir=str(run_dir / "checkpoints"), max_steps=steps, per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation, learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule, warmup_steps=0 if config.schedule == "constant" else max(1, steps // 20),
        optim="adamw_torch_fused" if cuda and config.optimizer == "adamw_torch" else config.optimizer,
        max_grad_norm=1.0, seed=config.seed, data_seed=config.seed,
        bf16=False,  # compute_loss casts by itself: accelerate's way also turns all logits into float32, which costs memory
        fp16=cuda and dtype == torch.float16, use_cpu=not cuda,
        gradient_checkpointing=config.gradient_checkpointing, max_length=config.max_length,
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
        logging_nan_inf_filter=False,  # it would wait for the GPU in every step
        logging_steps=logged, save_strategy="steps", save_steps=config.checkpoint_steps, save_total_limit=2,
        report_to="none", disable_tqdm=True, dataloader_pin_memory=cuda, dataloader_num_workers=2 if cuda else 0,
        dataloader_persistent_workers=cuda, ddp_find_unused_parameters=False)
    if cuda:
        arguments._n_gpu = 1  # transformers would spread one worker over all the GPUs that it sees
    arguments.mixed_precision = "fp16" if arguments.fp16 else "no"  # not what accelerate's variables in the environment say
    collator = Collator(tokenizer.pad_token_id)
    if packed:
        shapes = (config.batch_size, most_scored(dataset["labels"], config.batch_size)) if config.compile else ()
        collator = PackedCollator(tokenizer.pad_token_id, config.max_length, *shapes)
    trainer = _trainer_class()(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer,
                               data_collator=collator)
    # TRL 1.16 turns the adapter of a 4-bit base into bfloat16. Steps smaller than its 8 bits of mantissa are then lost, CPUs
    # without AMX slow down, and a resumed run (whose weights load as float32) takes another path. So: float32 throughout.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.cast = cuda and dtype == torch.bfloat16
    if config.compile:
        trainer.records = trainer.cast and records_steps(config, world, model.config.model_type)
        compile_blocks(trainer.model, dynamic=not packed)
        trainer.cross_entropy = torch.compile(summed_cross_entropy, dynamic=not packed)
    trainer.remove_callback(PrinterCallback)  # Progress prints instead
    trainer.add_callback(_progress_callback()())
    if trainer.accelerator.num_processes != world:
        raise WorkbookError(f"{world} workers were asked for and {trainer.accelerator.num_processes} started: this is a "
                            "fault of the launcher; start the job again.")
    return trainer


def dataset_of(config: FineTuneConfig, encoded: list[dict]):
    """What a run trains on: encoded rows with the labels that the config asks for, packed where it asks for that."""
    from datasets import Dataset

    if not config.completion_only:  # a document's first token has nothing before it that could predict it
        encoded = [{"input_ids": row["input_ids"], "labels": [-100, *row["input_ids"][1:]]} for row in encoded]
    dataset = Dataset.from_list(encoded)
    if config.packing == "none":
        return dataset
    return pack(dataset, config.max_length, {"documents": "bfd", "wrapped": "wrapped"}[config.packing])


def pack(dataset, length: int, strategy: str):
    """Rows packed into rows of at most `length` tokens, by TRL: "bfd", best-fit decreasing, whole documents whose lengths are
    in ``seq_lengths``, or "wrapped", one stream cut anywhere."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar
    from trl import pack_dataset

    disable_progress_bar()
    try:
        return pack_dataset(dataset, length, strategy)
    finally:
        enable_progress_bar()


def _refuse_mixed_documents(model, name: str) -> None:
    """Packed documents stay apart by positions and a mask: refuse models that take no positions and have not our ALiBi."""
    import inspect

    from helpers.fast.bloom import NAME

    base = model.get_base_model()
    if "position_ids" not in inspect.signature(base.forward).parameters and base.config._attn_implementation != NAME:
        raise WorkbookError(f"packing='documents' cannot be used with {name}: it takes no position_ids, so documents in one "
                            "row would see each other. Use packing='none'.")


def records_steps(config: FineTuneConfig, world: int, model_type: str) -> bool:
    """Whether steps are recorded as a CUDA graph (helpers.recorded): where all have the same shapes, as only packed rows have.

    Not with accumulation, as a replay writes gradients and does not add to them; nor with several workers, whose gradients
    DistributedDataParallel exchanges; nor with checkpointing, which keeps the state of the random numbers on the host. And only
    models that have been recorded on a GPU: others may wait for the GPU somewhere, which ends a recording with an error (so
    ended BLOOM's documents, once; the cure has not been on a GPU).
    """
    tried = {"llama": ("wrapped", "documents"), "bloom": ("wrapped",)}
    return (config.packing in tried.get(model_type, ()) and world == 1 and config.gradient_accumulation == 1
            and not config.gradient_checkpointing)


def compile_blocks(model, dynamic: bool = False) -> None:
    """torch.compile for every transformer block: they share one compiled graph, so compiling takes seconds, not minutes.

    dynamic: one graph for rows of every length, a little slower than one made for the only length there is.
    """
    import torch

    blocks = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    for block in blocks:
        block.compile(dynamic=dynamic)


def most_scored(labels: list[list[int]], rows: int) -> int:
    """The most places that a batch of so many rows can score."""
    return sum(sorted(sum(label != -100 for label in row[1:]) for row in labels)[-rows:])


@dataclass(frozen=True)
class PackedCollator:
    """Packed rows to a batch of a fixed width, so that every step has the same shapes.

    Rows with ``seq_lengths`` hold documents that stay apart: position_ids start at 0 in each, and ``document`` numbers them
    (padding counts as one more, with no labels). Others are one text each. They get no mask: padding follows the text,
    so no token of the text sees it, and a mask in some batches only would make torch compile the model twice.
    ``places`` are those to score and ``targets`` what each is scored on, -100 for nothing: found here, they need no waiting
    for the GPU. Where `rows` and `scored` are given, all batches have the same shapes: a batch with fewer rows (an epoch's
    last) is filled up with padding, and the places with some that have no target, up to as many as `scored`; where that is
    nearly every place, all are taken, with no ``places``.
    """

    pad_token_id: int
    width: int
    rows: int = 0
    scored: int = 0

    def __call__(self, rows: list[dict]) -> dict:
        import torch
        from torch.nn.functional import pad

        nothing = {"input_ids": [], "labels": [], "seq_lengths": []}
        rows = [*rows, *[nothing] * (self.rows - len(rows))]
        shape = (len(rows), self.width)
        used = [len(row["input_ids"]) for row in rows]
        batch = {"input_ids": torch.full(shape, self.pad_token_id), "labels": torch.full(shape, -100)}
        for i, row in enumerate(rows):
            batch["input_ids"][i, :used[i]] = torch.tensor(row["input_ids"], dtype=torch.long)
            batch["labels"][i, :used[i]] = torch.tensor(row["labels"], dtype=torch.long)
        batch["targets"] = _targets(batch["labels"])
        if self.scored < 0.9 * batch["targets"].numel():
            places, targets = _scored(batch["targets"])
            more = max(0, self.scored - len(places))
            batch["places"], batch["targets"] = pad(places, (0, more)), pad(targets, (0, more), value=-100)
        if "seq_lengths" in rows[0]:
            lengths = [[*row["seq_lengths"], self.width - n] for row, n in zip(rows, used, strict=True)]
            batch["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
            batch["document"] = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in lengths])
        return batch


class LengthSampler:
    """Row indices of an epoch: rows of like length stand together, batches come in random order.

    The order follows from seed and epoch alone. transformers' own length-grouped sampler draws from torch's global state,
    so that a resumed run would see other batches than the run it continues.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        rng = random.Random(f"{self.seed}/{self.epoch}")
        order = rng.sample(range(len(self.lengths)), len(self.lengths))
        pool = 50 * self.batch_size  # sorting everything would show the same neighbours in every epoch
        batches = []
        for start in range(0, len(order), pool):
            near = sorted(order[start:start + pool], key=self.lengths.__getitem__)
            batches += [near[i:i + self.batch_size] for i in range(0, len(near), self.batch_size)]
        rest = [batch for batch in batches if len(batch) < self.batch_size]  # at most one, and it must come last
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        rng.shuffle(whole)
        return iter([i for batch in whole + rest for i in batch])


def summed_cross_entropy(logits, targets):
    """Sum of the cross-entropy of (places, vocabulary) against (places,), in float32."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.float(), targets, reduction="sum")


def _targets(labels):
    """What each place is scored on, the token after it: labels (rows, length) -> (rows x length,), -100 where nothing is."""
    from torch.nn.functional import pad

    return pad(labels[:, 1:], (0, 1), value=-100).flatten()


def _scored(targets):
    """Indices of the places that are scored, and their targets."""
    places = (targets != -100).nonzero()[:, 0]
    return places, targets[places]


def completion_loss(model, inputs: dict, count=None, cross_entropy=summed_cross_entropy):
    """Cross-entropy over the scored places, computing the output head only there.

    The head is a quarter of a small model's arithmetic, and its logits (places x vocabulary) most of its memory; a
    prompt's places need neither. A hook in front of the head drops them inside the model's own forward, so it works
    for every architecture and under DistributedDataParallel. `count` divides the sum (default: scored places here).
    inputs: from a `Collator`, or from a `PackedCollator`, which has found places and targets already.
    """
    import torch

    if "targets" in inputs:
        places, targets = inputs.get("places", slice(None)), inputs["targets"]
    else:
        places, targets = _scored(_targets(inputs["labels"]))
    head = getattr(model, "module", model).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, arguments: (arguments[0].flatten(0, 1)[places], *arguments[1:]))
    try:
        logits = model(input_ids=inputs["input_ids"], use_cache=False, **_attention_inputs(inputs)).logits
    finally:
        hook.remove()
    total = cross_entropy(logits, targets)
    count = (targets != -100).sum() if count is None else count
    return total / torch.as_tensor(count).clamp(min=1)  # nothing to score is a loss of 0, not 0 / 0


def _attention_inputs(inputs: dict) -> dict:
    """What keeps rows apart: the padding mask, or for packed rows the positions and a mask of their documents."""
    import torch

    if "document" not in inputs:
        return {"attention_mask": inputs.get("attention_mask")}
    document = inputs["document"]
    causal = torch.ones(document.shape[1], document.shape[1], dtype=torch.bool, device=document.device).tril()
    same = document[:, None, :, None] == document[:, None, None, :]
    return {"attention_mask": same & causal, "position_ids": inputs["position_ids"]}


def _trainer_class():
    import torch
    from trl import SFTTrainer

    from helpers.fast.recorded import RecordedStep

    class CompletionTrainer(SFTTrainer):
        """SFTTrainer whose loss skips the prompt's logits, and whose steps can be recorded."""

        cast, records, recording, cross_entropy = False, False, None, staticmethod(summed_cross_entropy)

        def _get_train_sampler(self, train_dataset=None):
            rows = self.train_dataset if train_dataset is None else train_dataset
            # One optimizer step's rows, over all workers and accumulated passes, have like lengths.
            together = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
            sampler = LengthSampler([len(ids) for ids in rows["input_ids"]], together, self.args.data_seed)
            progress_of(self).sampler = sampler
            return sampler

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if return_outputs:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            with torch.autocast("cuda", torch.bfloat16, enabled=self.cast):
                loss = completion_loss(model, inputs, num_items_in_batch, self.cross_entropy)
            # num_items_in_batch counts the tokens of all workers, and the gradients are averaged over them.
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes
            return loss

        def training_step(self, model, inputs, num_items_in_batch=None):
            if not self.records:
                return super().training_step(model, inputs, num_items_in_batch)
            if self.recording is None:
                model.train()  # walks through all modules, so not in every step
                self.recording = RecordedStep(lambda batch: self.compute_loss(model, batch, False, batch.get("count")),
                                              [parameter for parameter in model.parameters() if parameter.requires_grad])
            count = {} if num_items_in_batch is None else {"count": num_items_in_batch}
            return self.recording(self._prepare_inputs(inputs) | count)

    return CompletionTrainer


def _progress_callback():
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """Prints a line now and then, notes the seconds of all attempts, and marks checkpoints that are complete."""

        sampler = None

        def on_train_begin(self, args, state, control, **kwargs):
            self.begin, self.first_step, self.shown = time.perf_counter(), state.global_step, 0.0
            self.before = 0.0
            if state.global_step:
                marker = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "complete.json"
                self.before = json.loads(marker.read_text())["seconds"]

        def seconds(self) -> float:
            return self.before + time.perf_counter() - self.begin

        def on_epoch_begin(self, args, state, control, **kwargs):
            # accelerate's loaders don't reach a sampler behind both a skip and a shard (a resumed run of several workers).
            if self.sampler is not None:
                self.sampler.set_epoch(int(state.epoch or 0))

        def on_log(self, args, state, control, logs=None, **kwargs):
            now = time.perf_counter()
            if "loss" not in (logs or {}) or not state.is_world_process_zero:
                return
            if now - self.shown < 10 and state.global_step < state.max_steps:
                return
            self.shown = now
            left = (now - self.begin) / (state.global_step - self.first_step) * (state.max_steps - state.global_step)
            print(f"step {state.global_step:>5}/{state.max_steps}   loss {logs['loss']:.3f}   "
                  f"{left / 60:.1f} min left", flush=True)

        def on_save(self, args, state, control, **kwargs):
            from torch import distributed

            if distributed.is_initialized():  # a checkpoint holds every rank's random state
                distributed.barrier()
            if state.is_world_process_zero:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                cards.write_json(folder / "complete.json", {"step": state.global_step, "seconds": self.seconds()})

    return Progress


def progress_of(trainer):
    """The trainer's Progress callback."""
    return next(callback for callback in trainer.callback_handler.callbacks if type(callback).__name__ == "Progress")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end (a killed run can leave a part of one), or None."""
    complete = [path.parent for path in Path(folder).glob("checkpoint-*/complete.json")]
    return max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def _finish_training(config, trainer, run_dir: Path, rows: data.Rows, used: int, left_out: int, world: int) -> dict:
    import torch

    progress = progress_of(trainer)
    log = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    tail = [loss for _, loss in log[-max(1, len(log) // 10):]]
    result = {
        "config": dataclasses.asdict(config), "data_source": rows.source, "data_licence": rows.licence, "rows": used,
        "rows_left_out": left_out, "steps": trainer.state.global_step, "final_loss": sum(tail) / len(tail),
        "training_seconds": progress.seconds(), "hardware": base_models.hardware(), "workers": world,
        "dtype": str(base_models.best_dtype()), "trained_parameters": sum(
            p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "base_revision": base_models.revision_of(config.base_model), "loss_log": log,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }
    if is_main():
        model = trainer.accelerator.unwrap_model(trainer.model)
        with base_models.disk_errors(run_dir, "the adapter"), tempfile.TemporaryDirectory(dir=run_dir) as temporary:
            target = Path(temporary) / "trained"
            save_adapter(model, config.base_model, target)
            cards.write_json(target / "result.json", result)
            shutil.rmtree(run_dir / "trained", ignore_errors=True)
            os.replace(target, run_dir / "trained")
    return result


def save_adapter(model, base_model: str, folder: Path) -> None:
    """Write a PEFT model's active adapter as bfloat16 safetensors and a config that names the base model, not a path."""
    import torch
    from safetensors.torch import load_file, save_file

    model.save_pretrained(folder, safe_serialization=True)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    base = base_models.resolve(base_model)
    config["base_model_name_or_path"] = base.hub_id or base.name
    config["revision"] = base_models.revision_of(base_model)
    config["target_modules"] = sorted(config["target_modules"])
    cards.write_json(folder / "adapter_config.json", config)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; `publish` writes a real one


def load_trained(config: FineTuneConfig, run_dir: Path):
    """The base model with the adapter of ``run_dir/trained``, ready for inference: ``(model, tokenizer)``."""
    from peft import PeftModel

    model, tokenizer = base_models.load(config.base_model, config.precision)
    return PeftModel.from_pretrained(model, Path(run_dir) / "trained").eval(), tokenizer


# -------------------------------------------------------------------------------------------------------- publishing


def publish(run_dir: Path, adapter_dir: Path, metrics: dict, examples: list[dict] | None = None, command: str = "") -> Path:
    """Make ``adapter_dir`` from the trained adapter: weights, config, metrics.json and a model card, all or nothing.

    metrics: what `metrics.json` holds beside the training's own record. Raises WorkbookError when the folder exists.
    """
    run_dir, adapter_dir = Path(run_dir), Path(adapter_dir)
    check_free(adapter_dir)
    result = json.loads((run_dir / "trained" / "result.json").read_text())
    data_file = result["config"]["data"]
    result["config"]["data"] = Path(data_file).name if Path(data_file).is_absolute() else data_file  # no folder of ours in it
    record = {**{key: value for key, value in result.items() if key != "loss_log"}, **metrics, "command": command,
              "examples": examples or []}
    with base_models.disk_errors(adapter_dir.parent, "the adapter"):
        adapter_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".publishing-", dir=adapter_dir.parent) as temporary:
            staging = Path(temporary) / "adapter"
            shutil.copytree(run_dir / "trained", staging, ignore=shutil.ignore_patterns("result.json"))
            record["weights_sha256"] = base_models.sha256(staging / "adapter_model.safetensors")  # checked when it is read
            cards.write(staging, record)
            if adapter_dir.is_dir():
                adapter_dir.rmdir()  # empty, as checked
            os.replace(staging, adapter_dir)
    return adapter_dir


def main(run_dir: str) -> None:
    """One worker of a group: train with the config that `fine_tune` left in the run's folder."""
    from helpers.worker_group import group

    known = Path(run_dir) / "config.json"
    if not known.is_file():
        raise WorkbookError(f"The run folder {run_dir} is not on this host: workers of several hosts need the project and its "
                            "runs on a file system that all of them share, under the same path.")
    settings = json.loads(known.read_text())
    workers = settings.pop("workers")
    config = FineTuneConfig(**settings)
    with group(workers, {"run settings": str(config)}):
        train(config, Path(run_dir))


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record  # a worker's error is kept for its launcher

    record(main)(sys.argv[1])
