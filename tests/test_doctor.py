"""Adapters from elsewhere: each is read, judged, and run as PEFT runs it or refused in a sentence; what is converted is exact."""

import copy
import json
import os
import re
import shutil
import struct
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_adapters import PROMPT, edit, logits
from transformers import AutoModelForCausalLM

from helpers import WorkbookError, adapters, base_models, doctor, export
from helpers.adapter_files import read_tensors
from helpers.export_plan import plan_export

MODULES = ["q_proj", "v_proj", "down_proj"]
BLOOM = dict(target_modules=["query_key_value"])
UNSLOTH = r"(?:.*?(?:language|text).*?(?:mlp).*?(?:up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)\.(?:(?:q_proj|v_proj)))"
# name: the settings of PEFT that make it, and what its `extras` are
RUN = {
    "plain": (dict(), ()),
    "rslora": (dict(use_rslora=True), ()),
    "patterns": (dict(rank_pattern={"q_proj": 8, "layers.1.self_attn.v_proj": 2}, alpha_pattern={r".*layers\.0.*": 3},
                      use_rslora=True), ()),
    "all-linear": (dict(target_modules="all-linear", exclude_modules=["o_proj"]), ()),
    "unsloth": (dict(target_modules=UNSLOTH), ()),
    "one-layer": (dict(layers_to_transform=[1]), ()),
    "no-task-type": (dict(task_type=None), ()),
    "dora": (dict(use_dora=True), ("DoRA",)),
    "dora-head": (dict(use_dora=True, rank_pattern={"q_proj": 2}, modules_to_save=["lm_head"]), ("DoRA", "its own lm_head")),
    "embeddings": (dict(modules_to_save=["embed_tokens", "lm_head"]), ("its own embed_tokens", "its own lm_head")),
    "tokens": (dict(trainable_token_indices=[5, 6, 300]), ("its own embed_tokens",)),
    "norm": (dict(modules_to_save=["model.norm"]), ("its own norm",)),
    "bloom-biases": (dict(**BLOOM, bias="all"), ("biases",)),
    "bloom-lora-bias": (dict(**BLOOM, lora_bias=True), ("biases in LoRA",)),
    "old-dora": (dict(use_dora=True), ("DoRA",)),
    "axolotl": (dict(), ()),
}


@lru_cache
def loaded(base: Path):
    return base_models.load(str(base))[0]


def foreign(base: Path, folder: Path, **settings) -> Path:
    """An adapter as PEFT itself saves it, all of its trained numbers moved at random."""
    model = copy.deepcopy(loaded(base))
    config = LoraConfig(**{**dict(r=4, lora_alpha=8, target_modules=MODULES, task_type="CAUSAL_LM"), **settings})
    model = get_peft_model(model, config)
    torch.manual_seed(len(folder.name))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    edit(folder, base_model_name_or_path=base.name)
    return folder


def renamed(folder: Path, change) -> None:
    tensors = load_file(folder / adapters.WEIGHTS)
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / adapters.WEIGHTS, {"format": "pt"})


