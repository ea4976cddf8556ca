"""What leaves is what was here: an exported folder answers as base model and adapter do, under transformers and llama.cpp."""

import json
import re
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
import xllamacpp
from peft import PeftModel
from test_adapters import edit, make_adapter
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpers import WorkbookError, adapters, base_models, export, gguf_files, read_json
from helpers.adapter_files import read_tensors
from helpers.data import load_rows
from helpers.export_plan import WEIGHTS_OF, plan_export
from helpers.tasks import TASKS

SQL = adapters.PREBUILT / "sql"
TOKENS = 24  # of an answer of the shipped adapter
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TINY = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
            max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2,
            initializer_range=0.3)  # large weights: attention looks somewhere, and the best token stands out


def tiny_model(folder: Path, kind: str, **changes) -> Path:
    """A random model of that architecture with the embedded base model's tokenizer; biases and norms are random as well."""
    tokenizer = base_models.load_tokenizer()
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**TINY, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompts(count: int = 20) -> list[str]:
    task = TASKS["sql"]
    return [task.prompt(row) for row in load_rows("sql", split="validation", n=count).rows]


def under_llama(model: Path, lora: Path | None = None):
    """llama.cpp in this process (it listens on loopback only): a function of token ids that answers greedily, as `here` does."""
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = str(model), 1024, 1, 1
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # else float16
    settings.verbosity, settings.warmup = -1, False
    if lora:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(settings)

    def answer(prompt: list[int] | str, tokens: int) -> tuple[list[int], dict[int, float]]:
        said = server.handle_completions({"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "top_k": 1,
                                          "logprobs": 3, "cache_prompt": False})
        content = (said["choices"][0]["logprobs"] or {"content": []})["content"]  # none: it ended at once
        first = content[0]["top_logprobs"] if content else []
        return [one["id"] for one in content], {one["id"]: one["logprob"] for one in first}

    return answer


def here(model):
    """transformers, greedily: the tokens, and the log-probabilities of the first one."""

    def answer(prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                                     eos_token_id=2, pad_token_id=2)
            return written[0, ids.shape[1]:].tolist(), model(ids).logits[0, -1].log_softmax(-1)

    return answer


def compare(there, ours, tokenizer, tokens: int = 6, count: int = 20) -> tuple[int, float]:
    """On how many prompts the tokens are the same, and the largest difference of a first token's log-probabilities (the
    three most probable ones). llama.cpp's server leaves tokens out that are a part of a character: so do both sides."""

    def shown(tokens: list[int]) -> list[int]:
        return [token for token in tokens if token != 2 and "\ufffd" not in tokenizer.decode([token])]

    same, apart = 0, 0.0
    for prompt in prompts(count):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        (theirs, theirs_first), (mine, mine_first) = there(ids, tokens), ours(ids, tokens)
        same += shown(theirs) == shown(mine)
        apart = max([apart, *(abs(value - mine_first[token].item()) for token, value in theirs_first.items())])
    return same, apart


@pytest.fixture(scope="session")
def llamas(tmp_path_factory) -> Path:
    """A folder with a tiny Llama, an adapter of all its linear layers, and that adapter's task noted."""
    folder = tmp_path_factory.mktemp("llamas")
    tiny_model(folder / "base", "llama")
    noted(make_adapter(folder / "base", folder / "mine", modules=ALL_LINEAR), folder / "base")
    return folder


def noted(adapter: Path, base: Path, **config) -> Path:
    (adapter / "metrics.json").write_text(json.dumps({"config": {"task": "sql", "base_model": str(base), **config}}))
    return adapter


def exported(folder: Path, to: str, out: Path, quantize: str | None = None, **options) -> Path:
    return export.export(plan_export(folder / "mine", to, quantize, out, str(folder / "base"), **options))


def adapted(folder: Path):
    """The product's own answer: PEFT on the base model, in float32."""
    base, _ = base_models.load(str(folder / "base"), device="cpu", dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder / "mine").eval()


# ------------------------------------------------------------------------------------------------ under llama.cpp: tiny models

