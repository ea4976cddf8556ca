"""The base models that the workbook knows by name, and where models and adapters are kept."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT, WorkbookError, closest

EMBEDDED = "smollm2-135m-instruct"  # works without a model hub; de-quantized from Q4_1
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True)
class BaseModel:
    """A base model. hub_id: its name on the model hub, which adapters record. revision: the commit
    (None: the newest). folder: a local folder, in the hub's form, instead of the hub."""

    name: str
    hub_id: str | None = None
    revision: str | None = None
    folder: Path | None = None
    licence: str = "see the model's own card"


ON_HUB = {  # hub id: licence
    "bigscience/bloom-1b1": "BigScience BLOOM RAIL 1.0",  # the base model of the reference recipe
    "HuggingFaceTB/SmolLM2-135M-Instruct": "Apache-2.0",  # the embedded model's bf16 weights
    "HuggingFaceTB/SmolLM2-360M-Instruct": "Apache-2.0",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": "Apache-2.0",  # wants a GPU
}
REGISTRY = {EMBEDDED: BaseModel(EMBEDDED, "HuggingFaceTB/SmolLM2-135M-Instruct",
                                f"gguf-sha256-{GGUF_SHA256[:12]}", licence="Apache-2.0")}
REGISTRY |= {name: BaseModel(name, name, licence=licence) for name, licence in ON_HUB.items()}


def resolve(name: str) -> BaseModel:
    """The base model of a registry name, local folder, or hub id with an optional ``@revision``.
    Raises WorkbookError for any other name."""
    name = str(name).strip()
    if name in REGISTRY:
        return REGISTRY[name]
    folder = os.path.expanduser(name)  # os.path, as Path's own methods raise for some names
    if os.path.isdir(folder):
        folder = Path(folder).resolve()
        if not (folder / "config.json").is_file():
            raise WorkbookError(f"base_model folder {name} has no config.json: give a folder with "
                                "config.json, tokenizer files and *.safetensors.")
        return BaseModel(folder.name, folder=folder)
    if match := re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", name):
        licence = ON_HUB.get(match[1], BaseModel.licence)
        return BaseModel(name, match[1], match[2], licence=licence)
    raise WorkbookError(f"base_model {name!r} is unknown: give a hub id such as org/name@revision, "
                        f"an existing folder, or a registered name; {closest(name, REGISTRY)}")


def cache_dir() -> Path:
    """Where converted base models are: ``$WORKBOOK_CACHE`` or ``~/.cache/lora-workbook``."""
    return Path(os.environ.get("WORKBOOK_CACHE") or "~/.cache/lora-workbook").expanduser()


def custom_adapters_dir() -> Path:
    """The reader's own adapters: ``$CUSTOM_LORA_ADAPTERS_DIR`` or adapters/custom."""
    folder = os.environ.get("CUSTOM_LORA_ADAPTERS_DIR") or ROOT / "adapters" / "custom"
    return Path(folder).expanduser()
