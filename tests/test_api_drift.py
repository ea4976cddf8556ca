"""Every argument that this project passes to trl, transformers, peft, accelerate, … exists in the installed version.

Names and arguments are read from the sources and notebooks, so the list cannot go stale. In a newer environment (`make
canary`) a renamed argument is named here, instead of somewhere in the middle of a training run.
"""

import ast
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("trl", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "huggingface_hub", "safetensors",
             "papermill", "sacrebleu", "nbclient", "voila")
SOURCES = sorted(path for pattern in ("helpers/**/*.py", "notebooks/**/*.ipynb", "tests/conftest.py")
                 for path in ROOT.glob(pattern) if ".ipynb_checkpoints" not in path.parts)
BEHIND = {  # where a function with **kwargs hands them on to
    "from_pretrained": ("transformers.modeling_utils", "transformers.tokenization_utils_base",
                        "transformers.configuration_utils"),
    "from_config": ("transformers.modeling_utils",),
    "generate": ("transformers.generation.utils", "peft.peft_model", "peft.tuners.lora.model"),
    "execute_notebook": ("papermill.engines", "papermill.clientwrap", "nbclient.client"),
}


def source_of(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    cells = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    return "\n".join(line for cell in cells for line in cell.splitlines() if not re.match(r"\s*[%!?]", line))


def imported(tree: ast.AST) -> dict[str, object]:
    """Local name -> the library's object, for every import of a library anywhere in a source. Raises what importing does."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            module = importlib.import_module(node.module)
            for alias in node.names:
                value = getattr(module, alias.name, None)
                found[alias.asname or alias.name] = value if value is not None else importlib.import_module(
                    f"{node.module}.{alias.name}")
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in LIBRARIES:
                    whole = importlib.import_module(alias.name)
                    found[alias.asname or alias.name.split(".")[0]] = whole if alias.asname else importlib.import_module(
                        alias.name.split(".")[0])
    return found


def resolve(node: ast.AST, names: dict[str, object]):
    """The library's object that an expression such as ``bnb.functional.quantize_4bit`` names; None for what is not one's.
    Raises AttributeError when the library no longer has it."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolve(node.value, names)
        return None if owner is None else getattr(owner, node.attr)
    return None


def accepts(function, argument: str) -> bool:
    """Whether a callable takes a keyword: by its signature, or, behind ``**kwargs``, by a name that its code looks up."""
    parameters = inspect.signature(function).parameters
    if argument in parameters and parameters[argument].kind is not inspect.Parameter.POSITIONAL_ONLY:
        return True
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return False
    name = getattr(function, "__name__", "")
    modules = [inspect.getmodule(inspect.unwrap(function)), *map(importlib.import_module, BEHIND.get(name, ()))]
    if name == "generate":
        from transformers import GenerationConfig
        if hasattr(GenerationConfig(), argument):
            return True
    return any(re.search(rf"""["']{argument}["']|\b{argument}\s*[:=]""", inspect.getsource(module)) for module in modules)


def dictionaries(tree: ast.AST) -> dict[str, set[str]]:
    """Keys of dict literals by the name that they are assigned to, for calls with ``**name``."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            for literal in [n for n in ast.walk(value) if isinstance(n, ast.Dict)] if isinstance(target, ast.Name) else []:
                found.setdefault(target.id, set()).update(k.value for k in literal.keys if isinstance(k, ast.Constant))
            if (isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name)
                    and isinstance(target.slice, ast.Constant)):
                found.setdefault(target.value.id, set()).add(target.slice.value)
    return found


def arguments_of(call: ast.Call, literals: dict[str, set[str]]) -> set[str]:
    names = {keyword.arg for keyword in call.keywords if keyword.arg}
    for keyword in call.keywords:
        if keyword.arg is None and isinstance(keyword.value, ast.Name):
            names |= literals.get(keyword.value.id, set())
        if keyword.arg is None and isinstance(keyword.value, ast.Dict):
            names |= {key.value for key in keyword.value.keys if isinstance(key, ast.Constant)}
    return names


def drifted(source: str) -> tuple[list[str], int]:
    """What the installed libraries do not have, as sentences, and the number of arguments that were looked up."""
    from transformers import GenerationMixin

    tree, count = ast.parse(source), 0
    try:
        names = imported(tree)
    except (ImportError, AttributeError) as error:
        return [f"cannot be imported: {error}"], 1
    problems = []
    scopes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Module)]
    for scope in scopes:
        literals = dictionaries(scope)
        inner = {n for s in ast.walk(scope) if isinstance(s, ast.FunctionDef) and s is not scope for n in ast.walk(s)}
        for call in [n for n in ast.walk(scope) if isinstance(n, ast.Call) and n not in inner]:
            try:
                function = resolve(call.func, names)
            except AttributeError as error:
                problems.append(f"line {call.lineno}: {ast.unparse(call.func)} is gone ({error})")
                continue
            if function is None and re.fullmatch(r"(\w+\.)*model\.generate", ast.unparse(call.func)):
                function = GenerationMixin.generate
            if function is None or not callable(function):
                continue
            for argument in sorted(arguments_of(call, literals)):
                count += 1
                try:
                    known = accepts(function, argument)
                except (TypeError, ValueError, OSError):  # a compiled function without a signature
                    continue
                if not known:
                    problems.append(f"line {call.lineno}: {ast.unparse(call.func)} has no argument {argument!r}")
    for node in [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]:
        bases = [base for base in (resolve(b, names) for b in node.bases) if base is not None]
        for method in [m.name for m in node.body if isinstance(m, ast.FunctionDef)] if bases else []:
            if re.match(r"_[a-z]|on_|compute_", method):  # replaces the library's own
                count += 1
                if not any(hasattr(base, method) for base in bases):
                    problems.append(f"line {node.lineno}: {node.name}.{method} replaces nothing of {ast.unparse(node.bases[0])}")
    return problems, count


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_argument_exists_in_the_installed_version(path):
    problems, _ = drifted(source_of(path))
    assert problems == []


def test_the_arguments_were_really_looked_up():
    """If the sources are written in a way that this test no longer understands, it must say so rather than pass."""
    counts = {path.relative_to(ROOT): drifted(source_of(path))[1] for path in SOURCES}
    assert sum(count for path, count in counts.items() if path.parts[0] == "helpers") >= 70, counts
    assert sum(counts.values()) >= 100


@pytest.mark.parametrize(("planted", "said"), [
    ("from trl import SFTConfig\nSFTConfig(max_seq_length=3)", "no argument 'max_seq_length'"),
    ("def f():\n    from trl import SFTTrainer\n    return SFTTrainer(tokenizer=1)", "no argument 'tokenizer'"),
    ("from peft import LoraConfig\noptions = {'rank': 3}\nLoraConfig(**options)", "no argument 'rank'"),
    ("from peft import LoraConfig\nLoraConfig(**{'rank': 3})", "no argument 'rank'"),
    ("from transformers import AutoModelForCausalLM as A\nA.from_pretrained('x', torch_dtyp=1)", "no argument 'torch_dtyp'"),
    ("import transformers\ntransformers.TrainingArguments(warmup_stepz=0.1)", "no argument 'warmup_stepz'"),
    ("from trl import DataCollatorForCompletionOnlyLM", "cannot be imported"),
    ("import peft\npeft.get_peft_modell(1)", "is gone"),
    ("model.generate(ids, max_new_tokenz=3)", "no argument 'max_new_tokenz'"),
    ("from trl import SFTTrainer\nclass T(SFTTrainer):\n    def _get_sampler_of_train(self): pass", "replaces nothing"),
    ("from transformers import TrainerCallback\nclass C(TrainerCallback):\n    def on_saved(self): pass", "replaces nothing"),
    ("from bitsandbytes import functional as F\nF.quantize_4bit(x, kind='nf4')", "no argument 'kind'")])
def test_each_planted_drift_is_found(planted, said):
    problems, _ = drifted(planted)
    assert len(problems) == 1 and said in problems[0], problems


def test_what_exists_is_not_reported():
    good = ("from trl import SFTConfig\nimport bitsandbytes as bnb\nfrom transformers import AutoModelForCausalLM as A\n"
            "o = {'do_sample': False}\nSFTConfig(max_length=3, packing=True)\nA.from_pretrained('x', dtype=1, gguf_file='y')\n"
            "model.generate(ids, max_new_tokens=3, **o)\nbnb.functional.quantize_4bit(x, quant_type='nf4')\nother(anything=1)")
    assert drifted(good)[0] == []
