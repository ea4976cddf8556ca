"""Adapter folders: find them, and check them before anything in them is trusted.

Only JSON and safetensors are opened, sizes are bounded before anything is read, links are not
followed, and every tensor is compared with the base model's own layers.
"""

import hashlib
import json
import math
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PureWindowsPath

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from helpers import METRICS, ROOT, WorkbookError, base_models
from helpers.adapter_layers import (LAYERS, Fault, check_alpha, check_rank, extras, layer_tensors,
                                    need, per_layer, places, scaling, target_modules, token_rows,
                                    whole_tensors)
from helpers.registry import EMBEDDED, custom_adapters_dir, resolve

PREBUILT = ROOT / "adapters" / "prebuilt"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_JSON_BYTES = 1_000_000
MAX_HEADER_BYTES = 10_000_000  # an adapter of 210 layers has a header of 55 kB

# Settings of PEFT's LoraConfig that change nothing when a trained adapter is only used, those that
# are read below, and those that may have some values. Any other one must be empty.
_IGNORED = {
    "base_model_name_or_path", "revision", "peft_version", "inference_mode", "r", "lora_alpha",
    "lora_dropout", "use_rslora", "megatron_core", "qalora_group_size", "merge_weights",
    "fan_in_fan_out",  # PEFT sets it where a layer (GPT-2's) keeps its weights so
    "loftq_config", "eva_config", "lora_ga_config"}
_READ = {*LAYERS, "rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "lora_bias",
         "trainable_token_indices"}
