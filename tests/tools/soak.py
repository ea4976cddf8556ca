"""Long runs, as commands: `make soak`, or one of

    python tests/tools/soak.py swaps --count 1000 [--base smollm2-135m-instruct]
    python tests/tools/soak.py kills --count 50

swaps: random swaps, answers and mixed batches on one AdapterBank, while a second thread keeps refreshing it and an adapter
comes, changes and goes. Every answer must be the one that PEFT alone gives for that adapter; at the end the logits must be
PEFT's, bit for bit, and the process no larger than 5% more than after the first tenth.
kills: one training run, killed with SIGKILL again and again at random moments, each time resumed. No complete checkpoint may
be lost, and loss log and adapter must be those of a run that nobody killed.
Without --base both use a small random model. Prints what was measured as JSON; ends with 1 and a sentence when something is
wrong.
"""

import argparse
import gc
import importlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import WorkbookError, base_models, publishing, recipes, sha256, trainer, training  # noqa: E402

PRELOADED = {"torch": ("nn",), "trl": ("SFTConfig", "SFTTrainer"), "peft": ("LoraConfig", "get_peft_model"),
             "datasets": ("Dataset",), "bitsandbytes": ("nn",), "sqlglot": ("parse",),
             "transformers": ("AutoModelForCausalLM", "AutoTokenizer", "BitsAndBytesConfig", "LlamaForCausalLM",
                              "TrainerCallback")}
PROMPTS = ("1, 2, 3,", "<TABLE>: CREATE TABLE t (a INTEGER)\n<QUESTION>: How many?\n<SQL>: ", "The capital of France is")


class Wrong(Exception):
    """What the soak run found to be wrong, in a sentence."""


# ---- swaps


def make_adapter(model, base_name: str, folder: Path, seed: int) -> Path:
    """A random adapter (B is not zero) in the form in which jobs publish them. The model is left as it was."""
    import torch
    from peft import LoraConfig, get_peft_model

    modules = base_models.lora_target_modules(model)[:4]
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    with tempfile.TemporaryDirectory(dir=folder.parent.parent) as temporary:
        staging = Path(temporary) / "adapter"
        publishing.save_adapter(wrapped, base_name, staging)
        wrapped.unload()
        if folder.exists():  # one rename each: a refresh sees the old adapter, none, or the new one
            os.replace(folder, Path(temporary) / "old")
        os.replace(staging, folder)
    return folder


def references(base_name: str, folders: dict) -> dict:
    """What PEFT alone gives: per adapter (None: the base model) the logits and the answer to each prompt."""
    import torch
    from peft import PeftModel

    found = {}
    for name, folder in folders.items():
        model, tokenizer = base_models.load(base_name, dtype=torch.float32, device="cpu")
        if folder is not None:
            model = PeftModel.from_pretrained(model, folder).eval()
        found[name] = [(logits(model, tokenizer, prompt), answer(model, tokenizer, prompt)) for prompt in PROMPTS]
    return found


def logits(model, tokenizer, prompt: str):
    import torch

    with torch.inference_mode():
        return model(**tokenizer(prompt, return_tensors="pt", add_special_tokens=False)).logits


