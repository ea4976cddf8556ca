"""Adapter folders: find them, and check them before anything in them is trusted.

An adapter folder comes from anywhere: a job, a hub, a colleague. Only JSON and safetensors are
opened, sizes are bounded before anything is read, links are not followed, and every tensor is
compared with the base model's own layers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import METRICS, ROOT, WorkbookError, base_models
from helpers.registry import EMBEDDED, custom_adapters_dir, resolve

PREBUILT = ROOT / "adapters" / "prebuilt"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_RANK, MAX_JSON_BYTES = 1024, 1_000_000
MAX_HEADER_BYTES = 10_000_000  # an adapter of 210 layers has a header of 55 kB
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Settings of PEFT's LoraConfig that change nothing when a trained adapter is only used.
_IGNORED = {
    "base_model_name_or_path", "revision", "peft_version", "inference_mode", "r", "lora_alpha",
    "lora_dropout", "target_modules", "use_rslora", "megatron_core", "qalora_group_size",
    "loftq_config", "eva_config", "lora_ga_config"}
# Settings that may have some values, and what an adapter with another one is.
_ALLOWED = {
    "peft_type": (("LORA",), "is of the kind {}: this workbook runs LoRA adapters"),
    "task_type": ((None, "CAUSAL_LM"), "was made for {}: this workbook runs language models"),
    "init_lora_weights": (
        (None, True, False, "gaussian", "eva", "orthogonal"),
        "was initialised with {}, which changes the base model's own weights: save it converted to "
        "plain LoRA (PEFT's path_initial_model_for_weight_conversion)"),
    "bias": ((None, "none"), "uses bias (trained biases): train it with bias='none'")}
# Settings that must be empty, and what each would mean here. One that nobody knows is refused too.
_UNSUPPORTED = {
    "use_dora": "DoRA: magnitudes of whole layers, which rule out mixed batches",
    "rank_pattern": "layers of different rank", "alpha_pattern": "layers of different alpha",
    "modules_to_save": "whole retrained modules", "lora_bias": "trained biases",
    "layer_replication": "repeated layers of the base model",
    "layers_to_transform": "only some layers", "trainable_token_indices": "retrained tokens",
    "auto_mapping": "a class to import from another package",
    "target_parameters": "parameters outside linear layers", "fan_in_fan_out": "transposed weights"}


@dataclass(frozen=True)
class AdapterInfo:
    """A checked adapter. `name` is unique among what `discover` finds; `title` is for people.

    rank and alpha: a layer's update is ``scaling * B @ A``, A of shape [rank, in], B [out, rank].
    modules: full names of the adapted linear layers; parameters: trained numbers; bytes and sha256:
    of the weights file; metrics: the content of metrics.json, or None; verified: the metrics hold
    the weights' SHA-256 (it then matched).
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
    """Check an adapter folder against a base model and say what is in it. Nothing of it is run.

    folder: with adapter_config.json and adapter_model.safetensors in PEFT's form, and metrics.json
    if there is one. Raises WorkbookError, one sentence that names the folder: for an adapter of
    another base model; missing, extra, misshapen or non-finite tensors; a rank that is not the
    config's; a target module that the base lacks; pickled, cut or changed weights; links that
    leave the folder; a kind of adapter that this workbook does not run.
    """
    return read_tensors(folder, base_name)[0]


