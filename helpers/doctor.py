"""The adapter doctor: what a folder from elsewhere is, whether it runs here, what it can become.

Read are its JSON and its safetensors, within bounds; nothing in it is run, and no pickle is opened.
"""

import math
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

from safetensors.torch import save_file

from helpers import METRICS, WorkbookError, write_json
from helpers.adapter_files import (CONFIG, MAX_HEADER_BYTES, WEIGHTS, AdapterInfo, parse_tensors,
                                   read_adapter, read_bytes, read_header, read_object,
                                   read_tensors, sentences)
from helpers.adapter_layers import PREFIX, layer_shapes, need, scaling, skeleton
from helpers.publishing import new_folder
from helpers.registry import EMBEDDED, REGISTRY, resolve

MLX = "adapters.safetensors"
MAKERS = ("Unsloth", "axolotl", "LLaMA-Factory", "TRL")  # who else writes PEFT's form
NEVER_OPENED = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".py", ".so")
# Parts of a tensor's name that a wrapper, or the adapter's own name, left in it.
WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_orig_mod|modules_to_save\.\w+)\.|^module\.")
NAMED = re.compile(r"(\.lora_[AB])\.\w+(\.(?:weight|bias))$|(vector)\.(?!weight$)\w+(?:\.weight)?$")
MERGE = "only a merge is exact: `python -m helpers.jobs export {} --to merged`."


def diagnose(folder: Path | str, base: str | None = None) -> list[str]:
    """What an adapter is and whether it runs on a base model, as sentences; the last one decides.

    base: a base model's name or folder (None: the adapter's own if it is here, else the embedded
    one). Raises WorkbookError for a folder that holds no adapter's JSON and safetensors.
    """
    folder = Path(folder)
    with sentences(folder):
        config = read_object(folder, CONFIG)
        header = read_header(folder, _weights(folder))
        said = [*_facts(folder, config, header), *_oddities(folder, config)]
    on = base or base_of(config)
    try:
        return [*said, f"It fits {on}.", _verdict(folder, read_adapter(folder, on))]
    except WorkbookError as error:
        problem = str(error).replace(f"The adapter in {folder}", "It")
    try:
        with tempfile.TemporaryDirectory() as place:
            info, _ = _stage(folder, Path(place) / "adapter", on, base)
        kind = ", ".join(info.extras) or "plain LoRA"
        return [*said, f"It does not run as it is: {problem}",
                f"It can be converted exactly to {kind} in PEFT's form on {on}: add --convert OUT."]
    except WorkbookError as error:
        problem = str(error).replace(f"The adapter in {folder}", "It")
    hint = [f"If {on} has the weights that it was trained on, say so with --base {on}."]
    return [*said, *(hint if not base and "belongs to" in problem else []),
            f"It is refused on {on}: {problem}"]


def convert(folder: Path | str, out: Path | str, base: str | None = None) -> Path:
    """Write an adapter as plain LoRA in PEFT's form, where that is exact; returns the new folder.

    rsLoRA becomes an alpha, patterns become a rank and an alpha per layer, MLX's names and those of
    wrappers PEFT's. What MLX saved as DoRA becomes PEFT's DoRA. base: as in `diagnose`; if given,
    it is also the base model that the new folder names. Raises WorkbookError as `read_adapter`,
    where plain LoRA would not be exact, for an `out` that holds something, and a full disk.
    """
    folder, out = Path(folder), Path(out).expanduser().absolute()
    with sentences(folder):
        on = base or base_of(read_object(folder, CONFIG))
    with new_folder(out, "the adapter") as staging:
        info, tensors = _stage(folder, staging, on, base)
        if not info.extras:
            _write(staging, _plain(info, on), tensors)
            read_adapter(staging, on)  # as whoever loads it will
        elif not (folder / MLX).exists():
            raise WorkbookError(f"The adapter in {folder} cannot become plain LoRA, as it is "
                                f"{', '.join(info.extras)}; {MERGE.format(folder)}")
    return out


def base_of(config: dict) -> str:
    """The base model that an adapter names, if it is on this machine, else the embedded one."""
    named = str(_named(config))
    here = named and named not in REGISTRY and os.path.isfile(os.path.join(named, "config.json"))
    return named if here else EMBEDDED


