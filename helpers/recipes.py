"""Recipes: everything that decides a fine-tuning run, and three presets of it. No heavy imports."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from helpers import KINDS, WorkbookError, check_numbers, closest
from helpers.data import source_file
from helpers.registry import EMBEDDED, resolve
from helpers.tasks import get_task
from helpers.workers import read_place

# What a preset changes of FineTuneConfig's defaults. `reference` is the recipe of the demo that
# this workbook grew from: every token is scored, documents are packed end to end, and the last
# step's adapter is kept.
PRESETS: dict[str, dict] = {
    "default": {},
    "full_data": dict(precision="full", rank=8, alpha=16, epochs=4.0, max_rows=-1, batch_size=32,
                      max_length=1024, packing="documents"),
    "reference": dict(dropout=0.05, learning_rate=2e-4, schedule="constant", max_rows=-1,
                      batch_size=1, gradient_accumulation=4, max_length=1024, packing="wrapped",
                      optimizer="paged_adamw_32bit", completion_only=False, validation_rows=0),
}
REFERENCE_TASKS = {"instruct": dict(data_fraction=0.3), "sql": dict(epochs=2.0),
                   "detox": dict(epochs=4.0)}
BOUNDS = (("rank", 1, 1024), ("alpha", 1, 4096), ("dropout", 0.0, 0.9),
          ("learning_rate", 1e-8, 1.0), ("epochs", 1e-6, 10_000), ("data_fraction", 1e-9, 1.0),
          ("batch_size", 1, 65_536), ("gradient_accumulation", 1, 65_536),
          ("max_length", 8, 131_072), ("checkpoint_steps", 1, 10**9), ("seed", 0, 2**32 - 1),
          ("validation_rows", 0, 10**6), ("max_steps", 1, 10**9), ("patience", 1, 10**9))
CHOICES = {"preset": tuple(PRESETS), "precision": ("4bit", "full"),
           "schedule": ("cosine", "constant", "linear"),
           "optimizer": ("adamw_torch", "paged_adamw_32bit"),
           "packing": ("none", "documents", "wrapped")}
MAY_BE_NONE = ("target_modules", "max_steps", "patience")


@dataclass(frozen=True)
class FineTuneConfig:
    """A run's whole recipe, checked when it is made. The defaults are those of preset "default";
    `from_parameters` fills in another one.

    precision: of the base weights, "4bit" (NF4, QLoRA) or "full".
    rank, alpha: the update of a layer is alpha / rank * B @ A (LoRA, arXiv:2106.09685, section
    4.1). target_modules: comma-separated names of linear layers; None: all of the transformer
    blocks. max_rows: training rows at most, -1: all. data_fraction: share of the split's rows.
    max_steps: optimizer steps; None: as many as the epochs need.
    batch_size: rows per worker and forward pass. max_length: in tokens.
    packing: "none" pads rows of like length; "documents" puts several into one row of max_length
    tokens, where each sees only itself; "wrapped" cuts one long stream into rows.
    completion_only: score the completion's tokens alone.
    validation_rows: rows on which the loss is measured before the first step, every
    checkpoint_steps and at the end; the checkpoint with the lowest is kept. 0: none, the last step
    is kept. patience: training ends after so many measurements without a lower one; None: never.
    compile: torch.compile; for packed rows on a GPU a step is also recorded as a CUDA graph.
    shard: each worker keeps a part of the frozen weights, for a base model that is too large for
    one GPU (FSDP); every worker loads the whole model into main memory first.

    Raises WorkbookError that names the first value which cannot work; nothing is loaded or created.
    """

    task: str
    base_model: str = EMBEDDED
    data: str = "practice"
    preset: str = "default"
    precision: str = "4bit"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str = None
    learning_rate: float = 2e-3
    schedule: str = "cosine"
    epochs: float = 1.0
    max_steps: int = None
    max_rows: int = 640
    data_fraction: float = 1.0
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_length: int = 512
    packing: str = "none"
    optimizer: str = "adamw_torch"
    completion_only: bool = True
    validation_rows: int = 32
    patience: int = None
    gradient_checkpointing: bool = False
    compile: bool = False
    shard: bool = False
    checkpoint_steps: int = 20
    seed: int = 0

    @classmethod
    def from_parameters(cls, **parameters) -> FineTuneConfig:
        """The config in which parameters that are None or absent are as the preset says."""
        fields = [field.name for field in dataclasses.fields(cls)]
        for name in parameters:
            if name not in fields:
                raise WorkbookError(f"parameter {name!r} is unknown to fine-tuning; "
                                    f"{closest(name, fields)}")
        task = get_task(parameters.get("task", ""))
        preset = parameters.get("preset") or "default"
        of_task = REFERENCE_TASKS.get(task.name, {}) if preset == "reference" else {}
        given = {name: value for name, value in parameters.items() if value is not None}
        return cls(**{**PRESETS.get(str(preset), {}), **of_task, **given, "preset": preset})

    def __post_init__(self):
        self._check_types()
        get_task(self.task)
        resolve(self.base_model)
        check_numbers(self, [one for one in BOUNDS if getattr(self, one[0]) is not None])
        if self.max_rows < 1 and self.max_rows != -1:
            raise WorkbookError(f"max_rows is {self.max_rows}: it must be at least 1, or -1 for "
                                "all rows.")
        if self.patience and not self.validation_rows:
            raise WorkbookError(f"patience is {self.patience}, but validation_rows is 0, so there "
                                "is no loss to wait for: raise validation_rows or leave patience "
                                "out.")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise WorkbookError(f"{name} is {getattr(self, name)!r}: use "
                                    f"{' or '.join(allowed)}.")
        source_file(self.task, self.data)

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value, (kind, words) = getattr(self, field.name), KINDS[field.type]
            if value is None and field.name in MAY_BE_NONE:
                continue
            is_kind = isinstance(value, (int, float) if kind is float else kind)
            if not is_kind or isinstance(value, bool) != (kind is bool):
                raise WorkbookError(f"{field.name} is {value!r}: it must be {words}.")


def check_parameters(parameters: dict) -> dict:
    """What the job checks before a kernel starts: notebook 04's parameters make a valid config,
    which is returned."""
    names = {field.name for field in dataclasses.fields(FineTuneConfig)}
    config = FineTuneConfig.from_parameters(
        **{name: value for name, value in parameters.items() if name in names})
    read_place(parameters.get("workers_on") or "")
    if not parameters.get("workers_on"):
        check_shard(config, parameters.get("workers", 1))
    if parameters.get("eval_rows", 1) < 1:
        raise WorkbookError(f"eval_rows is {parameters['eval_rows']}: it must be at least 1.")
    if parameters.get("adapter_dir") and not parameters.get("resume"):
        check_free(Path(parameters["adapter_dir"]))
    return dataclasses.asdict(config)


def check_shard(config: FineTuneConfig, workers: int) -> None:
    """Raise WorkbookError when there is nobody to share the weights with."""
    if config.shard and workers == 1:
        raise WorkbookError("shard is True, and there is one worker: ask for two or more, each "
                            "with a GPU (-p workers=2), or leave shard out.")


def check_free(folder: Path) -> None:
    """Raise WorkbookError when `folder` holds something (an adapter is never overwritten) or cannot
    be a folder."""
    try:
        reason = "already exists and is not empty" if os.listdir(folder) else None
    except FileNotFoundError:
        return
    except OSError as error:  # it is a file, may not be read, or its name is too long
        reason = f"cannot be used ({error.strerror})"
    if reason:
        raise WorkbookError(f"The output folder {folder} {reason}: choose another adapter_dir or "
                            "remove it.")
