"""Adapters: a bad folder is refused in one sentence; swapping is a flip that gives PEFT's own logits, bit for bit."""

import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import WorkbookError, adapters, base_models

MODULES = ["q_proj", "v_proj", "down_proj"]


def make_adapter(base: Path, folder: Path, seed: int = 0, rank: int = 4, modules=MODULES, **options) -> Path:
    """A random LoRA adapter (B is not zero) of a base model, saved as PEFT saves it, naming the base as the workbook does."""
    import torch
    from peft import LoraConfig, get_peft_model

    model, _ = base_models.load(str(base))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules), task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    edit(folder, base_model_name_or_path=base.name)
    return folder


def edit(folder: Path, **changes) -> None:
    path = folder / adapters.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="session")
def made(tiny, tmp_path_factory) -> Path:
    return make_adapter(tiny, tmp_path_factory.mktemp("adapters") / "good")


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "mine")


def refusal(folder: Path, base: Path) -> str:
    with pytest.raises(WorkbookError) as caught:
        adapters.read_adapter(folder, str(base))
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 600
    return text


# --------------------------------------------------------------------------------------------------- what is accepted


def test_a_good_adapter_is_described(folder, tiny):
    info = adapters.read_adapter(folder, str(tiny))
    assert (info.name, info.rank, info.alpha, info.scaling) == ("mine", 4, 8, 2.0)
    assert info.target_modules == ("q_proj", "v_proj", "down_proj") and len(info.modules) == 6
    assert info.bytes == (folder / adapters.WEIGHTS).stat().st_size
    assert info.parameters == 2 * 4 * ((64 + 64) + (64 + 32) + (128 + 64))
    assert info.metrics is None and info.task is None and not info.verified


def test_metrics_name_the_task_and_guard_the_weights(folder, tiny):
    digest = base_models.sha256(folder / adapters.WEIGHTS)
    (folder / adapters.METRICS).write_text(json.dumps({"config": {"task": "sql"}, "weights_sha256": digest}))
    info = adapters.read_adapter(folder, str(tiny))
    assert info.task == "sql" and info.verified
    data = bytearray((folder / adapters.WEIGHTS).read_bytes())
    data[-8] ^= 1  # the lowest bit of one number: still a good file by every other check
    (folder / adapters.WEIGHTS).write_bytes(data)
    assert "has changed since metrics.json" in refusal(folder, tiny)


def test_rslora_scales_by_the_square_root(tiny, tmp_path):
    info = adapters.read_adapter(make_adapter(tiny, tmp_path / "rs", use_rslora=True), str(tiny))
    assert info.scaling == 8 / 2


def test_a_bloom_adapter_is_read_on_a_bloom_base(tiny_bloom, tmp_path):
    info = adapters.read_adapter(make_adapter(tiny_bloom, tmp_path / "b", modules=["query_key_value"]), str(tiny_bloom))
    assert info.target_modules == ("query_key_value",)


def test_weights_are_read_beside_a_pickle_that_is_never_opened(folder, tiny):
    (folder / "training_args.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert adapters.read_adapter(folder, str(tiny)).rank == 4


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("changes", "said"), [
    ({"base_model_name_or_path": "bigscience/bloom-1b1"}, "belongs to the base model 'bigscience/bloom-1b1'"),
    ({"base_model_name_or_path": None}, "belongs to the base model None"),
    ({"r": 8}, "where rank 8 on this base model needs"),
    ({"r": True}, "its rank r is True"),
    ({"r": 10**9}, "its rank r is"),
    ({"r": "4"}, "its rank r is '4'"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    ({"target_modules": ["q_proj"]}, "does not account for"),
    ({"target_modules": [*MODULES, "k_proj"]}, "lacks 4 tensors"),
    ({"target_modules": [*MODULES, "wqkv"]}, "targets the module 'wqkv'"),
    ({"target_modules": ["lm_head"]}, "targets the module 'lm_head'"),
    ({"target_modules": "(a+)+$"}, "a pattern is not run"),
    ({"target_modules": []}, "target_modules []"),
    ({"peft_type": "IA3"}, "of the kind 'IA3'"),
    ({"task_type": "SEQ_CLS"}, "made for 'SEQ_CLS'"),
    ({"use_dora": True}, "uses use_dora (DoRA"),
    ({"bias": "all"}, "uses bias"),
    ({"lora_bias": True}, "uses lora_bias"),
    ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
    ({"rank_pattern": {"q_proj": 8}}, "uses rank_pattern"),
    ({"alpha_pattern": {"q_proj": 8}}, "uses alpha_pattern"),
    ({"auto_mapping": {"base_model_class": "system", "parent_library": "os"}}, "uses auto_mapping"),
    ({"auto_map": {"AutoModel": "evil.Model"}}, "setting 'auto_map'"),
    ({"megatron_config": {"a": 1}}, "setting 'megatron_config'"),
    ({"init_lora_weights": "pissa"}, "initialised with 'pissa'"),
])
def test_configs_are_refused(folder, tiny, changes, said):
    edit(folder, **changes)
    assert said in refusal(folder, tiny)


def rewrite(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / adapters.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / adapters.WEIGHTS)


def first(tensors: dict) -> str:
    return next(name for name in sorted(tensors) if "lora_A" in name)


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: t.pop(first(t)), "lacks 1 tensors"),
    (lambda t: t.update(extra=t[first(t)].clone()), "does not account for ('extra')"),
    (lambda t: t[first(t)].view(-1)[3:4].fill_(float("nan")), "not finite"),
    (lambda t: t[first(t)].view(-1)[3:4].fill_(float("inf")), "not finite"),
    (lambda t: t.update({first(t): t[first(t)][:, :5].clone()}), "of shape [4, 5]"),
    (lambda t: t.update({first(t): t[first(t)].double()}), "as torch.float64"),
])
def test_tensors_are_refused(folder, tiny, change, said):
    rewrite(folder, change)
    assert said in refusal(folder, tiny)


