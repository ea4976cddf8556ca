"""Adapters: a bad folder is refused in one sentence; swapping is a flip that gives PEFT's own logits, bit for bit."""

import cProfile
import dataclasses
import json
import os
import re
import shutil
import struct
from pathlib import Path
from unittest.mock import ANY

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import WorkbookError, adapters, base_models

MODULES = ["q_proj", "v_proj", "down_proj"]
SLOW = r"(?:\w|\.|.)*(?:\w|\.|.)*(?:\w|\.|.)*(?:\w|.)*[^a-z]"  # a pattern that would take for ever on a layer's name


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


@pytest.mark.parametrize("mapping", [
    {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"},
    {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama", "unsloth_fixed": True},
    {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}])
def test_an_auto_mapping_that_names_transformers_own_class_is_ignored(folder, tiny, mapping, monkeypatch):
    """What PEFT writes without a task_type, and Unsloth. The class is not looked up: it need not exist."""
    import importlib

    edit(folder, task_type=None, auto_mapping=mapping | {"base_model_class": "NoSuchModel"})
    monkeypatch.setattr(importlib, "import_module", lambda name, *_: pytest.fail(f"{name} was imported"))
    assert adapters.read_adapter(folder, str(tiny)).rank == 4


def test_an_adapter_that_peft_saved_without_a_task_type_is_read_and_acts(tiny, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base_models.load(str(tiny))[0], LoraConfig(r=4, target_modules=["q_proj"]))
    torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    model.save_pretrained(tmp_path / "plain")  # names the base by its path
    config = json.loads((tmp_path / "plain" / adapters.CONFIG).read_text())
    assert config["auto_mapping"]["base_model_class"] == "LlamaForCausalLM" and config["base_model_name_or_path"] == str(tiny)
    bank = adapters.AdapterBank(str(tiny))
    bank.load(adapters.read_adapter(tmp_path / "plain", str(tiny)))
    with bank.using("plain") as ours:
        assert logits(ours, bank).equal(logits(model.eval(), bank))


@pytest.mark.parametrize("named", ["{name}", "models/{name}", "/home/else/{name}/", "..\\models\\{name}", "org/{name}", "{path}"])
def test_a_base_model_in_a_folder_goes_by_the_last_part_of_its_path(folder, tiny, named):
    edit(folder, base_model_name_or_path=named.format(name=tiny.name, path=tiny))
    for revision in (None, "main", "0123456789abcdef0123456789abcdef01234567", "gguf-sha256-0123456789ab", 5, ["sha256-0"]):
        edit(folder, revision=revision)
        assert adapters.read_adapter(folder, str(tiny)).rank == 4


@pytest.mark.parametrize("named", ["{name}/other", "other-{name}", "{name}2", "/", "", " ", None, 0, True, ["{name}"], {}])
def test_another_folders_name_is_refused(folder, tiny, named):
    edit(folder, base_model_name_or_path=named.format(name=tiny.name) if isinstance(named, str) else named)
    for revision in (None, "main", "sha256-0123456789ab", "gguf-sha256-0123456789ab"):
        edit(folder, revision=revision)
        assert "belongs to the base model" in refusal(folder, tiny)


@pytest.mark.parametrize("named", ["models/elsewhere", "org/model", "", None])
def test_the_same_weights_are_the_same_base_under_every_name(folder, tiny, tmp_path, named):
    edit(folder, base_model_name_or_path=named, revision=base_models.revision_of(str(tiny)))
    copy = shutil.copytree(tiny, tmp_path / "moved")
    assert adapters.read_adapter(folder, str(tiny)) == adapters.read_adapter(folder, str(copy))


def test_other_weights_under_the_same_name_are_refused(folder, tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    edit(folder, base_model_name_or_path=tiny.name, revision=base_models.revision_of(str(tiny)))
    other = shutil.copytree(tiny, tmp_path / "models" / tiny.name)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert adapters.read_adapter(folder, str(tiny)).rank == 4
    assert f"was trained on other weights of {tiny.name} (sha256-" in refusal(folder, other)
    edit(folder, revision=None)  # nothing known of its weights: the name decides
    assert adapters.read_adapter(folder, str(other)).rank == 4


def test_the_embedded_base_is_known_by_its_hash_or_by_its_hub_id(folder, monkeypatch):
    """Names and revisions alone: no weights of it are read here."""
    from helpers import adapter_files

    embedded = adapters.EMBEDDED
    revision = base_models.resolve(embedded).revision
    monkeypatch.setattr(adapter_files, "_revision_of", lambda name: revision)
    hub_id = base_models.resolve(embedded).hub_id
    for named, noted, fits in ((hub_id, revision, True), (hub_id, None, True), (embedded, "main", True), ("x/y", revision, True),
                               (hub_id, "sha256-0123456789ab", True), (hub_id.split("/")[1], None, False),
                               (f"models/{embedded}", None, False), ("x/y", revision[:-1], False)):
        config = {"base_model_name_or_path": named, "revision": noted}
        try:
            adapter_files._check_base(config, embedded)
            assert fits, config
        except adapter_files.Fault as fault:
            assert not fits and f"not to {hub_id}" in str(fault), config


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
    ({"target_modules": "(a+)+$"}, "fit no layer"),
    ({"target_modules": SLOW}, "broken or takes too long"),
    ({"target_modules": "(q_proj"}, "broken or takes too long"),
    ({"exclude_modules": 5}, "in a way that PEFT refuses"),
    ({"exclude_modules": ".*"}, "fit no layer"),
    ({"layers_to_transform": [0], "layers_pattern": "(a+)+"}, "layers_pattern '(a+)+'"),
    ({"target_modules": []}, "target_modules []"),
    ({"peft_type": "IA3"}, "uses the setting 'peft_type' ('IA3'), which is not run here"),
    ({"task_type": "SEQ_CLS"}, "uses the setting 'task_type' ('SEQ_CLS')"),
    ({"use_dora": True}, "lacks 6 tensors, one is ['base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector']"),
    ({"bias": "some"}, "uses the setting 'bias' ('some')"),
    ({"lora_bias": True}, "lacks 6 tensors"),
    ({"modules_to_save": ["lm_head"]}, "lacks 1 tensors, one is ['base_model.model.lm_head.weight']"),
    ({"modules_to_save": "lm_head"}, "modules_to_save 'lm_head'"),
    ({"trainable_token_indices": [5]}, "lacks 1 tensors, one is ['base_model.model.model.embed_tokens.token_adapter."),
    ({"trainable_token_indices": [5, 5]}, "must be different tokens of model.embed_tokens"),
    ({"trainable_token_indices": [10**9]}, "must be different tokens of model.embed_tokens"),
    ({"trainable_token_indices": {"lm_head": [5]}}, "must be different tokens of model.embed_tokens"),
    ({"trainable_token_indices": "5"}, "must be different tokens of model.embed_tokens"),
    ({"rank_pattern": {"q_proj": 8}}, "where rank 8 on this base model needs"),
    ({"rank_pattern": {"q_proj": 0}}, "its rank r of 'q_proj' is 0"),
    ({"rank_pattern": ["q_proj"]}, "no map of names to numbers"),
    ({"rank_pattern": {SLOW: 8}}, "rank_pattern with a pattern that is broken"),
    ({"alpha_pattern": {"q_proj": "8"}}, "lora_alpha of 'q_proj' is '8'"),
    ({"auto_mapping": {"base_model_class": "system", "parent_library": "os"}}, "uses the setting 'auto_mapping'"),
    ({"auto_mapping": {"base_model_class": "M", "parent_library": "transformers_evil"}}, "uses the setting 'auto_mapping'"),
    ({"auto_mapping": {"base_model_class": "M", "parent_library": "transformers.models/../evil"}}, "uses the setting 'auto_mapping'"),
    ({"auto_mapping": {"base_model_class": "M", "parent_library": "evil.transformers"}}, "uses the setting 'auto_mapping'"),
    ({"auto_mapping": {"base_model_class": "M", "parent_library": ["transformers"]}}, "uses the setting 'auto_mapping'"),
    ({"auto_mapping": {"parent_library": "transformers"}}, "uses the setting 'auto_mapping'"),
    ({"auto_mapping": "transformers"}, "uses the setting 'auto_mapping'"),
    ({"auto_map": {"AutoModel": "evil.Model"}}, "setting 'auto_map'"),
    ({"megatron_config": {"a": 1}}, "setting 'megatron_config'"),
    ({"init_lora_weights": "pissa"}, "uses the setting 'init_lora_weights' ('pissa')"),
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
    assert "header too large" in refusal(folder, tiny)
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
        info, tensors = adapters.read_tensors(folder, str(tiny))
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


def test_a_folder_that_cannot_be_read_hides_no_other(made, tiny, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "good")
    shutil.copytree(made, tmp_path / "locked")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    listed = Path.iterdir

    def iterdir(self):  # tests may run as a user whom no permission stops
        if self.name == "locked":
            raise PermissionError(13, "Permission denied", str(self))
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    found = adapters.discover(str(tiny), tmp_path, tmp_path / "none")
    assert [info.name for info in found.adapters] == ["good"] and sorted(found.problems) == ["circle", "locked"]
    assert "cannot be read" in found.problems["locked"] and "is a link" in found.problems["circle"]


def test_discovery_of_nothing_is_empty(tiny, tmp_path):
    found = adapters.discover(str(tiny), tmp_path / "no", tmp_path / "none")
    assert found.adapters == [] and found.problems == {}


# --------------------------------------------------------------------------------------------------------------- bank

PROMPT = "<QUESTION>: how many?\n<SQL>: "


@pytest.fixture(scope="session")
def shelf(tiny, tmp_path_factory) -> Path:
    """Three adapters of different rank and targets on the tiny base model."""
    root = tmp_path_factory.mktemp("shelf")
    make_adapter(tiny, root / "instruct", 1)
    make_adapter(tiny, root / "sql", 2, rank=8, modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    make_adapter(tiny, root / "detox-1.5", 3, rank=2, use_rslora=True)
    return root


def infos(tiny, shelf):
    return adapters.discover(str(tiny), shelf, shelf / "none").adapters


@pytest.fixture
def bank(tiny, shelf):
    bank = adapters.AdapterBank(str(tiny))
    assert bank.sync(infos(tiny, shelf)) == {}
    return bank


def logits(model, bank):
    import torch

    with torch.inference_mode():
        return model(**bank.tokenizer(PROMPT, return_tensors="pt")).logits


@pytest.fixture(scope="session")
def expected(tiny, shelf):
    """What PEFT itself computes: each adapter alone on a fresh base model, and several on one with set_adapter."""
    from peft import PeftModel

    wanted, together = {}, None
    for info in infos(tiny, shelf):
        model, _ = base_models.load(str(tiny))
        bank = adapters.AdapterBank(str(tiny))
        wanted[None] = logits(model, bank)
        wanted[info.name] = logits(PeftModel.from_pretrained(model, info.folder).eval(), bank)
        key = info.name.replace(".", "_")
        if together is None:
            together = PeftModel.from_pretrained(base_models.load(str(tiny))[0], info.folder, adapter_name=key).eval()
        else:
            together.load_adapter(info.folder, key)
    for name in list(wanted):
        if name is None:
            with together.disable_adapter():
                got = logits(together, bank)
        else:
            together.set_adapter(name.replace(".", "_"))
            got = logits(together, bank)
        assert got.equal(wanted[name])
    assert len({str(value) for value in wanted.values()}) == 4, "the adapters must differ for the comparison to say anything"
    return wanted


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.lists(st.sampled_from([None, "instruct", "sql", "detox-1.5"]), min_size=1, max_size=8))
def test_every_order_of_swaps_gives_pefts_logits_bit_for_bit(tiny, shelf, expected, order):
    bank = swapping_bank(tiny, shelf)
    for name in order:
        bank.swap(name)
        assert logits(bank.model, bank).equal(expected[name]), f"{name} after {order}"


_BANKS = {}


def swapping_bank(tiny, shelf):
    if shelf not in _BANKS:
        _BANKS[shelf] = adapters.AdapterBank(str(tiny))
        _BANKS[shelf].sync(infos(tiny, shelf))
    return _BANKS[shelf]


def test_threads_never_see_each_others_adapter(bank, expected):
    from concurrent.futures import ThreadPoolExecutor

    names = [None, "instruct", "sql", "detox-1.5"]

    def one(number):
        name = names[number % 4]
        with bank.using(name) as model:
            return logits(model, bank).equal(expected[name])

    bank.swap("sql")
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(80)))
    assert bank.active == "sql" and logits(bank.model, bank).equal(expected["sql"])


def test_pefts_own_set_adapter_on_the_banks_model_agrees(bank, expected):
    bank.model.set_adapter(bank.key("sql"))
    assert logits(bank.model, bank).equal(expected["sql"])
    bank.swap("instruct")
    assert logits(bank.model, bank).equal(expected["instruct"])
    with bank.model.disable_adapter():
        assert logits(bank.model, bank).equal(expected[None])
    assert logits(bank.model, bank).equal(expected["instruct"])


def test_loading_unloading_and_loading_again_keeps_every_adapter_exact(tiny, shelf, expected):
    bank = adapters.AdapterBank(str(tiny))
    assert logits(bank.model, bank).equal(expected[None])
    found = {info.name: info for info in infos(tiny, shelf)}
    for name in ("sql", "instruct", "detox-1.5"):
        bank.load(found[name])
    bank.swap("sql")
    bank.unload("sql")
    assert bank.active is None and logits(bank.model, bank).equal(expected[None])
    bank.swap("detox-1.5")
    bank.load(found["sql"])
    assert logits(bank.model, bank).equal(expected["detox-1.5"])
    for name in ("sql", "instruct", "detox-1.5"):
        bank.swap(name)
        assert logits(bank.model, bank).equal(expected[name])
    for name in list(bank.adapters):
        bank.unload(name)
    assert logits(bank.model, bank).equal(expected[None]) and bank.generate(PROMPT, None, SHORT).tokens > 0
    bank.load(found["sql"])
    bank.swap("sql")
    assert logits(bank.model, bank).equal(expected["sql"])


@pytest.mark.parametrize("precision", ["full", "4bit"])
def test_a_second_adapter_with_layers_of_its_own_acts_alone_and_a_failed_one_not_at_all(tiny, tmp_path, monkeypatch, precision):
    """An interrupt in the middle of loading leaves base model and adapters as they were, and the adapter can be loaded later."""
    import torch
    from peft.tuners.lora import LoraModel

    for seed, (name, modules) in enumerate({"narrow": ["q_proj"], "wide": ["v_proj", "up_proj"]}.items()):
        make_adapter(tiny, tmp_path / name, seed, modules=modules)
    bank = adapters.AdapterBank(str(tiny), precision)
    ids = bank.tokenizer(PROMPT, return_tensors="pt").input_ids
    found = {name: adapters.read_adapter(tmp_path / name, str(tiny)) for name in ("narrow", "wide")}

    def logits(name):
        with bank.using(name) as model, torch.inference_mode():
            return model(ids, use_cache=False).logits

    bank.load(found["narrow"])
    before = [logits(None), logits("narrow")]
    with monkeypatch.context() as broken:
        broken.setattr(LoraModel, "_create_and_replace", interrupted_at_the_third_layer())
        with pytest.raises(KeyboardInterrupt):
            bank.load(found["wide"])
    assert list(bank.adapters) == ["narrow"] and torch.equal(logits(None), before[0]) and torch.equal(logits("narrow"), before[1])
    bank.load(found["wide"])
    assert torch.equal(logits(None), before[0]) and torch.equal(logits("narrow"), before[1])
    alone = adapters.AdapterBank(str(tiny), precision)
    alone.load(found["wide"])
    with alone.using("wide") as model, torch.inference_mode():
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits("wide"), expected)
    assert not torch.allclose(expected, before[0], atol=1e-3)
    assert not any(p.requires_grad for p in bank.model.parameters()) and not any(m.training for m in bank.model.modules())


