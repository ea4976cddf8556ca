"""An export that is checked before anything heavy is imported; helpers.export makes it."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT, WorkbookError, closest
from helpers.recipes import check_free
from helpers.registry import EMBEDDED, resolve
from helpers.tasks import get_task

WEIGHTS_OF = {  # what each target's weights can be written as, the usual one first
    "merged": ("f16",), "gguf": ("f16", "f32", "q8_0"), "gguf-lora": ("f16", "f32"),
    "modelfile": ("f16", "f32", "q8_0"), "hub-folder": ("bf16",)}
FOR = {  # what each target is for, as cards and the panel say it
    "gguf": "llama.cpp: base model and adapter in one file",
    "gguf-lora": "llama.cpp: the adapter alone, beside a GGUF file of the base model",
    "modelfile": "Ollama", "merged": "vLLM, transformers: one ordinary model folder",
    "hub-folder": "the Hugging Face hub; vLLM beside the base model"}


def offers(folder: str, base_model: str = EMBEDDED, plain: bool = True,
           verified: bool = True) -> list[tuple[str, str]]:
    """For each target that an adapter can have: what it is for, and the command that exports it.
    plain: plain LoRA, as llama.cpp's LoRA file needs; verified: with the metrics of a hub's card.
    """
    impossible = {"gguf-lora": not plain, "hub-folder": not verified}
    base = "" if base_model == EMBEDDED else f" -p base_model={shlex.quote(base_model)}"
    return [(purpose, f"python -m helpers.jobs export {shlex.quote(folder)} --to {to}{base}")
            for to, purpose in FOR.items() if not impossible.get(to)]


@dataclass(frozen=True)
class ExportPlan:
    """What to make of an adapter folder. to: a key of WEIGHTS_OF; quantize: one of its values.
    task: whose prompt the adapter expects (None: as its metrics say). out: the new folder."""

    adapter: Path
    to: str
    quantize: str
    out: Path
    base_model: str = EMBEDDED
    task: str | None = None


def plan_export(adapter: Path | str, to: str | None, quantize: str | None = None,
                out: Path | str | None = None, base_model: str = EMBEDDED,
                task: str | None = None) -> ExportPlan:
    """A checked plan; nothing is read but names. out: None for ``runs/exports/<adapter>-<to>…``.

    Raises WorkbookError for an unknown target, weights that it cannot have, a folder that is no
    adapter's, an output folder that holds something, and an unknown base model or task.
    """
    if to not in WEIGHTS_OF:
        raise WorkbookError(f"--to is {to!r}; {closest(to, WEIGHTS_OF)}")
    possible = WEIGHTS_OF[to]
    if quantize not in (None, *possible):
        raise WorkbookError(f"--quantize is {quantize!r}: --to {to} writes "
                            f"{' or '.join(possible)}.")
    adapter = Path(adapter).expanduser().absolute()
    if not (adapter / "adapter_config.json").is_file():
        raise WorkbookError(f"{adapter} holds no adapter_config.json: give the folder of a trained "
                            "adapter, such as adapters/prebuilt/sql.")
    resolve(base_model)
    if task is not None:
        get_task(task)
    quantize = quantize or possible[0]
    kind = f"-{quantize}" if len(possible) > 1 else ""
    out = Path(out or ROOT / "runs" / "exports" / f"{adapter.name}-{to}{kind}").expanduser()
    check_free(out)
    return ExportPlan(adapter, to, quantize, out.absolute(), base_model, task)