@pytest.fixture(scope="module")
def zoo(tiny, tiny_bloom, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("zoo")
    for name, (settings, _) in RUN.items():
        foreign(base_of(name, tiny, tiny_bloom), root / name, **settings)
    library = "transformers.models.llama.modeling_llama"
    edit(root / "unsloth", auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": library, "unsloth_fixed": True})
    renamed(root / "old-dora", lambda name: name.replace("magnitude_vector", "magnitude_vector.weight"))
    edit(root / "old-dora", peft_version=None, enable_lora=None, merge_weights=False)
    (root / "axolotl" / "README.md").write_text("---\ntags:\n- axolotl\n---\n# out\n")
    (root / "axolotl" / "tokenizer.json").write_text("{}")
    return root


def base_of(name: str, tiny: Path, tiny_bloom: Path) -> Path:
    return tiny_bloom if name.startswith("bloom") else tiny


@pytest.fixture(scope="module")
def banks(tiny, tiny_bloom) -> dict:
    """One bank a base model for all tests here: whatever one leaves would spoil another."""
    return {base: adapters.AdapterBank(str(base)) for base in (tiny, tiny_bloom)}


@lru_cache
def pefts(base: Path, folder: Path, bank) -> torch.Tensor:
    """The logits of PEFT itself on a fresh base model."""
    return logits(PeftModel.from_pretrained(copy.deepcopy(loaded(base)), folder).eval(), bank)


def said(folder: Path, base: Path | None) -> str:
    sentences = doctor.diagnose(folder, base and str(base))
    assert all(one.endswith(".") for one in sentences) and all("\n" not in one for one in sentences)
    return " ".join(sentences)


def refused(action) -> str:
    with pytest.raises(WorkbookError) as caught:
        action()
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ what runs


@pytest.mark.parametrize("name", RUN)
def test_what_peft_saves_is_judged_and_gives_pefts_logits(name, zoo, banks, tiny, tiny_bloom):
    base = base_of(name, tiny, tiny_bloom)
    bank, extras = banks[base], RUN[name][1]
    text = said(zoo / name, base)
    assert f"'{name}' was made by" in text and f"for the base model '{base.name}'" in text and "scaling" in text
    assert ("slower than plain LoRA (" + ", ".join(extras) in text) if extras else ("the fast swap" in text)
    info, before = adapters.read_adapter(zoo / name, str(base)), logits(bank.model, bank)
    assert info.extras == extras
    bank.load(info)
    assert bank.adapter_bytes(name) == 4 * info.parameters or name == "tokens"
    bank.swap(name)
    ours = logits(bank.model, bank)
    assert torch.allclose(ours, pefts(base, zoo / name, bank), atol=1e-5) and (ours - before).abs().max() > 0.1
    bank.swap(None)
    assert logits(bank.model, bank).equal(before)
    bank.swap(name)
    bank.unload(name)
    assert logits(bank.model, bank).equal(before) and not bank._whole


@pytest.mark.parametrize("name, words", [
    ("unsloth", "made by Unsloth with PEFT"), ("axolotl", "made by axolotl with PEFT"), ("old-dora", "an old version"),
    ("plain", "rank 4, alpha 8, scaling 2 (alpha / r), on 6 layers (q_proj, v_proj, down_proj)"),
    ("rslora", "scaling 4 (alpha / sqrt(r))"), ("patterns", "other ones for some layers (rank_pattern, alpha_pattern)"),
    ("dora-head", "it holds: DoRA, its own 'lm_head'."), ("one-layer", "on 3 layers"), ("dora", "jobs export")])
def test_the_doctor_says_who_made_it_and_what_it_is(name, words, zoo, tiny):
    text = said(zoo / name, tiny)
    assert re.search(re.escape(words), text) or words in text.replace("down_proj, q_proj, v_proj", "q_proj, v_proj, down_proj")


def test_swaps_between_dora_lora_and_whole_modules_give_pefts_logits_in_every_direction(zoo, tiny, banks):
    bank = banks[tiny]
    names = ["plain", "dora", "dora-head", "embeddings", "patterns"]
    wanted = {None: logits(bank.model, bank), **{name: pefts(tiny, zoo / name, bank) for name in names}}
    try:
        for name in names:
            bank.load(adapters.read_adapter(zoo / name, str(tiny)))
        for one in (None, *names):
            for other in (None, *names):
                for name in (one, other):
                    bank.swap(name)
                    assert logits(bank.model, bank).equal(wanted[name]), (one, other)
        bank.swap("embeddings")
        settings = adapters.Settings(max_new_tokens=3)
        mixed = bank.generate_mixed([PROMPT] * 3, ["plain", None, "patterns"], settings)
        assert bank.active == "embeddings" and logits(bank.model, bank).equal(wanted["embeddings"])
        assert [answer.text for answer in mixed] == [bank.generate(PROMPT, name, settings).text for name in ("plain", None, "patterns")]
        text = refused(lambda: bank.generate_mixed([PROMPT] * 2, ["dora-head", "plain"]))
        assert "dora-head cannot share a batch" in text and "DoRA, its own lm_head" in text
        assert bank.generate_mixed([PROMPT] * 2, ["dora"] * 2, settings)[0].text == bank.generate(PROMPT, "dora", settings).text
    finally:
        bank.sync([])
    assert logits(bank.model, bank).equal(wanted[None]) and not any(p.requires_grad for p in bank.model.parameters())


def test_the_panel_says_what_is_slower_and_keeps_it_out_of_the_batch(zoo, tiny, tmp_path):
    from helpers.panel import ALL, Panel

    for name in ("plain", "dora"):
        shutil.copytree(zoo / name, tmp_path / "shelf" / name)
    panel = Panel(base_name=str(tiny), prebuilt=tmp_path / "shelf", custom=tmp_path / "none")
    panel.wait(60)
    labels = [label for label, _ in panel.adapter.options]
    assert "dora · rank 4 · slower (DoRA)" in labels and "plain · rank 4" in labels
    panel.mode.value, panel.numbers["max_new_tokens"].value = ALL, 2
    panel.run()
    panel.wait(60)
    assert panel.error is None and "not in the batch, as no plain LoRA: dora" in panel.status.value
    assert [entry["adapter"] for entry in panel.history] == ["base", "plain"]


# ------------------------------------------------------------------------------------------------ what is converted


def mlx(zoo: Path, tiny: Path, folder: Path, kind: str = "lora", **parameters) -> Path:
    """The adapter of PEFT's form as mlx_lm saves it: its own names, matrices on their side, and a scale."""
    info, tensors = read_tensors(zoo / ("dora" if kind == "dora" else "plain"), str(tiny))
    names = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}
    folder.mkdir()
    saved = {}
    for name, tensor in tensors.items():
        old = next(ending for ending in names if name.endswith(ending))
        saved[name.removeprefix("base_model.model.").replace(old, names[old])] = tensor.T.contiguous() if tensor.dim() == 2 else tensor
    save_file(saved, folder / doctor.MLX, {"format": "mlx"})
    config = {"fine_tune_type": kind, "model": "mlx-community/tiny-4bit", "num_layers": 2, "adapter_path": "adapters",
              "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": info.scaling, **parameters}}
    (folder / adapters.CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind, parameters", [("lora", {}), ("lora", {"scale": 1.0, "alpha": 8}), ("dora", {})])
def test_mlx_adapters_become_pefts(kind, parameters, zoo, tiny, tmp_path, banks):
    folder, source = mlx(zoo, tiny, tmp_path / "mlx", kind, **parameters), "dora" if kind == "dora" else "plain"
    text = said(folder, None)
    assert "was made by MLX for the base model 'mlx-community/tiny-4bit'" in text and "rank 4, alpha 8.0, scaling 2" in text
    assert "refused" in text and ("DoRA" in text) == (kind == "dora")
    assert "can be converted exactly to" in said(folder, tiny)
    out = doctor.convert(folder, tmp_path / "out", str(tiny))
    assert sorted(path.name for path in out.iterdir()) == [adapters.CONFIG, adapters.WEIGHTS]
    assert torch.allclose(pefts(tiny, out, banks[tiny]), pefts(tiny, zoo / source, banks[tiny]), atol=1e-5)
    assert adapters.read_adapter(out, str(tiny)).extras == RUN[source][1]


@pytest.mark.parametrize("name", ["rslora", "patterns", "all-linear", "unsloth", "one-layer"])
def test_a_converted_adapter_is_plain_and_gives_the_same_logits(name, zoo, tiny, tmp_path, banks):
    out = doctor.convert(zoo / name, tmp_path / "out", str(tiny))
    config = json.loads((out / adapters.CONFIG).read_text())
    assert isinstance(config["target_modules"], list) and not config.keys() & {"use_rslora", "exclude_modules", "auto_mapping"}
    assert torch.allclose(pefts(tiny, out, banks[tiny]), pefts(tiny, zoo / name, banks[tiny]), atol=1e-5)


@pytest.mark.parametrize("change", [
    lambda name: re.sub(r"\.weight$", ".default.weight", name), lambda name: "base_model.model." + name,
    lambda name: name.removeprefix("base_model.model."), lambda name: name.replace("self_attn", "_fsdp_wrapped_module.self_attn")])
def test_names_that_peft_would_pass_over_are_mended(change, zoo, tiny, tmp_path, banks):
    folder = shutil.copytree(zoo / "plain", tmp_path / "named")
    renamed(folder, change)
    assert "It does not run as it is: It lacks" in said(folder, tiny) and "--convert" in said(folder, tiny)
    out = doctor.convert(folder, tmp_path / "out", str(tiny))
    assert torch.allclose(pefts(tiny, out, banks[tiny]), pefts(tiny, zoo / "plain", banks[tiny]), atol=1e-5)


def test_what_is_no_plain_lora_is_only_merged(zoo, tiny, tmp_path):
    text = refused(lambda: doctor.convert(zoo / "dora", tmp_path / "out", str(tiny)))
    assert "cannot become plain LoRA, as it is DoRA" in text and "--to merged" in text and not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize("name", ["patterns", "dora-head", "embeddings", "tokens", "bloom-lora-bias", "bloom-biases"])
def test_a_merged_model_gives_pefts_logits(name, zoo, tiny, tiny_bloom, tmp_path, banks):
    base = base_of(name, tiny, tiny_bloom)
    model, _ = export.merged_model(*read_tensors(zoo / name, str(base)), str(base))
    assert torch.allclose(logits(model, banks[base]), pefts(base, zoo / name, banks[base]), atol=2e-4)
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(logits(again, banks[base]), logits(model, banks[base]), atol=1e-4)  # untied heads, too


def test_the_export_that_the_doctor_names_merges_dora(zoo, tiny, tmp_path, banks):
    plan = plan_export(zoo / "dora-head", "merged", None, tmp_path / "out", str(tiny), "sql")
    merged = AutoModelForCausalLM.from_pretrained(export.export(plan), dtype=torch.float32).eval()
    assert torch.allclose(logits(merged, banks[tiny]), pefts(tiny, zoo / "dora-head", banks[tiny]), atol=0.05)  # float16
    assert "holds nothing else" in refused(lambda: export.export(replace(plan, to="gguf-lora", out=tmp_path / "lora")))


# ------------------------------------------------------------------------------------------------ what is refused


def grown(tiny: Path, folder: Path) -> Path:
    """Three tokens were added before training: PEFT saves both tables whole."""
    model = copy.deepcopy(loaded(tiny))
    model.resize_token_embeddings(model.config.vocab_size + 3)
    get_peft_model(model, LoraConfig(r=4, target_modules=MODULES, task_type="CAUSAL_LM")).save_pretrained(folder)
    return folder


def test_added_tokens_are_refused_with_what_to_do(tiny, tmp_path):
    text = refused(lambda: adapters.read_adapter(grown(tiny, tmp_path / "grown"), str(tiny)))
    assert "tokens were added" in text and "merge it where it was made" in text
    assert "is refused on" in said(tmp_path / "grown", tiny)


def test_nothing_in_a_folder_is_ever_run(zoo, tiny, tmp_path, banks):
    folder, mark = shutil.copytree(zoo / "plain", tmp_path / "trap"), tmp_path / "owned"
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    for name in ("modeling.py", "__init__.py", "adapter_model.py", "conftest.py"):
        (folder / name).write_text(code)
    (folder / "adapter_model.bin").write_bytes(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())
    (folder / "training_args.bin").write_bytes(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())
    assert "adapter_model.bin, adapter_model.py" in said(folder, tiny) and "never opened here" in said(folder, tiny)
    banks[tiny].load(adapters.read_adapter(folder, str(tiny)))
    banks[tiny].sync([])
    doctor.convert(folder, tmp_path / "out", str(tiny))
    assert not mark.exists() and sorted(path.name for path in (tmp_path / "out").iterdir()) == [adapters.CONFIG, adapters.WEIGHTS]
    (folder / adapters.WEIGHTS).unlink()
    assert "pickled weights" in refused(lambda: doctor.diagnose(folder)) and not mark.exists()
    (folder / adapters.WEIGHTS).symlink_to(zoo / "plain" / adapters.WEIGHTS)
    assert "link to another place" in refused(lambda: doctor.diagnose(folder))
    edit(folder, auto_map={"AutoModel": "modeling.Model"})
    (folder / adapters.WEIGHTS).unlink()
    shutil.copy(zoo / "plain" / adapters.WEIGHTS, folder)
    assert "auto_map" in said(folder, tiny) and "is refused on" in said(folder, tiny) and not mark.exists()


def header_of(folder: Path, change, name: str = adapters.WEIGHTS) -> None:
    """Rewrite the header alone: a lie about what follows."""
    data = (folder / name).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = change(json.loads(data[8:8 + size]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size:])


@pytest.mark.parametrize("name", [adapters.WEIGHTS, doctor.MLX])
@pytest.mark.parametrize("change", [
    lambda header: {name: {**entry, "shape": [2**40, 2**20]} if "shape" in entry else entry for name, entry in header.items()},
    lambda header: {name: {**entry, "shape": "12"} if "shape" in entry else entry for name, entry in header.items()},
    lambda header: {name: {**entry, "shape": []} if "shape" in entry else entry for name, entry in header.items()},
    lambda header: [1], lambda header: b"[" * 100_000, lambda header: {name: 5 for name in header}, lambda header: {}])
def test_lies_about_sizes_are_refused(change, name, zoo, tiny, tmp_path):
    folder = mlx(zoo, tiny, tmp_path / "mlx") if name == doctor.MLX else shutil.copytree(zoo / "dora", tmp_path / "dora")
    header_of(folder, change, name)
    try:
        text = said(folder, tiny)
        assert "is refused on" in text
    except WorkbookError as error:
        text = str(error)
    assert re.search("damaged|lacks|has no lora_a|where rank", text), text
    refused(lambda: doctor.convert(folder, tmp_path / "out", str(tiny)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, config", [
    ("extra", {}), ("a.\x1b[31mred.lora_A.weight", {}), ("x.lora_A.weight", {"base_model_name_or_path": ["\0"]}),
    ("x.lora_A", {"base_model_name_or_path": "x" * 9999, "r": -1}), ("y", {"use_rslora": 1, "r": "4", "peft_version": {"a": "\n"}}),
    ("m", {"base_model_name_or_path": "", "auto_mapping": "\n"}), ("z.modules_to_save.default.weight", {"peft_type": None})])
def test_strange_words_are_shown_safely(name, config, zoo, tiny, tmp_path):
    folder = shutil.copytree(zoo / "plain", tmp_path / "odd")
    save_file({name: torch.zeros(2, 2)}, folder / adapters.WEIGHTS)
    edit(folder, **config)
    assert said(folder, tiny).isprintable() and "is refused on" in said(folder, tiny)


def test_a_file_larger_than_its_base_model_is_not_read(zoo, tiny, tmp_path):
    folder = mlx(zoo, tiny, tmp_path / "mlx")
    with open(folder / doctor.MLX, "ab") as file:
        file.truncate(20 * 2**30)  # sparse
    assert "more than the" in refused(lambda: doctor.convert(folder, tmp_path / "out", str(tiny)))


@pytest.mark.parametrize("changes, words", [
    ({"peft_type": "IA3"}, "setting 'peft_type' ('IA3')"), ({"init_lora_weights": "pissa"}, "('pissa')"),
    ({"r": "4"}, "rank r is '4'"), ({"lora_alpha": None}, "lora_alpha is None"), ({"use_dora": True}, "lacks 6 tensors"),
    ({"base_model_name_or_path": "meta-llama/Llama-3-8B"}, "belongs to the base model 'meta-llama/Llama-3-8B'"),
    ({"target_modules": ["wqkv"]}, "which"), ({"layer_replication": [[0, 1]]}, "layer_replication")])
def test_what_cannot_run_is_described_and_refused_in_a_sentence(changes, words, zoo, tiny, tmp_path, monkeypatch):
    folder = shutil.copytree(zoo / "plain", tmp_path / "odd")
    edit(folder, **changes)
    monkeypatch.setattr(doctor, "EMBEDDED", str(tiny))
    text = said(folder, None)
    assert words in text and f"is refused on {tiny}" in text and "was made by PEFT" in text
    assert ("--base" in text) == ("base_model_name_or_path" in changes)


@pytest.mark.parametrize("parameters, words", [
    ({"fine_tune_type": "full"}, "of the kind 'full'"), ({"lora_parameters": None}, "no scale"),
    ({"lora_parameters": {"alpha": 8, "scale": 2.0}}, "alpha without a rank")])
def test_what_mlx_writes_otherwise_is_refused(parameters, words, zoo, tiny, tmp_path):
    folder = mlx(zoo, tiny, tmp_path / "mlx")
    edit(folder, **parameters)
    assert words in refused(lambda: doctor.diagnose(folder, str(tiny)))


def test_the_command_judges_and_converts(zoo, tiny, tmp_path, capsys):
    from helpers import jobs

    folder = mlx(zoo, tiny, tmp_path / "mlx")
    assert jobs.main(["doctor", str(folder), "--base", str(tiny), "--convert", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "was made by MLX" in printed and printed.endswith(f"Converted: {tmp_path / 'out'}\n")
    assert adapters.read_adapter(tmp_path / "out", str(tiny)).extras == ()


@pytest.mark.parametrize("words, said", [
    (["doctor"], "arguments are required: adapter"), (["export", "x", "--to", "gguf", "--base", "y"], "unrecognized arguments: --base"),
    (["doctor", "/nowhere"], "There is no adapter folder /nowhere"), (["doctor", "helpers"], "has no adapter_config.json")])
def test_the_command_refuses_in_a_sentence(words, said, capsys):
    from helpers import jobs

    os.chdir(Path(__file__).parent.parent)
    try:
        assert jobs.main(words) == 2
    except SystemExit as ended:
        assert ended.code == 2
    assert said in capsys.readouterr().err
