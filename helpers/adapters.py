"""Adapters: find them, check them before anything is trusted, and swap them on one base model in memory.

An adapter folder comes from anywhere: a job, a hub, a colleague. `read_adapter` opens it the careful way: JSON and
safetensors only, sizes bounded before anything is read, every tensor compared with the base model's own layers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import stat
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from helpers import WorkbookError, base_models, check_numbers
from helpers.base_models import EMBEDDED, custom_adapters_dir

PREBUILT = Path(__file__).resolve().parent.parent / "adapters" / "prebuilt"
WEIGHTS, CONFIG, METRICS = "adapter_model.safetensors", "adapter_config.json", "metrics.json"
MAX_RANK = 1024
MAX_JSON_BYTES = 1_000_000
MAX_HEADER_BYTES = 10_000_000  # an adapter of 210 layers has a header of 55 kB

# Settings of PEFT's LoraConfig that change nothing when a trained adapter is only used.
_IGNORED = {"base_model_name_or_path", "revision", "peft_type", "peft_version", "inference_mode", "r", "lora_alpha",
            "lora_dropout", "target_modules", "use_rslora", "init_lora_weights", "megatron_core", "qalora_group_size",
            "task_type", "loftq_config", "eva_config", "lora_ga_config"}
# Settings that do, and what each would mean here.
_UNSUPPORTED = {
    "use_dora": "DoRA, which needs the magnitude of each layer and rules out mixed batches",
    "rank_pattern": "layers of different rank",
    "alpha_pattern": "layers of different alpha", "modules_to_save": "whole retrained modules beside LoRA",
    "lora_bias": "trained biases", "layer_replication": "repeated layers of the base model",
    "layers_to_transform": "only some layers", "auto_mapping": "a class to import from another package",
    "target_parameters": "parameters outside linear layers", "trainable_token_indices": "retrained tokens",
    "fan_in_fan_out": "transposed weights"}


@dataclass(frozen=True)
class AdapterInfo:
    """A checked adapter. `name` is unique among what `discover` finds; `title` is for people.

    rank and alpha: the update of a layer is ``scaling * B @ A`` with A of shape [rank, in], B [out, rank];
    target_modules: names of the adapted linear layers, without the block they stand in; parameters: trained numbers;
    bytes: size of the weights file; metrics: the content of metrics.json or None; task: the task it was trained for, if
    its metrics say so; verified: whether metrics.json holds the weights' SHA-256 (it then matched).
    """

    name: str
    title: str
    folder: Path
    base_model: str
    revision: str | None
    rank: int
    alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...]
    modules: tuple[str, ...] = field(repr=False)
    parameters: int = 0
    bytes: int = 0
    verified: bool = False
    metrics: dict | None = field(default=None, repr=False, compare=False)

    @property
    def scaling(self) -> float:
        """alpha / rank (LoRA, arXiv:2106.09685, section 4.1), or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def task(self) -> str | None:
        config = (self.metrics or {}).get("config")
        name = config.get("task") if isinstance(config, dict) else None
        return name if isinstance(name, str) else None


def read_adapter(folder: Path | str, base_name: str = EMBEDDED) -> AdapterInfo:
    """Check an adapter folder against a base model and say what is in it. Nothing of it is run, and nothing unpickled.

    folder: with adapter_config.json and adapter_model.safetensors in PEFT's form, and metrics.json if there is one.
    Raises WorkbookError, one sentence that names the folder: for an adapter of another base model; missing, extra,
    misshapen or non-finite tensors; a rank that is not the config's; a target module that the base lacks; pickled,
    truncated or changed weights; links that leave the folder; a kind of adapter that this workbook does not run.
    """
    return _read(Path(folder), base_name)[0]


