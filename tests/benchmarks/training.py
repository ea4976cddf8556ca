"""Training speed, interleaved in one run: TRL's defaults and other recipes against this workbook's.

    python tests/benchmarks/training.py --json training.json               # any machine: short rows of a task, embedded base
    python tests/benchmarks/training.py --suite packed --json packed.json  # a GPU: rows of 1,024 tokens, every one scored
    python tests/benchmarks/training.py --suite bloom --json bloom.json    # a GPU: the reference's recipe, bloom-1b1's shape
    python tests/benchmarks/training.py --suite trio --json trio.json      # a GPU: its three jobs as a whole, once, minutes
    python tests/benchmarks/training.py --suite llama8b --json llama8b.json  # a GPU: Llama-3.1-8B's shape; qwen8b: Qwen3-8B's
    python tests/benchmarks/workers.py shared --json shared.json    # two GPUs: Llama-3.1-70B's shape, its weights shared

Every variant of a suite trains the same practice rows for the same number of optimizer steps of as many rows; the first steps
warm up and do not count. Printed: median of the repeats and their range, ratios within this run, the loss at the end, peak
memory of a GPU, and the share of the rate that plain matrix products reach in the same run (float32 on a CPU, bfloat16 on a GPU).
The large models themselves are not needed: one of the same shape with random weights costs the same time.
A variant that fails (a peer's options may not go together) is left out, and the JSON file says why.
Unsloth asks for older libraries: `--unsloth "COMMAND"` adds it to the packed suite, where COMMAND starts a Python that has it.
"""

import argparse
import functools
import gc
import json
import math
import multiprocessing
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks" / "practice")]

from make_practice import practice_rows  # noqa: E402

from helpers import base_models, data, read_json, recipes, tasks, training, write_json  # noqa: E402
from helpers.adapter_layers import layer_shapes, skeleton  # noqa: E402

SUITES = {"rows": {"rows": 8, "width": 1024, "steps": 6, "warm_up": 1},
          "packed": {"rows": 32, "width": 1024, "steps": 18, "warm_up": 6},
          "bloom": {"rows": 4, "width": 1024, "steps": 24, "warm_up": 8}, "trio": {"rows": 4, "width": 1024},
          "llama8b": {"rows": 2, "width": 2048, "steps": 14, "warm_up": 6},
          "qwen8b": {"rows": 2, "width": 2048, "steps": 14, "warm_up": 6},
          "llama70b": {"rows": 1, "width": 2048, "steps": 8, "warm_up": 3}}
EIGHT_B = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False}
SHAPES = {  # a suite's base model: its config's class and values
    "bloom": ("BloomConfig", {"n_layer": 24, "n_head": 16, "hidden_size": 1536, "vocab_size": 250_880}),
    "llama8b": ("LlamaConfig", EIGHT_B | {"num_hidden_layers": 32, "intermediate_size": 14_336, "vocab_size": 128_256}),
    "qwen8b": ("Qwen3Config", EIGHT_B | {"num_hidden_layers": 36, "intermediate_size": 12_288, "vocab_size": 151_936})}
SHAPES["llama70b"] = ("LlamaConfig", SHAPES["llama8b"][1] | {"num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64,
                                                            "intermediate_size": 28_672})
SHAPES["trio"] = SHAPES["bloom"]
TRIO = {"instruct": 4_400_000, "sql": 11_100_000, "detox": 3_000_000}  # tokens of the reference's three jobs


