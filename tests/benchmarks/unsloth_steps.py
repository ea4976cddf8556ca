"""Times training steps of LoRA (or QLoRA) with Unsloth on one GPU without a network: Unsloth's side of a comparison of speed.

It does what Unsloth's documentation does: FastLanguageModel loads the model and adds the adapter, and trl's SFTTrainer, which
Unsloth patches, trains it. Every step is one pass over --rows rows of the same width that were tokenized before, with nothing
packed or flattened: the timed steps are those after --warm-up, from one synchronized moment to another, so compiling (Unsloth
compiles the model's blocks in the first step) and loading are counted in before_and_warm_up_seconds alone. The last line of
the output is the result as JSON. It needs only local files, and an environment of its own (`pip install unsloth==2026.10.9`);
`training.py --suite packed --unsloth …` runs it in turn with the others:

    python unsloth_steps.py --base MODEL_FOLDER --rows-file rows.safetensors --json result.json
"""
import argparse
import atexit
import json
import os
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

SCRATCH = tempfile.mkdtemp(prefix="unsloth_steps_")
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1",  # local files only
    UNSLOTH_DISABLE_STATISTICS="1",  # Unsloth counts its users by a download: not here
    UNSLOTH_COMPILE_LOCATION=f"{SCRATCH}/compiled",  # the trainers that Unsloth writes as source code
    UNSLOTH_DISABLE_AUTO_PADDING_FREE="1")  # no batch flattened to one long row; padding_free=False says it again below
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:False")  # torch's own default, which Unsloth would change
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def arguments() -> argparse.Namespace:
    """What to train, on which rows, how, and for how long."""
    parser = argparse.ArgumentParser(description="Time training steps of Unsloth.")
    parser.add_argument("--base", required=True, type=Path, help="a local folder with the base model and its tokenizer")
    parser.add_argument("--rows-file", required=True, type=Path, help="safetensors: input_ids and labels, each (N, width)")
    parser.add_argument("--rows", type=int, default=32, help="rows of one optimizer step, all in one pass")
    parser.add_argument("--steps", type=int, default=18, help="optimizer steps, the warm-up among them")
    parser.add_argument("--warm-up", type=int, default=6, help="steps before the clock starts")
    parser.add_argument("--precision", choices=["full", "4bit"], default="full", help="bfloat16 base or NF4 base")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--checkpointing", choices=["none", "unsloth"], default="none", help="of activations")
    parser.add_argument("--json", type=Path, help="write the result there too")
    options = parser.parse_args()
    if not 0 < options.warm_up < options.steps:
        parser.error("--warm-up must be at least 1 and less than --steps")
    return options


OPTIONS = arguments()
STARTED = time.perf_counter()

# Unsloth patches the libraries below, so it must come before them.
import unsloth  # noqa: E402, I001
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402


class Clock(TrainerCallback):
    """Reads the clock, once the GPU has finished its work, after the last step of the warm-up and after the last of all."""

    def __init__(self, *steps: int):
        self.steps, self.times = steps, []

    def on_step_end(self, args, state, control, **_):
        """Called by the trainer after each optimizer step."""
        if state.global_step in self.steps:
            torch.cuda.synchronize()
            self.times.append(time.perf_counter())


def dataset_of(rows_file: Path, count: int) -> Dataset:
    """The first `count` rows of the file (again from the start if it holds fewer), tokenized as they are."""
    rows = load_file(rows_file)
    wanted = torch.arange(count) % len(rows["input_ids"])
    columns = {name: rows[name][wanted].long().numpy() for name in ("input_ids", "labels")}
    columns["attention_mask"] = torch.ones_like(rows["input_ids"][wanted]).long().numpy()
    return Dataset.from_dict({name: list(column) for name, column in columns.items()}).with_format("numpy")


def adapted_model(options: argparse.Namespace, width: int):
    """The base model with Unsloth's kernels and a new adapter on its seven linear projections, and the tokenizer."""
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        model_name=str(options.base), max_seq_length=width, dtype=torch.bfloat16, load_in_4bit=options.precision == "4bit",
        local_files_only=True, trust_remote_code=False)
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=options.rank, lora_alpha=options.alpha, lora_dropout=0, bias="none", target_modules=PROJECTIONS,
        use_gradient_checkpointing=False if options.checkpointing == "none" else "unsloth", random_state=0)
    return model, tokenizer


def trainer_of(options: argparse.Namespace, model, tokenizer, dataset: Dataset, width: int, clock: Clock) -> SFTTrainer:
    """trl's trainer as Unsloth has patched it, with the tokenized rows in their order and nothing saved or reported."""
    config = SFTConfig(
        output_dir=f"{SCRATCH}/run", max_steps=options.steps, per_device_train_batch_size=options.rows,
        gradient_accumulation_steps=1, learning_rate=2e-4, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        optim="adamw_torch_fused", bf16=True, gradient_checkpointing=options.checkpointing != "none", seed=0,
        packing=False, padding_free=False, max_length=width,
        dataset_kwargs={"skip_prepare_dataset": True}, train_sampling_strategy="sequential",
        logging_steps=max(1, options.steps // 6), save_strategy="no", report_to="none", disable_tqdm=True)
    return SFTTrainer(model=model, args=config, processing_class=tokenizer, train_dataset=dataset, callbacks=[clock])


def compiled_blocks(model) -> int:
    """How many decoder layers trained as compiled blocks: Unsloth falls back to plain ones, with a message, if it must."""
    notes = (layer.__dict__ for layer in model.get_base_model().model.layers)
    return sum(bool(note.get("_unsloth_block_checked") and note.get("_unsloth_block_mode")) for note in notes)


def main(options: argparse.Namespace) -> None:
    """Train, and print what was measured."""
    dataset = dataset_of(options.rows_file, options.rows * options.steps)
    width = dataset[0]["input_ids"].shape[0]
    model, tokenizer = adapted_model(options, width)
    clock = Clock(options.warm_up, options.steps)
    trainer = trainer_of(options, model, tokenizer, dataset, width, clock)
    shapes = set()  # of what the model was really given
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: shapes.add(tuple(inputs[0].shape)))
    trainer.train()
    if shapes != {(options.rows, width)}:
        raise SystemExit(f"The passes had the shapes {shapes}, not ({options.rows}, {width}) alone: nothing was measured.")

    seconds = clock.times[1] - clock.times[0]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    last = losses[-max(1, len(losses) // 3):]
    result = {
        "tool": "unsloth", "precision": options.precision, "checkpointing": options.checkpointing, "rank": options.rank,
        "alpha": options.alpha, "rows": options.rows, "width": width, "steps": options.steps, "warm_up": options.warm_up,
        "tokens_per_second": round(options.rows * width * (options.steps - options.warm_up) / seconds, 1),
        "seconds": round(seconds, 4), "loss": round(sum(last) / len(last), 4), "first_loss": round(losses[0], 4),
        "peak_gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3),
        "before_and_warm_up_seconds": round(clock.times[0] - STARTED, 2),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "linear": type(model.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__,
        "compiled_blocks": compiled_blocks(model), "gpu": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft")}}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(OPTIONS)
