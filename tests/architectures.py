"""Every causal architecture of the installed transformers, as a tiny random model, through every step of the workbook.

    python tests/architectures.py                                     all of them, a line each, about 25 minutes of a core
    python tests/architectures.py gemma2 qwen3 --tokenizers ours bos --steps load none workers
    python tests/architectures.py --json all.jsonl --table notebooks/bases.md

A cell is `ok`, `refused` with the sentence of a WorkbookError, or `FAULT` with what went wrong: a raw error, or wrong numbers.
`not made` is a model that the rules below do not shrink, or that transformers itself cannot make from such a config; "-" is not
tried, because a step before it was not ok. Each model runs in a process of its own, with a time limit.
"""

import argparse
import dataclasses
import gc
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import peft  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from helpers import WorkbookError, base_models, data, export, publishing, training  # noqa: E402 (helpers quiets bitsandbytes)
from helpers.adapter_files import read_tensors  # noqa: E402
from helpers.bank import AdapterBank  # noqa: E402
from helpers.fast import packing  # noqa: E402
from helpers.generation import Settings, generate  # noqa: E402
from helpers.recipes import FineTuneConfig  # noqa: E402
from helpers.scoring import evaluate, score  # noqa: E402
from helpers.tasks import TASKS, get_task  # noqa: E402
from helpers.trainer import completion_loss, what_hides  # noqa: E402

STEPS = ["load", "4bit", "none", "documents", "wrapped", "publish", "swap", "mixed", "merge", "generate", "evaluate"]
ROWS = [{"toxic": f"this silly text number {i} is {'very ' * (i % 5)}bad", "neutral": f"text {i} is not {'so ' * (i % 3)}good"}
        for i in range(24)]
PROMPTS = [get_task("detox").prompt(row) for row in ROWS[:4]]
EVALUATED = {
    "detox": ROWS[:2],
    "sql": [{"context": "CREATE TABLE t (a INTEGER, b VARCHAR)", "question": question, "answer": answer} for question, answer in (
        ("Which b has a over 3?", "SELECT b FROM t WHERE a > 3"), ("How many?", "SELECT COUNT(*) FROM t"))],
    "instruct": [{"instruction": "Say yes.", "input": "", "response": "Yes."},
                 {"instruction": "Repeat this.", "input": "One two", "response": "One two"}]}
SPARE = 16  # tokens beyond the tokenizer's, as padded vocabularies and pictures have them

# --- tiny models

WINDOW = 16  # shorter than a training row
# What a config's whole numbers become: the first pattern that fits a name decides, and no number is raised.
SMALL = [(re.compile(pattern), number) for pattern, number in (
    (r".*(kv_n_heads|n(um)?_kv_heads|key_value_heads|num_key_heads|query_groups)", 2),
    (r"(?!index).*(experts_per_tok(en)?|top_?k(_experts)?|moe_k|cross_attn_k)", 2),
    (r".*(experts|zero_expert_num|num_expert)", 4),
    (r".*(n_group|topk_group|expert_group|n_groups|o_groups|ngroups)", 1),
    (r".*(num_|n_|attention_|index_n_|^)heads?|.*mamba_num_heads", 4),
    (r".*(((sliding|attention)_|^)window(_size)?|attention_chunk_size|local_attention(_window_len)?)", WINDOW),
    (r".*((hidden|decoder|encoder|num|n)_layers?|num_blocks|depth|layers_per_stack)", 2),
    (r"mamba_(d_head|head_?dim)", 32), (r".*((rope|nope)_head_dim|rotary_dim)", 8),
    (r".*(head_dim|d_head|head_size|headdim|kv_channels|d_kv|d_state|state_size|dim_head)", 16),
    (r".*(intermediate|ffn|d_?ff|feed_forward|d_inner|mlp_dim).*", 128),
    (r".*(hidden_size(_global)?|d_model|n_embd|(embed|emb|embedding)_dim|embedding_size|embed_proj_dim|lru_width)", 64),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers", 1), (r".*(_rank|d_rel)", 16),
    (r".*(position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length|target_positions|rel_extent)", 512),
    (r".*chunk_size", 32),
    (r".*(image_size|crop_size)", 32),
    (r"ngram_vocab_size_base|encoder_hash_byte_group_vocab|codebook_size|num_centroids", 256))]
