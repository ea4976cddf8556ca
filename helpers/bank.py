"""The bank: one base model in memory, adapters on it, and a swap that copies nothing."""

import re
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from helpers import WorkbookError, base_models, is_text, probe
from helpers.adapter_files import AdapterInfo, read_tensors
from helpers.adapter_layers import DORA, LORA_BIAS, PREFIX
from helpers.data import prompt_ids
from helpers.generation import Answer, Settings, write_batch
from helpers.registry import EMBEDDED
from helpers.sql_databases import query_runs

GREEDY = Settings()
PARTS = (  # of a layer in PEFT: where a tensor of the file belongs
    ("lora_A", "weight", "lora_A.weight"), ("lora_B", "weight", "lora_B.weight"),
    ("lora_B", "bias", "lora_B.bias"), ("lora_magnitude_vector", "weight", "lora_magnitude_vector"))


class AdapterBank:
    """One base model and its adapters; which one acts is a pointer, and a swap moves it.

    PEFT's layers hold every adapter's A and B and one field that names the active ones. Here that
    field is one list, which all layers share: `swap` writes into it. What an adapter replaces of
    the base model (`AdapterInfo.whole`) is put there as well, and the base model's own put back.
    One lock guards the model: a swap waits for the answer that is being written. Adapter None is
    the base model itself.
    adapters: the loaded ones, by name; active: the one that acts; base_bytes: the base's memory.
    """

    def __init__(self, base_name: str = EMBEDDED, precision: str = "full", device=None, dtype=None):
        """Load the base model (precision, device, dtype and errors: see base_models.load)."""
        self.base_name = base_name
        self._base, self.tokenizer = base_models.load(base_name, precision, device, dtype)
        self.model = self._base  # in PEFT's wrapper while there are adapters
        self.base_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.adapters: dict[str, AdapterInfo] = {}
        self.active: str | None = None
        self._pointer: list[str] = []  # PEFT's name of the active adapter
        self._layers: list[LoraLayer] = []
        self._own: dict[str, torch.nn.Parameter] = {}  # the base's, of all that adapters replace
        self._whole: dict[str, dict[str, torch.nn.Parameter]] = {}  # by PEFT's name: the adapters'
        self._acting: dict[str, torch.nn.Parameter] = {}  # the one of _whole that is in place
        self._lock = threading.RLock()

    # --- which adapters are here

    def load(self, info: AdapterInfo) -> float:
        """Read and check an adapter again and put it beside the others. Returns seconds.

        Raises WorkbookError as `read_adapter`, or when one of that name is loaded. The bank is then
        (and after an interrupt) as before.
        """
        start = time.perf_counter()
        if info.name in self.adapters:
            raise WorkbookError(f"An adapter {info.name!r} is already loaded: unload it first.")
        checked, tensors = read_tensors(info.folder, self.base_name)
        with self._lock:
            try:
                self._add(_key(info.name), lora_config(checked), checked.modules, tensors)
                self._keep(_key(info.name), checked, tensors)
            except BaseException:  # half an adapter would act, for the base model as well
                self._remove(_key(info.name))
                raise
            self.adapters[info.name] = replace(checked, name=info.name, title=info.title)
        return time.perf_counter() - start

    def unload(self, name: str) -> None:
        """Remove an adapter and free its memory. If it was active, the base model is made so."""
        with self._lock:
            key = self.key(name)
            if self.active == name:
                self.swap(None)
            del self.adapters[name]
            self._remove(key)

    def sync(self, found: list[AdapterInfo]) -> dict[str, str]:
        """Make the loaded adapters those of `found`. Returns the problems by name: a broken adapter
        does not keep the others from working."""
        problems, wanted = {}, {info.name: info for info in found}
        for name, info in list(self.adapters.items()):
            if wanted.get(name) != info:
                self.unload(name)
        for name, info in wanted.items():
            try:
                if name not in self.adapters:
                    self.load(info)
            except WorkbookError as problem:
                problems[name] = str(problem)
        return problems

    def adapter_bytes(self, name: str) -> int:
        """Memory that a loaded adapter's numbers take, in bytes: LoRA's in float32, those that
        replace the base model's in its type."""
        key = self.key(name)
        layers = [self._base.get_submodule(module) for module in self.adapters[name].modules]
        mine = {*self._whole[key].values()}
        for part in {part for part, _, _ in PARTS}:
            mine |= {parameter for layer in layers if key in getattr(layer, part)
                     for parameter in getattr(layer, part)[key].parameters()}
        return sum(parameter.numel() * parameter.element_size() for parameter in mine)

    def key(self, name: str | None) -> str:
        """PEFT's name of a loaded adapter (``__base__``: no adapter), as in `adapter_names`."""
        if name not in (None, *self.adapters):
            known = ", ".join(self.adapters) or "none"
            raise WorkbookError(f"No adapter {name!r} is loaded: there are {known}.")
        return "__base__" if name is None else _key(name)

    def _add(self, key: str, config: LoraConfig, modules: tuple[str, ...], tensors: dict) -> None:
        """Put an adapter into its own layers. PEFT 0.21's way compares every module of all adapters
        with every adapted layer: to load 100 took seven times as long."""
        base = self._base
        if self.model is base:
            self.model = PeftModel(base, config, key, low_cpu_mem_usage=True).eval()
        else:
            self.model.peft_config[key] = config
            with init_empty_weights(), _others_hidden(self._layers):
                for name in modules:
                    parent, _, last = name.rpartition(".")
                    self.model.base_model._create_and_replace(
                        config, key, base.get_submodule(name), last, base.get_submodule(parent),
                        current_key=name)
        layers = [base.get_submodule(name) for name in modules]
        for name, layer in zip(modules, layers, strict=True):
            (layer if layer.training else layer.lora_dropout[key]).eval()  # what is new of it
            for part, attribute, tensor in PARTS:
                if f"{PREFIX}{name}.{tensor}" in tensors:  # float32, as PEFT computes LoRA
                    weight = tensors[f"{PREFIX}{name}.{tensor}"].to(self.model.device).float()
                    matrix = getattr(layer, part)[key].eval()
                    setattr(matrix, attribute, torch.nn.Parameter(weight, requires_grad=False))
        self._share(list(dict.fromkeys([*self._layers, *layers])))

    def _keep(self, key: str, info: AdapterInfo, tensors: dict) -> None:
        """Hold what an adapter replaces of the base model, in the base model's type."""
        for place in info.whole:
            self._own.setdefault(place, getattr(*self._place(place)))
        self._whole[key] = info.replacements(tensors, self._own.__getitem__)

    def _place(self, place: str) -> tuple[torch.nn.Module, str]:
        """The module that has a parameter of the base model, and the parameter's name in it."""
        module, _, name = place.rpartition(".")
        module = self._base.get_submodule(module)
        return module.base_layer if isinstance(module, LoraLayer) else module, name

    def _put(self, key: str) -> None:
        """Let an adapter's own weights act, and the base model's where it has none."""
        wanted, before = self._whole.get(key, {}), self._acting
        self._acting = wanted
        for place in before.keys() | wanted.keys() if before or wanted else ():
            setattr(*self._place(place), wanted.get(place, self._own[place]))

    def _remove(self, key: str) -> None:
        """Take an adapter, or what there is of it, out of its layers."""
        self._whole.pop(key, None)
        self._share(self._layers)
        self._pointer.clear()  # PEFT would otherwise choose another adapter as the active one
        if self.adapters:
            self.model.delete_adapter(key)
            self.model.active_adapter = _key(next(iter(self.adapters)))
            self._share(self._layers)
            return
        for name, module in list(self._base.named_modules()):
            if isinstance(module, LoraLayer):
                self._base.set_submodule(name, module.base_layer)
        vars(self._base).pop("peft_config", None)
        self.model = self._base  # PEFT's wrapper does not run without an adapter
        self._share([])

    # --- the swap

    def swap(self, name: str | None) -> float:
        """Make an adapter (None: the base model) the active one, after the answer that is being
        written. Returns the seconds that it took, without that wait; PEFT's own `active_adapter`
        stays as it was. Raises WorkbookError for an unknown adapter."""
        with self._lock:
            key = self.key(name)  # under the lock: a refresh in another thread may just unload it
            start = time.perf_counter()
            if self._layers and self._layers[0]._active_adapter is not self._pointer:
                self._share(self._layers)  # PEFT's own set_adapter gave each layer its own list
            self.active = name
            self._pointer[:] = () if name is None else (key,)
            self._put(key)
            return time.perf_counter() - start

    def _share(self, layers: list[LoraLayer]) -> None:
        """Let all layers, and no others, see the pointer to the active adapter."""
        self._layers = layers
        self._pointer[:] = () if self.active is None else (_key(self.active),)
        for layer in layers:
            layer._active_adapter = self._pointer

    @contextmanager
    def using(self, name: str | None):
        """The model with one adapter active, for a with block. Other threads wait meanwhile."""
        with self._lock:
            before = self.active
            self.swap(name)
            try:
                yield self.model
            finally:
                self.swap(before if before in self.adapters else None)

    @contextmanager
    def mixed(self, names: list[str | None], copies: int = 1):
        """The model for a batch whose row i uses adapter ``names[i]``, each row `copies` times.

        A layer computes ``base(x) + ((x @ A.T) * mask) @ B.T`` with the A and B of all adapters
        side by side, and a mask that leaves each row its own columns: four operations a layer,
        where PEFT's adapter_names takes eight an adapter. The two differ by rounding alone.
        """
        with self._lock:
            rows = [self.key(name) for name in names for _ in range(copies)]
            for name, info in self.adapters.items():
                if name in names and info.extras:
                    raise WorkbookError(f"The adapter {name} cannot share a batch with others, as "
                                        f"it is no plain LoRA ({', '.join(info.extras)}): ask it "
                                        "alone.")
            self._put("__base__")
            try:
                for layer in self._layers:
                    layer.forward = _mixed_forward(layer, rows)
                yield self.model
            finally:
                for layer in self._layers:
                    vars(layer).pop("forward", None)
                self._put(self.key(self.active))

    # --- answers

    def generate(self, prompt: str, adapter: str | None = None, settings: Settings = GREEDY,
                 on_text=None, stop: threading.Event | None = None) -> Answer:
        """One answer. The adapter stays active. on_text: called with the text so far after each
        token (beams: once). `stop` ends it at the next token. Raises WorkbookError for settings out
        of range or a prompt that is empty or too long, and what `on_text` raises."""
        tell = on_text and (lambda texts: on_text(texts[0]))
        with self._lock:
            seconds = self.swap(adapter)
            return self._write([prompt], [adapter], settings, tell, stop, seconds)[0]

    def generate_mixed(self, prompts: list[str], adapters: list[str | None],
                       settings: Settings = GREEDY, on_text=None,
                       stop: threading.Event | None = None) -> list[Answer]:
        """One batch of answers, each row with its own adapter. on_text: called with all texts."""
        one = len(set(adapters)) == 1
        with self.using(adapters[0]) if one else self.mixed(adapters, settings.beams):
            return self._write(prompts, adapters, settings, on_text, stop)

    def _write(self, prompts, adapters, settings: Settings, on_text, stop, swap_seconds=0.0):
        settings.check()
        if not prompts or not all(prompt and is_text(prompt) for prompt in prompts):
            raise WorkbookError("The prompt is empty or no text: write one or choose a sample.")
        width = max(len(prompt_ids(self.tokenizer, prompt)) for prompt in prompts)
        limit = probe.most_tokens(self.model)
        if limit and width + settings.max_new_tokens > limit:
            raise WorkbookError(f"The prompt's {width:,} tokens and {settings.max_new_tokens:,} "
                                f"new ones are more than the {limit:,} that this base model "
                                "reads: shorten one.")
        stop_text, tell = (settings.stop, on_text) if settings.beams == 1 else ("", None)
        with torch.random.fork_rng([self.model.device] if self.model.device.type == "cuda" else []):
            torch.manual_seed(settings.seed)
            answers = write_batch(self.model, self.tokenizer, prompts, stop_text, tell, stop,
                                  query_runs if settings.beams > 1 else None, **settings.options())
        if on_text:
            on_text([answer.text for answer in answers])
        return [replace(answer, adapter=name, swap_seconds=swap_seconds)
                for answer, name in zip(answers, adapters, strict=True)]


