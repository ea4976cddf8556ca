"""Twelve architectures, one of each kind, through the steps of tests/architectures.py: ok, or refused in one sentence."""

import re

import architectures
import pytest

from helpers import WorkbookError, base_models, probe, training
from helpers.fast import packing

STEPS = ["load", "none", "documents", "publish", "swap", "mixed", "merge", "generate"]
LATER = STEPS[3:]
# What is refused, where not every step is ok, and the words that say why.
REFUSED = {"bert": ("none documents", "sees those that follow it"),
           "bart": ("none documents", "padding beside a text"),
           "mamba2": ("documents", "would see each other")}


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma2", "gemma3", "gptj", "gpt2", "opt", "mixtral", "deepseek_v3",
                                  "mamba2", "bert", "bart"])
def test_an_architecture_is_right_or_refused(name):
    cells = architectures.in_a_process(name, steps=STEPS)
    refused, words = REFUSED.get(name, ("", ""))
    for step, cell in cells.items():
        if step in refused.split():
            assert re.fullmatch(f"refused: [^\n]*{words}[^\n]*\\.", cell), (step, cell)
        else:
            assert cell == "ok" or (cell == "-" and "none" in refused and step in LATER), (step, cell)


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """A model with an encoder of pictures, whose settings for text stand in a part of its config."""
    trial = architectures.Trial("gemma3", "ours", tmp_path_factory.mktemp("gemma3"))
    trial.load()
    return trial


def test_encoders_of_pictures_get_no_lora(gemma3):
    names = base_models.lora_target_modules(gemma3.model)
    assert "gate_proj" in names and "q_proj" not in names, "its encoder of pictures has a q_proj too"
    assert [name for name in names if name.endswith("q_proj")] and not [name for name in names if "vision" in name]
    chosen = training.check_fits(gemma3.config(target_modules="q_proj, gate_proj"), gemma3.model)
    assert set(chosen) == {name for name in names if name.endswith(("q_proj", "gate_proj"))}


def test_the_length_that_a_part_of_a_config_tells_is_kept(gemma3):
    with pytest.raises(WorkbookError, match="reads at most 512"):
        training.check_fits(gemma3.config(max_length=1024), gemma3.model)


def test_windows_are_left_to_transformers_and_the_embedded_architecture_keeps_its_mask(gemma3, tiny):
    assert packing.takes_mask(gemma3.model, "gemma3", 128) is False
    assert packing.takes_mask(base_models.load(str(tiny))[0], "llama", 128) is True


def test_the_check_leaves_a_model_as_it_was(gemma3):
    probe.PASSED.discard(gemma3.model)
    probe.check(gemma3.model)
    assert not any(module.training or module._forward_hooks or module._forward_pre_hooks for module in gemma3.model.modules())


def test_the_share_that_lora_reaches_is_said(gemma3, capsys):
    assert probe.shares(gemma3.model) == (0, 0)
    gemma3.none()
    said = re.search(r"LoRA adapts (\d+)% of the blocks' weights, and 0% are in 4 bits", capsys.readouterr().out)
    text = sum(weight.numel() for name, weight in gemma3.model.named_parameters() if "language_model.layers" in name)
    every = sum(weight.numel() for weight in gemma3.model.parameters()) - gemma3.model.get_input_embeddings().weight.numel()
    assert abs(int(said[1]) / 100 - text / every) < 0.02, "LoRA adapts all of the text's layers but their norms"


@pytest.mark.parametrize("name, left_out", [("laguna", "shared_experts"), ("inkling2_text", "sconv")])
def test_layers_that_peft_would_load_under_another_name_get_no_lora(name, left_out, tmp_path):
    trial = architectures.Trial(name, "ours", tmp_path)
    trial.load()
    assert [one for one in probe.plain_linear_layers(trial.model) if left_out in one]
    assert not [one for one in base_models.lora_target_modules(trial.model) if left_out in one]
    trial.none()
    trial.publish()
    trial.swap()  # against what PEFT loads from the same files
