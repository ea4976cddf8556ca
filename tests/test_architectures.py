"""Twelve architectures, one of each kind, through the steps of tests/architectures.py: ok, or refused in one sentence."""

import re

import architectures
import pytest

from helpers import base_models, probe

STEPS = ["load", "none", "documents", "publish", "swap", "mixed", "generate"]
LATER = STEPS[3:]
# What is refused, where not every step is ok, and the words that say why.
REFUSED = {"bert": ("none documents", "a token sees those that follow it"),
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
    trial = architectures.Trial("gemma3", "ours", tmp_path_factory.mktemp("gemma3"))
    trial.load()
    return trial.model


def test_encoders_of_pictures_get_no_lora(gemma3):
    names = base_models.lora_target_modules(gemma3)
    assert "gate_proj" in names and "q_proj" not in names, "its encoder of pictures has a q_proj too"
    assert [name for name in names if name.endswith("q_proj")] and not [name for name in names if "vision" in name]


def test_the_shares_count_what_lora_adapts(gemma3):
    """No LoRA yet: nothing is adapted, and nothing is in 4 bits."""
    assert probe.shares(gemma3) == (0, 0)


def test_a_model_is_as_it_was_after_the_check(gemma3):
    hooks = [module for module in gemma3.modules() if module._forward_hooks or module._forward_pre_hooks]
    probe.check(gemma3, 128)
    base_models.lora_target_modules(gemma3)
    after = [module for module in gemma3.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert after == hooks and not any(module.training for module in gemma3.modules())