_ALLOWED = {
    "peft_type": ("LORA",), "task_type": (None, "CAUSAL_LM"),
    "bias": (None, "none", "all", "lora_only"),
    # PiSSA, OLoRA and others change the base model's own weights.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal")}


@dataclass(frozen=True)
class AdapterInfo:
    """A checked adapter: a layer's update is ``scaling * B @ A``, A [rank, in], B [out, rank].

    name: unique among what `discover` finds; title: for people; modules: full names of the adapted
    linear layers; parameters: trained numbers; bytes and sha256: of the weights file; verified:
    metrics.json holds that SHA-256; metrics: its content, or None; ranks and alphas: of layers
    that have others; whole: base parameters that the adapter replaces, each with its tensor's name;
    rows: the tokens of a tensor that replaces a few rows only; extras: what it is beside plain
    LoRA, in words (none: it can be mixed).
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
    ranks: dict[str, int] = field(default_factory=dict, repr=False, hash=False)
    alphas: dict[str, float] = field(default_factory=dict, repr=False, hash=False)
    whole: dict[str, str] = field(default_factory=dict, repr=False, hash=False)
    rows: tuple[int, ...] = ()
    extras: tuple[str, ...] = ()

    @property
    def scaling(self) -> float:
        """What multiplies B A in the layers that have no rank or alpha of their own."""
        return scaling(self.alpha, self.rank, self.use_rslora)

    def scaling_of(self, module: str) -> float:
        """The scaling of one layer."""
        return scaling(self.alphas.get(module, self.alpha), self.ranks.get(module, self.rank),
                       self.use_rslora)

    def replacements(self, tensors: dict, own) -> dict[str, torch.nn.Parameter]:
        """``{base parameter: what takes its place}``, in its type; parameters that are tied get one
        and the same. own: gives the base model's parameter of a name. Raises WorkbookError where
        that is packed in 4 bits."""
        made = {}
        for place, tensor in self.whole.items():
            if tensor not in made:
                made[tensor] = self._replacement(tensors, tensor, own(place))
        return {place: made[tensor] for place, tensor in self.whole.items()}

    def _replacement(self, tensors: dict, name: str, own: torch.Tensor) -> torch.nn.Parameter:
        weight = tensors[name].to(own.device, own.dtype)
        if name.endswith("trainable_tokens_delta"):
            weight = own.detach().index_copy(0, torch.tensor(self.rows).to(own.device), weight)
        if weight.shape != own.shape:
            raise WorkbookError(f"The adapter {self.name} replaces weights that are packed in 4 "
                                "bits here: load the base model with precision='full'.")
        return torch.nn.Parameter(weight, requires_grad=False)

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
    with sentences(folder):
        return _read(Path(folder), base_name)


@contextmanager
def sentences(folder: Path | str):
    """Turn a Fault, or what the disk says, into a WorkbookError that names the folder."""
    try:
        if not Path(folder).is_dir():
            raise WorkbookError(f"There is no adapter folder {folder}: check the path.")
        yield
    except (Fault, OSError) as error:
        reason = error if isinstance(error, Fault) else f"cannot be read: {error}"
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


# --- checks, in the order in which `_read` makes them

def _read(folder: Path, base_name: str) -> tuple[AdapterInfo, dict]:
    name = folder.resolve().name
    if not re.fullmatch(r"\w[\w .+@=-]{0,99}", name):
        raise WorkbookError(f"The adapter folder name {name!r:.80} cannot be shown safely: rename "
                            "it with letters, digits, dots and dashes (at most 100).")
    config = read_object(folder, CONFIG)
    _check_settings(config)
    _check_base(config, base_name)
    modules = target_modules(config, base_name)
    ranks = per_layer(config, "rank_pattern", config["r"], modules, check_rank)
    alphas = per_layer(config, "alpha_pattern", config["lora_alpha"], modules, check_alpha)
    whole = whole_tensors(config, read_header(folder), modules, base_name)
    content, tensors = _read_weights(folder, layer_tensors(config, modules, ranks) | whole)
    metrics = read_object(folder, METRICS) if os.path.lexists(folder / METRICS) else None
    noted, digest = (metrics or {}).get("weights_sha256"), hashlib.sha256(content).hexdigest()
    need(noted in (None, digest), f"has a {WEIGHTS} that has changed since {METRICS} was written "
         "(its SHA-256 differs): copy the whole folder again")
    return AdapterInfo(
        name=name, title=name, folder=folder.resolve(), rank=config["r"],
        alpha=config["lora_alpha"], ranks=ranks, alphas=alphas,
        whole=places(config, whole, base_name), extras=extras(config, whole),
        rows=tuple(token_rows(config, base_name)[1]),
        use_rslora=config.get("use_rslora") is True, modules=tuple(modules),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=len(content), sha256=digest, verified=noted is not None, metrics=metrics), tensors


def _open_itself(path: str, flags: int) -> int:
    """Follow no link and wait for no pipe's other end, should one be there since it was checked."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def read_bytes(folder: Path, name: str, limit: int, whole: bool = True) -> bytes:
    """The content of a regular file of at most `limit` bytes that really lies in the folder.
    whole False: its first `limit` bytes. Raises Fault, a sentence without its subject."""
    path = folder / name
    need(os.path.lexists(path), f"has no {name}: copy the whole folder again")
    need(path.is_file() and not path.is_symlink(), f"cannot be used, because its {name} is a link "
         "to another place or not an ordinary file: put the file itself there")
    with open(path, "rb", opener=_open_itself) as file:
        content = file.read(limit + whole)
    need(len(content) <= limit, f"has a {name} of more than the {limit:,} bytes that it could "
         "need: do not trust it; fetch it again from where it was made")
    return content


def read_object(folder: Path, name: str) -> dict:
    """The content of a file that holds a JSON object. Raises Fault."""
    try:
        content = json.loads(read_bytes(folder, name, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as bad:
        raise Fault(f"has a {name} that is not valid JSON ({bad!s:.80}): copy it again") from bad
    need(isinstance(content, dict), f"has a {name} that is not a JSON object: copy it again")
    return content


def _check_settings(config: dict) -> None:
    for key, value in {"peft_type": None, **config}.items():
        runs = value in _ALLOWED[key] if key in _ALLOWED else key in _IGNORED | _READ or not value
        if key == "auto_mapping" and isinstance(value, dict):  # PEFT and Unsloth note the base
            library = str(value.get("parent_library"))  # model's class; nothing is imported
            runs = re.fullmatch(r"transformers(\.\w+)*", library) and "base_model_class" in value
        need(runs, f"uses the setting {key!r:.80} ({value!r:.80}), which is not run here: train "
              "it, or have PEFT convert it, as plain LoRA of a causal language model")
    check_rank(config.get("r"))
    check_alpha(config.get("lora_alpha"))


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
    need(named in (base.hub_id, base.name), "belongs to the base model "
         f"{config.get('base_model_name_or_path')!r:.80}, not to {base.hub_id or base.name}: load "
          "it on its own base model")
    need(not (noted.startswith("sha256-") and revision.startswith("sha256-")), "was trained on "
         f"other weights of {base.name} ({noted:.80}, not {revision}): load it on those")


def _canonical(name: str) -> str:
    """A tensor's name without what PEFT's versions do differently."""
    name = name.replace(".base_layer.", ".")  # of a bias
    return name.removesuffix(".weight") if name.endswith("vector.weight") else name


def read_header(folder: Path, name: str = WEIGHTS) -> dict[str, dict]:
    """What a safetensors file says of its tensors, ``{name: {"dtype", "shape"}}``; no numbers are
    read. Raises Fault."""
    pickled = "adapter_model.bin"
    need(os.path.lexists(folder / name) or not (folder / pickled).exists(),
         f"holds pickled weights ({pickled}), which can run code when they are opened: have "
          f"whoever made it save {name}")
    damaged = f"has a damaged or cut {name} (%s): copy the whole folder again"
    length = int.from_bytes(read_bytes(folder, name, 8, whole=False), "little")
    need(length <= MAX_HEADER_BYTES, damaged % "header too large")
    try:
        header = json.loads(read_bytes(folder, name, 8 + length, whole=False)[8:])
        header.pop("__metadata__", None)
        found = {_canonical(key): {"dtype": entry["dtype"], "shape": entry["shape"]}
                 for key, entry in header.items()}
        need(all(type(size) is int for one in found.values() for size in one["shape"]), damaged
             % "a shape is no list of numbers")
        return found
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as bad:
        raise Fault(damaged % f"{bad!s:.80}") from bad


def parse_tensors(content: bytes, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file's content. Raises Fault."""
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise Fault(f"has a damaged or cut {name} ({error!s:.100}): copy the whole folder again"
                    ) from error


def _read_weights(folder: Path, expected: dict[str, list[int]]) -> tuple[bytes, dict]:
    """The file's bytes and its tensors, if they are exactly those, and finite."""
    again = "copy the whole folder again"
    numbers = sum(math.prod(shape) for shape in expected.values())
    content = read_bytes(folder, WEIGHTS, 4 * numbers + MAX_HEADER_BYTES)
    loaded = parse_tensors(content, WEIGHTS)
    tensors = {_canonical(name): tensor for name, tensor in loaded.items()}
    need(len(tensors) == len(loaded), f"has a tensor twice, under an old and a new name: {again}")
    missing = sorted(expected.keys() - tensors.keys())
    need(not missing, f"lacks {len(missing)} tensors, one is {missing[:1]!r:.100}: {again}")
    for name, tensor in sorted(tensors.items()):
        short, shape, kind = f"{name!r:.80}", list(tensor.shape), tensor.dtype
        need(name in expected, f"has a tensor its config does not account for ({short}): {again}")
        rank = expected[name][0 if "lora_A" in name else -1]
        where = f"rank {rank} on this base model" if ".lora_" in name else "this base model"
        need(shape == expected[name], f"has {short} of shape {shape} where {where} needs "
             f"{expected[name]}: its rank or its base model is another one")
        need(kind in (torch.float32, torch.float16, torch.bfloat16),
             f"has {short} as {kind}: save it as float32, float16 or bfloat16")
        need(torch.isfinite(tensor).all(), f"holds numbers that are not finite (in {short}): its "
             "training diverged or the file is damaged; train or copy it again")
    return content, tensors