def lora_config(info: AdapterInfo) -> LoraConfig:
    """PEFT's config of a checked adapter, with every layer named."""
    patterns = [{f"^{re.escape(module)}": number for module, number in numbers.items()}
                for numbers in (info.ranks, info.alphas)]
    return LoraConfig(r=info.rank, lora_alpha=info.alpha, use_rslora=info.use_rslora,
                      rank_pattern=patterns[0], alpha_pattern=patterns[1],
                      use_dora=DORA in info.extras, lora_bias=LORA_BIAS in info.extras,
                      task_type="CAUSAL_LM", target_modules=list(info.modules), inference_mode=True)


@contextmanager
def _others_hidden(layers: list[LoraLayer]):
    """For a with block: the layers seem to have no adapter yet. PEFT 0.21 looks at all of a layer's
    adapters when it gets one more, so the 300th would take seven times as long as the third."""
    parts = [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names]
    before = [(part, part._modules) for part in parts if isinstance(part, torch.nn.ModuleDict)]
    for part, _ in before:
        part._modules = {}
    try:
        yield
    finally:
        for part, others in before:
            others.update(part._modules)
            part._modules = others


def _key(name: str) -> str:
    """A name that PEFT takes, with no dots or slashes, nor like the names of its own tensors."""
    return f"adapter_{name.encode().hex()}"


