"""BLOOM's fused attention computes what transformers' step-by-step attention computes, and masks that it cannot take."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig

from helpers import base_models
from helpers.fast import bloom

ROWS, LENGTH = 3, 40
IDS = torch.randint(3, 500, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
PLACES = torch.arange(LENGTH)
MASKS = {"none": None, "all": torch.ones(ROWS, LENGTH, dtype=torch.long),
         "padded right": (PLACES < torch.tensor([[40], [30], [7]])).long(),
         "padded left": (PLACES >= torch.tensor([[0], [9], [33]])).long()}


def pair(heads: int, dtype=torch.float32):
    """The same random BLOOM twice: as transformers has it, and with fused attention."""
    torch.manual_seed(0)
    config = BloomConfig(n_layer=3, n_head=heads, hidden_size=16 * heads, vocab_size=500, initializer_range=0.2)
    own = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    fused = copy.deepcopy(own)
    bloom.use_fused_attention(fused)
    return own, fused


@pytest.mark.parametrize("heads", [1, 2, 12, 16, 20])
def test_slopes_are_the_papers(heads):
    """2^(-8/n), 2^(-16/n), … for n heads; else those of the power of two below, then every second of twice as many."""
    power = 2 ** (heads.bit_length() - 1)
    exponents = [8 * i / power for i in range(1, power + 1)] + [4 * i / power for i in range(1, 2 * (heads - power) + 1, 2)]
    expected = torch.tensor([2.0**-exponent for exponent in exponents])
    torch.testing.assert_close(bloom.slopes(heads), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("heads", [4, 12])
@pytest.mark.parametrize("mask", MASKS)
def test_logits_and_gradients_equal_the_step_by_step_attention(mask, heads):
    own, fused = pair(heads)
    mask = MASKS[mask]
    real = (torch.ones_like(IDS) if mask is None else mask).bool()
    labels = IDS.masked_fill(~real, -100)
    labels[torch.arange(ROWS), real.int().argmax(dim=1)] = -100  # a first token has only padding before it
    gradients = []
    for model in (own, fused):
        model.train()
        model(input_ids=IDS, attention_mask=mask, labels=labels).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.eval()
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    for cache in (False, True):
        with torch.inference_mode():
            expected, got = (model(input_ids=IDS, attention_mask=mask, use_cache=cache).logits for model in (own, fused))
        torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=1e-4)


def test_generation_equals_the_step_by_step_attention():
    own, fused = pair(4)
    texts = [model.generate(input_ids=IDS, attention_mask=MASKS["padded left"], max_new_tokens=12, do_sample=False,
                            pad_token_id=3) for model in (own, fused)]
    assert torch.equal(*texts)


def test_packed_documents_do_not_see_each_other():
    own, fused = pair(4)
    cuts = [(0, 11), (11, 31), (31, 40)]
    document = torch.repeat_interleave(torch.arange(3), torch.tensor([end - start for start, end in cuts]))
    allowed = ((document[:, None] == document) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())[None, None]
    with torch.inference_mode():
        alone = torch.cat([own(input_ids=IDS[:1, start:end]).logits for start, end in cuts], dim=1)
        packed = fused(input_ids=IDS[:1], attention_mask=allowed, use_cache=False).logits
        mixed = own(input_ids=IDS[:1]).logits
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)
    assert (mixed - alone).abs().max() > 0.5, "the documents would not have shown in the logits"


def test_bfloat16_is_at_least_as_near_to_float32_as_the_step_by_step_attention():
    """Distances are exact in 8 bits near the query; places, which transformers adds, are not."""
    exact, _ = pair(4)
    own, fused = pair(4, torch.bfloat16)
    with torch.inference_mode():
        expected = exact(input_ids=IDS).logits
        far, near = ((model(input_ids=IDS).logits.float() - expected).abs().mean() for model in (own, fused))
    assert near < 1.1 * far


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_factors_hold_slope_times_place_exactly_in_every_type(dtype):
    """Places beyond 256, which bfloat16 cannot hold in one number, and slopes that are no powers of two."""
    heads, length, scaling = 12, 5000, 64**-0.5
    slope, place = bloom.factors(heads, length, scaling, dtype, torch.device("cpu"))
    product = (slope[:, 0].double() @ place.double().T) * scaling
    expected = bloom.slopes(heads).double()[:, None] * torch.arange(length)
    torch.testing.assert_close(product, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mask, calls", [("none", 3), ("all", 0)])
def test_only_rows_without_a_mask_have_the_bias_as_a_product(mask, calls, monkeypatch):
    _, fused = pair(4)
    seen, real = [], bloom._causal
    monkeypatch.setattr(bloom, "_causal", lambda *given: seen.append(given) or real(*given))
    bloom.factors.cache_clear()
    with torch.inference_mode():  # what inference makes first, training can use
        fused(input_ids=IDS, attention_mask=MASKS[mask])
    assert len(seen) == calls
    fused(input_ids=IDS, attention_mask=MASKS[mask], labels=IDS).loss.backward()


def test_long_rows_without_a_mask_equal_the_step_by_step_attention():
    ids = torch.randint(3, 500, (2, 700), generator=torch.Generator().manual_seed(1))
    own, fused = pair(12)
    for model in (own, fused):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
    for expected, got in zip(own.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-5, rtol=1e-3)
    with torch.inference_mode():
        expected, got = (model(input_ids=ids).logits for model in (own, fused))
    torch.testing.assert_close(got, expected, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms_keep_bfloat16_under_autocast_and_leave_the_rest_to_it(dtype):
    _, fused = pair(4)
    norms = [module for module in fused.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 3 * 2 + 2 and all(type(norm) is bloom.SameTypeNorm for norm in norms)
    norm, seen = norms[0].to(dtype), []
    # CPUs' autocast leaves norms alone, so what a GPU would do is asked of the switch instead of the result.
    real = torch.nn.LayerNorm.forward
    with torch.autocast("cpu", torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.LayerNorm, "forward", lambda *given: seen.append(torch.is_autocast_enabled("cpu")) or real(*given))
        norm(torch.randn(2, 64, dtype=dtype))
    assert seen == [dtype != torch.bfloat16]


def test_every_loaded_bloom_has_it(tiny_bloom):
    for precision in ("full", "4bit"):
        model, _ = base_models.load(str(tiny_bloom), precision)
        assert all(isinstance(block.self_attention, bloom.AlibiAttention) for block in model.transformer.h)
        assert model.config._attn_implementation == bloom.NAME