def _read(folder: Path, base_name: str):
    """The checked ``(AdapterInfo, {tensor name: tensor})`` of a folder: one reading, so what is used is what was checked."""
    folder = Path(folder)
    config = _read_config(folder)
    base = base_models.resolve(base_name)
    trained_on = config.get("base_model_name_or_path")
    if trained_on not in (base.hub_id, base.name) or trained_on is None:
        raise _fault(folder, f"belongs to the base model {_short(trained_on)}, not to {base.hub_id or base.name}",
                     "load it on its own base model")
    rank, alpha = _rank_and_alpha(folder, config)
    modules = _target_modules(folder, config, base_name)
    metrics = _read_json(folder, METRICS) if _exists(folder / METRICS) else None
    content = _read_weights(folder, rank, modules)
    verified = _check_hash(folder, metrics, content)
    tensors = _check_tensors(folder, content, rank, modules)
    info = AdapterInfo(
        name=folder.resolve().name, title=folder.resolve().name, folder=folder.resolve(), base_model=trained_on,
        revision=config.get("revision") if isinstance(config.get("revision"), str) else None, rank=rank, alpha=alpha,
        use_rslora=config.get("use_rslora") is True, modules=tuple(modules), metrics=metrics, verified=verified,
        target_modules=tuple(dict.fromkeys(module.rsplit(".", 1)[-1] for module in modules)), bytes=len(content),
        parameters=sum(tensor.numel() for tensor in tensors.values()))
    return info, tensors


def _fault(folder: Path, wrong: str, cure: str) -> WorkbookError:
    return WorkbookError(f"The adapter in {folder} {wrong}: {cure}.")


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ------------------------------------------------------------------------------------------------ files, carefully


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def _read_file(folder: Path, name: str, limit: int) -> bytes:
    """The content of a regular file that really lies in the folder. Never follows a link, never waits on a pipe."""
    path = folder / name
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise _fault(folder, f"has no {name}", "copy the whole adapter folder again") from None
    except OSError as error:
        wrong = "is a link to another place" if path.is_symlink() else f"cannot be opened ({error.strerror})"
        raise _fault(folder, f"cannot be used, because its {name} {wrong}", "put the file itself into the folder") from error
    status = os.fstat(number)
    if not stat.S_ISREG(status.st_mode):
        os.close(number)
        raise _fault(folder, f"cannot be used, because its {name} is not an ordinary file", "put the file itself there")
    with os.fdopen(number, "rb") as file:
        if status.st_size > limit:
            raise _fault(folder, f"has a {name} of {status.st_size:,} bytes, more than the {limit:,} it could need",
                         "do not trust it; fetch it again from where it was made")
        return file.read(limit + 1)


def _read_json(folder: Path, name: str) -> dict:
    data = _read_file(folder, name, MAX_JSON_BYTES)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _fault(folder, f"has a {name} that is not valid JSON ({str(error)[:80]})", "copy the file again") from error
    if not isinstance(content, dict):
        raise _fault(folder, f"has a {name} that is not a JSON object", "copy the file again")
    return content


def _read_config(folder: Path) -> dict:
    """adapter_config.json, if it describes a plain LoRA adapter. A setting that nobody here knows is refused, not skipped."""
    if not folder.is_dir():
        raise WorkbookError(f"There is no adapter folder {folder}: check the path.")
    if not re.fullmatch(r"\w[\w .+@=-]{0,99}", folder.resolve().name):
        raise WorkbookError(f"The adapter folder name {_short(folder.resolve().name)} cannot be shown safely: rename it with "
                            "letters, digits, dots and dashes (at most 100).")
    config = _read_json(folder, CONFIG)
    if config.get("peft_type") != "LORA":
        raise _fault(folder, f"is of the kind {_short(config.get('peft_type'))}", "this workbook runs LoRA adapters")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise _fault(folder, f"was made for {_short(config['task_type'])}", "this workbook runs causal language models")
    for key, meaning in _UNSUPPORTED.items():
        if config.get(key):
            raise _fault(folder, f"uses {key} ({meaning}), which this workbook does not run", "train it as plain LoRA")
    if config.get("bias", "none") != "none":
        raise _fault(folder, "uses bias (trained biases), which this workbook does not run", "train it with bias='none'")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "eva", "orthogonal"):
        raise _fault(folder, f"was initialised with {_short(config['init_lora_weights'])}, which changes the base model's "
                     "own weights", "save it converted to plain LoRA (PEFT's path_initial_model_for_weight_conversion)")
    for key, value in config.items():
        if value and key not in _IGNORED and not (key == "bias" and value == "none"):
            raise _fault(folder, f"has the setting {_short(key)}, which this workbook does not know", "train it as plain LoRA")
    return config