# --- the layers of a mixed batch

def _mixed_forward(layer: LoraLayer, rows: list[str]):
    """A layer's forward for a batch; rows: PEFT's name of each row's adapter."""
    base = layer.base_layer
    keys = [key for key in dict.fromkeys(rows) if key in layer.lora_A]
    if not keys:
        return lambda x: base(x)  # a module would become a part of the layer
    a = torch.cat([layer.lora_A[key].weight for key in keys])  # [sum of ranks, in]
    b = torch.cat([layer.lora_B[key].weight.T * layer.scaling[key] for key in keys])
    masks = [torch.tensor([float(row == key) for row in rows]).expand(layer.r[key], -1)
             for key in keys]
    mask = torch.cat(masks).T[:, None].to(a.device)  # [rows, 1, sum of ranks]

    def forward(x):
        result = base(x)
        # (rows x length, in) is one text after the other.
        if len(x) % len(rows) or (x.dim() > 2 and len(x) != len(rows)):
            raise WorkbookError("A mixed batch cannot be run on this base model: a layer of it is "
                                "given tokens without their rows. Ask one adapter at a time.")
        inner = (x.to(a.dtype) @ a.T).reshape(len(rows), -1, a.shape[0]) * mask
        if result.dtype == b.dtype and not result.requires_grad:  # in place: a copy less
            result.view(-1, b.shape[1]).addmm_(inner.view(-1, a.shape[0]), b)
            return result
        return result + (inner @ b).reshape(result.shape).to(result.dtype)

    return forward