def interrupted_at_the_third_layer():
    """PEFT's `_create_and_replace`, interrupted when it is called for the third time."""
    from peft.tuners.lora import LoraModel

    create, calls = LoraModel._create_and_replace, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return create(*arguments, **options)

    return interrupted


def test_an_interrupt_in_the_first_load_leaves_the_base_model(tiny, shelf, monkeypatch, expected):
    from peft.tuners.lora import LoraModel

    bank, info = adapters.AdapterBank(str(tiny)), infos(tiny, shelf)[0]
    before = [name for name, _ in bank.model.named_modules()]
    with monkeypatch.context() as broken:
        broken.setattr(LoraModel, "_create_and_replace", interrupted_at_the_third_layer())
        with pytest.raises(KeyboardInterrupt):
            bank.load(info)
    assert [name for name, _ in bank.model.named_modules()] == before and not bank.adapters
    assert logits(bank.model, bank).equal(expected[None]) and bank.generate(PROMPT, None, SHORT).tokens > 0
    bank.load(info)
    bank.swap(info.name)
    assert logits(bank.model, bank).equal(expected[info.name])


def test_mixed_batches_of_many_combinations_keep_one(bank):
    import gc

    import torch

    def count():
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    combinations = [["sql", None], ["sql", "instruct"], ["detox-1.5", "instruct"], ["detox-1.5", None], ["sql", "detox-1.5"]]
    counts = []
    for names in combinations:
        with bank.mixed(names):
            pass
        counts.append(count())
    assert max(counts) - min(counts) < 10, counts


