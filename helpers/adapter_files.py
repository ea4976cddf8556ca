"""Adapter folders: find them, and check them before anything in them is trusted.

Only JSON and safetensors are opened, sizes are bounded before anything is read, links are not
followed, and every tensor is compared with the base model's own layers.
"""

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PureWindowsPath

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from helpers import METRICS, ROOT, WorkbookError, base_models
from helpers.registry import EMBEDDED, custom_adapters_dir, resolve

PREBUILT = ROOT / "adapters" / "prebuilt"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_RANK, MAX_JSON_BYTES = 1024, 1_000_000
MAX_HEADER_BYTES = 10_000_000  # an adapter of 210 layers has a header of 55 kB

# Settings of PEFT's LoraConfig that change nothing when a trained adapter is only used, and those
# that may have some values. Any other one must be empty: DoRA, biases, layers of different rank …
_IGNORED = {
    "base_model_name_or_path", "revision", "peft_version", "inference_mode", "r", "lora_alpha",
    "lora_dropout", "target_modules", "use_rslora", "megatron_core", "qalora_group_size",
    "fan_in_fan_out",  # PEFT sets it where a layer (GPT-2's) keeps its weights so
    "loftq_config", "eva_config", "lora_ga_config"}
_ALLOWED = {
    "peft_type": ("LORA",), "task_type": (None, "CAUSAL_LM"), "bias": (None, "none"),
    # PiSSA, OLoRA and others change the base model's own weights.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal")}


@dataclass(frozen=True)
class AdapterInfo:
    """A checked adapter: a layer's update is ``scaling * B @ A``, A [rank, in], B [out, rank].

    name: unique among what `discover` finds; title: for people; modules: full names of the adapted
    linear layers; parameters: trained numbers; bytes and sha256: of the weights file; verified:
    metrics.json holds that SHA-256; metrics: its content, or None.
    """

    name: str
    title: str
    folder: Path
    rank: int
    alpha: float
    use_rslora: bool
    modules: tuple[str, ...] = field(repr=False)
    parameters: int
    bytes: int
    sha256: str
    verified: bool
    metrics: dict | None = field(repr=False, compare=False)

    @property
    def scaling(self) -> float:
        """alpha / rank (LoRA, arXiv:2106.09685, 4.1) or alpha / sqrt(rank) (arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The last parts of `modules`, each once."""
        return tuple(dict.fromkeys(name.rsplit(".", 1)[-1] for name in self.modules))

    @property
    def task(self) -> str | None:
        """The task that the adapter was trained for, if its metrics say so."""
        config = (self.metrics or {}).get("config")
        name = config.get("task") if isinstance(config, dict) else None
        return name if isinstance(name, str) else None


def read_adapter(folder: Path | str, base_name: str = EMBEDDED) -> AdapterInfo:
    """Check an adapter folder, in PEFT's form, against a base model and say what is in it.

    Nothing of it is run. Raises WorkbookError: one sentence with the folder and what is wrong.
    """
    return read_tensors(folder, base_name)[0]


def read_tensors(folder: Path | str, base_name: str = EMBEDDED) -> tuple[AdapterInfo, dict]:
    """As `read_adapter`, with the tensors by name. What is used is what was checked: one read."""
    try:
        return _read(Path(folder), base_name)
    except (_Fault, OSError) as error:
        reason = error if isinstance(error, _Fault) else f"cannot be read: {error}"
        raise WorkbookError(f"The adapter in {folder} {reason}.") from error


@dataclass(frozen=True)
class Discovered:
    """What `discover` found: adapters that can be used, and why each other folder cannot."""

    adapters: list[AdapterInfo]
    problems: dict[str, str]


def discover(base_name: str = EMBEDDED, prebuilt: Path | None = None,
             custom: Path | None = None) -> Discovered:
    """All adapters of ``adapters/prebuilt`` and of `custom_adapters_dir`, checked.

    The reader's own are named ``custom/<folder>`` and titled ``Custom: <folder>``. A folder that
    cannot be used is reported. One without adapter files, or hidden (half-published), is passed by.
    """
    found, problems = [], {}
    for root, prefix, label in ((Path(prebuilt or PREBUILT), "", ""),
                                (Path(custom or custom_adapters_dir()), "custom/", "Custom: ")):
        for folder in sorted(root.glob("[!.]*")):
            name, about = prefix + folder.name, f"The adapter in {folder}"
            try:
                if folder.is_symlink():
                    problems[name] = f"{about} is a link to another place: copy the folder here."
                elif folder.is_dir() and any(
                        path.name.startswith("adapter_") for path in folder.iterdir()):
                    info = read_adapter(folder, base_name)
                    found.append(replace(info, name=name, title=label + folder.name))
            except WorkbookError as problem:
                problems[name] = str(problem)
            except OSError as error:
                problems[name] = f"{about} cannot be read ({error}): remove or mend it."
    return Discovered(found, problems)


@lru_cache(maxsize=8)
def layer_shapes(base_name: str = EMBEDDED) -> dict[str, tuple[int, int]]:
    """The linear layers of a base model's blocks, ``{full name: (out, in)}``. Do not change it."""
    folder = base_models.fetch(base_name, quiet=True)
    with torch.device("meta"):  # shapes only
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = model.get_output_embeddings()
    shapes = {name: tuple(module.weight.shape) for name, module in model.named_modules()
              if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head}
    return {name: shape[::-1] if isinstance(model.get_submodule(name), Conv1D) else shape
            for name, shape in shapes.items()}


# --- checks, in the order in which `_read` makes them

class _Fault(Exception):
    """What is wrong with an adapter and what to do: a sentence without its subject."""


def _need(condition, otherwise: str) -> None:
    if not condition:
        raise _Fault(otherwise)


def _read(folder: Path, base_name: str) -> tuple[AdapterInfo, dict]:
    if not folder.is_dir():
        raise WorkbookError(f"There is no adapter folder {folder}: check the path.")
    name = folder.resolve().name
    if not re.fullmatch(r"\w[\w .+@=-]{0,99}", name):
        raise WorkbookError(f"The adapter folder name {name!r:.80} cannot be shown safely: rename "
                            "it with letters, digits, dots and dashes (at most 100).")
    config = _read_json(folder, CONFIG)
    _check_settings(config)
    _check_base(config, base_name)
    modules, rank = _target_modules(config.get("target_modules"), base_name), config["r"]
    content, tensors = _read_weights(folder, rank, modules)
    metrics = _read_json(folder, METRICS) if os.path.lexists(folder / METRICS) else None
    noted, digest = (metrics or {}).get("weights_sha256"), hashlib.sha256(content).hexdigest()
    _need(noted in (None, digest), f"has a {WEIGHTS} that has changed since {METRICS} was written "
          "(its SHA-256 differs): copy the whole folder again")
    return AdapterInfo(
        name=name, title=name, folder=folder.resolve(), rank=rank, alpha=config["lora_alpha"],
        use_rslora=config.get("use_rslora") is True, modules=tuple(modules),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=len(content), sha256=digest, verified=noted is not None, metrics=metrics), tensors


def _open_itself(path: str, flags: int) -> int:
    """Follow no link and wait for no pipe's other end, should one be there since it was checked."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _read_file(folder: Path, name: str, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes that really lies in the folder."""
    path = folder / name
    _need(os.path.lexists(path), f"has no {name}: copy the whole folder again")
    _need(path.is_file() and not path.is_symlink(), f"cannot be used, because its {name} is a link "
          "to another place or not an ordinary file: put the file itself there")
    with open(path, "rb", opener=_open_itself) as file:
        content = file.read(limit + 1)
    _need(len(content) <= limit, f"has a {name} of more than the {limit:,} bytes that it could "
          "need: do not trust it; fetch it again from where it was made")
    return content


def _read_json(folder: Path, name: str) -> dict:
    try:
        content = json.loads(_read_file(folder, name, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as bad:
        raise _Fault(f"has a {name} that is not valid JSON ({bad!s:.80}): copy it again") from bad
    _need(isinstance(content, dict), f"has a {name} that is not a JSON object: copy it again")
    return content


def _check_settings(config: dict) -> None:
    for key, value in {"peft_type": None, **config}.items():
        runs = value in _ALLOWED[key] if key in _ALLOWED else key in _IGNORED or not value
        if key == "auto_mapping" and isinstance(value, dict):  # PEFT and Unsloth note the base
            library = str(value.get("parent_library"))  # model's class; nothing is imported
            runs = re.fullmatch(r"transformers(\.\w+)*", library) and "base_model_class" in value
        _need(runs, f"uses the setting {key!r:.80} ({value!r:.80}), which is not run here: train "
              "it, or have PEFT convert it, as plain LoRA of a causal language model")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    _need(type(rank) is int and 1 <= rank <= MAX_RANK, f"says that its rank r is {rank!r:.80}: it "
          f"must be a whole number from 1 to {MAX_RANK}")
    _need(type(alpha) in (int, float) and 0 < alpha <= 1e6,
          f"says that lora_alpha is {alpha!r:.80}: it must be a number above 0, at most a million")


_revision_of = lru_cache(maxsize=8)(base_models.revision_of)  # it reads all of a folder's weights


def _check_base(config: dict, base_name: str) -> None:
    """The base model's weights decide, if the config notes their hash as this workbook does; else
    its name: a hub id, or a path that ends with the folder's name."""
    base, named = resolve(base_name), str(config.get("base_model_name_or_path") or "")
    noted, revision = str(config.get("revision")), ""
    if re.fullmatch("(gguf-)?sha256-[0-9a-f]+", noted):
        revision = _revision_of(base_name)
        if noted == revision:
            return
    if base.folder:
        named = PureWindowsPath(named).name  # what follows the last / or \
    _need(named in (base.hub_id, base.name), "belongs to the base model "
          f"{config.get('base_model_name_or_path')!r:.80}, not to {base.hub_id or base.name}: load "
          "it on its own base model")
    _need(not (noted.startswith("sha256-") and revision.startswith("sha256-")), "was trained on "
          f"other weights of {base.name} ({noted:.80}, not {revision}): load it on those")


def _target_modules(named, base_name: str) -> dict[str, tuple[int, int]]:
    """The base model's layers that a config names, as PEFT matches them, with their shapes."""
    layers = layer_shapes(base_name)
    _need(isinstance(named, list) and named and all(isinstance(name, str) for name in named),
          f"has target_modules {named!r:.80}: it must be a list of names (a pattern is not run)")
    known = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers))
    for name in named:
        _need(any(f".{layer}".endswith(f".{name}") for layer in layers),
              f"targets the module {name!r:.80}, which {base_name} lacks: it has {known}")
    endings = tuple(f".{name}" for name in named)
    return {layer: shape for layer, shape in layers.items() if f".{layer}".endswith(endings)}


def _read_weights(folder: Path, rank: int, modules: dict) -> tuple[bytes, dict]:
    """The file's bytes and its tensors, if they are exactly the modules' own, and finite."""
    pickled, again = "adapter_model.bin", "copy the whole folder again"
    _need(os.path.lexists(folder / WEIGHTS) or not (folder / pickled).exists(),
          f"holds pickled weights ({pickled}), which can run code when they are opened: have "
          f"whoever made it save {WEIGHTS}")
    expected = {}
    for module, (out, into) in modules.items():
        expected[f"base_model.model.{module}.lora_A.weight"] = [rank, into]
        expected[f"base_model.model.{module}.lora_B.weight"] = [out, rank]
    numbers = sum(math.prod(shape) for shape in expected.values())
    content = _read_file(folder, WEIGHTS, 4 * numbers + MAX_HEADER_BYTES)
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise _Fault(f"has a damaged or cut {WEIGHTS} ({error!s:.100}): {again}") from error
    missing = sorted(expected.keys() - tensors.keys())
    _need(not missing, f"lacks {len(missing)} tensors, one is {missing[:1]!r:.100}: {again}")
    for name, tensor in sorted(tensors.items()):
        short, shape, kind = f"{name!r:.80}", list(tensor.shape), tensor.dtype
        _need(name in expected, f"has a tensor its config does not account for ({short}): {again}")
        _need(shape == expected[name], f"has {short} of shape {shape} where rank {rank} on this "
              f"base model needs {expected[name]}: its rank or its base model is another one")
        _need(kind in (torch.float32, torch.float16, torch.bfloat16),
              f"has {short} as {kind}: save it as float32, float16 or bfloat16")
        _need(torch.isfinite(tensor).all(), f"holds numbers that are not finite (in {short}): its "
              "training diverged or the file is damaged; train or copy it again")
    return content, tensors
