"""What an adapter's config says of its base model's layers: which, of what rank, what it replaces.

PEFT's own rules decide, on the names and shapes of the base model alone. No pattern is run that
could take for ever.
"""

import math
import re
import time
from functools import lru_cache

import regex
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from helpers import base_models
from helpers.registry import EMBEDDED

MAX_RANK = 1024
LAYERS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
DORA, LORA_BIAS = "DoRA", "biases in LoRA"  # two of what `extras` says
PREFIX = "base_model.model."  # of every tensor's name


class Fault(Exception):
    """What is wrong with an adapter and what to do: a sentence without its subject."""


def need(condition, otherwise: str) -> None:
    if not condition:
        raise Fault(otherwise)


@lru_cache(maxsize=8)
def skeleton(base_name: str):
    """A base model without numbers: its names and shapes."""
    folder = base_models.fetch(base_name, quiet=True)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


@lru_cache(maxsize=8)
def layer_shapes(base_name: str = EMBEDDED) -> dict[str, tuple[int, int]]:
    """The linear layers of a base model's blocks, ``{full name: (out, in)}``. Do not change it."""
    model = skeleton(base_name)
    head = model.get_output_embeddings()
    shapes = {name: tuple(module.weight.shape) for name, module in model.named_modules()
              if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head}
    return {name: shape[::-1] if isinstance(model.get_submodule(name), Conv1D) else shape
            for name, shape in shapes.items()}


def scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    """alpha / rank (LoRA, arXiv:2106.09685, 4.1) or alpha / sqrt(rank) (arXiv:2312.03732)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def check_rank(rank, of: str = "") -> None:
    need(type(rank) is int and 1 <= rank <= MAX_RANK, f"says that its rank r{of} is {rank!r:.80}: "
         f"it must be a whole number from 1 to {MAX_RANK}")


def check_alpha(alpha, of: str = "") -> None:
    need(type(alpha) in (int, float) and 0 < alpha <= 1e6, f"says that lora_alpha{of} is "
         f"{alpha!r:.80}: it must be a number above 0, at most a million")


def target_modules(config: dict, base_name: str) -> dict[str, tuple[int, int]]:
    """The base model's layers that a config names, as PEFT matches them, with their shapes."""
    layers, named = layer_shapes(base_name), config.get("target_modules")
    texts = isinstance(named, list) and named and all(isinstance(name, str) for name in named)
    need(texts or (named and isinstance(named, str)), f"has target_modules {named!r:.80}: it must "
         "be a list of names, a pattern or all-linear")
    known = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers))
    for name in named if texts else ():
        need(any(f".{layer}".endswith(f".{name}") for layer in layers),
             f"targets the module {name!r:.80}, which {base_name} lacks: it has {known}")
    asked = {key: config.get(key) for key in LAYERS}
    for key in ("target_modules", "exclude_modules"):
        if isinstance(asked[key], str):
            every = key == "target_modules" and asked[key] == "all-linear"
            asked[key] = list(layers if every else _fitting({asked[key]: 1}, layers, key))
    patterns = asked["layers_pattern"] or []
    for name in [patterns] if isinstance(patterns, str) else patterns:
        need(re.fullmatch(r"\w+", str(name)), f"has layers_pattern {name!r:.80}: give a plain name")
    try:
        asked = LoraConfig(**asked)
        found = {layer: shape for layer, shape in layers.items()
                 if not saved_whole(config, layer) and check_target_module_exists(asked, layer)}
    except (ValueError, TypeError) as bad:
        raise Fault(f"names its layers in a way that PEFT refuses ({bad!s:.80})") from bad
    need(found, f"has target_modules {named!r:.80}, which fit no layer of {base_name}: it has "
         f"{known}")
    return found


def _fitting(patterns: dict[str, object], names, key: str, form: str = "%s") -> dict[str, object]:
    """``{name: what the first pattern that fits it stands for}``, in at most two seconds: a pattern
    of someone else can be made to take for ever."""
    found, end = {}, time.monotonic() + 2
    for pattern, value in patterns.items():
        try:
            matcher = regex.compile(form % pattern)
            for name in names:
                if matcher.fullmatch(name, timeout=max(end - time.monotonic(), 1e-3)):
                    found.setdefault(name, value)
        except (regex.error, TimeoutError, OverflowError, RecursionError) as bad:
            raise Fault(f"has a {key} with a pattern that is broken or takes too long "
                        f"({pattern!r:.80}): list the layers' names instead") from bad
    return found