def test_unloading_frees_the_adapters_memory(bank):
    def count():
        return sum(p.numel() for p in bank.model.parameters())

    before, info = count(), bank.adapters["sql"]
    assert bank.adapter_bytes("sql") == 4 * info.parameters
    bank.unload("sql")
    assert before - count() == info.parameters


def test_a_swap_copies_nothing(bank):
    before = {name: parameter.data_ptr() for name, parameter in bank.model.named_parameters()}
    for name in ("sql", None, "instruct", "sql"):
        assert bank.swap(name) >= 0
    assert before == {name: parameter.data_ptr() for name, parameter in bank.model.named_parameters()}


def test_unknown_and_doubled_names_are_refused(bank):
    for call in (lambda: bank.swap("none"), lambda: bank.unload("none"), lambda: bank.generate(PROMPT, "none"),
                 lambda: bank.generate_mixed([PROMPT], ["none"])):
        with pytest.raises(WorkbookError, match="No adapter 'none' is loaded"):
            call()
    with pytest.raises(WorkbookError, match="already loaded"):
        bank.load(bank.adapters["sql"])


def test_sync_follows_the_folders(tiny, shelf, tmp_path, expected):
    root = shutil.copytree(shelf, tmp_path / "shelf")
    bank = adapters.AdapterBank(str(tiny))
    look = lambda: bank.sync(adapters.discover(str(tiny), root, root / "none").adapters)
    look()
    assert sorted(bank.adapters) == ["detox-1.5", "instruct", "sql"]
    shutil.rmtree(root / "instruct")
    shutil.rmtree(root / "sql")
    make_adapter(tiny, root / "sql", 9, rank=2)  # another adapter under a known name
    shutil.copytree(shelf / "sql", root / "sql-new")
    look()
    assert sorted(bank.adapters) == ["detox-1.5", "sql", "sql-new"] and bank.adapters["sql"].rank == 2
    bank.swap("sql-new")
    assert logits(bank.model, bank).equal(expected["sql"])
    bank.swap("sql")
    assert not logits(bank.model, bank).equal(expected["sql"])
    make_adapter(tiny, root / "sql", 10, rank=2)  # trained again: the same shapes, other numbers
    before = logits(bank.model, bank)
    look()
    bank.swap("sql")
    assert not logits(bank.model, bank).equal(before)