def _named(config: dict):
    return config.get("base_model_name_or_path") or config.get("model") or ""


def _weights(folder: Path) -> str:
    return MLX if (folder / MLX).exists() and not (folder / WEIGHTS).exists() else WEIGHTS


# --- what it is

def _facts(folder: Path, config: dict, header: dict) -> list[str]:
    """Sentences on maker, base model, numbers, layers and extras: what config and header say."""
    settings = _from_mlx(config, header) if _weights(folder) == MLX else config
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    try:
        root = bool(settings.get("use_rslora"))
        times = f"{scaling(alpha, rank, root):g} (alpha / {'sqrt(r)' if root else 'r'})"
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        times = "unknown"
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if settings.get(key)]
    own = f", other ones for some layers ({', '.join(patterns)})" if patterns else ""
    layers = [found[1] for name in header if (found := re.search(r"(\w+)\.lora_[Aa]\b", name))]
    modules = ", ".join(dict.fromkeys(layers)) or "none"
    numbers = sum(math.prod(entry["shape"]) for entry in header.values())
    kinds = {"DoRA": "use_dora", "biases in LoRA": "lora_bias",
             "new token vectors": "trainable_token_indices"}
    others = dict.fromkeys(name.split(".")[-2:][0] for name in header if ".lora_" not in name
                           and not (name.endswith(".m") and settings.get("use_dora")))
    extras = [kind for kind, key in kinds.items() if settings.get(key)]
    extras += [f"its own {name!r:.40}" for name in others]
    base = f"for the base model {_named(config)!r:.80}" if _named(config) else "and names no base"
    return [f"{folder.name!r:.80} was made by {_maker(folder, config)} {base}.",
            f"It is {settings.get('peft_type')!r:.20} of rank {rank!r:.20}, alpha {alpha!r:.20}, "
            f"scaling {times}{own}, on {len(layers)} layers ({modules:.200}), {numbers:,} "
            "numbers.",
            f"Beside plain LoRA it holds: {', '.join(extras):.200}." if extras else
            "It holds nothing beside LoRA's matrices."]


def _maker(folder: Path, config: dict) -> str:
    if _weights(folder) == MLX:
        return "MLX"
    if (folder / METRICS).exists() and "weights_sha256" in read_object(folder, METRICS):
        return "the LoRA Workbook"
    card = ""
    if (folder / "README.md").exists():
        card = read_bytes(folder, "README.md", 100_000, whole=False).decode(errors="replace")
    signs = f"{card} {config.get('auto_mapping')} {_named(config)}".lower()
    other = [maker for maker in MAKERS if re.search(rf"\b{maker.lower()}(\b|_)", signs)]
    version = config.get("peft_version")
    return f"{f'{other[0]} with ' if other else ''}PEFT " + (
        f"{version!r:.20}" if version else "of an old version, as none is noted")


def _oddities(folder: Path, config: dict) -> list[str]:
    """Sentences on what is missing or strange."""
    odd = []
    if not config.get("revision"):
        odd.append("It notes no revision of its base model: only names and shapes are compared.")
    files = sorted(path.name for path in folder.iterdir() if path.suffix in NEVER_OPENED)
    odd += [f"It also holds {', '.join(files)!r:.200}, never opened here."] if files else []
    if config.get("auto_map"):
        odd.append("It asks for code of its own (auto_map), which is never run here.")
    return odd


def _verdict(folder: Path, info: AdapterInfo) -> str:
    if info.extras:
        return (f"It runs here, slower than plain LoRA ({', '.join(info.extras)}) and in no mixed "
                f"batch; as plain LoRA {MERGE.format(folder)}")
    plain = " and --convert OUT writes it without them" if info.ranks or info.alphas else ""
    plain = " Other tools may not know its settings" + plain + "." if plain else ""
    return f"It runs here as plain LoRA, with the fast swap and in mixed batches.{plain}"


# --- what it can become