def _rank_and_alpha(folder: Path, config: dict) -> tuple[int, float]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise _fault(folder, f"says that its rank r is {_short(rank)}", f"it must be a whole number from 1 to {MAX_RANK}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha <= 1e6:
        raise _fault(folder, f"says that lora_alpha is {_short(alpha)}", "it must be a number above 0, at most a million")
    return rank, alpha


def _target_modules(folder: Path, config: dict, base_name: str) -> dict[str, tuple[int, int]]:
    """The base model's layers that the config's target_modules name: ``{full name: (out, in)}``, as PEFT matches them."""
    layers = layer_shapes(base_name)
    named = config.get("target_modules")
    if named == "all-linear":
        return layers
    if not isinstance(named, list) or not named or not all(isinstance(name, str) for name in named):
        raise _fault(folder, f"has target_modules {_short(named)}", "it must be a list of module names (a pattern is not run)")
    chosen = {}
    for name in named:
        found = {layer: shape for layer, shape in layers.items() if layer == name or layer.endswith(f".{name}")}
        if not found:
            known = ", ".join(dict.fromkeys(layer.rsplit(".", 1)[-1] for layer in layers))
            raise _fault(folder, f"targets the module {_short(name)}, which {base_name} does not have",
                         f"its linear layers are {known}")
        chosen.update(found)
    return {layer: shape for layer, shape in layers.items() if layer in chosen}


def layer_shapes(base_name: str = EMBEDDED) -> dict[str, tuple[int, int]]:
    """The linear layers inside a base model's blocks, ``{full name: (out features, in features)}``; no weights are read."""
    return dict(_layer_shapes(base_models.fetch(base_name, quiet=True)))


@lru_cache(maxsize=8)
def _layer_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):  # shapes only
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False),
                                                 trust_remote_code=False)
    head = model.get_output_embeddings()
    return {name: tuple(module.weight.shape) for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head}


def _read_weights(folder: Path, rank: int, modules: dict[str, tuple[int, int]]) -> bytes:
    if not _exists(folder / WEIGHTS):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        if pickled:
            raise _fault(folder, f"holds pickled weights ({pickled[0]}), which can run code when they are opened",
                         f"have whoever made it save {WEIGHTS}")
    numbers = sum(rank * (out + into) for out, into in modules.values())
    return _read_file(folder, WEIGHTS, 4 * numbers + MAX_HEADER_BYTES)


def _check_hash(folder: Path, metrics: dict | None, content: bytes) -> bool:
    import hashlib

    noted = (metrics or {}).get("weights_sha256")
    if noted is not None and noted != hashlib.sha256(content).hexdigest():
        raise _fault(folder, f"has a {WEIGHTS} that has changed since {METRICS} was written (its SHA-256 differs)",
                     "copy the whole folder again")
    return noted is not None


