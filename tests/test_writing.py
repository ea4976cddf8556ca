"""The faster way to write answers on a CPU: the same tokens as transformers' own way, and that way for all that it does not know."""

import threading
from contextlib import nullcontext

import pytest
import torch
from peft.tuners.lora import Linear
from test_adapters import make_adapter

from helpers import WorkbookError, adapters, base_models, data, generation
from helpers.fast import writing

PROMPTS = ["Say it politely: ", "x", "a much longer prompt, with padding for all the others: ", "SELECT name FROM"]
ROUNDING = 1e-4  # two tokens whose logits are nearer than this may change places
TOKENS = 16


@pytest.fixture(scope="module")
def bank(tiny, shelf):
    bank = adapters.AdapterBank(str(tiny))
    assert bank.sync(adapters.discover(str(tiny), shelf, shelf / "none").adapters) == {} and len(bank.adapters) == 3
    return bank


def write(model, bank, prompts, tokens=TOKENS, stop="", on_text=None, halt=None, **options):
    return generation.write_batch(model, bank.tokenizer, prompts, stop, on_text, halt, max_new_tokens=tokens,
                                  **{"do_sample": False, **options})


def slow(monkeypatch, call):
    """What `call` returns when everything is computed transformers' and PEFT's way."""
    with monkeypatch.context() as patch:
        patch.setattr(generation, "quick", lambda *arguments: nullcontext())
        return call()


def same(model, bank, ours, theirs) -> None:
    """Equal answers, or at the first difference two tokens that rounding may swap."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        if mine.text != other.text:
            ids = [data.prompt_ids(bank.tokenizer, mine.prompt + one.text) for one in (mine, other)]
            common = next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
            with torch.inference_mode():
                best = model(torch.tensor([ids[0][:common]])).logits[0, -1].topk(2).values
            assert best[0] - best[1] < ROUNDING, (mine.text, other.text)


def prompts(rows: int) -> list[str]:
    return [f"{PROMPTS[i % 4]}{i}" for i in range(rows)]


@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("name", [None, "sql"])
def test_the_same_tokens_as_the_slow_way(bank, monkeypatch, rows, name):
    with bank.using(name) as model:
        theirs = slow(monkeypatch, lambda: write(model, bank, prompts(rows)))
        same(model, bank, write(model, bank, prompts(rows)), theirs)


@pytest.mark.parametrize("rows", [2, 8, 32])
def test_a_mixed_batch_has_the_same_tokens(bank, monkeypatch, rows):
    names = [[None, "sql", "instruct", "detox"][i % 4] for i in range(rows)]
    with bank.mixed(names) as model:
        theirs = slow(monkeypatch, lambda: write(model, bank, prompts(rows)))
        ours = write(model, bank, prompts(rows))
    for name, mine, other in zip(names, ours, theirs, strict=True):
        with bank.using(name) as model:
            same(model, bank, [mine], [other])


def test_the_embedded_base_writes_the_same_sql(monkeypatch):
    bank = adapters.AdapterBank()
    bank.sync(adapters.discover(base_models.EMBEDDED).adapters)
    for name in ("sql", None, "sql"):
        with bank.using(name) as model:
            theirs = slow(monkeypatch, lambda model=model: write(model, bank, PROMPTS))
            same(model, bank, write(model, bank, PROMPTS), theirs)


def test_a_swap_acts_in_the_next_answer(bank):
    texts = {name: bank.generate(PROMPTS[0], name, adapters.Settings(max_new_tokens=TOKENS)).text for name in ("sql", None, "detox")}
    assert len(set(texts.values())) == 3
    for name in ("detox", "sql", None, "sql"):
        assert bank.generate(PROMPTS[0], name, adapters.Settings(max_new_tokens=TOKENS)).text == texts[name]


@pytest.mark.parametrize("options", [{"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9}, {"repetition_penalty": 1.4},
                                     {"num_beams": 3}, {"min_new_tokens": TOKENS}, {"num_return_sequences": 1}])
def test_other_options_have_the_same_tokens(bank, monkeypatch, options):
    def seeded():
        torch.manual_seed(3)
        return [answer.text for answer in write(model, bank, PROMPTS, **options)]

    with bank.using("instruct") as model:
        assert seeded() == slow(monkeypatch, seeded)


# ----------------------------------------------------------------------------------------------- rows that have ended


def sizes(model, call) -> tuple[list[int], object]:
    """How many rows each pass had, and what `call` returns."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, arguments, out: seen.append(len(out)))
    try:
        return seen, call()
    finally:
        hook.remove()


def stop_text(bank, model, monkeypatch) -> str:
    """A text that ends some rows early and not all."""
    free = [answer.text for answer in slow(monkeypatch, lambda: write(model, bank, prompts(8)))]
    return free[0].lstrip()[4:6]


def test_rows_leave_the_batch_after_their_stop_text(bank, monkeypatch):
    with bank.using("sql") as model:
        mark = stop_text(bank, model, monkeypatch)
        batch = prompts(7) + [prompts(1)[0]] * 5
        theirs = slow(monkeypatch, lambda: write(model, bank, batch, stop=mark))
        seen, ours = sizes(model, lambda: write(model, bank, batch, stop=mark))
        same(model, bank, ours, theirs)
        assert seen[0] == 12 and seen == sorted(seen, reverse=True)
        assert seen[-1] <= 7 and max(answer.tokens for answer in ours) == TOKENS > ours[0].tokens
        assert sizes(model, lambda: write(model, bank, batch, stop=mark, num_beams=2))[0][-1] == 24, "beams stay"