def test_an_adapter_that_breaks_between_looking_and_loading_leaves_the_bank_whole(bank, tiny, made, tmp_path, expected):
    folder = shutil.copytree(made, tmp_path / "late")
    info = adapters.read_adapter(folder, str(tiny))
    (folder / adapters.WEIGHTS).write_bytes(b"x" * 100)
    assert "damaged" in bank.sync([*bank.adapters.values(), info])["late"]
    bank.swap("sql")
    assert "late" not in bank.adapters and logits(bank.model, bank).equal(expected["sql"])


# --------------------------------------------------------------------------------------------------------- generation

SHORT = adapters.Settings(max_new_tokens=8)


def alone(tiny, folder, prompt, tokens):
    """The same answer the ordinary way: a fresh base model, PEFT, generate."""
    from peft import PeftModel

    model, tokenizer = base_models.load(str(tiny))
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).eval()
    batch = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**batch, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id,
                            eos_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(output[0, batch["input_ids"].shape[1]:], skip_special_tokens=True)


def test_generation_equals_the_ordinary_way_and_streams_every_token(bank, tiny, shelf):
    for name in (None, "sql", "detox-1.5"):
        seen = []
        answer = bank.generate(PROMPT, name, SHORT, seen.append)
        assert answer.text == alone(tiny, shelf / name if name else None, PROMPT, 8)
        assert len(seen) == answer.tokens + 1 and seen[-1] == answer.text and bank.active == name
        assert 0 < answer.first_token_seconds <= answer.seconds and answer.tokens_per_second > 0 and not answer.stopped


