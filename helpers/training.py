"""From a checked recipe to a trained adapter: TRL's trainer set up well, and resumable.

`train` trains what the caller loaded. `train_on_workers` starts a group of processes
(helpers.workers), each of which runs ``python -m helpers.training <run_dir>``. Either way
checkpoints are in ``run_dir/checkpoints`` and the adapter in ``run_dir/trained``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import set_seed
from trl import SFTConfig

from helpers import (METRICS, WorkbookError, base_models, data, disk_errors, read_json, sha256,
                     probe, write_json)
from helpers.fast import attention, packing, recorded, sharded
from helpers.publishing import save_trained, training_record
from helpers.recipes import FineTuneConfig, check_shard
from helpers.tasks import Task, get_task, register
from helpers.trainer import CompletionTrainer, last_checkpoint, summed_cross_entropy
from helpers.worker_group import group
from helpers.workers import launch, plan

SETTINGS = "config.json"  # in a run's folder: its recipe, number of workers, validation rows


def train(config: FineTuneConfig, rows: data.Rows, model, tokenizer, run_dir: Path,
          resume: bool = False, validation: list[dict] = ()) -> dict:
    """Train an adapter on a loaded base model and save it in ``run_dir/trained``, beside the run's
    record, which is returned. The base model is given back without LoRA.

    validation: rows whose loss chooses the checkpoint that is saved (none: the last).
    resume: go on from the newest complete checkpoint of `run_dir`, with its rows.
    Raises WorkbookError for bad data, a full disk, too little memory, or a folder of another run.
    """
    run_dir = Path(run_dir)
    check_fits(config, model)
    validation = _open_run(config, run_dir, world_size(), resume, validation)
    set_seed(config.seed)
    encoded, _ = data.encode_rows(tokenizer, get_task(config.task), rows.rows, config.max_length)
    watched, _ = data.encode_rows(tokenizer, get_task(config.task), validation, config.max_length)
    checkpoint, trainer = last_checkpoint(run_dir / "checkpoints"), None
    try:
        trainer = make_trainer(config, model, tokenizer, encoded, run_dir, watched)
        if trainer.is_world_process_zero():
            _say_what_begins(config, rows, len(encoded), trainer, checkpoint)
        with disk_errors(run_dir, "a checkpoint"):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        result = training_record(config, trainer, rows, len(encoded))
        if trainer.is_world_process_zero():
            for warning in result["warnings"]:
                print(f"Warning: {warning}", flush=True)
            with disk_errors(run_dir, "the adapter"):
                save_trained(trainer.accelerator.unwrap_model(trainer.model), result, run_dir)
    except torch.OutOfMemoryError as error:
        raise WorkbookError(f"The GPU's memory is too small for batch_size={config.batch_size} and "
                            f"max_length={config.max_length}: lower batch_size (and raise "
                            "gradient_accumulation by the same factor), or lower max_length."
                            ) from error
    finally:  # the caller gets its model back
        if config.compile:
            recorded.undo_compile(model)
        if trainer:
            trainer.accelerator.unwrap_model(trainer.model).unload().eval()
    return result


def check_fits(config: FineTuneConfig, model) -> list[str]:
    """`target_modules`. Raises WorkbookError for a recipe that this base model cannot follow."""
    limit = probe.most_tokens(model) or config.max_length
    if config.max_length > limit:
        raise WorkbookError(f"max_length is {config.max_length} tokens, and {config.base_model} "
                            f"reads at most {limit}: lower max_length.")
    probe.check(model)
    if config.packing == "documents":
        packing.takes_mask(model, config.base_model, config.max_length)
    return target_modules(config, model)


def target_modules(config: FineTuneConfig, model) -> list[str]:
    """The names of the linear layers that get an adapter: those that the recipe chose of all."""
    found = base_models.lora_target_modules(model)
    named = [name.strip() for name in (config.target_modules or "").split(",") if name.strip()]
    chosen = [[one for one in found if f".{one}".endswith(f".{name}")] for name in named]
    for name, layers in zip(named, chosen, strict=True):
        if not layers:
            has = ", ".join(dict.fromkeys(one.rsplit(".", 1)[-1] for one in found))
            raise WorkbookError(f"target_modules names {name!r}, which {config.base_model} does "
                                f"not have: it has {has}.")
    return list(dict.fromkeys(sum(chosen, []))) or found


def train_on_workers(config: FineTuneConfig, run_dir: Path, workers: int, workers_on: str = "",
                     resume: bool = False, validation: list[dict] = (), model=None) -> dict:
    """`train` in a group of processes, here or where `workers_on` says (workers.read_place). Each
    loads rows and base model for itself. model: one of the caller's; where the weights are shared,
    because a GPU cannot hold them, its memory is freed. Raises WorkbookError as `train` and
    `launch` do."""
    run_dir = Path(run_dir).resolve()
    _open_run(config, run_dir, workers, resume, validation)
    base_models.fetch(config.base_model)  # once, before several workers ask for it
    if config.shard and model:
        base_models.free(model)
    logs = run_dir / "workers"
    launch(plan("helpers.training", [str(run_dir)], workers, logs, workers_on), logs)
    return read_json(run_dir / "trained" / METRICS)


def run(config: FineTuneConfig, run_dir: Path, workers: int = 1, workers_on: str = "",
        resume: bool = False, validation: list[dict] = ()) -> dict:
    """Load what the recipe names and train it, here or on workers: a run without a notebook."""
    if workers == 1 and not workers_on:
        return train(config, *load_inputs(config), run_dir, resume, validation)
    return train_on_workers(config, run_dir, workers, workers_on, resume, validation)


def load_inputs(config: FineTuneConfig):
    """What a recipe names: ``(rows, model, tokenizer)``."""
    most = None if config.max_rows == -1 else config.max_rows
    rows = data.load_rows(config.task, config.data, "train", most, config.data_fraction,
                          config.seed)
    device = "cpu" if config.shard else None  # a GPU would have to hold all the weights at once
    return rows, *base_models.load(config.base_model, config.precision, device)


def world_size() -> int:
    """How many workers train. Raises WorkbookError if WORLD_SIZE says more than one, but this
    process is in no group: accelerate would wait for the others."""
    if distributed.is_initialized():
        return distributed.get_world_size()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise WorkbookError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} in the environment, but "
                            "this process is in no group of workers: unset RANK and WORLD_SIZE, "
                            "or start the workers with --workers.")
    return 1


def _open_run(config: FineTuneConfig, run_dir: Path, workers: int, resume: bool,
              validation: list[dict]) -> list[dict]:
    """Record recipe and validation rows in a new run's folder; on a resume compare the recipe.
    Returns the validation rows that the run began with. Raises WorkbookError."""
    check_shard(config, workers)
    rows_file = data.source_file(config.task, config.data)
    settings = {**dataclasses.asdict(config), "workers": workers,
                "base_revision": base_models.revision_of(config.base_model),
                "data_revision": sha256(rows_file) if rows_file else None,
                "task_definition": dataclasses.asdict(get_task(config.task))}
    settings = json.loads(json.dumps(settings))  # as it is read back
    known = run_dir / SETTINGS
    if resume and known.is_file():
        before = read_json(known)
        for name, value in settings.items():
            if before.get(name) != value:
                raise WorkbookError(f"The run in {run_dir} was made with {name}="
                                    f"{before.get(name)!r}, not {value!r}: resume it unchanged or "
                                    "start a new one.")
        return before["validation"]
    if (run_dir / "checkpoints").exists():
        raise WorkbookError(f"The output folder {run_dir} already holds a training run: resume it "
                            "or choose another.")
    with disk_errors(run_dir, "the training run"):
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(known, settings | {"validation": list(validation)})
    return validation


def _say_what_begins(config, rows, used: int, trainer, checkpoint) -> None:
    world = trainer.accelerator.num_processes
    if used < len(rows.rows):
        print(f"{len(rows.rows) - used} of {len(rows.rows)} rows are longer than max_length="
              f"{config.max_length} tokens and are left out.")
    print(f"Training on {used:,} rows of {rows.source}, {trainer.args.max_steps:,} steps of "
          f"{config.batch_size * config.gradient_accumulation * world} rows, {world} "
          f"worker{'s' * (world > 1)}, {base_models.hardware()}, weights {config.precision}, "
          f"computing in {base_models.best_dtype()}.", flush=True)
    if config.validation_rows and not trainer.eval_dataset:
        print("There are no validation rows for a loss curve, so the last step will be kept.")
    adapted, packed = probe.shares(trainer.model)
    if adapted < 0.9 or config.precision == "4bit" and packed < 0.9:
        print(f"LoRA adapts {adapted:.0%} of the blocks' weights, and {packed:.0%} are in 4 bits: "
              "stacked experts and encoders of pictures stay as they are.", flush=True)
    if checkpoint:
        print(f"Going on from {checkpoint.name}.", flush=True)


# --- the trainer, set up

def make_trainer(config: FineTuneConfig, model, tokenizer, encoded: list[dict], run_dir: Path,
                 validation: list[dict] = ()) -> CompletionTrainer:
    """The base model with a fresh LoRA adapter inside TRL's trainer. encoded, validation: rows of
    `data.encode_rows`, so training sees the prompt tokens that generation will."""
    packed = config.packing != "none"
    dataset = make_dataset(config, encoded)
    collator = data.Collator(tokenizer.pad_token_id)
    if packed:
        shape = 0, 0
        if config.compile:  # batches of one shape: rows and places to score
            shape = config.batch_size, packing.most_scored(dataset["labels"], config.batch_size)
        mask = config.packing == "documents" and packing.takes_mask(
            model, config.base_model, config.max_length)
        collator = packing.PackedCollator(tokenizer.pad_token_id, config.max_length, *shape, mask)
    lora_model = _with_lora(config, model)
    if config.packing == "wrapped":
        attention.use_plain_causal_attention(model)
    bfloat16 = torch.cuda.is_available() and base_models.best_dtype() == torch.bfloat16
    kind, summed = CompletionTrainer, summed_cross_entropy
    if config.compile:
        recorded.compile_blocks(model, dynamic=not packed,
                                stored=0.0 if config.gradient_checkpointing else 0.9)
        summed = torch.compile(summed_cross_entropy, dynamic=not packed)
        if bfloat16 and recorded.records_steps(config, model.config.model_type):
            kind = recorded.RecordedTrainer
    if config.shard:
        sharded.shard(lora_model, base_models.best_device())
        kind = sharded.ShardedTrainer
    watched = Dataset.from_list(_labelled(config, validation)) if validation else None
    return kind(model=lora_model, args=_arguments(config, len(dataset), run_dir, bool(watched)),
                train_dataset=dataset, eval_dataset=watched, processing_class=tokenizer,
                data_collator=collator, bfloat16=bfloat16, summed=summed, patience=config.patience)


def make_dataset(config: FineTuneConfig, encoded: list[dict]) -> Dataset:
    """What a run trains on: rows with the labels that the recipe asks for, packed if it says so."""
    dataset = Dataset.from_list(_labelled(config, encoded))
    if config.packing == "none":
        return dataset
    return packing.pack(dataset, config.max_length, config.packing)


def _labelled(config: FineTuneConfig, encoded: list[dict]) -> list[dict]:
    if config.completion_only:
        return encoded
    # Nothing stands before a document's first token to predict it.
    return [{"input_ids": row["input_ids"], "labels": [-100, *row["input_ids"][1:]]}
            for row in encoded]


def _with_lora(config: FineTuneConfig, model):
    model.requires_grad_(False)
    if config.gradient_checkpointing and not config.compile:
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, bias="none",
        task_type="CAUSAL_LM", target_modules=target_modules(config, model)))


def _arguments(config: FineTuneConfig, rows: int, run_dir: Path, evaluated: bool) -> SFTConfig:
    cuda = torch.cuda.is_available()
    rows_a_step = config.batch_size * config.gradient_accumulation * world_size()
    steps = config.max_steps or max(1, math.ceil(config.epochs * rows / rows_a_step))
    # About 100 losses a run. A checkpoint stands where a loss is logged: otherwise a resumed run
    # would log the mean of fewer steps.
    logged = min(config.checkpoint_steps, max(1, steps // 100))
    while config.checkpoint_steps % logged:
        logged -= 1
    fused = cuda and config.optimizer == "adamw_torch"
    arguments = SFTConfig(
        output_dir=str(run_dir / "checkpoints"), max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate, lr_scheduler_type=config.schedule,
        warmup_steps=0 if config.schedule == "constant" else steps // 20,
        optim="adamw_torch_fused" if fused else config.optimizer,
        max_grad_norm=1.0, seed=config.seed, data_seed=config.seed,
        use_cpu=base_models.best_device(config.precision).type == "cpu",
        bf16=False,  # compute_loss casts: accelerate's way also turns all logits into float32
        fp16=cuda and base_models.best_dtype() == torch.float16,
        # Compiled blocks do it themselves, see compile_blocks.
        gradient_checkpointing=config.gradient_checkpointing and not config.compile,
        max_length=config.max_length,
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
        router_aux_loss_coef=0.0,  # frozen routers: its loss teaches nothing, and reads our masks
        logging_nan_inf_filter=False,  # it would wait for the GPU in every step
        logging_steps=logged, save_strategy="steps", save_steps=config.checkpoint_steps,
        eval_strategy="steps" if evaluated else "no", eval_steps=config.checkpoint_steps,
        eval_on_start=evaluated and not last_checkpoint(run_dir / "checkpoints"),
        load_best_model_at_end=evaluated,
        save_total_limit=3,  # the best one, the newest, and the one before it while that is written
        report_to="none", disable_tqdm=True, dataloader_pin_memory=cuda,
        dataloader_num_workers=2 if cuda else 0, dataloader_persistent_workers=cuda,
        ddp_find_unused_parameters=False)
    if cuda:
        arguments._n_gpu = 1  # else one worker is spread over all the GPUs that it sees
    # Not what accelerate's variables in the environment say.
    arguments.mixed_precision = "fp16" if arguments.fp16 else "no"
    return arguments


@record  # a worker's error is kept for its launcher
def main(run_dir: str) -> None:
    """One worker of a group: train with the recipe that `train_on_workers` left in `run_dir`."""
    known = Path(run_dir) / SETTINGS
    if not known.is_file():
        raise WorkbookError(f"The run folder {run_dir} is not on this host: workers of several "
                            "hosts need the project and its runs on a file system that all of them "
                            "share, under the same path.")
    settings = read_json(known)
    register(Task(**settings["task_definition"]))  # it may be one that the notebook registered
    fields = [field.name for field in dataclasses.fields(FineTuneConfig)]
    config = FineTuneConfig(**{name: settings[name] for name in fields})
    inputs = load_inputs(config)  # before the group forms: it waits long for a slow disk or network
    with group(settings["workers"]):
        # resume: `train_on_workers` has opened the folder, and there may be checkpoints.
        train(config, *inputs, Path(run_dir), resume=True)


if __name__ == "__main__":
    main(sys.argv[1])