def per_layer(config: dict, key: str, usual, modules, check) -> dict:
    """What rank_pattern or alpha_pattern says: ``{full name: number}`` where it is not `usual`."""
    patterns = config.get(key) or {}
    need(isinstance(patterns, dict), f"has a {key} that is no map of names to numbers: mend it")
    for pattern, number in patterns.items():
        check(number, f" of {pattern!r:.80}")
    found = _fitting(patterns, modules, key, r"(.*\.)?(%s)")
    return {module: number for module, number in found.items() if number != usual}


def layer_tensors(config: dict, modules: dict, ranks: dict) -> dict[str, list[int]]:
    """The shapes of the tensors that the layers must have."""
    shapes = {}
    for module, (out, into) in modules.items():
        rank, name = ranks.get(module, config["r"]), PREFIX + module
        shapes |= {f"{name}.lora_A.weight": [rank, into], f"{name}.lora_B.weight": [out, rank]}
        if config.get("use_dora"):
            shapes[f"{name}.lora_magnitude_vector"] = [out]
        if config.get("lora_bias"):
            shapes[f"{name}.lora_B.bias"] = [out]
    return shapes


def saved_whole(config: dict, name: str) -> bool:
    """Whether modules_to_save names a module or one around it; PEFT compares endings."""
    saved, parts = config.get("modules_to_save") or (), name.split(".")
    need(isinstance(saved, list | tuple) and all(isinstance(one, str) and one for one in saved),
         f"has modules_to_save {saved!r:.80}: it must be a list of names")
    around = (".".join(parts[:count + 1]) for count in range(len(parts) if saved else 0))
    return any(path.endswith(tuple(saved)) for path in around)


def whole_tensors(config: dict, header: dict, modules: dict, base_name: str) -> dict[str, list]:
    """The shapes of tensors that replace a parameter of the base model: of modules_to_save, biases,
    and token embeddings, which PEFT saves when tokens were added. header: see `read_header`."""
    model, bias = skeleton(base_name), config.get("bias")
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module, _, last = name.rpartition(".")
        saved = saved_whole(config, module)
        if not saved and PREFIX + name not in header:
            continue
        fits = model.get_submodule(module) in tables or last == "bias" and (
            bias == "all" or (bias == "lora_only" and module in modules))
        if saved or fits:
            shape = found[PREFIX + name] = list(parameter.shape)
            stored = header.get(PREFIX + name, {}).get("shape")
            more = fits and isinstance(stored, list) and stored[1:] == shape[1:] and stored > shape
            need(not more, f"holds {stored and stored[0]} token vectors in {name}, and this base "
                 f"model has {shape[0]}: tokens were added, which are not run here; merge it where "
                 "it was made, with its tokenizer, and use the merged model as base_model")
    name, rows = token_rows(config, base_name)
    if rows:
        found[_delta(name)] = [len(rows), tables[0].weight.shape[1]]
    return found


def _delta(name: str) -> str:
    """The tensor of trained rows of a parameter."""
    return f"{PREFIX}{name.removesuffix('weight')}token_adapter.trainable_tokens_delta"


def token_rows(config: dict, base_name: str) -> tuple[str, list[int]]:
    """The parameter with the token vectors, and which rows of it trainable_token_indices trained
    (none where there is no such setting)."""
    model, given = skeleton(base_name), config.get("trainable_token_indices") or []
    table = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is table)
    one = not isinstance(given, dict) or (len(given) == 1 and name.endswith(tuple(given)))
    rows = [*given.values()][0] if isinstance(given, dict) and one else given
    need(one and isinstance(rows, list) and len({*map(str, rows)}) == len(rows)
         and all(type(row) is int and 0 <= row < len(table.weight) for row in rows),
         f"has trainable_token_indices {given!r:.80}, which must be different tokens of {name}: "
         "merge it where it was made")
    return f"{name}.weight", rows


def places(config: dict, whole: dict, base_name: str) -> dict[str, str]:
    """``{base parameter: whole tensor}``: its own parameter, and where PEFT makes no copy of the
    module (modules_to_save), those that are tied to it."""
    named = dict(skeleton(base_name).named_parameters(remove_duplicate=False))
    table, found = token_rows(config, base_name)[0], {}
    for tensor in whole:
        own = table if tensor == _delta(table) else tensor.removeprefix(PREFIX)
        alone = saved_whole(config, own.rpartition(".")[0])
        found |= {name: tensor for name, parameter in named.items()
                  if name == own or (parameter is named[own] and not alone)}
    return found


def extras(config: dict, whole: dict) -> tuple[str, ...]:
    """What an adapter is beside plain LoRA, in words."""
    kinds = {DORA: config.get("use_dora"), LORA_BIAS: config.get("lora_bias")}
    whole = [name.replace(".token_adapter.", ".") for name in whole]
    for *_, module, last in (name.split(".") for name in whole):
        kinds["biases" if last == "bias" else f"its own {module}"] = True
    return tuple(kind for kind, there in kinds.items() if there)