def test_what_is_drawn_for_a_row_does_not_depend_on_others_that_have_left(bank, monkeypatch):
    def drawn():
        torch.manual_seed(5)
        return [answer.text for answer in write(model, bank, prompts(8), stop=mark, do_sample=True, temperature=0.8)]

    with bank.using("sql") as model:
        mark = stop_text(bank, model, monkeypatch)
        assert drawn() == slow(monkeypatch, drawn)


def test_a_mixed_batch_keeps_its_rows(bank, monkeypatch):
    with bank.using("sql") as model:
        mark = stop_text(bank, model, monkeypatch)
    with bank.mixed(["sql"] * 6 + [None]) as model:
        seen, ours = sizes(model, lambda: write(model, bank, [prompts(1)[0]] * 6 + ["y"], stop=mark))
        assert set(seen) == {7} and ours[0].tokens < TOKENS


def test_halt_ends_all_rows_within_a_token(bank):
    halt, seen = threading.Event(), []

    def tell(texts):
        seen.append(texts)
        if len(seen) == 3:
            halt.set()

    with bank.using("sql") as model:
        answers = write(model, bank, prompts(8), on_text=tell, halt=halt)
    assert len(seen) == 3 and all(answer.stopped and answer.tokens <= 3 for answer in answers)


# ---------------------------------------------------------------------------------------------- what stays as it was


def changed(model) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_the_model_is_as_before_afterwards_and_after_an_error(bank):
    with bank.using("sql") as model:
        with writing.quick(model, 2, 1):
            during = changed(model)
        assert not changed(model)
        own = "base_model.model.model.layers.0.mlp.down_proj"
        assert {"base_model.model", own, f"{own}.base_layer", "base_model.model.lm_head"} <= set(during)
        with pytest.raises(ZeroDivisionError):
            write(model, bank, PROMPTS, on_text=lambda texts: 1 / 0)
        assert not changed(model)


def test_a_model_that_trains_or_is_no_float32_stays(tiny):
    model, _ = base_models.load(str(tiny))
    for other in (model.train(), model.eval().bfloat16()):
        with writing.quick(other, 2, beams=2):
            assert not changed(other)


def test_four_bits_stay(tiny):
    model, _ = base_models.load(str(tiny), "4bit", dtype=torch.float32, device="cpu")
    with writing.quick(model, 2, beams=2):
        assert changed(model) == ["lm_head"]


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_what_is_no_plain_lora_stays_and_answers_the_same(tiny, tmp_path, monkeypatch, options):
    make_adapter(tiny, tmp_path / "other", **options)
    bank = adapters.AdapterBank(str(tiny))
    assert bank.sync(adapters.discover(str(tiny), tmp_path, tmp_path / "none").adapters) == {}
    with bank.using("other") as model:
        with writing.quick(model, 2, beams=2):
            assert changed(model) and not [module for module in model.modules() if type(module) is Linear and "forward" in vars(module)]
        same(model, bank, write(model, bank, PROMPTS), slow(monkeypatch, lambda: write(model, bank, PROMPTS)))


def test_a_merged_and_a_disabled_adapter_act_as_peft_says(tiny, shelf, monkeypatch):
    from peft import PeftModel

    model, tokenizer = base_models.load(str(tiny))
    bank = adapters.AdapterBank(str(tiny))
    base = write(model, bank, PROMPTS)
    model = PeftModel.from_pretrained(model, shelf / "sql").eval()
    with model.disable_adapter():
        same(model, bank, write(model, bank, PROMPTS), base)
    apart = write(model, bank, PROMPTS)
    assert apart[0].text != base[0].text
    model.merge_adapter()
    same(model, bank, write(model, bank, PROMPTS), apart)
    model.unmerge_adapter()
    same(model, bank, write(model, bank, PROMPTS), apart)


def test_pefts_own_mixed_batch_still_works(bank, monkeypatch):
    names = [bank.key(name) for name in ("sql", None, "detox", "instruct")]
    with bank.using("sql") as model:
        call = lambda: [answer.text for answer in write(model, bank, PROMPTS, adapter_names=names)]
        assert call() == slow(monkeypatch, call)


def test_bloom_writes_the_same(tiny_bloom, tmp_path, monkeypatch):
    make_adapter(tiny_bloom, tmp_path / "one", modules=["query_key_value", "dense_4h_to_h"])
    bank = adapters.AdapterBank(str(tiny_bloom))
    bank.sync(adapters.discover(str(tiny_bloom), tmp_path, tmp_path / "none").adapters)
    with bank.using("one") as model:
        mark = stop_text(bank, model, monkeypatch)
        theirs = slow(monkeypatch, lambda: write(model, bank, prompts(8), stop=mark))
        same(model, bank, write(model, bank, prompts(8), stop=mark), theirs)


def test_a_mixed_batch_of_another_size_is_still_refused(bank):
    with pytest.raises(WorkbookError, match="without their rows"), bank.mixed(["sql", None]) as model:
        write(model, bank, PROMPTS[:3])