def read_tensors(folder: Path | str, base_name: str = EMBEDDED) -> tuple[AdapterInfo, dict]:
    """The AdapterInfo of a folder and its tensors by name, checked as by `read_adapter`.

    The files are read once: what is used is what was checked.
    """
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
    cannot be used is reported and does not hide the others. Folders without adapter files, and
    hidden ones (half-published), are passed over.
    """
    found, problems = [], {}
    for root, prefix, label in ((Path(prebuilt or PREBUILT), "", ""),
                                (Path(custom or custom_adapters_dir()), "custom/", "Custom: ")):
        for folder in sorted(root.glob("[!.]*")):
            name = prefix + folder.name
            try:
                if _holds_adapter(folder, root):
                    info = read_adapter(folder, base_name)
                    found.append(replace(info, name=name, title=label + folder.name))
            except WorkbookError as problem:
                problems[name] = str(problem)
            except OSError as error:
                problems[name] = f"The folder {folder} cannot be read ({error}): remove or mend it."
    return Discovered(found, problems)


def _holds_adapter(folder: Path, root: Path) -> bool:
    if not Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(root)):
        raise WorkbookError(f"The adapter in {folder} is a link to another place: copy it there.")
    return folder.is_symlink() or (
        folder.is_dir() and any(path.name.startswith("adapter_") for path in folder.iterdir()))


@lru_cache(maxsize=8)
def layer_shapes(base_name: str = EMBEDDED) -> dict[str, tuple[int, int]]:
    """The linear layers of a base model's blocks, ``{full name: (out features, in features)}``.

    No weights are read. The answer is kept: do not change it.
    """
    folder = base_models.fetch(base_name, quiet=True)
    with torch.device("meta"):  # shapes only
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = model.get_output_embeddings()
    return {name: tuple(module.weight.shape) for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head}


# --- checks, in the order in which `_read` makes them

class _Fault(Exception):
    """What is wrong with an adapter and what to do: a sentence without its subject."""


def _need(condition, otherwise: str) -> None:
    if not condition:
        raise _Fault(otherwise)


def _read(folder: Path, base_name: str) -> tuple[AdapterInfo, dict]:
    if not folder.is_dir():
        raise WorkbookError(f"There is no adapter folder {folder}: check the path.")
    name, base = folder.resolve().name, resolve(base_name)
    if not re.fullmatch(r"\w[\w .+@=-]{0,99}", name):
        raise WorkbookError(f"The adapter folder name {name!r:.80} cannot be shown safely: rename "
                            "it with letters, digits, dots and dashes (at most 100).")
    config = _read_json(folder, CONFIG)
    _check_settings(config)
    trained_on, rank = config.get("base_model_name_or_path"), config["r"]
    _need(trained_on and trained_on in (base.hub_id, base.name), "belongs to the base model "
          f"{trained_on!r:.80}, not to {base.hub_id or base.name}: load it on its own base model")
    modules = _target_modules(config.get("target_modules"), base_name)
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
    path, cannot = folder / name, f"cannot be used, because its {name}"
    _need(os.path.lexists(path), f"has no {name}: copy the whole folder again")
    _need(not path.is_symlink(), f"{cannot} is a link to another place: put the file itself there")
    _need(path.is_file(), f"{cannot} is not an ordinary file: put the file itself there")
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
    for key, (allowed, sentence) in _ALLOWED.items():
        _need(config.get(key) in allowed, sentence.format(f"{config.get(key)!r:.80}"))
    for key, value in config.items():
        known = key in _IGNORED or key in _ALLOWED
        what = f"uses {key} ({_UNSUPPORTED[key]})" if key in _UNSUPPORTED else \
            f"has the unknown setting {key!r:.80}"
        _need(known or not value, f"{what}, which is not run here: train it as plain LoRA")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    _need(type(rank) is int and 1 <= rank <= MAX_RANK, f"says that its rank r is {rank!r:.80}: it "
          f"must be a whole number from 1 to {MAX_RANK}")
    _need(type(alpha) in (int, float) and 0 < alpha <= 1e6,
          f"says that lora_alpha is {alpha!r:.80}: it must be a number above 0, at most a million")


def _target_modules(named, base_name: str) -> dict[str, tuple[int, int]]:
    """The base model's layers that a config names, as PEFT matches them, with their shapes."""
    layers = layer_shapes(base_name)
    _need(isinstance(named, list) and named and all(isinstance(name, str) for name in named),
          f"has target_modules {named!r:.80}: it must be a list of names (a pattern is not run)")
    chosen, known = set(), ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers))
    for name in named:
        found = [layer for layer in layers if f".{layer}".endswith(f".{name}")]
        _need(found, f"targets the module {name!r:.80}, which {base_name} lacks: it has {known}")
        chosen.update(found)
    return {layer: shape for layer, shape in layers.items() if layer in chosen}


def _read_weights(folder: Path, rank: int, modules: dict) -> tuple[bytes, dict]:
    """The file's bytes and its tensors, if they are exactly the modules' own, and finite."""
    if not os.path.lexists(folder / WEIGHTS):
        for path in sorted(folder.iterdir()):
            _need(path.suffix not in _PICKLED, f"holds pickled weights ({path.name}), which can "
                  f"run code when they are opened: have whoever made it save {WEIGHTS}")
    expected = {}
    for module, (out, into) in modules.items():
        expected[f"base_model.model.{module}.lora_A.weight"] = [rank, into]
        expected[f"base_model.model.{module}.lora_B.weight"] = [out, rank]
    numbers = sum(math.prod(shape) for shape in expected.values())
    content = _read_file(folder, WEIGHTS, 4 * numbers + MAX_HEADER_BYTES)
    header = int.from_bytes(content[:8], "little")
    damaged, again = f"has a damaged or cut {WEIGHTS}", "copy the whole folder again"
    _need(header <= min(len(content), MAX_HEADER_BYTES),
          f"{damaged} (its header claims {header:,} bytes of {len(content):,}): copy it again")
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise _Fault(f"{damaged} ({error!s:.100}): copy the file again") from error
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
