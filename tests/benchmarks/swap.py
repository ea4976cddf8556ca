"""How long a swap takes, against PEFT's own ways, in one interleaved run; and what a mixed batch costs.

    python tests/benchmarks/swap.py [--rounds 200] [--tokens 32] [--out result.json]

Swaps: AdapterBank.swap, PEFT's set_adapter, entering and leaving PEFT's disable_adapter, loading an adapter from disk;
each round times every one of them, so that a busy machine is busy for all. Mixed batch: generating the same number of
tokens for one prompt with one adapter, and for four rows with base and three adapters. Needs three adapters: those of
adapters/prebuilt, or random ones (--random). Writes JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from helpers import WorkbookError, adapters, base_models  # noqa: E402

PROMPT = ("<TABLE>: CREATE TABLE employees (name VARCHAR, department VARCHAR, salary INTEGER, city VARCHAR)\n"
          "<QUESTION>: How many employees work in the Sales department?\n<SQL>: ")


def random_adapters(folder: Path, base_name: str, rank: int = 8) -> None:
    """Three adapters with random numbers on all linear layers: swaps and batches cost the same whatever the numbers are."""
    import torch
    from peft import LoraConfig, get_peft_model

    base = base_models.resolve(base_name)
    for seed, name in enumerate(("instruct", "sql", "detox")):
        model, _ = base_models.load(base_name, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM",
                                                 target_modules=base_models.lora_target_modules(model)))
        torch.manual_seed(seed)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.data.normal_(std=0.02)
        model.save_pretrained(folder / name)
        config = json.loads((folder / name / adapters.CONFIG).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base.hub_id or base.name
        (folder / name / adapters.CONFIG).write_text(json.dumps(config), encoding="utf-8")


def summary(seconds: list[float]) -> dict:
    """Milliseconds: median, 99th percentile (the smallest value that at least 99% do not exceed), maximum."""
    ordered = sorted(1e3 * value for value in seconds)
    return {"p50_ms": round(statistics.median(ordered), 4), "p99_ms": round(ordered[-(-99 * len(ordered) // 100) - 1], 4),
            "max_ms": round(ordered[-1], 4), "n": len(ordered)}


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def disable(model) -> None:
    with model.disable_adapter():
        pass


def swaps(bank: adapters.AdapterBank, rounds: int) -> dict:
    """Times of each way to change the active adapter, taken in turn."""
    names = list(bank.adapters)
    first = bank.adapters[names[0]]
    times: dict[str, list[float]] = {"bank_swap": [], "bank_swap_after_set_adapter": [], "peft_set_adapter": [],
                                     "peft_disable_adapter": [], "load_from_disk": []}
    for number in range(rounds):
        # PEFT's set_adapter, last called a round ago, gave every layer a value of its own: this swap must share one again.
        times["bank_swap_after_set_adapter"].append(timed(lambda: bank.swap(names[0])))
        for name in (None, *names):
            times["bank_swap"].append(timed(lambda name=name: bank.swap(name)))
        for name in names:
            times["peft_set_adapter"].append(timed(lambda name=name: bank.model.set_adapter(bank.key(name), inference_mode=True)))
        times["peft_disable_adapter"].append(timed(lambda: disable(bank.model)))
        if number % 50 == 0:
            bank.unload(first.name)
            times["load_from_disk"].append(timed(lambda: bank.load(first)))
    return {way: summary(values) for way, values in times.items()}


def mixed(bank: adapters.AdapterBank, tokens: int, rounds: int = 5) -> dict:
    """Seconds for one answer and for four rows (base and three adapters) of as many tokens, taken in turn."""
    import torch

    names = [None, *list(bank.adapters)[:3]]
    batch = bank.tokenizer([PROMPT] * 4, return_tensors="pt", add_special_tokens=False).to(bank.model.device)
    one = {key: value[:1] for key, value in batch.items()}
    options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False,
               "pad_token_id": bank.tokenizer.pad_token_id}
    times: dict[str, list[float]] = {"one_adapter": [], "four_rows_one_adapter": [], "four_rows_mixed": [],
                                     "four_rows_mixed_peft": []}
    with torch.inference_mode():
        for _ in range(rounds):
            bank.swap(names[1])
            times["one_adapter"].append(timed(lambda: bank.model.generate(**one, **options)))
            times["four_rows_one_adapter"].append(timed(lambda: bank.model.generate(**batch, **options)))
            with bank.mixed(names) as model:
                times["four_rows_mixed"].append(timed(lambda model=model: model.generate(**batch, **options)))
            times["four_rows_mixed_peft"].append(timed(lambda: bank.model.generate(
                **batch, adapter_names=[bank.key(name) for name in names], **options)))
    medians = {way: round(statistics.median(values), 4) for way, values in times.items()}
    return {"prompt_tokens": batch["input_ids"].shape[1], "tokens": tokens, "rounds": rounds, "seconds": medians,
            "mixed_over_one": round(medians["four_rows_mixed"] / medians["one_adapter"], 3),
            "mixed_over_four_alone": round(medians["four_rows_mixed"] / (4 * medians["one_adapter"]), 3)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=base_models.EMBEDDED, help="base model (default: the embedded one)")
    parser.add_argument("--random", action="store_true", help="three random adapters instead of adapters/prebuilt")
    parser.add_argument("--rounds", type=int, default=200, help="rounds of swaps (default 200)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens per generated row (default 32)")
    parser.add_argument("--batch-rounds", type=int, default=5, help="rounds of generations (default 5)")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args(arguments)
    import torch

    # PEFT warns of a changed active adapter when the loading time is measured; nothing here depends on it.
    warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
    with tempfile.TemporaryDirectory() as temporary:
        folder = adapters.PREBUILT
        if options.random:
            folder = Path(temporary)
            random_adapters(folder, options.base)
        try:
            bank = adapters.AdapterBank(options.base)
            found = adapters.discover(options.base, folder, Path(temporary) / "none").adapters[:3]
            if len(found) < 3:
                raise WorkbookError(f"{folder} holds {len(found)} usable adapters, and three are needed: say --random.")
            for info in found:
                bank.load(info)
        except WorkbookError as problem:
            print(f"error: {problem}", file=sys.stderr)
            return 1
        result = {"benchmark": "swap", "base_model": options.base, "hardware": base_models.hardware(),
                  "threads": torch.get_num_threads(),
                  "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
                  "adapters": {info.name: {"rank": info.rank, "layers": len(info.modules), "bytes": info.bytes}
                               for info in found},
                  "swap": swaps(bank, options.rounds), "mixed_batch": mixed(bank, options.tokens, options.batch_rounds)}
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