CASES = {
    "llama": dict(), "llama with biases": dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "llama with wide heads": dict(head_dim=32), "mistral": dict(sliding_window=None), "qwen2": dict(), "qwen3": dict(),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_gives_the_same_tokens_and_probabilities(case, tmp_path):
    """Base + LoRA file and merged file, in float32, against PEFT; the adapter's scaling is that of rsLoRA, and some layers have
    a rank and an alpha of their own."""
    tiny_model(tmp_path / "base", case.split()[0], **CASES[case])
    noted(make_adapter(tmp_path / "base", tmp_path / "mine", modules=ALL_LINEAR, use_rslora=True, rank_pattern={"v_proj": 2},
                       alpha_pattern={"q_proj": 24}), tmp_path / "base")
    model, tokenizer = base_models.load(str(tmp_path / "base"), device="cpu", dtype=torch.float32)
    ours = here(adapted(tmp_path))
    gguf_files.write_model(model, tokenizer, tmp_path / "base.gguf", "f32")
    lora = exported(tmp_path, "gguf-lora", tmp_path / "lora", "f32") / "mine-lora-f32.gguf"
    assert_same(compare(under_llama(tmp_path / "base.gguf", lora), ours, tokenizer))
    merged = exported(tmp_path, "gguf", tmp_path / "merged", "f32") / "mine-f32.gguf"
    assert_same(compare(under_llama(merged), ours, tokenizer))
    assert compare(under_llama(tmp_path / "base.gguf"), ours, tokenizer, 1, 4)[1] > 0.5  # the adapter does act


def assert_same(compared: tuple[int, float]) -> None:
    same, apart = compared
    assert same == 20 and apart < 0.05, compared


def test_without_the_permutation_llama_cpp_answers_something_else(llamas, tmp_path, monkeypatch):
    """The control of the test above: rows of q and k in transformers' order, in the LoRA file or in the merged one."""
    model, tokenizer = base_models.load(str(llamas / "base"), device="cpu", dtype=torch.float32)
    gguf_files.write_model(model, tokenizer, tmp_path / "base.gguf", "f32")
    monkeypatch.setattr(gguf_files, "llama_rows", lambda name, content, config: content)
    lora = exported(llamas, "gguf-lora", tmp_path / "lora", "f32") / "mine-lora-f32.gguf"
    merged = exported(llamas, "gguf", tmp_path / "merged", "f32") / "mine-f32.gguf"
    for there in (under_llama(tmp_path / "base.gguf", lora), under_llama(merged)):
        same, apart = compare(there, here(adapted(llamas)), tokenizer)
        assert same < 20 and apart > 0.5, (same, apart)


def test_lora_a_is_never_permuted(llamas, tmp_path):
    info, tensors = read_tensors(llamas / "mine", str(llamas / "base"))
    path = exported(llamas, "gguf-lora", tmp_path / "lora", "f32") / "mine-lora-f32.gguf"
    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    a, b = gguf_files.lora_pair(tensors, info.modules[0])
    assert info.modules[0].endswith("q_proj") and (written["blk.0.attn_q.weight.lora_a"] == a.numpy()).all()
    changed = written["blk.0.attn_q.weight.lora_b"]
    assert not (changed == b.numpy()).all()
    assert (changed[1] == b.numpy()[8]).all()  # of a head's 16 rows, the ninth comes second


TEXTS = ["SELECT max(x1), 1234567 FROM  table\n\n WHERE name = 'it''s' AND y>=37.5;", "Ça va? I'LL see 北京 at 10:45 — they're 4u2.",
         "\ttabs   and\r\nlines 😀😀 ... !?#", "x=1;y=22;z=333;w=4444 don't DON'T", "  "]


@pytest.mark.parametrize("kind", gguf_files.PRE_TOKENIZERS)
def test_llama_cpp_cuts_text_into_the_same_tokens(kind, llamas, tmp_path):
    """The embedded tokenizer, with the way of cutting text that each known kind has."""
    model, tokenizer = base_models.load(str(llamas / "base"), device="cpu", dtype=torch.float32)
    tokenizer = with_pre_tokenizer(tokenizer, kind)
    assert gguf_files.pre_tokenizer(tokenizer) == kind
    gguf_files.write_model(model, tokenizer, tmp_path / "m.gguf", "f32")
    server = under_llama(tmp_path / "m.gguf")
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert server(text, 1) == server(ids, 1), (text, ids)


def with_pre_tokenizer(tokenizer, kind: str):
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    words, digits = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}, {
        "type": "Digits", "individual_digits": True}
    split = {"type": "Split", "behavior": "Isolated", "invert": False,
             "pattern": {"Regex": gguf_files.PRE_TOKENIZERS[kind][0]}}
    content["pre_tokenizer"] = {"gpt-2": words, "smollm": {"type": "Sequence", "pretokenizers": [digits, words]}}.get(
        kind, {"type": "Sequence", "pretokenizers": [split, {**words, "use_regex": False}]})
    content["model"]["ignore_merges"] = kind == "llama-bpe"  # as Llama 3's file says
    changed = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))
    return type(tokenizer)(tokenizer_object=changed, bos_token="<|im_start|>", eos_token="<|im_end|>")


