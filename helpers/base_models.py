"""Base models: fetch one by name, verify it, load it in full or 4-bit precision.

Any causal language model goes: the embedded one, one of the model hub, or one in a local folder.
"""

import os
import re
import sys
import warnings
from pathlib import Path

import torch
from huggingface_hub import errors as hub
from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers, convert_peft_config_for_transformers)
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from helpers import WorkbookError, disk_errors, probe, read_json, sha256
from helpers.embedded import MANIFEST, fetch_embedded
from helpers.registry import EMBEDDED, cache_dir, custom_adapters_dir, resolve  # noqa: F401

# TRL 1.16 and PEFT 0.21 use argument names that transformers 5.23 has renamed.
warnings.filterwarnings("ignore", category=FutureWarning,
                        message=".*deprecated and will be removed in v6.*")

DTYPES = ("float32", "bfloat16", "float16")
MODEL_CONFIGS = ("generation_config.json", "config.json")
HUB_ERRORS = (  # the first kind that fits
    (hub.RevisionNotFoundError, "has no such revision on the model hub: check what follows the @"),
    (hub.GatedRepoError, "is gated: accept its terms on the hub and log in with `hf auth login`"),
    (hub.RepositoryNotFoundError, "was not found on the model hub: check its spelling, or log in"),
    (OSError, "is not in the local hub cache and the model hub cannot be reached: connect to a "
              f"network, give a local folder, or use the embedded {EMBEDDED}"))


def fetch(name: str = EMBEDDED, quiet: bool = False) -> Path:
    """The base model's folder (safetensors, config and tokenizer), fetched if needed.

    Raises WorkbookError when it is not cached and cannot be fetched, is damaged, or holds no
    safetensors, and when the disk is full.
    """
    base = resolve(name)
    if base.name == EMBEDDED and not base.folder:  # a folder may have that name
        return fetch_embedded(quiet)
    folder = base.folder or _fetch_from_hub(base)
    _check_weights(folder)
    return folder


def _fetch_from_hub(base) -> Path:
    """A snapshot of the hub: config, tokenizer and safetensors only, never pickles or code."""
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        with disk_errors("the model hub's cache", f"the base model {base.name}"):
            return Path(snapshot_download(base.hub_id, revision=base.revision,
                                          allow_patterns=wanted))
    except OSError as error:  # of all kinds
        wrong = next(words for kind, words in HUB_ERRORS if isinstance(error, kind))
        kind = type(error).__name__
        raise WorkbookError(f"base_model {base.hub_id} {wrong} ({kind}).") from error


def _check_weights(folder: Path) -> None:
    """Refuse weights that are no safetensors, and an index that names other files."""
    index = folder / "model.safetensors.index.json"
    try:
        parts = map(str, read_json(index)["weight_map"].values()) if index.is_file() else ()
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise WorkbookError(f"{index} is damaged ({error!r}): fetch the model again.") from error
    others = [part for part in parts if not re.fullmatch(r"[\w.-]+\.safetensors", part)]
    if others or not any(folder.glob("*.safetensors")):
        wrong = f"has {others[0]!r} in its index" if others else "has no *.safetensors file"
        raise WorkbookError(f"{folder} {wrong} (pickled weights are never opened): convert the "
                            "model to safetensors first.")


def verify(name: str = EMBEDDED) -> Path:
    """The fetched folder, each file compared with the hash that was noted when it was made.
    Raises WorkbookError that names a file which has changed."""
    folder = fetch(name)
    files = read_json(folder / MANIFEST)["files"] if (folder / MANIFEST).is_file() else {}
    for file, entry in files.items():
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