def stock(arguments, rows, folder, precision="4bit", plain_attention=False, packed=False, **settings):
    """TRL's SFTTrainer as TRL sets it up, with `settings` of SFTConfig; the LoRA is the workbook's."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    task = tasks.get_task("sql")
    model, tokenizer = (transformers_own if plain_attention else base_models.load)(arguments.base_model, precision)
    if packed:  # every token is scored, as in plain text; the stream is cut into rows of --width
        dataset = Dataset.from_list([{"text": task.prompt(row) + task.completion(row)} for row in rows])
        settings |= {"packing": True, "packing_strategy": "wrapped", "max_length": arguments.width}
    else:
        dataset = Dataset.from_list([{"prompt": task.prompt(row), "completion": task.completion(row)} for row in rows])
    cuda = torch.cuda.is_available()
    settings = {"per_device_train_batch_size": arguments.rows, "learning_rate": 2e-4, **settings}
    config = SFTConfig(output_dir=str(folder), max_steps=arguments.steps, report_to="none", disable_tqdm=True,
                       save_strategy="no", use_cpu=not cuda, bf16=cuda, logging_steps=1, **settings)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=recipe_of(arguments).dropout, task_type="CAUSAL_LM",
                      target_modules=base_models.lora_target_modules(model))
    return SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)


def recipe_of(arguments) -> recipes.FineTuneConfig:
    return recipes.FineTuneConfig.from_parameters(task="sql", preset="reference" if arguments.suite == "bloom" else "default")


def transformers_own(name: str, precision: str):
    """A base model with the attention that transformers gives it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantized = {"quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=base_models.best_dtype())} if precision == "4bit" else {}
    model = AutoModelForCausalLM.from_pretrained(base_models.fetch(name), dtype=base_models.best_dtype(),
                                                 device_map={"": base_models.best_device()}, **quantized)
    return model, base_models.load_tokenizer(name)


def config_of(arguments, **changes):
    """The workbook's default preset, and `changes`."""
    return recipes.FineTuneConfig.from_parameters(**{
        "task": "sql", "base_model": arguments.base_model, "batch_size": arguments.rows, "max_steps": arguments.steps,
        "checkpoint_steps": 10**6, **changes})


def ours(arguments, rows, folder, plain_attention=False, **changes):
    """This workbook's trainer for `config_of`."""
    config = config_of(arguments, **changes)
    load = transformers_own if plain_attention else base_models.load
    model, tokenizer = load(arguments.base_model, config.precision, **({"device": "cpu"} if config.shard else {}))
    encoded, _ = data.encode_rows(tokenizer, tasks.get_task("sql"), rows, config.max_length)
    return training.make_trainer(config, model, tokenizer, encoded, folder)


def unsloth(arguments, rows, precision: str, checkpointing: str = "none", **changes) -> dict:
    """Unsloth on the whole rows that `ours` gets, in a Python of its own; the same record as `measure` gives."""
    from safetensors.torch import save_file

    config = config_of(arguments, **changes)
    encoded, _ = data.encode_rows(base_models.load_tokenizer(arguments.base_model), tasks.get_task("sql"), rows, config.max_length)
    packed = [row for row in training.make_dataset(config, encoded) if len(row["labels"]) == config.max_length]
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder, "rows.safetensors"), Path(folder, "result.json")
        save_file({name: torch.tensor([row[name] for row in packed]) for name in ("input_ids", "labels")}, file)
        options = {"base": base_models.fetch(arguments.base_model), "rows-file": file, "json": out, "precision": precision,
                   "rows": arguments.rows, "steps": arguments.steps, "warm-up": arguments.warm_up,
                   "checkpointing": checkpointing}
        command = [*shlex.split(arguments.unsloth), str(Path(__file__).with_name("unsloth_steps.py")),
                   *[word for name, value in options.items() for word in (f"--{name}", str(value))]]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed: {(done.stdout + done.stderr)[-3000:]}")
        return json.loads(out.read_text(encoding="utf-8"))


def packed_rows(arguments) -> dict:
    """This workbook's settings for the packed rows of a suite, of which every token is scored, as in plain text."""
    if arguments.suite == "bloom":  # the reference's recipe, in one pass a step
        return {"preset": "reference", "gradient_accumulation": 1, "optimizer": "adamw_torch", "max_length": arguments.width}
    return {"packing": "wrapped", "max_length": arguments.width, "completion_only": False, "rank": 16,
            "schedule": "constant", "learning_rate": 2e-4}


def fastest(arguments) -> dict:
    """`packed_rows`, compiled, the weights in 4 bits where the model is large."""
    return packed_rows(arguments) | {"precision": "full" if arguments.suite in ("packed", "bloom") else "4bit", "compile": True}