LEFT_OUT = ("id2label", "label2id", "per_layer_config")
# What rules do not find: settings that depend on each other.
DROP = object()
BY_NAME = {
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}, "full_attention": None}},
    "bamba": {"attn_layer_indices": [1], "layers_block_type": DROP, "layer_types": DROP},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "layers_block_type": DROP, "layer_types": DROP},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "mamba2": {"num_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 32]},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
                       "indexer_compress_ratio": 16, "linear_num_value_heads": 4, "hc_lowrank": 16},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128,
              "attention_head_dim": 32},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3],
               "attention_hidden_size": 128, "attention_head_dim": 32, "n_mamba_heads": 4},
    "xmod": {"default_language": "en_XX"},
}


def shrink(config: dict, vocabulary: int, tokens: dict) -> dict:
    """A config as a dictionary, with few small layers: one of each kind, at least two."""
    config = {name: value for name, value in config.items() if name not in LEFT_OUT}
    equal = config.get("num_key_value_heads") == config.get("num_attention_heads")
    lengths = [value for name, value in config.items() if isinstance(value, int) and layers(name) and value > 2]
    lists = [value for name, value in config.items() if isinstance(value, list) and len(value) in lengths]
    kinds = {}
    for i, kind in enumerate(zip(*lists, strict=True) if lists else ()):
        kinds.setdefault(json.dumps(kind), i)
    kept = sorted(kinds.values())[:4] if len(kinds) > 1 else [0, 1]
    small = {}
    for name, value in config.items():
        if isinstance(value, dict):
            value = shrink(value, vocabulary, tokens)
        elif isinstance(value, list) and any(value is one for one in lists):
            value = [value[i] for i in kept]
            if value and isinstance(value[0], int):
                value = [number(name, one) for one in value]
        elif isinstance(value, int) and not isinstance(value, bool):
            value = len(kept) if layers(name) and value > 2 else number(name, value)
        elif isinstance(value, float) and re.fullmatch("initializer_range|init_std|initializer_std", name):
            value = 0.1  # so small a model would otherwise say nearly the same of every token
        elif value is None and name in ("head_dim", "num_key_value_heads"):
            value = {"head_dim": 16, "num_key_value_heads": 4}[name]
        if name == "num_key_value_heads" and equal and value > 1:
            value = 4
        if name == "head_dim" and config["head_dim"] == config.get("qk_rope_head_dim"):
            value = 8
        small[name] = value
        if re.fullmatch(r"(unpadded_|decoder_)?vocab_size(_per_layer_input)?", name):
            small[name] = vocabulary
        if re.fullmatch(r".*token_(id|index)", name) and value is not None:
            small[name] = tokens.get(name, vocabulary - 1)
    return small


def layers(name: str) -> bool:
    return bool(re.fullmatch(r"(num_hidden|num_decoder|num_encoder|decoder|encoder|n|num)_layers?|num_blocks", name))


def number(name: str, value: int) -> int:
    return next((min(value, most) for pattern, most in SMALL if pattern.fullmatch(name)), value)