def test_a_mixed_batch_gives_each_row_its_own_adapters_answer(bank):
    names, prompts = ["sql", None, "detox-1.5", "sql"], [PROMPT, "a much longer prompt, padded on the left: ", "x", "y z"]
    seen = []
    answers = bank.generate_mixed(prompts, names, SHORT, seen.append)
    assert [answer.adapter for answer in answers] == names and len(seen[0]) == 4
    for answer, name, prompt in zip(answers, names, prompts, strict=True):
        assert answer.text == bank.generate(prompt, name, SHORT).text
    assert bank.tokenizer.padding_side == bank.tokenizer.init_kwargs.get("padding_side", "right")


def test_a_mixed_batch_equals_pefts_up_to_rounding(bank, expected):
    import torch

    names = ["sql", None, "detox-1.5", "instruct", "sql"]
    batch = bank.tokenizer([PROMPT] * 5, return_tensors="pt")
    with torch.inference_mode():
        with bank.mixed(names) as model:
            ours = model(**batch).logits
        pefts = bank.model(**batch, adapter_names=[bank.key(name) for name in names]).logits
    assert torch.allclose(ours, pefts, atol=2e-5 * pefts.abs().max().item())
    for row, name in zip(ours, names, strict=True):
        assert torch.allclose(row, expected[name][0], atol=2e-5 * pefts.abs().max().item())
    bank.swap("sql")
    assert logits(bank.model, bank).equal(expected["sql"]), "a mixed batch leaves the layers as they were"


