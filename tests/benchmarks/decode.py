"""Decoding speed: base, adapter, merged adapter and a batch of mixed adapters against transformers' own generate.

    python tests/benchmarks/decode.py --json tests/benchmarks/decode.json

Every way writes the same number of tokens after the same prompts of the SQL task, in turn within one run. New tokens per
second of the whole batch, median and range of the repeats. "generate" is transformers' method on the base model, prompts in
the order given; the workbook's own sorts them by length and stops rows at the task's stop text (switched off here, so that
all write as much).
"""

import argparse
import copy
import gc
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from helpers import adapters, base_models, cards, data, evaluation, tasks  # noqa: E402


def ways(bank: adapters.AdapterBank, prompts: list[str], batch_size: int, tokens: int) -> dict:
    """Name -> a call that writes `tokens` tokens after every prompt."""
    settings = {"min_new_tokens": tokens, "pad_token_id": bank.tokenizer.pad_token_id, "do_sample": False}
    merged = copy.deepcopy(bank.model)
    merged.set_adapter(bank.key("sql"), inference_mode=True)
    merged = merged.merge_and_unload()
    bank.tokenizer.padding_side = "left"
    names = [None, *list(bank.adapters)[:3]]

    def generate(model=bank.model, **options):
        for start in range(0, len(prompts), batch_size):
            batch = bank.tokenizer(prompts[start:start + batch_size], return_tensors="pt", padding=True,
                                   add_special_tokens=False).to(model.device)
            with torch.inference_mode():
                model.generate(**batch, max_new_tokens=tokens, **settings, **options)

    def with_adapter(name, model=None):
        bank.swap(name)
        evaluation.generate(model or bank.model, bank.tokenizer, prompts, tokens, batch_size, **settings)

    def mixed():
        # Rows of base and three adapters in turn: a batch of one row holds a single adapter and is left out.
        with bank.mixed([names[i % 4] for i in range(batch_size)]) as model:
            generate(model)

    def plain():
        bank.swap(None)
        generate()

    found = {"transformers generate, base": plain, "base": lambda: with_adapter(None), "adapter": lambda: with_adapter("sql"),
             "adapter, merged": lambda: with_adapter(None, merged)}
    return found | ({"mixed adapters": mixed} if batch_size >= 4 else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", default=base_models.EMBEDDED)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="rows of a batch")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of a row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    task = tasks.get_task("sql")
    bank = adapters.AdapterBank(arguments.base_model)
    bank.sync(adapters.discover(arguments.base_model).adapters)
    result = {"hardware": base_models.hardware(), "torch": torch.__version__, "tokens": arguments.tokens,
              "command": "python tests/benchmarks/decode.py", "batches": {}}
    for batch_size in arguments.batches:
        prompts = [task.prompt(row) for row in data.load_rows("sql", "practice", "validation", batch_size).rows]
        calls, speeds = ways(bank, prompts, batch_size, arguments.tokens), {}
        for repeat in range(arguments.repeats + 1):  # the first warms up and does not count
            for name, call in calls.items():
                if bank.model.device.type == "cuda":
                    torch.cuda.synchronize()
                begin = time.perf_counter()
                call()
                if repeat:
                    speeds.setdefault(name, []).append(batch_size * arguments.tokens / (time.perf_counter() - begin))
        first = statistics.median(speeds["transformers generate, base"])
        print(f"\n{batch_size} rows, {result['hardware']}")
        for name, values in speeds.items():
            print(f"{name:30}{statistics.median(values):10,.1f} tokens/s [{min(values):,.1f}, {max(values):,.1f}]   "
                  f"x{statistics.median(values) / first:.2f}", flush=True)
        result["batches"][str(batch_size)] = {name: {"median": statistics.median(values), "values": values,
                                                     "ratio": statistics.median(values) / first}
                                              for name, values in speeds.items()}
        del calls
        gc.collect()
    if arguments.json:
        cards.write_json(arguments.json, result)


if __name__ == "__main__":
    main()