def _check_tensors(folder: Path, content: bytes, rank: int, modules: dict[str, tuple[int, int]]) -> dict:
    """The tensors by name, when they are exactly those of the target modules, of the right shapes, and finite."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    if int.from_bytes(content[:8], "little") > min(len(content), MAX_HEADER_BYTES):
        raise _fault(folder, f"has a damaged {WEIGHTS} (its header claims {int.from_bytes(content[:8], 'little'):,} bytes of "
                     f"{len(content):,})", "copy the file again")
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise _fault(folder, f"has a damaged or cut {WEIGHTS} ({str(error)[:100]})", "copy the file again") from error
    expected = {}
    for module, (out, into) in modules.items():
        expected[f"base_model.model.{module}.lora_A.weight"] = (rank, into)
        expected[f"base_model.model.{module}.lora_B.weight"] = (out, rank)
    for name in sorted(expected.keys() - tensors.keys()):
        raise _fault(folder, f"lacks {len(expected.keys() - tensors.keys())} tensors, for instance {_short(name)}",
                     "its weights and its config do not belong together; copy the whole folder again")
    for name in sorted(tensors.keys() - expected.keys()):
        raise _fault(folder, f"holds a tensor that its config does not account for ({_short(name)})",
                     "its weights and its config do not belong together; copy the whole folder again")
    for name, tensor in sorted(tensors.items()):
        if tuple(tensor.shape) != expected[name]:
            raise _fault(folder, f"has {_short(name)} of shape {list(tensor.shape)} where rank {rank} on this base model "
                         f"needs {list(expected[name])}", "its rank or its base model is another one")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise _fault(folder, f"has {_short(name)} as {tensor.dtype}", "save it as float32, float16 or bfloat16")
        if not torch.isfinite(tensor).all():
            raise _fault(folder, f"holds numbers that are not finite (in {_short(name)})",
                         "its training diverged or the file is damaged; train or copy it again")
    return tensors


# ------------------------------------------------------------------------------------------------------- discovery


@dataclass(frozen=True)
class Discovered:
    """What `discover` found: adapters that can be used, and for each other folder the reason why it cannot."""

    adapters: list[AdapterInfo]
    problems: dict[str, str]


def discover(base_name: str = EMBEDDED, prebuilt: Path | None = None, custom: Path | None = None) -> Discovered:
    """All adapters of ``adapters/prebuilt`` and of the reader's own folder (`custom_adapters_dir`), checked.

    The reader's own are named ``custom/<folder>`` and titled ``Custom: <folder>``. A folder that cannot be used is
    reported and does not hide the others; folders without adapter files, and hidden ones (half-published), are passed over.
    """
    found, problems = [], {}
    for root, prefix, label in ((prebuilt or PREBUILT, "", ""), (custom or custom_adapters_dir(), "custom/", "Custom: ")):
        root = Path(root)
        for folder in sorted(root.iterdir()) if root.is_dir() else []:
            if folder.name.startswith(".") or not (folder.is_symlink() or folder.is_dir()):
                continue
            if not (folder.is_symlink() or any(path.name.startswith("adapter_") for path in folder.iterdir())):
                continue
            try:
                if folder.is_symlink() and not folder.resolve().is_relative_to(root.resolve()):
                    raise _fault(folder, "is a link to another place", "copy the folder itself there")
                info = read_adapter(folder, base_name)
            except WorkbookError as problem:
                problems[prefix + folder.name] = str(problem)
                continue
            found.append(dataclasses.replace(info, name=prefix + folder.name, title=label + folder.name))
    return Discovered(found, problems)


# ------------------------------------------------------------------------------------------------------ generation


@dataclass(frozen=True)
class Settings:
    """How an answer is generated. Greedy unless `sample`; temperature, top_p and top_k then shape the draw (top_k 0: off).

    max_new_tokens in tokens; beams: number of beams of a beam search (1: none); repetition_penalty: Keskar et al. 2019,
    arXiv:1909.05858, section 4.1 (1: none); seed: of the draws; stop: text that ends an answer ("": only end-of-text).
    """

    max_new_tokens: int = 64
    sample: bool = False
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    beams: int = 1
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: str = ""

    def check(self) -> None:
        """Raise WorkbookError that names the first setting which is out of range."""
        check_numbers(self, (("max_new_tokens", 1, 4096), ("temperature", 0.01, 10), ("top_p", 0.01, 1), ("top_k", 0, 10_000),
                             ("beams", 1, 16), ("repetition_penalty", 0.5, 5), ("seed", 0, 2**32 - 1)))

    def options(self) -> dict:
        """The same as arguments of transformers' generate. All are given, so that no model's own defaults leak in."""
        drawn = {"temperature": float(self.temperature), "top_p": float(self.top_p), "top_k": self.top_k} if self.sample else {
            "temperature": 1.0, "top_p": 1.0, "top_k": 50}  # the library's own neutral values: unused when greedy
        return {"max_new_tokens": self.max_new_tokens, "do_sample": self.sample, "num_beams": self.beams,
                "repetition_penalty": float(self.repetition_penalty), **drawn}


@dataclass(frozen=True)
class Answer:
    """One generated answer. Times in seconds from the start of the generation; tokens without the end-of-text token."""

    adapter: str | None
    prompt: str
    text: str
    tokens: int
    swap_seconds: float
    first_token_seconds: float
    seconds: float
    stopped: bool

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token (the prompt's own pass is the time to first token), or 0 for a single token."""
        after = self.seconds - self.first_token_seconds
        return (self.tokens - 1) / after if self.tokens > 1 and after > 0 else 0.0