# ------------------------------------------------------------------------------------------ under llama.cpp: the shipped adapter


@pytest.fixture(scope="session")
def shipped(tmp_path_factory):
    """The SQL adapter on the embedded base model: PEFT's answers to 20 prompts, and the base's GGUF file."""
    folder = tmp_path_factory.mktemp("shipped")
    base, tokenizer = base_models.load(device="cpu", dtype=torch.float32)
    gguf_files.write_model(base, tokenizer, folder / "base-f16.gguf", "f16")
    model = PeftModel.from_pretrained(base, SQL).eval()
    batch = tokenizer(prompts(), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    with torch.inference_mode():
        written = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    answers = {}
    for prompt, row in zip(prompts(), written[:, batch["input_ids"].shape[1]:].tolist(), strict=True):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            answers[tuple(ids)] = row, model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    return folder, tokenizer, lambda ids, tokens: answers[tuple(ids)]


@pytest.mark.parametrize("to, quantize", [("gguf-lora", "f16"), ("gguf", "f16"), ("gguf", "q8_0")])
def test_the_shipped_adapter_answers_the_same_under_llama_cpp(to, quantize, shipped, tmp_path):
    folder, tokenizer, ours = shipped
    out = export.export(plan_export(SQL, to, quantize, tmp_path / "out"))
    file = next(out.glob("*.gguf"))
    there = under_llama(folder / "base-f16.gguf", file) if to == "gguf-lora" else under_llama(file)
    same, apart = compare(there, ours, tokenizer, TOKENS)
    print(to, quantize, same, apart)  # with pytest -s: the figures of the notes
    assert (same == 20 and apart < 0.05) if quantize == "f16" else (same >= 18 and apart < 1)


# ------------------------------------------------------------------------------------------------------------------- merged


def test_a_merged_folder_gives_the_logits_of_base_and_adapter(llamas, tmp_path):
    out = exported(llamas, "merged", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = adapted(llamas)
    for prompt in prompts(5):
        batch = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            ours, theirs = model(**batch).logits, merged(**batch).logits
        apart = (ours - theirs).abs() / ours.std()
        assert apart.mean() < 0.01 and apart.max() < 0.1  # rounding to float16
    assert merged.generation_config.max_new_tokens == TASKS["sql"].max_new_tokens and not merged.generation_config.do_sample
    assert tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False) == prompt


def test_an_adapter_of_a_4bit_base_is_merged_into_the_weights_that_it_was_trained_on(llamas, tmp_path):
    """The merged model is NF4 base + adapter to rounding; the same adapter on the full base is something else."""
    info, tensors = read_tensors(llamas / "mine", str(llamas / "base"))
    info = replace(info, metrics={"config": {"task": "sql", "precision": "4bit"}})
    base, tokenizer = base_models.load(str(llamas / "base"), "4bit", "cpu", torch.float32)
    trained = PeftModel.from_pretrained(base, llamas / "mine").eval()
    batch = tokenizer(prompts(1)[0], return_tensors="pt", add_special_tokens=False)
    apart = {}
    for precision in (None, "full"):
        merged, _ = export.merged_model(info, tensors, str(llamas / "base"), precision)
        with torch.inference_mode():
            apart[precision] = (merged(**batch).logits - trained(**batch).logits).abs().max().item()
    assert apart[None] < 1e-2 and apart["full"] > 1, apart
    assert not hasattr(merged.config, "quantization_config")


# ------------------------------------------------------------------------------------------------------- what a folder holds


@pytest.mark.parametrize("to", sorted(WEIGHTS_OF.keys() - {"hub-folder"}))
def test_every_folder_says_how_to_ask_and_what_it_was_made_from(to, llamas, tmp_path):
    out = exported(llamas, to, tmp_path / "out")
    record, notes = read_json(out / "export.json"), (out / "README.md").read_text()
    assert record["prompt_template"] == TASKS["sql"].template and record["stop"] == "\n"
    assert record["adapter"]["sha256"] == base_models.sha256(llamas / "mine" / adapters.WEIGHTS)
    assert record["base_model"]["revision"] == base_models.revision_of(str(llamas / "base"))
    assert record["files"] == {path.name: base_models.sha256(path) for path in out.iterdir() if path.name != "export.json"}
    assert TASKS["sql"].template in notes and '"\\n"' in notes and record["adapter"]["sha256"] in notes
    assert "**not run** here" in notes and "0.0.0.0" not in notes and not list(tmp_path.glob(".*"))


def test_a_modelfile_is_raw_greedy_and_stops(llamas, tmp_path):
    out = exported(llamas, "modelfile", tmp_path / "out", "q8_0")
    text = (out / "Modelfile").read_text()
    assert "FROM ./mine-q8_0.gguf\n" in text and (out / "mine-q8_0.gguf").is_file()
    assert 'TEMPLATE """{{ .Prompt }}"""\n' in text and "PARAMETER temperature 0\n" in text
    assert 'PARAMETER stop """\n"""\n' in text and text.startswith("# Not run under Ollama here")


def test_a_hub_folder_is_the_adapter_with_a_card_that_the_hub_reads(tmp_path):
    from huggingface_hub import ModelCard

    out = export.export(plan_export(SQL, "hub-folder", out=tmp_path / "sql"))
    assert adapters.read_adapter(out).sha256 == adapters.read_adapter(SQL).sha256
    card, record = ModelCard.load(out / "README.md"), read_json(SQL / "metrics.json")
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and card.data.license == "apache-2.0"
    assert card.data.library_name == "peft" and card.data.tags == ["lora"]
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == {name: round(metric["value"], 3) for name, metric in record["evaluation"]["adapter"].items()}
    assert "hf upload" in card.text and TASKS["sql"].template in card.text and "## Measured" in card.text
    assert read_json(out / "export.json")["adapter"]["rank"] == 8


def test_a_base_with_another_licence_is_named_in_the_card():
    record = read_json(SQL / "metrics.json")
    record["config"]["base_model"] = "bigscience/bloom-1b1"
    text = export.hub_card(record, "notes")
    assert "license: other" in text and "license_name: BigScience BLOOM RAIL 1.0" in text


# ------------------------------------------------------------------------------------------------------------ what is refused


def refused(call) -> str:
    with pytest.raises(WorkbookError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 500
    return text


def test_an_export_is_whole_or_not_there_and_overwrites_nothing(llamas, tmp_path, monkeypatch):
    out = tmp_path / "exports" / "out"
    monkeypatch.setattr(export, "write_lora", lambda *_: (_ for _ in ()).throw(RuntimeError("the machine stops")))
    with pytest.raises(RuntimeError):
        exported(llamas, "gguf-lora", out)
    assert list(out.parent.iterdir()) == []
    monkeypatch.undo()
    plan = plan_export(llamas / "mine", "gguf-lora", None, out, str(llamas / "base"))
    out.mkdir()
    (out / "mine").write_text("mine")  # since the plan was made
    assert "already exists" in refused(lambda: export.export(plan))
    assert [path.name for path in out.iterdir()] == ["mine"]


@pytest.mark.parametrize("kind, changes, said", [
    ("gemma", dict(head_dim=16), "architecture gemma"), ("bloom", {}, "architecture bloom"),
    ("mistral", dict(sliding_window=128), "looks back only 128 tokens"),
    ("qwen2", dict(use_sliding_window=True, sliding_window=128, max_window_layers=0), "looks back only 128 tokens"),
    ("qwen3", dict(attention_bias=True), "attention_bias"),
    ("llama", dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "rotary positions (linear)"),
    ("llama", dict(hidden_act="gelu"), "activation gelu")])
def test_what_was_not_compared_with_llama_cpp_is_refused(kind, changes, said, tmp_path):
    config = AutoConfig.for_model(kind, vocab_size=300, **{**TINY, **changes})
    text = refused(lambda: gguf_files.check_gguf(config))
    assert said in text and "--to merged" in text


def test_an_unknown_tokenizer_is_refused(llamas):
    tokenizer = base_models.load_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
    other = type(tokenizer)(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(content)))
    assert "kind of tokenizer" in refused(lambda: gguf_files.check_gguf(AutoConfig.from_pretrained(llamas / "base"), other))


def test_an_adapter_must_say_its_task_or_be_told(llamas, tmp_path):
    make_adapter(llamas / "base", tmp_path / "mine")
    plan = lambda **options: plan_export(tmp_path / "mine", "gguf-lora", None, tmp_path / "out", str(llamas / "base"), **options)
    assert "does not say what task it is for" in refused(lambda: export.export(plan()))
    assert "no metrics.json" in refused(lambda: export.export(replace(plan(task="sql"), to="hub-folder")))
    assert read_json(export.export(plan(task="detox")) / "export.json")["prompt_template"] == TASKS["detox"].template
    edit(tmp_path / "mine", use_dora=True)
    plan = plan_export(tmp_path / "mine", "gguf-lora", None, tmp_path / "dora", str(llamas / "base"), "sql")
    assert "lora_magnitude_vector" in refused(lambda: export.export(plan))


@pytest.mark.parametrize("arguments, said", [
    (("adapters/prebuilt/sql", "--to", "ggfu"), "--to is 'ggfu'; did you mean gguf"),
    (("adapters/prebuilt/sql",), "--to is None; there are: merged"),
    (("adapters/prebuilt/sql", "--to", "merged", "--quantize", "q8_0"), "--to merged writes f16"),
    (("adapters/prebuilt/sql", "--to", "gguf", "--quantize", "q4_k_m"), "--to gguf writes f16 or f32 or q8_0"),
    (("adapters/prebuilt/nothing", "--to", "gguf"), "holds no adapter_config.json"),
    (("adapters/prebuilt/sql", "--to", "gguf", "--out", "adapters"), "already exists"),
    (("adapters/prebuilt/sql", "--to", "gguf", "-p", "task=sqll"), "did you mean sql"),
    (("adapters/prebuilt/sql", "--to", "gguf", "-p", "base_modl=x"), "did you mean base_model"),
    (("adapters/prebuilt/sql", "--to", "gguf", "-p", "base_model=nonsense"), "base_model 'nonsense' is unknown")])
def test_the_command_refuses_in_one_sentence_before_anything_is_loaded(arguments, said, capsys, monkeypatch):
    import sys

    from helpers import jobs

    monkeypatch.setitem(sys.modules, "helpers.export", None)  # importing it would raise ImportError
    assert jobs.main(["export", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error and error.endswith((".", "?"))


def test_the_command_exports(llamas, tmp_path, jobs):
    done = jobs("export", llamas / "mine", "--to", "gguf-lora", "--out", tmp_path / "out", "-p", f"base_model={llamas / 'base'}")
    assert done.returncode == 0 and re.fullmatch(rf"Exported: {re.escape(str(tmp_path / 'out'))}\n", done.stdout), done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "export.json", "mine-lora-f16.gguf"]