def test_a_mixed_batch_that_fails_leaves_the_layers_as_they_were(bank, expected):
    with pytest.raises(ZeroDivisionError), bank.mixed(["sql", None]):
        raise ZeroDivisionError
    bank.swap("sql")
    assert logits(bank.model, bank).equal(expected["sql"])


def test_a_mixed_batch_of_one_kind_and_without_adapters(bank, tiny):
    bank.swap("instruct")
    assert bank.generate_mixed([PROMPT], ["sql"], SHORT)[0].text == bank.generate(PROMPT, "sql", SHORT).text
    bank.swap("instruct")
    bank.generate_mixed([PROMPT, "x"], [None, None], SHORT)
    assert bank.active == "instruct"
    empty = adapters.AdapterBank(str(tiny))
    assert empty.generate_mixed([PROMPT], [None], SHORT)[0].text == bank.generate(PROMPT, None, SHORT).text


def test_stop_ends_the_answer_within_a_token_and_leaves_the_bank_usable(bank):
    import threading

    stop, seen = threading.Event(), []

    def on_text(text):
        seen.append(text)
        if len(seen) == 3:
            stop.set()

    answer = bank.generate(PROMPT, "sql", adapters.Settings(max_new_tokens=100), on_text, stop)
    assert answer.stopped and answer.tokens == 3
    assert not bank.generate(PROMPT, "sql", SHORT).stopped


