"""What work costs as it grows: training against rank, rows of a batch and their length; swapping against resident adapters.

    python tests/benchmarks/growth.py --json tests/benchmarks/growth.json

Every point runs in a process of its own, so that its peak memory is its own; the points of one curve run in turn, `--rounds`
times. Training: LoRA on all linear layers of the embedded base model in full precision, random tokens, every one
scored, AdamW; tokens per second without the first step. Swapping: as many adapters of rank 8 on one base model.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from helpers import base_models, write_json  # noqa: E402

START = {"rank": 16, "rows": 4, "length": 64}
CURVES = {"rank": [4, 16, 64, 256], "rows": [1, 4, 16], "length": [32, 128, 512]}
BASES = {"length": {"rows": 2}}  # long rows in a smaller batch
ADAPTERS = [3, 30, 300]


def peak_bytes() -> int:
    """The most memory that this process has held so far: the GPU's where there is one."""
    import resource

    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else \
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def train(rank: int, rows: int, length: int, steps: int) -> dict:
    """Tokens per second and peak memory of one setting."""
    import torch
    from peft import LoraConfig, get_peft_model

    from helpers import trainer

    torch.manual_seed(0)
    model, _ = base_models.load()
    before = peak_bytes()
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=base_models.lora_target_modules(model)))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(3, 49_000, (rows, length), device=model.device)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    moments = []
    for _ in range(steps + 1):
        trainer.completion_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        moments.append(time.perf_counter())
    return {"tokens_per_second": steps * rows * length / (moments[-1] - moments[0]), "peak_bytes": peak_bytes(),
            "base_bytes": before}


def swap(count: int, rounds: int = 200) -> dict:
    """Milliseconds of a swap with `count` adapters resident, and of loading the last of them."""
    import tempfile

    import torch
    from swap import random_adapters

    from helpers import adapters

    with tempfile.TemporaryDirectory() as folder:
        random_adapters(Path(folder), base_models.EMBEDDED)
        bank = adapters.AdapterBank()
        infos = adapters.discover(bank.base_name, Path(folder), Path(folder) / "none").adapters
        for i in range(count):
            loading = bank.load(dataclasses.replace(infos[i % len(infos)], name=f"adapter-{i}"))
        times = []
        order = torch.randint(count, (rounds,), generator=torch.Generator().manual_seed(0)).tolist()
        for i in order:
            begin = time.perf_counter()
            bank.swap(f"adapter-{i}")
            times.append(1e3 * (time.perf_counter() - begin))
    return {"swap_ms": statistics.median(times), "swap_p99_ms": sorted(times)[-(-99 * rounds // 100) - 1],
            "last_load_ms": 1e3 * loading, "peak_bytes": peak_bytes()}


def point(**settings) -> dict:
    """Run this file for one point, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--point", json.dumps(settings)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{settings}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", default=[*CURVES, "adapters"], help="curves to measure; others in --json stay")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        settings = json.loads(arguments.point)
        print(json.dumps(swap(settings["adapters"]) if "adapters" in settings else train(**settings)))
        return
    found: dict[str, dict] = {}
    if arguments.json and arguments.json.exists():
        found = {name: curve for name, curve in json.loads(arguments.json.read_text(encoding="utf-8"))["curves"].items()
                 if name not in arguments.only}
    command = f"python tests/benchmarks/growth.py --rounds {arguments.rounds} --steps {arguments.steps}"

    def keep(name: str, value: int, said: str, **settings) -> None:
        """Measure one point, say it, and write everything so far: a long run that is cut short has lost nothing."""
        one = point(**settings)
        found.setdefault(name, {}).setdefault(str(value), []).append(one)
        print(f"{name} {value}: {said.format(**one)}", flush=True)
        if arguments.json:
            write_json(arguments.json, {"command": command, "hardware": base_models.hardware(), "start": START,
                                              "bases": BASES, "curves": found})

    for _ in range(arguments.rounds):
        for name in [name for name in CURVES if name in arguments.only]:
            for value in CURVES[name]:
                settings = START | BASES.get(name, {}) | {name: value, "steps": arguments.steps}
                keep(name, value, "{tokens_per_second:,.0f} tokens/s, {peak_bytes:,} bytes", **settings)
    for count in ADAPTERS if "adapters" in arguments.only else []:  # each is the median of 200 swaps already
        keep("adapters", count, "swap {swap_ms:.4f} ms, last load {last_load_ms:.0f} ms", adapters=count)


if __name__ == "__main__":
    main()