def _stage(folder: Path, staging: Path, on: str, base: str | None) -> tuple[AdapterInfo, dict]:
    """Write an adapter in PEFT's form into a new folder, and read that as any adapter is read."""
    with sentences(folder):
        config, weights = read_object(folder, CONFIG), _weights(folder)
        header = read_header(folder, weights)
        largest = 4 * sum(parameter.numel() for parameter in skeleton(on).parameters())
        tensors = parse_tensors(read_bytes(folder, weights, largest + MAX_HEADER_BYTES), weights)
        if weights == MLX:
            config = _from_mlx(config, header)
            matrices = ("lora_a", "lora_b")  # MLX: x @ a @ b; PEFT: x @ A.T @ B.T
            tensors = {name: tensor.T.contiguous() if name.endswith(matrices) else tensor
                       for name, tensor in tensors.items()}
        renamed = {_as_peft(name): tensor for name, tensor in tensors.items()}
        need(len(renamed) == len(tensors), "has a tensor twice, under two names: copy it again")
    if base:  # whoever names it knows that its weights are those
        config["base_model_name_or_path"] = resolve(base).hub_id or str(resolve(base).folder)
    _write(staging, config, renamed)
    try:
        return read_tensors(staging, on)
    except WorkbookError as error:
        raise WorkbookError(str(error).replace(str(staging), str(folder))) from error


def _as_peft(name: str) -> str:
    """A tensor's name as PEFT saves it, from MLX's or with what wrappers and versions added."""
    name = NAMED.sub(lambda found: "".join(filter(None, found.groups())), WRAPPERS.sub("", name))
    name = re.sub(r"\.lora_([ab])$", lambda found: f".lora_{found[1].upper()}.weight", name)
    name = re.sub(r"\.m$", ".lora_magnitude_vector", name)
    return PREFIX + re.sub(rf"^({re.escape(PREFIX)})*", "", name)


def _from_mlx(config: dict, header: dict) -> dict:
    """PEFT's config of an adapter of MLX. Its update is scale * (x @ a) @ b: alpha = scale * r."""
    kind, given = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    need(kind in ("lora", "dora"), f"is a fine-tune of the kind {kind!r:.40}: MLX's lora and dora "
         "are read; fuse it with mlx_lm.fuse instead")
    ranks = {name.removesuffix(".lora_a"): entry["shape"][-1] for name, entry in header.items()
             if name.endswith(".lora_a") and entry["shape"]}
    scale = given.get("scale", 1.0) if isinstance(given, dict) else None
    need(ranks and type(scale) in (int, float), "has no lora_a, or no scale in its "
         f"lora_parameters ({given!r:.80}): copy the whole folder again")
    if "alpha" in given:  # older: the scale is multiplied by alpha / r
        need(type(given["alpha"]) in (int, float) and ranks and given.get("rank"),
             "has an alpha without a rank in its lora_parameters: copy the whole folder again")
        scale *= given["alpha"] / given["rank"]
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "use_dora": kind == "dora",
            "base_model_name_or_path": config.get("model"),
            **_numbers(ranks, dict.fromkeys(ranks, scale)), "target_modules": list(ranks)}


def _numbers(ranks: dict[str, int], scalings: dict[str, float]) -> dict:
    """The settings that give each layer its rank and its scaling as alpha / r."""
    alphas = {module: scalings[module] * rank for module, rank in ranks.items()}
    (rank, _), (alpha, _) = (Counter(numbers.values()).most_common(1)[0]
                             for numbers in (ranks, alphas))
    return {"r": rank, "lora_alpha": alpha,
            "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
            "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha}}


def _plain(info: AdapterInfo, on: str) -> dict:
    """The config of a checked adapter as plain LoRA: scaling alpha / r, layers named."""
    ends = tuple(f".{name}" for name in info.target_modules)
    short = all(name in info.modules for name in layer_shapes(on) if f".{name}".endswith(ends))
    numbers = _numbers({name: info.ranks.get(name, info.rank) for name in info.modules},
                       {name: info.scaling_of(name) for name in info.modules})
    base = read_object(info.folder, CONFIG)
    kept = {key: base[key] for key in ("base_model_name_or_path", "revision") if base.get(key)}
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True,
            "target_modules": list(info.target_modules if short else info.modules),
            **numbers, **kept}


def _write(folder: Path, config: dict, tensors: dict) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    write_json(folder / CONFIG, config)
