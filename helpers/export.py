"""Take an adapter home: a folder that other tools read, whole or not at all.

Each folder holds export.json (prompt template, stop text, SHA-256 of what it was made from and of
its files), and a README that says the same to people, with the commands of the tools it is for. Of
those, tests/test_export.py and notebook 10 run llama.cpp alone. Nothing is uploaded.
"""

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel, set_peft_model_state_dict
from transformers import AutoConfig, GenerationConfig
from transformers.utils import logging

from helpers import (METRICS, WorkbookError, __version__, base_models, sha256, write_json,
                     write_text)
from helpers.adapter_files import CONFIG, WEIGHTS, AdapterInfo, read_tensors
from helpers.adapter_layers import LORA_BIAS
from helpers.bank import lora_config
from helpers.export_plan import ExportPlan
from helpers.generation import end_ids
from helpers.gguf_files import check_gguf, write_lora, write_model
from helpers.publishing import model_card, new_folder
from helpers.registry import resolve
from helpers.tasks import Task, get_task

# It names the type of weights that are de-quantized.
logging.get_logger("transformers.integrations.bitsandbytes").setLevel("ERROR")
# A server that asks for a chat is given the last message as it is: the whole prompt belongs there.
RAW_CHAT = "{{ messages[-1]['content'] }}"
SERVERS = {  # target: the commands that a person types inside the folder, and the server's port
    "merged": ("vllm serve . --host 127.0.0.1 --served-model-name {name}", 8000),
    "hub-folder": ("hf upload YOUR_NAME/{name} .\nvllm serve {base} --host 127.0.0.1 --enable-lora "
                   "--max-lora-rank {max_rank} --lora-modules {name}=.", 8000),
    "gguf": ("llama-server -m {file}", 8080),
    "gguf-lora": ("llama-server -m BASE.gguf --lora {file}", 8080),
    "modelfile": ("ollama create {name} -f Modelfile", 11434)}
NOTES = """\
# {name}, exported as {to} ({weights})

Send the whole prompt in this form, with nothing before it and no chat template:

```
{template}
```

The answer ends at {stop} or at the end-of-text token. It was measured at temperature 0.

Commands, from the tools' documents; they were **not run** here:

```
{server}
curl http://127.0.0.1:{port}/v1/completions -H 'Content-Type: application/json' -d '{request}'
```

Made from the adapter {name} (SHA-256 {sha256}), which was trained on {trained_on} weights of
{base}, revision {revision}, licence {licence}.{warning} More is in export.json.
"""
WARNINGS = {
    "gguf-lora": " BASE.gguf is a GGUF file of that base model; in another precision the "
                 "answers differ.",
    "hub-folder": " vLLM fetches the base model from the hub: if its weights are not those of this "
                  "revision, answers differ a little.",
    "4bit": " The 4 bits are NF4. A merged model holds those weights, de-quantized; on other "
            "weights of the base model the adapter answers differently."}


def export(plan: ExportPlan) -> Path:
    """Make the folder ``plan.out`` and return it.

    Merging holds the base model in float32, 4 bytes a weight, and a GGUF file once more.
    Raises WorkbookError as `read_adapter`, `merged_model` and `check_gguf`, for an adapter of no
    known task or that the target cannot hold, a folder that is not empty, and a full disk.
    """
    info, tensors = read_tensors(plan.adapter, plan.base_model)
    if not (plan.task or info.task):
        raise WorkbookError(f"The adapter in {plan.adapter} does not say what task it is for: name "
                            "the one whose prompt it expects with -p task=sql, for instance.")
    if plan.to == "hub-folder" and not info.verified:
        raise WorkbookError(f"The adapter in {plan.adapter} has no {METRICS} of this project, of "
                            "which the card is made: publish it with notebook 04.")
    if plan.to == "gguf-lora" and info.extras:
        raise WorkbookError(f"The adapter in {plan.adapter} is no plain LoRA "
                            f"({', '.join(info.extras)}), and llama.cpp's LoRA file holds nothing "
                            "else: export --to merged or --to gguf.")
    task = get_task(plan.task or info.task)
    file = f"{info.name}-{'lora-' * (plan.to == 'gguf-lora')}{plan.quantize}.gguf"
    with new_folder(plan.out, "the export") as folder:
        _write_weights(plan, info, tensors, task, folder, file)
        if plan.to == "modelfile":
            write_text(folder / "Modelfile", modelfile(file, task))
        record = _record(plan, info, task)
        notes = _notes(plan, info, record, file)
        if plan.to == "hub-folder":
            notes = hub_card(info.metrics, notes)
        write_text(folder / "README.md", notes)
        record["files"] = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        write_json(folder / "export.json", record)
    return plan.out


def _write_weights(plan: ExportPlan, info: AdapterInfo, tensors: dict, task: Task, folder: Path,
                   file: str) -> None:
    if plan.to == "hub-folder":
        for name in (WEIGHTS, CONFIG, METRICS):
            shutil.copyfile(info.folder / name, folder / name)
        return
    config = AutoConfig.from_pretrained(base_models.fetch(plan.base_model))
    if plan.to == "gguf-lora":
        write_lora(info, tensors, config, folder / file, plan.quantize)
        return
    if plan.to != "merged":  # refused before any weights are read
        check_gguf(config, base_models.load_tokenizer(plan.base_model))
    model, tokenizer = merged_model(info, tensors, plan.base_model)
    tokenizer.chat_template = RAW_CHAT
    if plan.to == "merged":
        save_merged(model, tokenizer, task, folder)
    else:
        write_model(model, tokenizer, folder / file, plan.quantize)