def variants(arguments) -> dict:
    """Name -> a call with arguments and rows that trains and returns a record, as `measure` does."""
    def of(make, **settings):
        return functools.partial(measure, functools.partial(make, **settings))

    if arguments.suite == "rows":
        return {"TRL defaults": of(stock), "workbook, 4 bits": of(ours), "workbook, full precision": of(ours, precision="full")}
    packed = packed_rows(arguments)
    if arguments.suite in ("llama8b", "qwen8b"):
        plain = {"packed": True, "gradient_checkpointing": False}
        small = {"gradient_checkpointing": True, "optimizer": "paged_adamw_32bit"}
        other = {f"Unsloth, checkpointing {kind}": functools.partial(unsloth, **packed, precision="4bit", checkpointing=kind)
                 for kind in ("none", "unsloth")} if arguments.unsloth else {}
        return {"TRL defaults": of(stock, packed=True),
                "TRL, no checkpointing": of(stock, **plain),
                "TRL, no checkpointing, Liger": of(stock, **plain, use_liger_kernel=True),
                "TRL, no checkpointing, Liger, compiled": of(stock, **plain, use_liger_kernel=True, torch_compile=True),
                **other,
                "workbook, compiled": of(ours, **packed, compile=True),
                "workbook, compiled, checkpointing": of(ours, **packed, **small, compile=True),
                "workbook, 1 row a step, checkpointing": of(ours, **packed, **small, batch_size=1)}
    if arguments.suite == "packed":
        apart = packed | {"packing": "documents"}
        other = {"Unsloth": functools.partial(unsloth, **packed, precision="full"),
                 "Unsloth, 4 bits": functools.partial(unsloth, **packed, precision="4bit")} if arguments.unsloth else {}
        return {"TRL defaults, bfloat16": of(stock, packed=True, precision="full"),
                "TRL, no checkpointing": of(stock, packed=True, precision="full", gradient_checkpointing=False),
                "workbook": of(ours, **packed, precision="full"),
                "workbook, compiled": of(ours, **packed, precision="full", compile=True),
                "compiled, documents apart": of(ours, **apart, precision="full", compile=True),
                "TRL, no checkpointing, 4 bits": of(stock, packed=True, gradient_checkpointing=False),
                "workbook, compiled, 4 bits": of(ours, **packed, precision="4bit", compile=True)} | other
    # The reference's step is 1 row x 4 accumulated passes; the others make the same step of 4 rows in one pass.
    one_by_one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": arguments.rows,
                  "optim": "paged_adamw_32bit", "lr_scheduler_type": "constant"}
    return {"reference recipe": of(stock, packed=True, plain_attention=True, **one_by_one),
            "workbook, transformers' attention": of(ours, plain_attention=True, **packed, precision="full"),
            "workbook": of(ours, **packed, precision="full"),
            "workbook, compiled": of(ours, **packed, precision="full", compile=True),
            "workbook, compiled, 4 bits": of(ours, **packed, precision="4bit", compile=True)}


def trio(arguments) -> None:
    """The reference's three jobs one after the other: as many tokens as its own, practice rows over and over. Totals in the JSON
    file, when all are done. --workers shares the rows of a step among so many GPUs."""
    result = {"hardware": base_models.hardware(), "torch": torch.__version__, "workers": arguments.workers, "jobs": {},
              "command": f"python tests/benchmarks/training.py --suite trio --workers {arguments.workers}"}
    for task, tokens in TRIO.items():
        begin = time.perf_counter()
        config = recipes.FineTuneConfig.from_parameters(
            task=task, base_model=arguments.base_model, preset="reference", precision="full",
            batch_size=arguments.rows // arguments.workers, gradient_accumulation=1, optimizer="adamw_torch", compile=True,
            max_length=arguments.width, checkpoint_steps=500,
            max_steps=math.ceil(tokens / (arguments.rows * arguments.width)))
        with tempfile.TemporaryDirectory() as folder:
            one = training.run(config, Path(folder, "run"), arguments.workers)
        result["jobs"][task] = {"tokens": tokens, "steps": one["steps"], "seconds": time.perf_counter() - begin,
                                "training_seconds": one["training_seconds"], "final_loss": one["final_loss"]}
        if len(result["jobs"]) == len(TRIO):
            result |= {name: sum(job[name] for job in result["jobs"].values()) for name in ("seconds", "training_seconds")}
        print(f"{task}: {result['jobs'][task]}", flush=True)
        if arguments.json:
            write_json(arguments.json, result)
        free_memory()
    print(f"{result['hardware']}: {result['seconds']:.0f} s in all, {result['training_seconds']:.0f} s of training, "
          "from the first step with its compiling to the last")