def _few_rows(linear):
    """A linear layer's forward that is faster for a few rows on a CPU, or the layer itself where that does not apply.

    For 2 to 16 rows of float32, MKL takes ``(W @ x.T).T`` in half the time of ``x @ W.T`` (measured on AVX2, torch 2.13).
    """
    import torch

    weight = linear.weight if type(linear) is torch.nn.Linear else None  # not a 4-bit layer
    if weight is None or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return linear

    def forward(x):
        rows = x.reshape(-1, x.shape[-1])
        if not 1 < len(rows) <= 16:
            return torch.nn.functional.linear(x, weight, linear.bias)
        result = (weight @ rows.T).T.reshape(*x.shape[:-1], -1)
        return result if linear.bias is None else result + linear.bias

    return forward


def _mixed_forward(base_layer, a, b, mask):
    base = _few_rows(base_layer)

    def forward(x):
        result = base(x)
        if a is None:  # none of the batch's adapters has this layer
            return result
        return result + ((x.to(a.dtype) @ a.T) * mask @ b).to(result.dtype)

    return forward


def _watch(tokenizer, width: int, stop: threading.Event, stop_text: str, on_text: Callable[[list[str]], None] | None):
    """A stopping criterion that also streams: after each token it tells the texts so far and notes the time.

    It runs inside `generate`, in the caller's own thread: an exception of `on_text` reaches the caller, and there is no
    queue on which anyone could wait for ever.
    """
    import torch
    from transformers import StoppingCriteria

    class Watch(StoppingCriteria):
        first: float | None = None
        stopped = False

        def __call__(self, input_ids, scores, **kwargs):
            if self.first is None:
                self.first = time.perf_counter()
            rows = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
            if on_text or stop_text:
                texts = tokenizer.batch_decode(input_ids[:, width:], skip_special_tokens=True)
                if stop_text:
                    rows |= torch.tensor([stop_text in text.lstrip() for text in texts], device=rows.device)
                if on_text:
                    on_text(texts)
            if stop.is_set():
                self.stopped = True
                rows[:] = True
            return rows

    return Watch()


# ------------------------------------------------------------------------------------------------------------- bank