def test_a_swap_waits_for_the_answer_that_is_being_generated(bank):
    """The answer is whole: the other thread's swap happens after it, and then holds."""
    import threading

    wanted = bank.generate(PROMPT, "sql", adapters.Settings(max_new_tokens=20)).text
    started, swapped = threading.Event(), threading.Event()

    def other():
        started.wait(10)
        bank.swap("detox-1.5")
        swapped.set()

    thread = threading.Thread(target=other)
    thread.start()
    early = []

    def on_text(text):
        started.set()
        early.append(swapped.wait(0.005))

    answer = bank.generate(PROMPT, "sql", adapters.Settings(max_new_tokens=20), on_text)
    thread.join(10)
    assert answer.text == wanted and not any(early) and swapped.is_set() and bank.active == "detox-1.5"


def test_an_exception_while_streaming_reaches_the_caller_and_frees_the_lock(bank):
    import threading

    def broken(text):
        raise ZeroDivisionError("of the listener")

    with pytest.raises(ZeroDivisionError):
        bank.generate(PROMPT, "sql", SHORT, broken)
    done = threading.Thread(target=bank.swap, args=(None,))
    done.start()
    done.join(5)
    assert not done.is_alive() and bank.active is None


def test_sampling_follows_its_seed_and_leaves_the_readers_random_state_alone(bank):
    import torch

    hot = lambda seed: adapters.Settings(max_new_tokens=12, sample=True, temperature=5.0, top_p=1.0, top_k=0, seed=seed)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    texts = [bank.generate(PROMPT, "sql", hot(seed)).text for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1] and torch.equal(before, torch.get_rng_state())


def test_beams_show_their_end_and_stop_text_cuts(bank):
    seen = []
    answer = bank.generate(PROMPT, "sql", adapters.Settings(max_new_tokens=6, beams=3), seen.append)
    assert seen == [answer.text]
    assert len(bank.generate_mixed([PROMPT, "x"], ["sql", None], adapters.Settings(max_new_tokens=4, beams=2))) == 2
    free = bank.generate(PROMPT, "instruct", adapters.Settings(max_new_tokens=30))
    mark = free.text.strip()[3]
    cut = bank.generate(PROMPT, "instruct", adapters.Settings(max_new_tokens=30, stop=mark))
    assert mark in cut.text and cut.tokens < free.tokens and free.text.startswith(cut.text)


def test_of_beams_the_first_that_is_accepted_is_the_answer(bank):
    from helpers.generation import write_batch

    bank.swap("sql")
    prompts, seen = [PROMPT, "x"], []

    def answers(accept):
        return write_batch(bank.model, bank.tokenizer, prompts, accept=accept, max_new_tokens=6, num_beams=3, do_sample=False)

    best = answers(None)
    refused = answers(lambda prompt, text: seen.append((prompt, text)))
    assert refused == [dataclasses.replace(one, seconds=ANY, first_token_seconds=ANY) for one in best], "none is accepted"
    for i, prompt in enumerate(prompts):
        beams = [text for asked, text in seen if asked == prompt]
        assert len(beams) == len(set(beams)) == 3 and beams[0] == best[i].text
        third = answers(lambda prompt, text, beams=beams: text == beams[2])[i]
        assert third.text == beams[2] and third.tokens == len(bank.tokenizer(third.text)["input_ids"])


def test_a_banks_beams_are_asked_whether_their_query_runs(bank, monkeypatch):
    asked = []
    monkeypatch.setattr("helpers.bank.query_runs", lambda prompt, text: asked.append(prompt))
    bank.generate(PROMPT, "sql", adapters.Settings(max_new_tokens=4, beams=2))
    assert asked == [PROMPT] * 2
    bank.generate(PROMPT, "sql", adapters.Settings(max_new_tokens=4))
    assert asked == [PROMPT] * 2


@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_a_stop_text_of_any_number_of_tokens_ends_the_row_that_wrote_it(bank, length):
    """The shortest beginning of the free answer that holds the stop text after something that is not blank."""
    from helpers.generation import write_batch

    bank.swap("instruct")
    model, tokenizer, prompts = bank.model, bank.tokenizer, [PROMPT, "a longer prompt than the other: "]
    free = [answer.text for answer in write_batch(model, tokenizer, prompts, max_new_tokens=24, do_sample=False)]
    ids = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False)
    rows = model.generate(**ids, max_new_tokens=24, do_sample=False, pad_token_id=2)[:, ids["input_ids"].shape[1]:].tolist()
    mark = free[0].lstrip()[6:6 + length]
    assert len(mark) == length and free[0] != free[1]
    cut = write_batch(model, tokenizer, prompts, mark, max_new_tokens=24, do_sample=False)
    for answer, row, whole in zip(cut, rows, free, strict=True):
        wanted = whole
        for count in range(1, len(row) + 1):
            text = tokenizer.decode(row[:count], skip_special_tokens=True)
            if mark in text.lstrip():
                wanted = text
                break
        assert answer.text == wanted


