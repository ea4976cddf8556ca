"""Writing speed: base, adapter, merged adapter and a batch of mixed adapters, each against transformers' and PEFT's own way.

    python tests/benchmarks/decode.py --json tests/benchmarks/decode.json

Every way writes the same number of tokens after the same prompts of the SQL task, in turn within one run. New tokens per
second of the whole batch with its prompts, median and range of the repeats; beside it the seconds until the first token. "slow"
is the same call without `helpers/fast/writing.py`. The task's stop text is switched off, so that all write as much, except in the
last part: an evaluation, as `scoring.evaluate` asks for it, with and without that file, in seconds.
"""

import argparse
import contextlib
import copy
import gc
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from helpers import (  # noqa: E402
    adapters,
    base_models,
    data,
    evaluation,
    generation,
    tasks,
    write_json,
)


def ways(bank: adapters.AdapterBank, prompts: list[str], batch_size: int, tokens: int) -> dict:
    """Name -> a call that writes `tokens` tokens after every prompt."""
    settings = {"min_new_tokens": tokens, "pad_token_id": bank.tokenizer.pad_token_id, "do_sample": False}
    merged = copy.deepcopy(bank.model)
    merged.set_adapter(bank.key("sql"), inference_mode=True)
    merged = merged.merge_and_unload()
    bank.tokenizer.padding_side = "left"
    names = [None, *list(bank.adapters)[:3]]

    def generate():
        batch = bank.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(bank.model.device)
        with bank.using(None) as model, torch.inference_mode():
            model.generate(**batch, max_new_tokens=tokens, **settings)

    def write(model) -> float:
        return generation.write_batch(model, bank.tokenizer, prompts, max_new_tokens=tokens, **settings)[0].first_token_seconds

    def alone(name, model=None) -> float:
        with bank.using(name) as current:
            return write(model or current)

    def mixed() -> float:
        # Rows of base and three adapters in turn: a batch of one row holds a single adapter and is left out.
        with bank.mixed([names[i % 4] for i in range(batch_size)]) as model:
            return write(model)

    own = {"base": lambda: alone(None), "adapter": lambda: alone("sql"), "adapter, merged": lambda: alone(None, merged)}
    own |= {"mixed adapters": mixed} if batch_size >= 4 else {}
    return {"transformers generate, base": generate} | {
        name: call for way in own for name, call in ((f"{way}, slow", slow(own[way])), (way, own[way]))}


def slow(call):
    """The same call without the faster way."""
    def without():
        kept, generation.quick = generation.quick, lambda *arguments: contextlib.nullcontext()
        try:
            return call()
        finally:
            generation.quick = kept

    return without


def evaluated(bank: adapters.AdapterBank, task, rows: int, repeats: int) -> dict:
    """Seconds for the answers of an evaluation with the SQL adapter, and how many were the same."""
    prompts = [task.prompt(row) for row in data.load_rows("sql", "practice", "validation", rows).rows]
    with bank.using("sql") as model:
        call = lambda: evaluation.generate(model, bank.tokenizer, prompts, task.max_new_tokens, stop=task.stop)
        seconds, texts = {"slow": [], "fast": []}, {}
        for _ in range(repeats):
            for name, way in (("slow", slow(call)), ("fast", call)):
                begin = time.perf_counter()
                texts[name] = way()
                seconds[name].append(time.perf_counter() - begin)
    same = sum(a == b for a, b in zip(texts["slow"], texts["fast"], strict=True))
    ratio = statistics.median(seconds["slow"]) / statistics.median(seconds["fast"])
    print(f"\n{rows} rows evaluated: {seconds}, x{ratio:.2f}, {same} answers the same")
    return {"rows": rows, "seconds": seconds, "ratio": ratio, "same_answers": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", default=base_models.EMBEDDED)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="rows of a batch")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of a row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--evaluate", type=int, default=64, help="rows of the evaluation")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    task = tasks.get_task("sql")
    bank = adapters.AdapterBank(arguments.base_model)
    bank.sync(adapters.discover(arguments.base_model).adapters)
    result = {"hardware": base_models.hardware(), "torch": torch.__version__, "tokens": arguments.tokens,
              "command": "python tests/benchmarks/decode.py", "batches": {}}
    for batch_size in arguments.batches:
        prompts = [task.prompt(row) for row in data.load_rows("sql", "practice", "validation", batch_size).rows]
        calls, speeds, firsts = ways(bank, prompts, batch_size, arguments.tokens), {}, {}
        for repeat in range(arguments.repeats + 1):  # the first warms up and does not count
            for name, call in calls.items():
                if bank.model.device.type == "cuda":
                    torch.cuda.synchronize()
                begin = time.perf_counter()
                wait = call()
                if repeat:
                    firsts.setdefault(name, []).append(wait)
                    speeds.setdefault(name, []).append(batch_size * arguments.tokens / (time.perf_counter() - begin))
        middle = {name: statistics.median(values) for name, values in speeds.items()}
        base = {name: middle.get(f"{name}, slow", middle["transformers generate, base"]) for name in middle}
        print(f"\n{batch_size} rows, {result['hardware']}")
        result["batches"][str(batch_size)] = {}
        for name, values in speeds.items():
            wait = None if None in firsts[name] else statistics.median(firsts[name])
            print(f"{name:30}{middle[name]:10,.1f} tokens/s [{min(values):,.1f}, {max(values):,.1f}]   "
                  f"x{middle[name] / base[name]:.2f}   first token {f'{wait:.3f} s' if wait else '-'}", flush=True)
            result["batches"][str(batch_size)][name] = {"median": middle[name], "values": values, "first_token_seconds": wait,
                                                        "ratio": middle[name] / base[name]}
        del calls
        gc.collect()
    if arguments.evaluate:
        result["evaluation"] = evaluated(bank, task, arguments.evaluate, arguments.repeats)
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
