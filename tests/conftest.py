"""Shared fixtures: a tiny base model in a local folder in the hub's form, made from a config with random weights; a browser."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)

# Many tests compare numbers digit by digit, which CPUs with AMX, computing in bfloat16, would round.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("WORKBOOK_DTYPE", "float32")

# Started in the background or by nohup, this session would ignore these signals, and so would every job that a test starts:
# jobs honour what their caller ignores, and the tests that stop them could not.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (getattr(signal, "SIGHUP", None), signal.SIG_DFL)):
    if _number is not None and signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


def make_tiny(folder: Path, architecture: str = "llama", **changes) -> Path:
    """A random model of that architecture with the embedded base model's tokenizer: real code paths, little arithmetic."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        BloomConfig,
        LlamaConfig,
        MistralConfig,
        MptConfig,
        Qwen3Config,
    )

    from helpers import base_models

    tokenizer = base_models.load_tokenizer()
    size, tokens = len(tokenizer), {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    llama = dict(vocab_size=size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=128, max_position_embeddings=512, tie_word_embeddings=True)
    config = {
        "llama": lambda: LlamaConfig(**llama, **tokens, **changes),
        "mistral": lambda: MistralConfig(**llama, **tokens, **changes),
        "qwen3": lambda: Qwen3Config(**llama, head_dim=16, **tokens, **changes),
        "bloom": lambda: BloomConfig(vocab_size=size, hidden_size=64, n_layer=2, n_head=4, **tokens, **changes),
        "mpt": lambda: MptConfig(vocab_size=size, d_model=64, n_layers=2, n_heads=4, **tokens, **changes),
    }[architecture]()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_bloom(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny-bloom", "bloom")


@pytest.fixture(scope="session")
def shelf(tiny, tmp_path_factory) -> Path:
    """A folder of three adapters of the tiny base, with the shipped adapters' names."""
    from test_adapters import make_adapter

    root = tmp_path_factory.mktemp("shelf")
    for seed, name in enumerate(("instruct", "sql", "detox")):
        make_adapter(tiny, root / name, seed)
    return root


def executable() -> str | None:
    """The system's Chromium, else the one that Playwright installed, else None."""
    if CHROMIUM:
        return CHROMIUM
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


@pytest.fixture(scope="session")
def browser():
    path = executable()
    if path is None:
        reason = "no Chromium was found: run `make browser` (or install chromium); what a reader sees was NOT tested in a browser"
        if os.environ.get("WORKBOOK_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without a sandbox only because tests in containers run as root; every page is our own, on this machine.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def jobs(tmp_path):
    """Run `python -m helpers.jobs …` as a user would, with its own runs and adapters folders."""

    def call(*arguments, **options):
        environment = {**os.environ, "CUSTOM_LORA_ADAPTERS_DIR": str(tmp_path / "adapters"), "OMP_NUM_THREADS": "1",
                       **options.pop("env", {})}
        command = [sys.executable, "-m", "helpers.jobs", *map(str, arguments), "--runs-dir", str(tmp_path / "runs")]
        if options.pop("background", False):
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                    text=True)
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)

    return call