def test_generation_leaves_no_trace(bank):
    from helpers.generation import generate

    side, before = bank.tokenizer.padding_side, bank.generate(PROMPT, None, SHORT).text
    bank.model.train()
    assert generate(bank.model, bank.tokenizer, [PROMPT], 8) == [before]
    assert bank.model.training and bank.tokenizer.padding_side == side
    bank.model.eval()
    with pytest.raises(ZeroDivisionError):
        generate(bank.model, bank.tokenizer, [PROMPT], 8, progress=lambda done: 1 / 0)
    assert not bank.model.training


@pytest.mark.parametrize(("changes", "said"), [
    ({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"temperature": 0.0}, "temperature is 0.0"), ({"top_p": 2}, "top_p is 2"),
    ({"beams": 99}, "beams is 99"), ({"seed": -1}, "seed is -1"), ({"repetition_penalty": float("nan")}, "repetition_penalty"),
    ({"max_new_tokens": 600}, "more than the 512"),
])
def test_settings_out_of_range_are_named(bank, changes, said):
    with pytest.raises(WorkbookError, match=re.escape(said)):
        bank.generate(PROMPT, None, adapters.Settings(**changes))


def test_an_empty_prompt_is_named(bank):
    with pytest.raises(WorkbookError, match="prompt is empty"):
        bank.generate("", None)


def test_a_bloom_base_swaps_too(tiny_bloom, tmp_path):
    make_adapter(tiny_bloom, tmp_path / "one", modules=["query_key_value", "dense_4h_to_h"])
    bank = adapters.AdapterBank(str(tiny_bloom))
    bank.sync(adapters.discover(str(tiny_bloom), tmp_path, tmp_path / "none").adapters)
    assert bank.generate(PROMPT, "one", SHORT).text == alone(tiny_bloom, tmp_path / "one", PROMPT, 8)
    assert bank.generate(PROMPT, None, SHORT).text == alone(tiny_bloom, None, PROMPT, 8)


# ---------------------------------------------------------------------------------------------------------- benchmark


def test_the_swap_benchmark_measures_every_way(tiny, tmp_path, capsys):
    import importlib.util

    spec = importlib.util.spec_from_file_location("swap", Path(__file__).parent / "benchmarks" / "swap.py")
    swap = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(swap)
    options = ["--base", str(tiny), "--random", "--rounds", "4", "--tokens", "3", "--batch-rounds", "1"]
    assert swap.main([*options, "--out", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert json.loads(capsys.readouterr().out) == result and len(result["adapters"]) == 3
    assert [result["swap"][way]["n"] for way in ("bank_swap", "peft_set_adapter", "peft_disable_adapter")] == [16, 12, 4]
    for way in result["swap"].values():
        assert 0 < way["p50_ms"] <= way["p99_ms"] <= way["max_ms"]
    assert result["swap"]["bank_swap"]["p50_ms"] < result["swap"]["peft_set_adapter"]["p50_ms"]
    assert result["mixed_batch"]["mixed_over_one"] > 0
    assert swap.main(["--base", str(tiny), "--rounds", "1"]) == 1 and "say --random" in capsys.readouterr().err


def test_an_adapter_loads_like_the_first_ones_however_many_are_there(tiny, shelf):
    """Calls of Python's functions, which unlike times are the same on every machine."""
    bank = adapters.AdapterBank(str(tiny))
    info, calls = infos(tiny, shelf)[0], []
    for number in range(30):
        profile = cProfile.Profile()
        with profile:
            bank.load(dataclasses.replace(info, name=f"copy-{number}"))
        calls.append(sum(entry.callcount for entry in profile.getstats()))
    assert calls[29] < 1.15 * calls[2], calls
