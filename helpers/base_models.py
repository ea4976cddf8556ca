"""Base models: fetch one by name, verify it, load it in full or 4-bit precision.

The embedded base model needs no model hub (helpers.embedded). Any causal language model of the hub,
or in a local folder in the hub's form, goes the same way.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path

import torch
from huggingface_hub import errors as hub
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from helpers import WorkbookError, disk_errors, read_json, sha256
from helpers.embedded import MANIFEST, fetch_embedded
from helpers.registry import EMBEDDED, REGISTRY, BaseModel, cache_dir, custom_adapters_dir, resolve

__all__ = ["EMBEDDED", "REGISTRY", "best_device", "best_dtype", "cache_dir", "custom_adapters_dir",
           "fetch", "hardware", "load", "load_tokenizer", "lora_target_modules", "resolve",
           "revision_of", "verify"]

# TRL 1.16 and PEFT 0.21 use argument names that transformers 5.23 has renamed.
warnings.filterwarnings("ignore", category=FutureWarning,
                        message=".*deprecated and will be removed in v6.*")


# --- fetch and verify

def fetch(name: str = EMBEDDED, quiet: bool = False) -> Path:
    """A folder that holds the base model as safetensors with config and tokenizer, fetched if needed.

    Raises WorkbookError when the model is not cached and cannot be fetched, when what came is not what
    was pinned, or when the disk is full.
    """
    base = resolve(name)
    if base.folder:
        return _checked_folder(base.folder)
    return fetch_embedded(quiet) if base.name == EMBEDDED else _fetch_from_hub(base)


def _fetch_from_hub(base: BaseModel) -> Path:
    """Fetch a snapshot of the hub: config, tokenizer and safetensors only, never pickles or code."""
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    where = f"base_model {base.hub_id}"
    try:
        with disk_errors(cache_dir(), f"the base model {base.name}"):
            folder = snapshot_download(base.hub_id, revision=base.revision, allow_patterns=wanted)
    except hub.RevisionNotFoundError as error:
        raise WorkbookError(f"{where} has no revision {base.revision!r} on the model hub: check the "
                            "name after the @.") from error
    except hub.GatedRepoError as error:
        raise WorkbookError(f"{where} is gated: accept its terms on the model hub and log in with "
                            "`hf auth login`.") from error
    except hub.RepositoryNotFoundError as error:
        raise WorkbookError(f"{where} was not found on the model hub: check its spelling, or log in if "
                            "it is private.") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.HfHubHTTPError,
            OSError) as error:
        raise WorkbookError(f"{where} is not in the local hub cache and the model hub cannot be reached "
                            f"({type(error).__name__}): connect to a network, give a local folder, or "
                            f"use the embedded {EMBEDDED}.") from error
    return _checked_folder(Path(folder))


def _checked_folder(folder: Path) -> Path:
    """The folder, if its weights are safetensors and its index names nothing else."""
    convert = "(pickled weights are never opened): convert the model to safetensors first."
    if not any(folder.glob("*.safetensors")):
        raise WorkbookError(f"{folder} has no *.safetensors file {convert}")
    index = folder / "model.safetensors.index.json"  # it may name any file as a part of the weights
    if not index.is_file():
        return folder
    try:
        parts = sorted({str(part) for part in read_json(index)["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WorkbookError(f"{index} is damaged ({error!r}): fetch the model again.") from error
    for part in parts:
        if not re.fullmatch(r"[\w.-]+\.safetensors", part):
            raise WorkbookError(f"{index} names {part!r} as a part of the weights, which is none of "
                                f"its safetensors files {convert}")
    return folder


def verify(name: str = EMBEDDED) -> Path:
    """Fetch if needed, then compare every file with the hash that was noted when it was made.

    Returns the folder. Raises WorkbookError that names a file which has changed.
    """
    folder = fetch(name)
    if (folder / MANIFEST).is_file():
        for file, entry in read_json(folder / MANIFEST)["files"].items():
            if sha256(folder / file) != entry["sha256"]:
                raise WorkbookError(f"{folder / file} has changed since it was made: delete {folder} "
                                    "and fetch again.")
    return folder


def revision_of(name: str) -> str:
    """What exactly a base model is: the hub's commit, the GGUF's hash, or its weights' hash."""
    folder = fetch(name, quiet=True)
    if (folder / MANIFEST).is_file():
        return read_json(folder / MANIFEST)["revision"]
    if folder.parent.name == "snapshots":  # the hub's cache: models--org--name/snapshots/<commit>
        return folder.name
    return "sha256-" + sha256(min(folder.glob("*.safetensors")))[:12]


