"""Training speed: TRL's defaults against this workbook's recipe, interleaved in one run.

    python tests/benchmarks/training.py --json training.json
    python tests/benchmarks/training.py --width 512 --rows 64 --packed --repeats 3        # a GPU: packed, compiled or not

Every variant trains the same practice rows for the same number of steps; the first step warms up and does not count.
Printed: median of the repeats and their range, ratios within this run, and, on a CPU, the share of the rate that plain
float32 matrix products reach in the same run.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from helpers import base_models, cards, data, fine_tuning, tasks  # noqa: E402
from helpers.practice import practice_rows  # noqa: E402


def trl_defaults(arguments, rows, folder):
    """SFTTrainer as TRL sets it up, on prompt and completion columns, with the same LoRA, batch and learning rate."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    task = tasks.get_task("sql")
    model, tokenizer = base_models.load(arguments.base_model, "4bit")
    dataset = Dataset.from_list([{"prompt": task.prompt(row), "completion": task.completion(row)} for row in rows])
    cuda = torch.cuda.is_available()
    config = SFTConfig(output_dir=str(folder), max_steps=arguments.steps, per_device_train_batch_size=arguments.rows,
                       report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=not cuda, bf16=cuda)
    lora = LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM", target_modules=base_models.lora_target_modules(model))
    return SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)


def ours(arguments, rows, folder, **changes):
    """This workbook's trainer with the default preset, and `changes`."""
    model, tokenizer = base_models.load(arguments.base_model, changes.get("precision", "4bit"))
    config = fine_tuning.FineTuneConfig.from_parameters(task="sql", base_model=arguments.base_model, batch_size=arguments.rows,
                                                        max_steps=arguments.steps, checkpoint_steps=10**6, **changes)
    encoded, _ = data.encode_rows(tokenizer, tasks.get_task("sql"), rows, config.max_length)
    return fine_tuning.make_trainer(config, model, tokenizer, encoded, folder)


def variants(arguments) -> dict:
    if not arguments.packed:
        return {"TRL defaults": trl_defaults, "workbook, 4 bits": ours,
                "workbook, full precision": lambda *given: ours(*given, precision="full")}
    packed = {"packing": "documents", "max_length": arguments.width, "precision": "full", "rank": 8}
    return {"packed": lambda *given: ours(*given, **packed),
            "packed, compiled": lambda *given: ours(*given, **packed, compile=True)}


def measure(make, arguments, rows) -> dict:
    """Train, and time from the end of the first step: tokens that are not padding, per second."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.moments = []

        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.moments.append(time.perf_counter())

    counted = []

    class Counted:
        """Counts a batch's tokens on its way to the model."""

        def __init__(self, collator):
            self.collator = collator

        def __call__(self, batch):
            counted.append(sum(len(row["input_ids"]) for row in batch))
            return self.collator(batch)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(arguments, rows, Path(folder))
        trainer.args.dataloader_num_workers, trainer.args.dataloader_persistent_workers = 0, False
        clock = Clock()
        trainer.add_callback(clock)
        trainer.data_collator = Counted(trainer.data_collator)
        trainer.train()
        loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        tokens = sum(counted[arguments.warm_up:arguments.steps])
    seconds = clock.moments[-1] - clock.moments[arguments.warm_up - 1]
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    del trainer
    gc.collect()
    return {"tokens_per_second": tokens / seconds, "loss": loss[-1] if loss else None, "peak_gpu_gb": peak}


def matrix_rate() -> float:
    """FLOP/s of float32 matrix products of this model's shapes on this device's CPU."""
    a, b = torch.randn(1024, 576), torch.randn(576, 1536)
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(20):
            a @ b
        best = max(best, 20 * 2 * 1024 * 576 * 1536 / (time.perf_counter() - begin))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", default=base_models.EMBEDDED)
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
    parser.add_argument("--width", type=int, default=512, help="tokens of a packed row")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=1, help="steps that do not count")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--packed", action="store_true", help="packed rows, compiled and not, instead of TRL against ours")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.steps <= arguments.warm_up or arguments.warm_up < 1:
        parser.error("--steps must be more than --warm-up, and --warm-up at least 1")
    rows = practice_rows("sql", "train", 64 if not arguments.packed else 6 * arguments.rows * arguments.width // 60)
    found: dict[str, list[dict]] = {}
    rates = []
    for repeat in range(arguments.repeats):
        rates.append(matrix_rate())
        for name, make in variants(arguments).items():
            found.setdefault(name, []).append(measure(make, arguments, rows))
            print(f"repeat {repeat + 1}: {name}: {found[name][-1]['tokens_per_second']:,.0f} tokens/s", flush=True)
    first = statistics.median(run["tokens_per_second"] for run in next(iter(found.values())))
    layers = sum(out * into for out, into in _layers(arguments.base_model))
    result = {"hardware": base_models.hardware(), "torch": torch.__version__, "arguments": vars(arguments) | {"json": None},
              "matrix_gflops": [rate / 1e9 for rate in rates], "variants": {}}
    print(f"\n{result['hardware']}; float32 matrix products {statistics.median(rates) / 1e9:.0f} GFLOP/s")
    for name, runs in found.items():
        speeds = [run["tokens_per_second"] for run in runs]
        middle = statistics.median(speeds)
        # A token passes the frozen layers once forward and once backward: 2 + 2 FLOP a weight. The head is not counted.
        share = middle * 4 * layers / statistics.median(rates)
        result["variants"][name] = {"runs": runs, "median": middle, "ratio": middle / first, "share_of_matrix_rate": share}
        cpu = "" if torch.cuda.is_available() else f", {share:.0%} of the matrix rate"
        print(f"{name:26}{middle:12,.0f} tokens/s [{min(speeds):,.0f}, {max(speeds):,.0f}]   x{middle / first:.2f}{cpu}")
    if arguments.json:
        cards.write_json(arguments.json, result)


def _layers(base_model: str) -> list[tuple[int, int]]:
    from helpers.adapters import layer_shapes

    return list(layer_shapes(base_model).values())


if __name__ == "__main__":
    main()