class AdapterBank:
    """One base model in memory and any number of adapters on it; which one acts is a pointer, and a swap moves it.

    PEFT's layers hold every adapter's A and B and one field that names the active ones. Here that field is one list which
    all layers share: `swap` writes into it, and nothing is copied. One lock guards the model: a swap waits for the answer
    that is being generated, so an answer never mixes two adapters. Adapter None is the base model itself.
    """

    def __init__(self, base_name: str = EMBEDDED, precision: str = "full", device=None, dtype=None):
        """Load the base model (see base_models.load for precision, device, dtype and the errors)."""
        self.base_name = base_name
        self.model, self.tokenizer = base_models.load(base_name, precision, device, dtype)
        self.base_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.adapters: dict[str, AdapterInfo] = {}
        self.active: str | None = None
        self._keys: dict[str, str] = {}  # our name -> PEFT's, which allows no dots
        self._layers: list = []
        self._pointer: list[str] = []  # the active adapter, as every layer sees it
        self._joined: dict[tuple, list] = {}  # for mixed batches, see `mixed`
        self._count = 0
        self._lock = threading.RLock()

    # -- which adapters are here

    def load(self, info: AdapterInfo) -> float:
        """Read an adapter again, check it again, and put it beside the others. Returns seconds.

        Raises WorkbookError as `read_adapter` does, or when one of that name is loaded; the bank is then as before.
        """
        from peft import LoraConfig, PeftModel, set_peft_model_state_dict

        start = time.perf_counter()
        if info.name in self.adapters:
            raise WorkbookError(f"An adapter named {info.name!r} is already loaded: unload it first.")
        checked, tensors = _read(info.folder, self.base_name)
        config = LoraConfig(r=checked.rank, lora_alpha=checked.alpha, use_rslora=checked.use_rslora, task_type="CAUSAL_LM",
                            target_modules=list(checked.modules), inference_mode=True)
        with self._lock:
            key = self._key(info.name)
            # PEFT computes LoRA in float32 (it casts 16-bit adapters when it loads them); so does the bank.
            tensors = {name: tensor.to(self.model.device).float() for name, tensor in tensors.items()}
            if isinstance(self.model, PeftModel):
                try:
                    self._add(key, config, checked.modules, tensors)
                except BaseException:  # an interrupt too: half an adapter would act, for the base model as well
                    self._flip(None)
                    self.model.delete_adapter(key)
                    self._collect_layers()
                    raise
            else:
                self.model = PeftModel(self.model, config, adapter_name=key, low_cpu_mem_usage=True)
                set_peft_model_state_dict(self.model, tensors, adapter_name=key, low_cpu_mem_usage=True)
                self.model.requires_grad_(False).eval()
                self._collect_layers()
            self._keys[info.name] = key
            self.adapters[info.name] = dataclasses.replace(checked, name=info.name, title=info.title)
        return time.perf_counter() - start

    def _add(self, key: str, config, modules: tuple[str, ...], tensors: dict) -> None:
        """What PEFT's add_adapter and set_peft_model_state_dict do for plain LoRA, in the adapter's own layers only.

        PEFT 0.21 walks through the modules of all resident adapters, and compares each with every adapted layer: to load 100 took
        seven times as long that way. A layer that is new to LoRA is created as PEFT creates it.
        """
        import torch
        from accelerate import init_empty_weights

        tuner, layers = self.model.base_model, []
        self.model.peft_config[key] = config
        for name in modules:
            parent, _, last = name.rpartition(".")
            with init_empty_weights():
                tuner._create_and_replace(config, key, tuner.model.get_submodule(name), last, tuner.model.get_submodule(parent),
                                          current_key=name)
            layers.append(layer := tuner.model.get_submodule(name))
            (layer if layer.training else layer.lora_dropout[key]).eval()  # a layer that is new to LoRA, or what is new in it
            for part in ("lora_A", "lora_B"):
                linear = getattr(layer, part)[key].eval()
                linear.weight = torch.nn.Parameter(tensors[f"base_model.model.{name}.{part}.weight"], requires_grad=False)
        tuner.targeted_module_names[:] = dict.fromkeys([*tuner.targeted_module_names, *modules])
        self._use_layers(list(dict.fromkeys([*self._layers, *layers])))

    def _key(self, name: str) -> str:
        """A name that PEFT can take: no dots or slashes, and nothing that looks like its own tensor names."""
        self._count += 1
        plain = re.fullmatch(r"[a-z]\w{2,}", name) and "lora" not in name and name not in ("default", *self._keys.values())
        return name if plain else f"adapter_{self._count}"

    def _collect_layers(self) -> None:
        from peft.tuners.lora import LoraLayer

        self._use_layers([module for module in self.model.modules() if isinstance(module, LoraLayer)])

    def _use_layers(self, layers: list) -> None:
        self._layers = layers
        self._joined.clear()
        self._share_pointer()
        self._flip(self.active)

    def _share_pointer(self) -> None:
        for layer in self._layers:
            layer._active_adapter = self._pointer

    def unload(self, name: str) -> None:
        """Remove an adapter and free its memory; if it was active, the base model is from now on."""
        with self._lock:
            self._known(name)
            if self.active == name:
                self.active = None
            self._flip(None)  # PEFT would otherwise choose another adapter as the active one
            self.model.delete_adapter(self._keys.pop(name))
            del self.adapters[name]
            if self._keys:
                self.model.active_adapter = next(iter(self._keys.values()))
            else:  # PEFT's wrapper does not run without an adapter
                self.model = self.model.unload()
            self._collect_layers()

    def sync(self, found: list[AdapterInfo]) -> dict[str, str]:
        """Make the loaded adapters those of `found`: load new ones, reload changed ones, unload those that are gone.

        Returns the problems by name: a broken adapter does not keep the others from working.
        """
        problems, wanted = {}, {info.name: info for info in found}
        for name, info in list(self.adapters.items()):
            if wanted.get(name) != info:
                self.unload(name)
        for name, info in wanted.items():
            if name not in self.adapters:
                try:
                    self.load(info)
                except WorkbookError as problem:
                    problems[name] = str(problem)
        return problems

    def adapter_bytes(self, name: str) -> int:
        """Memory that a loaded adapter's numbers take, in bytes (float32)."""
        return 4 * self._known(name).parameters

    def key(self, name: str | None) -> str:
        """What PEFT calls this adapter (``__base__``: no adapter), for its own methods and ``adapter_names``."""
        return "__base__" if name is None else (self._known(name) and self._keys[name])

    def _known(self, name: str) -> AdapterInfo:
        if name not in self.adapters:
            raise WorkbookError(f"No adapter {name!r} is loaded: there are {', '.join(self.adapters) or 'none'}.")
        return self.adapters[name]

    # -- the swap

    def _flip(self, name: str | None) -> None:
        # PEFT's own set_adapter gives each layer a value of its own: share again if somebody called it.
        if self._layers and (self._layers[0]._active_adapter is not self._pointer
                             or self._layers[-1]._active_adapter is not self._pointer):
            self._share_pointer()
        self._pointer[:] = () if name is None else (self._keys[name],)

    def swap(self, name: str | None) -> float:
        """Make an adapter (None: the base model alone) the active one. Returns the seconds that the flip took.

        Waits for an answer that is being generated. Raises WorkbookError for an adapter that is not loaded.
        """
        with self._lock:
            if name is not None:  # under the lock: a refresh in another thread may just be unloading it
                self._known(name)
            start = time.perf_counter()
            self._flip(name)
            self.active = name
            return time.perf_counter() - start

    @contextmanager
    def using(self, name: str | None):
        """The model with one adapter active, for this block alone: other threads wait, and what was active comes back."""
        with self._lock:
            before = self.active
            self.swap(name)
            try:
                yield self.model
            finally:
                self.swap(before if before in self.adapters else None)

    @contextmanager
    def mixed(self, names: list[str | None], copies: int = 1):
        """The model for a batch whose row i uses adapter ``names[i]`` (None: the base model), each row `copies` times.

        A layer computes ``base(x) + ((x @ A.T) * mask) @ B.T`` with the A and B of all adapters side by side, and a mask
        that leaves each row its own columns: four operations a layer, where PEFT's adapter_names takes eight an adapter.
        The numbers differ from PEFT's by rounding alone.
        """
        import torch

        with self._lock:
            for name in names:
                self.key(name)
            loaded = tuple(dict.fromkeys(name for name in names if name is not None))
            if loaded not in self._joined:
                self._joined[loaded] = [self._join(layer, loaded) for layer in self._layers]
            rows = [name for name in names for _ in range(copies)]
            masks: dict[tuple, torch.Tensor] = {}
            head = self.model.get_output_embeddings()
            try:
                for layer, (owners, a, b) in zip(self._layers, self._joined[loaded], strict=True):
                    if owners not in masks:
                        masks[owners] = torch.tensor([[[float(owner == name) for owner in owners]] for name in rows],
                                                     device=self.model.device)
                    layer.forward = _mixed_forward(layer.base_layer, a, b, masks[owners])
                if (faster := _few_rows(head)) is not head:
                    head.forward = faster
                yield self.model
            finally:
                for layer in (*self._layers, head):
                    layer.__dict__.pop("forward", None)

    def _join(self, layer, names: tuple[str, ...]):
        """One layer's adapters side by side: whose each column is, A [sum of ranks, in], scaled and transposed B."""
        import torch

        here = [(name, self._keys[name]) for name in names if self._keys[name] in layer.lora_A]
        if not here:
            return (), None, None
        a = torch.cat([layer.lora_A[key].weight for _, key in here])
        b = torch.cat([layer.lora_B[key].weight.T * layer.scaling[key] for _, key in here])
        return tuple(name for name, key in here for _ in range(layer.r[key])), a, b

    # -- answers

    def generate(self, prompt: str, adapter: str | None = None, settings: Settings | None = None,
                 on_text: Callable[[str], None] | None = None, stop: threading.Event | None = None) -> Answer:
        """One answer. on_text is called with the text so far after each token (with beams, only the end is shown).

        `stop` ends it at the next token. The adapter stays active. Raises WorkbookError for settings out of range or a
        prompt that is empty or too long, and whatever `on_text` or the model raises.
        """
        with self._lock:
            swapped = self.swap(adapter)
            tell = (lambda texts: on_text(texts[0])) if on_text else None
            return self._run([prompt], [adapter], settings or Settings(), tell, stop or threading.Event(), swapped)[0]

    def generate_mixed(self, prompts: list[str], adapters: list[str | None], settings: Settings | None = None,
                       on_text: Callable[[list[str]], None] | None = None, stop: threading.Event | None = None) -> list[Answer]:
        """Answers to several prompts in one batch, each row with its own adapter (None: the base model)."""
        settings = settings or Settings()
        one = len(set(adapters)) == 1
        with self.using(adapters[0]) if one else self.mixed(adapters, settings.beams):
            return self._run(prompts, adapters, settings, on_text, stop or threading.Event(), 0.0)

    def _run(self, prompts, names, settings: Settings, on_text, stop, swapped) -> list[Answer]:
        import torch
        from transformers import StoppingCriteriaList

        settings.check()
        if not prompts or not all(prompts):
            raise WorkbookError("The prompt is empty: write one or choose a sample.")
        if re.search("[\ud800-\udfff]", "".join(prompts)):
            raise WorkbookError("The prompt holds half a surrogate pair, which is no text for a tokenizer: remove it.")
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        batch = batch.to(self.model.device)
        width = batch["input_ids"].shape[1]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit and width + settings.max_new_tokens > limit:
            raise WorkbookError(f"The prompt has {width:,} tokens and up to {settings.max_new_tokens:,} new ones are wanted, "
                                f"together more than the {limit:,} that this base model reads: shorten one of them.")
        tell = None if settings.beams > 1 else on_text
        watch = _watch(self.tokenizer, width, stop, "" if settings.beams > 1 else settings.stop, tell)
        end = self.tokenizer.eos_token_id
        options = {**settings.options(), "pad_token_id": self.tokenizer.pad_token_id, "eos_token_id": end}
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices):
            torch.manual_seed(settings.seed)
            start = time.perf_counter()
            output = self.model.generate(**batch, stopping_criteria=StoppingCriteriaList([watch]), **options)
            seconds = time.perf_counter() - start
        answers = []
        for name, prompt, row in zip(names, prompts, output[:, width:].tolist(), strict=True):
            tokens = row.index(end) if end in row else len(row)
            text = self.tokenizer.decode(row[:tokens], skip_special_tokens=True)
            answers.append(Answer(name, prompt, text, tokens, swapped, (watch.first or start) - start, seconds, watch.stopped))
        if on_text:
            on_text([answer.text for answer in answers])
        return answers