def random_model(suite: str, folder: Path, **changes) -> str:
    """A model of the suite's shape with random weights, and the embedded base's tokenizer, in a local folder.
    changes: of the model's config."""
    import transformers

    torch.manual_seed(0)
    tokenizer = base_models.load_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    kind, values = SHAPES[suite]
    config = getattr(transformers, kind)(**values | special | changes)
    with torch.device(base_models.best_device()):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=base_models.best_dtype())
    # transformers makes the padding token's row zero; it is the end-of-text token too, and a norm of zeros has no gradient.
    torch.nn.init.normal_(model.get_input_embeddings().weight.data[tokenizer.pad_token_id], std=0.02)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def random_4bit_model(suite: str, folder: Path) -> str:
    """`random_model` with the weights stored in 4 bits; all blocks are alike. 70 B weights fill 40 GB."""
    from safetensors.torch import load_file, save_file

    folder = Path(folder)
    model, tokenizer = base_models.load(random_model(suite, folder / "one-block", num_hidden_layers=1), "4bit")
    for part in (model, tokenizer):
        part.save_pretrained(folder / suite)
    one = folder / suite / "model.safetensors"
    weights, blocks, files = load_file(one), SHAPES[suite][1]["num_hidden_layers"], {}
    one.unlink()
    for number in range(blocks):
        block = {name.replace("layers.0.", f"layers.{number}."): tensor for name, tensor in weights.items()
                 if "layers.0." in name or number == 0}
        files |= dict.fromkeys(block, f"block-{number}.safetensors")
        save_file(block, folder / suite / f"block-{number}.safetensors", metadata={"format": "pt"})
    write_json(folder / suite / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    write_json(folder / suite / "config.json", read_json(folder / suite / "config.json") | {"num_hidden_layers": blocks})
    shutil.rmtree(folder / "one-block")
    free_memory()
    return str(folder / suite)


class Counted:
    """A collator that sends the number of a batch's tokens along with it: batches are made ahead, in other processes."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, batch):
        return {**self.collator(batch), "tokens": torch.tensor(sum(len(row["input_ids"]) for row in batch))}


def measure(make, arguments, rows) -> dict:
    """Train, and time from the end of the first step: tokens that are not padding, per second."""
    from transformers import TrainerCallback, set_seed

    class Clock(TrainerCallback):
        def __init__(self):
            self.moments = []

        def on_step_end(self, args, state, control, **_):
            # Between these two steps nothing waits for the GPU that would not wait in a longer run.
            if torch.cuda.is_available() and state.global_step in (arguments.warm_up, state.max_steps):
                torch.cuda.synchronize()
            self.moments.append(time.perf_counter())

    counted = []
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    set_seed(0)  # every variant starts from the same adapter
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(arguments, rows, Path(folder))
        clock, training_step = Clock(), trainer.training_step

        def counting_step(model, inputs, *rest):
            counted.append(inputs.pop("tokens"))
            return training_step(model, inputs, *rest)

        trainer.training_step = counting_step
        trainer.args.logging_steps = max(1, arguments.steps // 6)  # a loss is read now and then, as in a longer run
        trainer.add_callback(clock)
        trainer.data_collator = Counted(trainer.data_collator)
        trainer.train()
        loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        passes = trainer.args.gradient_accumulation_steps
        tokens = sum(int(n) for n in counted[arguments.warm_up * passes:])
    seconds = clock.moments[-1] - clock.moments[arguments.warm_up - 1]
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    last = loss[-max(1, len(loss) // 3):]
    return {"tokens_per_second": tokens / seconds, "loss": sum(last) / len(last), "first_loss": loss[0], "peak_gpu_gb": peak,
            "before_and_warm_up_seconds": clock.moments[arguments.warm_up - 1] - begin}


def free_memory() -> None:
    torch.compiler.reset()  # compiled code keeps its model
    gc.collect()
    torch.cuda.empty_cache()


def matrix_rate() -> float:
    """FLOP/s of matrix products: on a GPU large ones in bfloat16, on a CPU float32 ones of the embedded model's shapes."""
    cuda = torch.cuda.is_available()
    m, n, k = (8192, 8192, 8192) if cuda else (1024, 1536, 576)
    options = {"device": "cuda", "dtype": torch.bfloat16} if cuda else {}
    a, b = torch.randn(m, k, **options), torch.randn(k, n, **options)
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(20):
            a @ b
        if cuda:
            torch.cuda.synchronize()
        best = max(best, 20 * 2 * m * n * k / (time.perf_counter() - begin))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", default=base_models.EMBEDDED)
    parser.add_argument("--suite", choices=SUITES, default="rows")
    parser.add_argument("--rows", type=int, help="rows of an optimizer step")
    parser.add_argument("--width", type=int, help="tokens of a packed row (default 1024, 2048 for 8B)")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--warm-up", type=int, help="steps that do not count")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="GPUs of the suite trio")
    parser.add_argument("--unsloth", default="", help='command of a Python with Unsloth, for instance "/opt/unsloth/bin/python"')
    parser.add_argument("--only", nargs="*", default=[], help="variants to run: their names, or how names start")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for name, value in SUITES[arguments.suite].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.suite != "trio" and (arguments.steps <= arguments.warm_up or arguments.warm_up < 1):
        parser.error("--steps must be more than --warm-up, and --warm-up at least 1")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.suite in SHAPES:
            arguments.base_model = random_model(arguments.suite, Path(folder) / f"{arguments.suite}-shape")
        (trio if arguments.suite == "trio" else run)(arguments)


def measure_variant(name: str, arguments, rows) -> dict:
    return variants(arguments)[name](arguments, rows)


def alone(name: str, arguments, rows) -> dict:
    """`measure_variant` in a process of its own: Liger, for one, changes transformers' classes for all that comes after it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(measure_variant, name, arguments, rows).result()


def run(arguments) -> None:
    needed = arguments.steps * arguments.rows * arguments.width // 60  # a practice row has about 75 tokens
    rows = practice_rows("sql", "train", 64 if arguments.suite == "rows" else needed)
    known = variants(arguments)
    starts = tuple(only for only in arguments.only if only not in known)
    if nothing := [start for start in starts if not any(name.startswith(start) for name in known)]:
        sys.exit(f"error: --only {nothing[0]!r} names no variant of the suite {arguments.suite}: it has {', '.join(known)}.")
    wanted = [name for name in known if not arguments.only or name in arguments.only or name.startswith(starts)]
    found: dict[str, list[dict]] = {name: [] for name in wanted}
    rates, failed = [], {}
    for repeat in range(arguments.repeats):
        rates.append(matrix_rate())
        for name in [name for name in wanted if name not in failed]:
            try:
                found[name].append(alone(name, arguments, rows))
                print(f"repeat {repeat + 1}: {name}: {found[name][-1]}", flush=True)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"[-1500:]
                del found[name]
                print(f"repeat {repeat + 1}: {name} failed: {failed[name]}", flush=True)
            if arguments.json:  # a long run that is cut short has lost nothing
                write_json(arguments.json, summary(arguments, found, rates, failed))
    result = summary(arguments, found, rates, failed)
    print(f"\n{result['hardware']}; matrix products {statistics.median(rates) / 1e9:,.0f} GFLOP/s")
    for name, one in result["variants"].items():
        speeds = [each["tokens_per_second"] for each in one["runs"]]
        gpu = f"{one['runs'][0]['peak_gpu_gb']:5.1f} GB, " if torch.cuda.is_available() else ""
        print(f"{name:38}{one['median']:12,.0f} tokens/s [{min(speeds):,.0f}, {max(speeds):,.0f}]   x{one['ratio']:.2f}   "
              f"loss {one['runs'][0]['loss']:.4f}   {gpu}{one['share_of_matrix_rate']:.0%} of the matrix rate")


def summary(arguments, found: dict[str, list[dict]], rates: list[float], failed: dict[str, str]) -> dict:
    """What goes to the JSON file: every run, and of each variant the median, its ratio to the first variant's.

    Turns count that all variants have finished (in the first, every run).
    """
    finished = max(1, min(map(len, found.values()), default=1))
    found = {name: runs[:finished] for name, runs in found.items() if runs}
    first = None
    # A token passes the frozen weights once forward and once backward: 2 + 2 FLOP a weight. Short rows score few places, so the
    # head is counted where every place is scored. Attention and LoRA are not counted.
    weights = sum(out * into for out, into in layer_shapes(arguments.base_model).values())
    if arguments.suite != "rows":
        weights += skeleton(arguments.base_model).get_output_embeddings().weight.numel()
    kept = {name: value for name, value in vars(arguments).items() if name not in ("json", "base_model", "unsloth")}
    only = " --only " + " ".join(f'"{name}"' for name in arguments.only) if arguments.only else ""
    only += ' --unsloth "…"' if arguments.unsloth else ""
    result = {"hardware": base_models.hardware(), "torch": torch.__version__, "arguments": kept,
              "command": f"python tests/benchmarks/training.py --suite {arguments.suite}{only}",
              "matrix_gflops": [rate / 1e9 for rate in rates], "variants": {}, "failed": failed}
    for name, runs in found.items():
        middle = statistics.median(run["tokens_per_second"] for run in runs)
        first = first or middle
        result["variants"][name] = {"runs": runs, "median": middle, "ratio": middle / first,
                                    "share_of_matrix_rate": 4 * weights * middle / statistics.median(rates)}
    return result


if __name__ == "__main__":
    main()