def make_tokenizer(kind: str):
    """A small byte-level tokenizer. ours: no BOS is added, the end token pads; bos: adds BOS; qwen: has none; end: has no pad
    token, and ends with another token than the model's own config says."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=512, special_tokens=special, show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator([text for row in ROWS for text in row.values()], trainer)
    if kind == "bos":
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    names = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": "<|im_end|>"}
    names |= {"bos": {"pad_token": "<|pad|>"}, "qwen": {"bos_token": None, "pad_token": "<|endoftext|>"},
              "end": {"pad_token": None, "eos_token": "<|endoftext|>"}}.get(kind, {})
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, clean_up_tokenization_spaces=False, **names)


def make_model(name: str, tokenizer):
    """A random model of that architecture, its weights large enough to tell tokens apart."""
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id}
    default = transformers.CONFIG_MAPPING[name]()
    small = shrink(default.to_dict(), len(tokenizer) + SPARE, tokens)
    merge(small, BY_NAME.get(name, {}))
    config = type(default).from_dict(small)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > 30e6:
        raise RuntimeError(f"{size / 1e6:.0f} M parameters are not tiny")
    embeddings = model.get_input_embeddings().weight.data
    if tokenizer.pad_token_id is not None:  # where the end token pads, its row is zero
        embeddings[tokenizer.pad_token_id] = embeddings[3:].std() * torch.randn(embeddings.shape[1])
    return model


def merge(config: dict, changes: dict) -> None:
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(config.get(name), dict):
            merge(config[name], value)
        elif value is DROP:
            config.pop(name, None)
        else:
            config[name] = value


# --- steps

class Wrong(Exception):
    """Numbers that are not as they should be."""


def need(condition, what: str) -> None:
    if not condition:
        raise Wrong(what)


def off(got, expected) -> float:
    """The largest difference, in units of the expected numbers' spread."""
    return float((got - expected).abs().max() / expected.std().clamp(min=1e-6))


def same(got, expected, what: str, most: float = 2e-3) -> None:
    need(torch.isfinite(got).all(), f"{what}: not finite")
    need(off(got, expected) <= most, f"{what}: differs by {off(got, expected):.2g} of the spread")