# --- the hardware

def best_device() -> torch.device:
    """This process's CUDA GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def best_dtype() -> torch.dtype:
    """The type that this hardware computes fastest without losing range.

    bfloat16 on NVIDIA Ampere and newer and on CPUs with AMX; float16 on older GPUs (V100, T4);
    float32 elsewhere: a CPU without AMX multiplies bfloat16 matrices more slowly.
    """
    if torch.cuda.is_available():
        ampere = torch.cuda.get_device_capability()[0] >= 8
        return torch.bfloat16 if ampere else torch.float16
    flags = Path("/proc/cpuinfo")
    if flags.is_file() and re.search(r"\bamx_bf16\b", flags.read_text()):
        return torch.bfloat16
    return torch.float32


def hardware() -> str:
    """One line naming the device and its size, for cards and tables."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    return f"CPU ({name[1] if name else 'unknown'}, {torch.get_num_threads()} threads)"


# --- load

def load_tokenizer(name: str = EMBEDDED):
    """The base model's tokenizer; its end-of-text token pads where it has no pad token of its own."""
    tokenizer = AutoTokenizer.from_pretrained(fetch(name), trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(name: str = EMBEDDED, precision: str = "full", device=None, dtype=None):
    """Load a base model and its tokenizer.

    precision: "full" (weights in `dtype`), or "4bit": NF4 with double quantization (QLoRA,
    arXiv:2305.14314, section 3), computing in `dtype`. device and dtype default to `best_device` and
    `best_dtype`.
    Returns ``(model, tokenizer)``, the model in eval mode. Raises WorkbookError for an unknown or
    unfetchable name, a wrong precision, or damaged weights.
    """
    if precision not in ("full", "4bit"):
        raise WorkbookError(f"precision is {precision!r}: it must be 'full' or '4bit'.")
    dtype = dtype or best_dtype()
    options = {"dtype": dtype, "device_map": {"": torch.device(device or best_device())}}
    if precision == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype)
    folder = fetch(name)
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True,
                                                     trust_remote_code=False, **options)
    except (SafetensorError, EOFError) as error:
        raise WorkbookError(f"The weights in {folder} are damaged ({error}): delete that folder and "
                            "fetch again.") from error
    except (ValueError, ImportError) as error:
        raise WorkbookError(_cannot_load(name, precision, error)) from error
    finally:
        logging.enable_progress_bar()
    if model.config.model_type == "bloom":
        from helpers.fast.bloom import use_fused_attention  # BLOOM's alone: not loaded for others

        use_fused_attention(model)
    return model.eval(), load_tokenizer(name)


def _cannot_load(name: str, precision: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return (f"precision={precision!r} needs a package that is missing ({error}): "
                "run `make setup`.")
    if "trust_remote_code" in str(error):
        return (f"{name} needs code from its own folder, which is never run: use a model whose "
                "architecture transformers itself has.")
    reason = " ".join(str(error).split())[:200]
    return (f"{name} cannot be loaded as a causal language model ({reason}): check its config.json.")


def lora_target_modules(model) -> list[str]:
    """Names of the linear layers inside the transformer blocks, as LoRA's `target_modules`.

    Found by walking the model, so they exist for every architecture: q_proj … down_proj in Llama,
    query_key_value … dense_4h_to_h in BLOOM. The output head is left out: it is often tied to the
    embeddings.
    """
    head = model.get_output_embeddings()
    names = [name.rsplit(".", 1)[-1] for name, module in model.named_modules()
             if isinstance(module, torch.nn.Linear) and module is not head and "." in name]
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    try:
        print(f"Base model ready: {verify(sys.argv[1] if len(sys.argv) > 1 else EMBEDDED)}")
    except WorkbookError as problem:
        sys.exit(f"error: {problem}")