def best_device(precision: str = "full") -> torch.device:
    """This process's CUDA GPU; else a Mac's (MPS: written, not run here), which bitsandbytes and
    groups of workers do not know; else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if precision == "full" and alone and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def best_dtype() -> torch.dtype:
    """The type that this hardware computes fastest without losing range: bfloat16 on NVIDIA Ampere
    and newer and on CPUs with AMX, float16 on older GPUs (V100, T4), float32 on other CPUs.
    WORKBOOK_DTYPE=float32 asks for another. Raises WorkbookError for what is none of the three."""
    if chosen := os.environ.get("WORKBOOK_DTYPE"):
        if chosen not in DTYPES:
            raise WorkbookError(f"WORKBOOK_DTYPE is {chosen!r}: use {' or '.join(DTYPES)}.")
        return getattr(torch, chosen)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    return torch.bfloat16 if re.search(r"\bamx_bf16\b", _cpuinfo()) else torch.float32


def hardware() -> str:
    """One line naming the device and its size, for cards and tables."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = re.search(r"model name\s*:\s*(.+)", _cpuinfo())
    return f"CPU ({name[1] if name else 'unknown'}, {torch.get_num_threads()} threads)"


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")  # Linux alone has it
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def load_tokenizer(name: str = EMBEDDED):
    """The base model's tokenizer, with an end-of-text token (the tokenizer's own, else the one of
    the model's config) and a pad token (its own, else the end-of-text token).
    Raises WorkbookError where there is no tokenizer or no end-of-text token."""
    folder = fetch(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WorkbookError(f"The tokenizer of {name} cannot be loaded ({reason}): put its "
                            f"tokenizer files into {folder}.") from error
    ends = [read_json(folder / file).get("eos_token_id") for file in MODEL_CONFIGS
            if (folder / file).is_file()]
    for end in ends:
        if tokenizer.eos_token_id is None and end is not None:
            first = end[0] if isinstance(end, list) else end
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    if tokenizer.eos_token_id is None:
        raise WorkbookError(f"{name} has no end-of-text token, so it cannot be taught where an "
                            f"answer ends: set eos_token in {folder / 'tokenizer_config.json'}.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(name: str = EMBEDDED, precision: str = "full", device=None, dtype=None,
         spread: bool = False):
    """Load a base model and its tokenizer: ``(model, tokenizer)``, the model in eval mode.

    precision: "full" (weights in `dtype`), or "4bit": NF4 with double quantization (QLoRA,
    arXiv:2305.14314, section 3), computing in `dtype`. device and dtype default to `best_device`
    and `best_dtype`. spread: over all GPUs that this process sees, block after block, for a model
    that one GPU cannot hold. Raises WorkbookError for a model that cannot be fetched or loaded, and
    for a wrong precision.
    """
    if precision not in ("full", "4bit"):
        raise WorkbookError(f"precision is {precision!r}: it must be 'full' or '4bit'.")
    dtype = dtype or best_dtype()
    device = torch.device(device or best_device(precision))
    options = {"dtype": dtype, "device_map": "auto" if spread else {"": device}}
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
        raise WorkbookError(f"The weights in {folder} are damaged ({error}): delete that folder "
                            "and fetch again.") from error
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WorkbookError(f"{name} cannot be loaded as a causal language model, {precision} "
                            f"({reason}): check its config.json (code in its folder is never run) "
                            "and that `make setup` has run.") from error
    finally:
        logging.enable_progress_bar()
    _set_up(model)
    return model.eval(), load_tokenizer(name)


def _set_up(model) -> None:
    """What this workbook changes in a loaded model."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # else packed in eval mode, for a product that rounds scales and passes no gradient
            module.support_avx512bf16_for_cpu = False
    if model.config.model_type == "bloom":
        from helpers.fast.bloom import use_fused_attention  # BLOOM's alone: not loaded for others

        use_fused_attention(model)


def free(model) -> None:
    """Give a model's memory back, whoever still knows the model. It is of no use afterwards."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def lora_target_modules(model) -> list[str]:
    """Names of the linear layers that text passes through (`probe.plain_linear_layers`), as LoRA's
    `target_modules`: q_proj … down_proj in Llama, query_key_value … dense_4h_to_h in BLOOM.

    Where other layers have the same last name, full names. Left out is also what PEFT refuses or
    makes something else of: Mamba's out_proj, names that were experts' in older checkpoints, and
    layers whose weights PEFT would look for under another name when it loads them (Laguna's shared
    experts).
    Raises WorkbookError when no layer is left.
    """
    last = {name: name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    full = probe.plain_linear_layers(model)
    kept = {name for name in {last[one] for one in full} if _stays_a_layer(model, name)}
    full = _found_again(model, [name for name in full if last[name] in kept])
    others = {last[name] for name in last.keys() - set(full)}
    if not full:
        raise WorkbookError(f"{model.config.model_type} models cannot be trained here: none of "
                            "their layers is a linear one that LoRA can be put on. Choose another "
                            "base_model.")
    return list(dict.fromkeys(name if last[name] in others else last[name] for name in full))


def _stays_a_layer(model, name: str) -> bool:
    """Whether PEFT 0.21 puts LoRA on the layers of this name themselves."""
    config = LoraConfig(target_modules=[name], task_type="CAUSAL_LM")
    try:
        _check_lora_target_modules_mamba(config, model, name)
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        return False
    return config.target_modules == {name}


def _found_again(model, names: list[str]) -> list[str]:
    """Those of the layers whose LoRA weights have the same name in a file and, for PEFT 0.21, in
    the model: it renames what transformers renames in older checkpoints."""
    keys = {f"base_model.model.{name}.lora_A.weight": name for name in names}
    found = convert_peft_adapter_state_dict_for_transformers(
        model, LoraConfig(target_modules=names), {key: torch.empty(0) for key in keys})
    return [name for key, name in keys.items() if key in found]


if __name__ == "__main__":
    try:
        print(f"Base model ready: {verify(sys.argv[1] if len(sys.argv) > 1 else EMBEDDED)}")
    except WorkbookError as problem:
        sys.exit(f"error: {problem}")