class Trial:
    """One architecture with one tokenizer; each step is a method that raises, or returns a note."""

    def __init__(self, name: str, kind: str, folder: Path):
        self.folder, self.base = folder, folder / f"tiny-{name}"
        self.tokenizer = make_tokenizer(kind)
        made = make_model(name, self.tokenizer)
        made.save_pretrained(self.base)
        self.tokenizer.save_pretrained(self.base)
        self.tokenizer = base_models.load_tokenizer(str(self.base))
        self.made = self.logits(made)
        self.rows = data.Rows(ROWS, "rows of this test", "none", len(ROWS))
        self.adapters = []

    def config(self, **changes) -> FineTuneConfig:
        return FineTuneConfig.from_parameters(**{
            "task": "detox", "base_model": str(self.base), "precision": "full", "max_steps": 2, "batch_size": 4, "rank": 4,
            "max_length": 128, **changes})

    def logits(self, model, prompt: str = PROMPTS[0]):
        with torch.inference_mode():
            return model(self.ids([prompt])["input_ids"], use_cache=False).logits

    def ids(self, prompts: list[str]):
        ids = [data.prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        return self.tokenizer.pad({"input_ids": ids}, return_tensors="pt")

    def load(self):
        self.model, self.tokenizer = base_models.load(str(self.base), dtype=torch.float32)
        same(self.logits(self.model), self.made, "the loaded model's logits")

    def fourbit(self):
        config = self.config(precision="4bit")
        training.train(config, self.rows, *base_models.load(str(self.base), "4bit"), self.folder / "fourbit")

    def batches(self, packed: str):
        """Two rows alone, and a batch of both, as training makes them."""
        config = self.config(packing=packed)
        encoded, _ = data.encode_rows(self.tokenizer, get_task("detox"), ROWS[:2], 128)
        dataset = training.make_dataset(config, encoded)
        collator = data.Collator(self.tokenizer.pad_token_id)
        alone = [collator([row]) for row in encoded]
        if packed != "none":
            mask = packed == "documents" and packing.takes_mask(self.model, "the model", 128)
            collator = packing.PackedCollator(self.tokenizer.pad_token_id, 128, mask=mask)
        return alone, collator(list(dataset))

    def losses(self, packed: str) -> None:
        """The loss of a batch is what transformers says of each of its rows alone."""
        alone, batch = self.batches(packed)
        if packed == "wrapped":
            ids = torch.cat([row["input_ids"] for row in alone], 1)
            alone = [{"input_ids": ids, "labels": torch.cat([row["labels"] for row in alone], 1)}]
        total = places = 0
        with torch.no_grad():
            for row in alone:
                logits = self.model(row["input_ids"], use_cache=False).logits[:, :-1].float().flatten(0, 1)
                labels = row["labels"][:, 1:].flatten()
                total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                places += (labels != -100).sum()
            got = completion_loss(self.model, batch)
        need((got - total / places).abs() < 1e-4, f"the batch's loss is {got:.5f}, its rows' {total / places:.5f}")

    def train(self, packed: str, **changes):
        out = self.folder / f"run-{packed}"
        config = self.config(packing=packed, **changes)
        record = training.train(config, self.rows, self.model, self.tokenizer, out)
        need(record["steps"] == 2, f"{record['steps']} steps")
        self.losses(packed)
        return out

    def none(self):
        before = self.logits(self.model)
        self.run = self.train("none")
        same(self.logits(self.model), before, "the base model after training", 0)

    def documents(self):
        self.train("documents")
        self.leaks()

    def leaks(self) -> None:
        """No document of a row sees another one, or what follows: changing one leaves the others' logits as they were."""
        _, batch = self.batches("documents")
        inputs = {name: batch[name] for name in ("input_ids", "document", "position_ids") if name in batch}
        number = (batch["position_ids"][0] == 0).cumsum(0) - 1
        with torch.no_grad():
            options = what_hides(inputs)
            before = self.model(inputs["input_ids"], use_cache=False, **options).logits
            for document in (0, 1):
                here = number == document
                changed = inputs["input_ids"].clone()
                changed[0, here.nonzero()[-1]] = 7
                after = self.model(changed, use_cache=False, **options).logits
                others = ~here
                others[here.nonzero()[:-1]] = True
                others[number > 1] = False
                same(after[0, others], before[0, others], f"other tokens' logits when document {document}'s end changes", 1e-4)

    def wrapped(self):
        self.train("wrapped")

    def workers(self):
        record = training.train_on_workers(self.config(), self.folder / "run-workers", 2)
        need((record["workers"], record["steps"]) == (2, 2), f"{record['workers']} workers, {record['steps']} steps")

    def publish(self):
        for i in (1, 2):  # two of large random numbers: they differ, and act
            out = Path(shutil.copytree(self.run, self.folder / f"run-{i}"))
            weights = out / "trained" / publishing.WEIGHTS
            tensors = load_file(weights)
            for tensor in tensors.values():
                tensor.normal_(std=0.2, generator=torch.Generator().manual_seed(i))
            save_file(tensors, weights, metadata={"format": "pt"})
            folder = publishing.publish(out, self.folder / f"adapter-{i}", {})
            info, read = read_tensors(folder, str(self.base))
            need(all(read[name].equal(tensors[name]) for name in tensors) and len(read) == len(tensors), "read back other tensors")
            self.adapters.append(info)

    def swap(self):
        self.bank = AdapterBank(str(self.base), dtype=torch.float32)
        self.expected = {None: self.logits(self.model)}
        for info in self.adapters:
            self.bank.load(info)
            fresh, _ = base_models.load(str(self.base), dtype=torch.float32)
            self.expected[info.name] = self.logits(peft.PeftModel.from_pretrained(fresh, info.folder).eval())
            need(off(self.expected[info.name], self.expected[None]) > 0.01, "the adapter changes nothing")
        for name in (None, *self.bank.adapters, None):
            self.bank.swap(name)
            same(self.logits(self.bank.model), self.expected[name], f"logits of {name}", 0)

    def mixed(self):
        names = [None, *self.bank.adapters, None]
        batch = self.ids([PROMPTS[0]] * len(names))
        with self.bank.mixed(names) as model, torch.inference_mode():
            got = model(batch["input_ids"], use_cache=False).logits
        for row, name in zip(got, names, strict=True):
            same(row, self.expected[name][0], f"a mixed batch's row of {name}")
        several = [answer.text for answer in self.bank.generate_mixed(PROMPTS, [*names], Settings(max_new_tokens=5))]
        single = [self.bank.generate(prompt, name, Settings(max_new_tokens=5)).text
                  for prompt, name in zip(PROMPTS, names, strict=True)]
        need(several == single, f"mixed answers {several} are not the single ones {single}")

    def merge(self):
        info = self.adapters[0]
        merged, _ = export.merged_model(*read_tensors(info.folder, str(self.base)), str(self.base))
        same(self.logits(merged), self.expected[info.name], "the merged model's logits")

    def generate(self):
        several = generate(self.model, self.tokenizer, PROMPTS, 6)
        single = [generate(self.model, self.tokenizer, [prompt], 6)[0] for prompt in PROMPTS]
        need(several == single, f"a batch's answers {several} are not the single ones {single}")

    def evaluate(self):
        """Base and adapters scored on rows of the three tasks, as notebook 04 does it: a batch is scored as its rows are alone."""
        for name, task in TASKS.items():
            task, rows = dataclasses.replace(task, max_new_tokens=5), EVALUATED[name]
            right = score(task, [task.completion(row) for row in rows], rows)
            need([row[task.metric] for row in right] == [1, 1], f"{name}: references score {right}")
            for adapter in (None, *self.bank.adapters):
                with self.bank.using(adapter) as model:
                    got = evaluate(task, model, self.tokenizer, rows)
                    alone = [evaluate(task, model, self.tokenizer, [row]) for row in rows]
                for key in ("answers", "scores"):
                    need(got[key] == sum([one[key] for one in alone], []), f"{name}: {key} {got[key]} are not those of the rows alone")


# Steps that need others before them; all but "load" need that one.
NEEDS = {"4bit": {"load"}, "publish": {"none"}, "swap": {"publish"}, "mixed": {"swap"}, "merge": {"swap"}, "generate": {"none"},
         "evaluate": {"swap"}}


def try_all(name: str, kind: str, steps: list[str], say) -> None:
    """Every step, said as (step, cell); a step whose needs failed is not run."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            trial = Trial(name, kind, Path(folder))
        except Exception as error:
            say("load", f"not made: {first_line(error)}")
            return
        done = set()
        for step in steps:
            if step != "load" and not NEEDS.get(step, {"load"}) <= done:
                say(step, "-")
                continue
            try:
                getattr(trial, {"4bit": "fourbit"}.get(step, step))()
                done.add(step)
                say(step, "ok")
            except WorkbookError as refusal:
                say(step, "refused: " + re.sub(r"/\S*/(tiny-|adapter-)", r"\1", str(refusal)))
            except Exception as error:
                say(step, f"FAULT: {first_line(error)}")
                traceback.print_exc()


def first_line(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = (str(error).strip().splitlines() or [""])[0][:200]
    if isinstance(error, Wrong):
        return text
    return f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"


def in_a_process(name: str, kind: str = "ours", steps: list[str] = STEPS, seconds: float = 120) -> dict[str, str]:
    """`try_all` in a process of its own. Returns the cells by step."""
    context = multiprocessing.get_context("fork")  # the libraries are imported once
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(name, kind, steps, theirs))
    process.start()
    theirs.close()
    cells, cell, ends, ended = {}, (), time.monotonic() + seconds, "the process died"
    try:
        while cell is not None:
            if not ours.poll(max(0, ends - time.monotonic())):
                ended = f"no end after {seconds:.0f} s"
                break
            cell = ours.recv()
            cells |= dict([cell] if cell else [])
    except EOFError:
        pass
    process.kill()
    process.join()
    if cell is not None:
        cells[next(step for step in steps if step not in cells)] = f"FAULT: {ended}"
    return {step: cells.get(step, "-") for step in steps}


def _child(name: str, kind: str, steps: list[str], pipe) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # the trainer collects garbage, and need not look through what was imported
    transformers.utils.logging.set_verbosity_error()
    if not os.environ.get("VERBOSE"):
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    try_all(name, kind, steps, lambda *cell: pipe.send(cell))
    pipe.send(None)


# --- the table

POPULAR = {
    "llama": "Llama 3.x, SmolLM2", "qwen3": "Qwen3", "qwen2": "Qwen2.5", "gemma3_text": "Gemma 3 1B", "gemma3": "Gemma 3 4B to 27B",
    "phi3": "Phi-4, Phi-3", "smollm3": "SmolLM3", "mistral": "Mistral 7B", "ministral3": "Ministral 3", "gpt_oss": "gpt-oss",
    "qwen3_moe": "Qwen3 MoE", "mixtral": "Mixtral", "deepseek_v3": "DeepSeek V3", "glm4_moe": "GLM-4.5", "bloom": "BLOOM",
    "qwen3_next": "Qwen3-Next", "qwen3_5_text": "Qwen3.5", "olmo2": "OLMo 2", "granite": "Granite 3", "falcon": "Falcon",
    "gemma2": "Gemma 2", "gpt2": "GPT-2", "gpt_neox": "Pythia", "opt": "OPT", "starcoder2": "StarCoder2"}


def table(results: list[dict], steps: list[str]) -> str:
    """The results as a page: an architecture a line, then the sentences of the refusals."""
    notes, lines, whole, faults = {}, [], 0, 0
    for result in results:
        name, cells = result["name"], []
        for step in steps:
            cell = result.get(step, "-")
            kind, _, text = cell.partition(": ")
            faults += kind == "FAULT"
            if text:
                text = text.replace(f"tiny-{name}", "<base model>").replace(f"{name} models", "<its> models")
                cell = f"{kind} {notes.setdefault(text, len(notes) + 1)}"
            cells.append(cell)
        whole += set(cells) == {"ok"}
        shown = name if result["tokenizer"] == "ours" else f"{name} ({result['tokenizer']})"
        lines.append(f"| {shown} | {POPULAR.get(name, '')} | {' | '.join(cells)} |")
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("transformers", "peft", "torch", "bitsandbytes"))
    head = ["# Base models: which architectures work", "",
            f"Made by `python tests/architectures.py --table notebooks/bases.md` with {versions}. Each architecture is a tiny random "
            "model, not the real one: real weights are not fetched. Every step's numbers are checked, see the script.", "",
            f"{len(results)} tried, {whole} ok in every step, {faults} cells with a fault. \"none\", \"documents\" and \"wrapped\" are "
            "the ways to pack rows; \"-\" was not tried, as a step before it was not ok.", "",
            f"| architecture | for instance | {' | '.join(steps)} |", "|" + " --- |" * (len(steps) + 2)]
    return "\n".join([*head, *lines, "", *(f"{number}. {text}" for text, number in notes.items())]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="architectures, as transformers names them (none: all)")
    parser.add_argument("--tokenizers", nargs="+", default=["ours"], choices=["ours", "bos", "qwen", "end"])
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=[*STEPS, "workers"])
    parser.add_argument("--seconds", type=float, default=120, help="the longest that one may take")
    parser.add_argument("--json", type=Path, help="a file of results; what is in it already is not tried again")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    results = []
    if options.json and options.json.is_file():
        results = [json.loads(line) for line in options.json.read_text().splitlines()]
    known = {(result["name"], result["tokenizer"]) for result in results}
    for name in options.names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        for kind in options.tokenizers:
            if (name, kind) in known:
                continue
            began = time.monotonic()
            cells = in_a_process(name, kind, options.steps, options.seconds)
            bad = [f"{step} {cell}" for step, cell in cells.items() if cell not in ("ok", "-")]
            print(f"{name:24} {kind:5} {time.monotonic() - began:5.1f} s  ", " | ".join(bad) or "ok", flush=True)
            results.append({"name": name, "tokenizer": kind, **cells})
            if options.json:
                options.json.write_text("".join(json.dumps(result) + "\n" for result in results))
    if options.table:
        options.table.write_text(table(sorted(results, key=lambda result: result["name"]), options.steps))
    if any(cell.startswith("FAULT") for result in results for cell in result.values()):
        sys.exit("There are faults.")


if __name__ == "__main__":
    main()