def trained_precision(info: AdapterInfo) -> str:
    """The base weights that an adapter was trained on: "4bit", or "full" (also where unknown)."""
    config = (info.metrics or {}).get("config")
    return "4bit" if isinstance(config, dict) and config.get("precision") == "4bit" else "full"


def merged_model(info: AdapterInfo, tensors: dict, base_model: str, precision: str | None = None):
    """The base model with ``scaling * B @ A`` added to its weights (LoRA, arXiv:2106.09685, 4.1) in
    float32, and its tokenizer.

    precision: of the base weights to merge into (None: as the adapter was trained). "4bit": NF4
    weights, de-quantized again, whose errors the adapter learned to live with. Raises WorkbookError
    as `base_models.load`, where adapted layers share their weights, and for a bias without a place.
    """
    precision = precision or trained_precision(info)
    model, tokenizer = base_models.load(base_model, precision, "cpu", torch.float32)
    if precision == "4bit":
        model = model.dequantize()
    layers = [model.get_submodule(module) for module in info.modules]
    if len({id(layer.weight) for layer in layers}) < len(layers):  # Zamba's attention
        raise WorkbookError(f"The adapter in {info.folder} cannot be merged: layers of "
                            f"{base_model} share their weights, and the adapter changes each in "
                            "its own way. Export it with --to hub-folder.")
    if LORA_BIAS in info.extras and any(layer.bias is None for layer in layers):
        raise WorkbookError(f"The adapter in {info.folder} cannot be merged: it has biases, and "
                            f"{base_model} has none there. Use it beside its base model.")
    adapted = PeftModel(model, lora_config(info), low_cpu_mem_usage=True)  # no random start values
    of_lora = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    set_peft_model_state_dict(adapted, of_lora, low_cpu_mem_usage=True)
    model = adapted.merge_and_unload()
    for place, parameter in info.replacements(tensors, model.get_parameter).items():
        module, _, name = place.rpartition(".")
        setattr(model.get_submodule(module), name, parameter)
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    if info.whole and tables[0].weight is not tables[1].weight:
        model.config.tie_word_embeddings = False
    return model, tokenizer


def save_merged(model, tokenizer, task: Task, folder: Path) -> None:
    """Write an ordinary model folder. float16 keeps 11 bits of a weight, bfloat16 only 8: on the
    shipped SQL adapter the logits move 8 times less (notebook 10)."""
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=task.max_new_tokens,
        eos_token_id=sorted(end_ids(model, tokenizer)),
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id)
    logging.disable_progress_bar()
    model.to(torch.float16).save_pretrained(folder)
    logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)


def modelfile(gguf_name: str, task: Task) -> str:
    """Ollama's Modelfile: the prompt goes in as it is, and the answer is greedy. Ollama reads no
    escapes: a line break in a stop text is a line break between three quotes."""
    stops = [f'PARAMETER stop """{task.stop}"""'] if task.stop else []
    return "\n".join([
        "# Not run under Ollama here: written from its documents and the source of its parser.",
        f"FROM ./{gguf_name}", 'TEMPLATE """{{ .Prompt }}"""', "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1", f"PARAMETER num_predict {task.max_new_tokens}", *stops, ""])


def hub_card(record: dict, notes: str) -> str:
    """The adapter's card with the metadata that the hub reads, and `notes` below it."""
    card, base = ModelCard(model_card(record)), resolve(record["config"]["base_model"])
    evaluation, task = record.get("evaluation") or {}, record["config"]["task"]
    results = [EvalResult(
        task_type="text-generation", dataset_type=task, metric_type=name,
        dataset_name=f"{evaluation['rows']} rows of {evaluation['source']}",
        metric_value=round(metric["value"], 3))
        for name, metric in evaluation.get("adapter", {}).items()]
    licence = {"license": "other", "license_name": base.licence}
    if base.licence == "Apache-2.0":
        licence = {"license": "apache-2.0"}
    data = ModelCardData(**{**card.data.to_dict(), **licence}, eval_results=results or None,
                         model_name=f"{task} adapter" if results else None)
    return f"---\n{data.to_yaml()}\n---\n{card.text.rstrip()}\n\n{notes}"


def _record(plan: ExportPlan, info: AdapterInfo, task: Task) -> dict:
    """What export.json says, but for the files."""
    base = resolve(plan.base_model)
    return {
        "made_by": f"LoRA Workbook {__version__}", "target": plan.to, "weights": plan.quantize,
        "task": task.name, "prompt_template": task.template, "stop": task.stop,
        "temperature": 0, "max_new_tokens": task.max_new_tokens,
        "adapter": {"name": info.name, "sha256": info.sha256, "rank": info.rank},
        "base_model": {"name": base.hub_id or base.name, "licence": base.licence,
                       "revision": base_models.revision_of(plan.base_model),
                       "trained_on": trained_precision(info)}}


def _notes(plan: ExportPlan, info: AdapterInfo, record: dict, file: str) -> str:
    """The README."""
    base, (server, port) = record["base_model"], SERVERS[plan.to]
    names = {"name": info.name, "base": base["name"], "file": file,
             "max_rank": max(8, 1 << (info.rank - 1).bit_length())}  # vLLM takes powers of two
    request = {"model": info.name, "prompt": "…", "temperature": 0, "stop": record["stop"],
               "max_tokens": record["max_new_tokens"]}
    return NOTES.format(
        **names, to=plan.to, weights=plan.quantize, template=record["prompt_template"],
        stop=json.dumps(record["stop"]), server=server.format(**names), port=port,
        request=json.dumps(request, ensure_ascii=False), sha256=info.sha256,
        trained_on=base["trained_on"], revision=base["revision"], licence=base["licence"],
        warning=WARNINGS.get(plan.to, "") + WARNINGS.get(base["trained_on"], ""))
