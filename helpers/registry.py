"""The base models that the workbook knows by name, and where models and adapters are kept."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT, WorkbookError, closest

EMBEDDED = "smollm2-135m-instruct"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True)
class BaseModel:
    """A base model that the workbook can load.

    hub_id: its name on the model hub, which adapters record. revision: the commit that is asked for
    (None: the newest). folder: a local folder, in the hub's form, instead of the hub.
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None
    folder: Path | None = None
    licence: str = "see the model's own card"
    note: str = ""


def _on_hub(hub_id: str, licence: str, note: str) -> BaseModel:
    return BaseModel(hub_id, hub_id, licence=licence, note=note)


SMOLLM = "HuggingFaceTB/SmolLM2-"
REGISTRY = {model.name: model for model in (
    BaseModel(EMBEDDED, f"{SMOLLM}135M-Instruct", f"gguf-sha256-{GGUF_SHA256[:12]}", None,
              "Apache-2.0", "embedded: works without a model hub; de-quantized from Q4_1"),
    _on_hub("bigscience/bloom-1b1", "BigScience BLOOM RAIL 1.0",
            "the base model of the reference recipe"),
    _on_hub(f"{SMOLLM}135M-Instruct", "Apache-2.0", "the embedded model's original bf16 weights"),
    _on_hub(f"{SMOLLM}360M-Instruct", "Apache-2.0", "the next size"),
    _on_hub(f"{SMOLLM}1.7B-Instruct", "Apache-2.0", "the largest size; wants a GPU"),
)}


def resolve(name: str) -> BaseModel:
    """Find a base model by registry name, local folder, or hub id with an optional ``@revision``.

    Raises WorkbookError when the name is none of these.
    """
    name = str(name).strip()
    if name in REGISTRY:
        return REGISTRY[name]
    folder = Path(os.path.expanduser(name))  # Path's own method raises for an unknown user
    if os.path.isdir(folder):  # False for a name that is too long, where Path's method raises
        if not (folder / "config.json").is_file():
            raise WorkbookError(f"base_model folder {name} has no config.json: give a folder in "
                                "the model hub's form (config.json, tokenizer files and "
                                "*.safetensors).")
        return BaseModel(folder.resolve().name, folder=folder.resolve(), note="local folder")
    if match := re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", name):
        licence = REGISTRY[match[1]].licence if match[1] in REGISTRY else BaseModel.licence
        return BaseModel(name, match[1], match[2], None, licence, "model hub")
    raise WorkbookError(f"base_model {name!r} is unknown: give a hub id such as org/name@revision, "
                        f"an existing folder, or a registered name; {closest(name, REGISTRY)}")


def cache_dir() -> Path:
    """The folder that keeps converted base models: ``$WORKBOOK_CACHE`` or
    ``~/.cache/lora-workbook``."""
    default = Path.home() / ".cache" / "lora-workbook"
    return Path(os.environ.get("WORKBOOK_CACHE") or default).expanduser()


def custom_adapters_dir() -> Path:
    """The reader's own adapters: ``$CUSTOM_LORA_ADAPTERS_DIR`` or this project's
    adapters/custom."""
    default = ROOT / "adapters" / "custom"
    return Path(os.environ.get("CUSTOM_LORA_ADAPTERS_DIR") or default).expanduser()