def answer(model, tokenizer, prompt: str, tokens: int = 4) -> str:
    import torch

    batch = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        output = model.generate(**batch, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(output[0, batch["input_ids"].shape[1]:], skip_special_tokens=True)


def swaps(count: int, base_name: str, seed: int = 0, after=lambda: None) -> dict:
    """See the module's docstring. ``after`` is called after every turn (a test plants a leak there). Raises Wrong."""
    import psutil
    import torch

    from helpers import adapters

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rng, process, settings = random.Random(seed), psutil.Process(), adapters.Settings(max_new_tokens=4)
    with tempfile.TemporaryDirectory() as temporary:
        prebuilt, custom = Path(temporary) / "prebuilt", Path(temporary) / "custom"
        prebuilt.mkdir()
        custom.mkdir()
        plain, _ = base_models.load(base_name, dtype=torch.float32, device="cpu")
        folders = {name: make_adapter(plain, base_name, prebuilt / name, number) for number, name in enumerate("abc", 1)}
        guests = [make_adapter(plain, base_name, Path(temporary) / "prebuilt" / f"guest{n}", 10 + n) for n in range(2)]
        for number, guest in enumerate(guests):
            os.replace(guest, Path(temporary) / f"guest{number}")
        expected = references(base_name, {None: None, **folders})
        guest_answers = references(base_name, {number: Path(temporary) / f"guest{number}" for number in range(2)})
        allowed = [{guest_answers[number][i][1] for number in range(2)} for i in range(len(PROMPTS))]
        del plain
        bank = adapters.AdapterBank(base_name, dtype=torch.float32, device="cpu")
        done, refreshes, failed, found = threading.Event(), [0, 0], [], {}

        def refresh():
            """What the panel's button does, without a pause; meanwhile a guest adapter comes, changes and goes."""
            try:
                while not done.is_set():
                    state = refreshes[0] % 3
                    shutil.rmtree(custom / "guest", ignore_errors=True)
                    if state < 2:
                        shutil.copytree(Path(temporary) / f"guest{state}", Path(temporary) / "copy")
                        os.replace(Path(temporary) / "copy", custom / "guest")
                    found["now"] = adapters.discover(base_name, prebuilt, custom)
                    problems = {**found["now"].problems, **bank.sync(found["now"].adapters)}
                    if problems:
                        raise Wrong(f"a sound adapter was refused: {problems}")
                    refreshes[0] += 1
                    time.sleep(0.02)
            except BaseException as error:
                failed.append(error)

        bank.sync(adapters.discover(base_name, prebuilt, custom).adapters)
        other, sizes, started = threading.Thread(target=refresh), [], time.perf_counter()
        other.start()
        try:
            for turn in range(count):
                number = rng.randrange(len(PROMPTS))
                name = rng.choice([None, "a", "b", "c", "custom/guest"])
                try:
                    if rng.random() < 0.3:
                        bank.swap(name)
                    if rng.random() < 0.15:
                        names = [None, "a", "b", "c", *([name] if name == "custom/guest" else [])]
                        given = bank.generate_mixed([PROMPTS[number]] * len(names), names, settings)
                        texts = [(n, one.text) for n, one in zip(names, given, strict=True)]
                    else:
                        texts = [(name, bank.generate(PROMPTS[number], name, settings).text)]
                except WorkbookError:
                    if name != "custom/guest":
                        raise
                    refreshes[1] += 1  # the guest has just gone: a sentence, as it should be
                    texts = []
                for who, text in texts:
                    right = allowed[number] if who == "custom/guest" else {expected[who][number][1]}
                    if text not in right:
                        raise Wrong(f"turn {turn}: adapter {who} answered {text!r} instead of {sorted(right)}")
                after()
                if failed:
                    raise failed[0]
                sizes.append(process.memory_info().rss)
        finally:
            done.set()
            other.join()
        seconds = time.perf_counter() - started
        if failed:
            raise failed[0]
        for name in [None, "c", "a", None, "b", "a"]:
            bank.swap(name)
            for number, prompt in enumerate(PROMPTS):
                if not torch.equal(logits(bank.model, bank.tokenizer, prompt), expected[name][number][0]):
                    raise Wrong(f"after {count} turns the logits of adapter {name} are no longer PEFT's")
        gc.collect()
        tenth = max(1, count // 10)
        begin, end = statistics.median(sizes[tenth:2 * tenth]), statistics.median(sizes[-tenth:])
        result = {"turns": count, "base": Path(base_name).name, "refreshes": refreshes[0], "guest was gone": refreshes[1],
                  "seconds": round(seconds, 1), "MB after the first tenth": round(begin / 1e6, 1),
                  "MB at the end": round(end / 1e6, 1),
                  "growth": round(end / begin - 1, 4)}
        if end > 1.05 * begin:
            raise Wrong(f"memory grew by {100 * (end / begin - 1):.1f}%: {result}")
        return result


# ---- kills


def kills(count: int, base_name: str, seed: int = 0, between=lambda run_dir: None) -> dict:
    """See the module's docstring. ``between`` is called with the run's folder after every kill. Raises Wrong."""
    rng, steps = random.Random(seed), 4 * count + 8
    config = recipes.FineTuneConfig.from_parameters(
        task="sql", base_model=base_name, max_rows=64, batch_size=4, max_steps=steps, checkpoint_steps=1, dropout=0.1, rank=4)
    with tempfile.TemporaryDirectory() as temporary:
        whole, killed = Path(temporary) / "whole", Path(temporary) / "killed"
        if code := os.waitstatus_to_exitcode(os.waitpid(start(config, whole, False), 0)[1]):
            raise Wrong(f"the run that nobody kills ended with {code}")
        attempts, early, reached, started = 0, 0, 0, time.perf_counter()
        while attempts < count:
            before = step_of(killed)
            pid = start(config, killed, True)
            goal = before + (0, 1, 2, 1, 3)[attempts % 5]  # 0: at any moment of the start
            end, deadline = time.monotonic() + rng.uniform(0.05, 1.0), time.monotonic() + 600
            while (step_of(killed) < goal or (goal == before and time.monotonic() < end)) and not finished(pid):
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                    raise Wrong("an attempt made no step in ten minutes")
                time.sleep(rng.uniform(0.001, 0.02))
            if finished(pid):
                raise Wrong(f"attempt {attempts + 1} ended by itself at step {step_of(killed)} of {steps}")
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            attempts, early = attempts + 1, early + (goal == before)
            reached = max(reached, step_of(killed))
            between(killed)
            if step_of(killed) < reached:
                raise Wrong(f"kill {attempts} lost complete checkpoints: step {reached} before, {step_of(killed)} after")
        if code := os.waitstatus_to_exitcode(os.waitpid(start(config, killed, True), 0)[1]):
            raise Wrong(f"the last attempt ended with {code}")
        logs = [json.loads((run / "trained" / "metrics.json").read_text(encoding="utf-8"))["loss_log"] for run in (whole, killed)]
        if logs[0] != logs[1]:
            raise Wrong(f"the loss took another path: {[pair for pair in zip(*logs, strict=False) if pair[0] != pair[1]][:1]}")
        names = [sha256(run / "trained" / "adapter_model.safetensors") for run in (whole, killed)]
        if names[0] != names[1]:
            raise Wrong("the adapter's file differs from that of the run that nobody killed")
        left = [path.name for path in killed.iterdir() if path.name not in ("config.json", "checkpoints", "trained")]
        if left:
            raise Wrong(f"something was left behind: {left}")
        return {"kills": attempts, "of these before the first step": early, "steps": steps, "step at the last kill": reached,
                "loss log": "equal", "adapter sha256": names[0][:12], "seconds": round(time.perf_counter() - started, 1)}


def start(config, run_dir: Path, resume: bool) -> int:
    """A child process that trains, forked so that it needs no import. Its output goes nowhere. Returns its pid."""
    for module, names in PRELOADED.items():  # libraries import lazily: once here, instead of in every child
        for name in names:
            getattr(importlib.import_module(module), name)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            training.run(config, run_dir, resume=resume)
            code = 0
        except BaseException as error:
            print(f"a child failed: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return pid


def finished(pid: int) -> bool:
    """Whether a child has ended, without collecting it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def step_of(run_dir: Path) -> int:
    checkpoint = trainer.last_checkpoint(run_dir / "checkpoints")
    return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="?", choices=["swaps", "kills", "both"], default="both")
    parser.add_argument("--count", type=int, help="turns (1000) or kills (50)")
    parser.add_argument("--base", help="a base model instead of the small random one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        base = options.base
        if base is None:
            from conftest import make_tiny
            base = str(make_tiny(Path(folder) / "tiny-llama"))
        try:
            for name, function, count in (("kills", kills, 50), ("swaps", swaps, 1000)):  # forks come before threads
                if options.which in (name, "both"):
                    print(json.dumps({name: function(options.count or count, base, options.seed)}), flush=True)
        except Wrong as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