def test_pickled_weights_are_never_opened(folder, tiny):
    (folder / adapters.WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    assert "pickled weights (adapter_model.bin)" in refusal(folder, tiny)


@pytest.mark.parametrize("kept", [0, 3, 7, 8, 9, 500, -1])
def test_cut_weights_are_refused(folder, tiny, kept):
    data = (folder / adapters.WEIGHTS).read_bytes()
    (folder / adapters.WEIGHTS).write_bytes(data[:kept])
    assert "damaged" in refusal(folder, tiny)


def test_a_header_that_claims_gigabytes_is_refused(folder, tiny):
    data = (folder / adapters.WEIGHTS).read_bytes()
    (folder / adapters.WEIGHTS).write_bytes(struct.pack("<Q", 2**40) + data[8:])
    assert "header claims 1,099,511,627,776 bytes" in refusal(folder, tiny)
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**31, 2**20], "data_offsets": [0, 2**53]}}).encode()
    (folder / adapters.WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    assert "damaged" in refusal(folder, tiny)


def test_a_file_larger_than_the_adapter_could_be_is_not_read(folder, tiny):
    with open(folder / adapters.WEIGHTS, "ab") as file:
        file.truncate(20 * 2**30)  # sparse: 20 GB that are not there
    assert "more than the" in refusal(folder, tiny)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), name=st.sampled_from([adapters.WEIGHTS, adapters.CONFIG]))
def test_a_flipped_bit_is_refused_or_harmless(made, tiny, tmp_path_factory, where, bit, name):
    """Anywhere in the files: a clear refusal, or an adapter whose numbers are finite and whose shapes are right."""
    import torch

    folder = shutil.copytree(made, tmp_path_factory.mktemp("flip") / "mine")
    data = bytearray((folder / name).read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    (folder / name).write_bytes(data)
    try:
        info, tensors = adapters._read(folder, str(tiny))
    except WorkbookError:
        return
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values()) and 0 < info.rank <= adapters.MAX_RANK


@pytest.mark.parametrize("name", [adapters.WEIGHTS, adapters.CONFIG])
def test_links_and_pipes_are_refused(folder, tiny, tmp_path, name):
    moved = tmp_path / "elsewhere"
    shutil.move(folder / name, moved)
    (folder / name).symlink_to(moved)
    assert "link to another place" in refusal(folder, tiny)
    (folder / name).unlink()
    os.mkfifo(folder / name)  # opening it the ordinary way would wait for ever
    assert "not an ordinary file" in refusal(folder, tiny)
    (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()
    (folder / name).mkdir()
    assert "not an ordinary file" in refusal(folder, tiny)


@pytest.mark.parametrize(("text", "said"), [
    ("", "not valid JSON"), ("[1]", "not a JSON object"), ("[" * 200_000, "not valid JSON"), ("\xff", "not valid JSON"),
    ("x" * 2_000_000, "more than the 1,000,000"),
])
def test_a_broken_config_file_is_refused(folder, tiny, text, said):
    (folder / adapters.CONFIG).write_bytes(text.encode("latin-1"))
    assert said in refusal(folder, tiny)


def test_missing_folders_and_strange_names_are_refused(made, tiny, tmp_path):
    assert "There is no adapter folder" in refusal(tmp_path / "nothing", tiny)
    assert "cannot be shown safely" in refusal(shutil.copytree(made, tmp_path / "<img src=x>"), tiny)
    (tmp_path / "empty").mkdir()
    assert "has no adapter_config.json" in refusal(tmp_path / "empty", tiny)


# ---------------------------------------------------------------------------------------------------------- discovery


def test_discovery_labels_custom_adapters_and_reports_broken_ones(made, tiny, tmp_path, monkeypatch):
    prebuilt, custom = tmp_path / "prebuilt", tmp_path / "custom"
    shutil.copytree(made, prebuilt / "sql")
    shutil.copytree(made, custom / "sql")
    shutil.copytree(made, custom / ".publishing-1" / "adapter")
    edit(shutil.copytree(made, custom / "broken"), r=5)
    (custom / "notes").mkdir()
    (custom / "away").symlink_to(prebuilt / "sql")
    monkeypatch.setenv("CUSTOM_LORA_ADAPTERS_DIR", str(custom))
    found = adapters.discover(str(tiny), prebuilt)
    assert [(info.name, info.title) for info in found.adapters] == [("sql", "sql"), ("custom/sql", "Custom: sql")]
    assert sorted(found.problems) == ["custom/away", "custom/broken"]
    assert re.search("rank 5", found.problems["custom/broken"]) and "another place" in found.problems["custom/away"]


def test_discovery_of_nothing_is_empty(tiny, tmp_path):
    found = adapters.discover(str(tiny), tmp_path / "no", tmp_path / "none")
    assert found.adapters == [] and found.problems == {}
