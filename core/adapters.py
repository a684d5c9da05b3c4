"""LoRA on a loaded model, through PEFT: every parameter acts or raises, and no adapter lands where it is dead."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .contracts import Family, LoraTargets
from .errors import ConfigError, ModelError
from .heads import within
from .quantised import has_short_rows, layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .prepared import Prepared


_SHORT_ROWS = "on a CPU, PEFT reads 4-bit layers wrong whose inputs are no multiple of 64, and this model has some"


def add_lora(
    transformer: PreTrainedModel, family: Family, *, random_state: int, target_modules: Any, lora: dict[str, Any]
) -> list[str]:
    """Inject a LoRA adapter, in place; if PEFT refuses it half-way, the transformer is as it was.

    Args:
        transformer: From `check_adaptable`.
        family: What its plugin says about it.
        random_state: Seed of the adapter's initial weights; the global generator is left as it was.
        target_modules: Module-path suffixes (or a regular expression, or "all-linear"); None means the family's.
        lora: What goes to `peft.LoraConfig` as it is.

    Returns:
        What was decided on the user's behalf, one line each.

    Raises:
        ConfigError: If a target names no module, or PEFT refuses a setting.
    """
    from peft import LoraConfig

    _check_saved_modules(transformer, lora.get("modules_to_save"))
    saved = _inside(transformer, lora.get("modules_to_save") or ())
    targets, excluded, notes = _targets(transformer, family.lora, target_modules, saved)
    settings = {"task_type": "FEATURE_EXTRACTION", **{key: value for key, value in lora.items() if value is not None}}
    settings |= _initialisation(settings)
    _check_quantised(transformer, settings)
    trainable = [parameter.requires_grad for parameter in transformer.parameters()]
    try:
        config = LoraConfig(target_modules=targets, exclude_modules=excluded or None, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(random_state)
            transformer.add_adapter(config)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        remove_adapter(transformer)
        for parameter, before in zip(transformer.parameters(), trainable, strict=True):
            parameter.requires_grad_(before)
        what = str(error) or type(error).__name__
        raise ConfigError(f"PEFT refuses the adapter: {what}", where="get_peft_model") from error
    float32_adapters(transformer)
    return notes + _reading_note(config)


def split_saved(model: Prepared, names: Sequence[str] | None) -> tuple[list[str], frozenset[str]]:
    """`modules_to_save` in two: what PEFT finds in the transformer, and the classes of modules that come after it."""
    after = {type(module).__name__ for module in list(model.children())[1:] if any(True for _ in module.parameters())}
    inside = [name for name in names or () if name not in after]
    return inside, frozenset(names or ()) & after


def freeze_after_pooling(model: Prepared, kept: frozenset[str]) -> list[str]:
    """Freeze what stands after the transformer (Dense layers), but for the classes in `kept`; what was done, in words.

    Under an adapter the model it was made for stays as it is. Such layers are saved with the adapter all the same.
    Those that train are held in float32, as adapters are, and take what the transformer gives in that dtype.
    """
    notes = []
    for name, module in list(model.named_children())[1:]:
        size = sum(parameter.numel() for parameter in module.parameters())
        trains = type(module).__name__ in kept
        module.requires_grad_(trains)
        if size and trains and next(module.parameters()).dtype in (torch.float16, torch.bfloat16):
            module.float().register_forward_pre_hook(_widen)
        if size and not trains:
            kind = type(module).__name__
            notes.append(
                f"module {name} ({kind}, {size / 1e6:.1f}M) stays frozen; modules_to_save=[{kind!r}] trains it"
            )
    return notes


def _widen(module: nn.Module, inputs: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """Features in float32: outside autocast a layer takes its own dtype alone."""
    features, *rest = inputs
    halves = {
        name: value.float()
        for name, value in features.items()
        if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    }
    return {**features, **halves}, *rest


def check_adaptable(model: Prepared) -> PreTrainedModel:
    """The model's transformer, if it can take an adapter now.

    Raises:
        ModelError: If it cannot.
    """
    fix = f"Load it with Fast{getattr(model, 'model_type', 'SentenceTransformer')}.from_pretrained(name)"
    preparation = getattr(model, "burnish", None)  # a plain SentenceTransformer has none
    if preparation is None or model.transformers_model is None:
        raise ModelError("this model was not loaded by Burnish", where="get_peft_model", fix=fix)
    purpose = preparation.decision.options.purpose
    if purpose != "adapters":
        flag = "full_finetuning=True" if purpose == "full" else "for_inference=True"
        raise ModelError(f"this model was loaded for {purpose}", where="get_peft_model", fix=f"{fix}, without {flag}")
    if getattr(model.transformers_model, "_hf_peft_config_loaded", False):
        raise ModelError(
            "this model has an adapter already", where="get_peft_model", fix="Train that one, or load the base model"
        )
    return model.transformers_model


def _inside(transformer: PreTrainedModel, saved: Iterable[str]) -> list[str]:
    """The linear layers that are, or stand inside of, modules that train in full."""
    linear = [name for name, module in transformer.named_modules() if _is_linear(module)]
    return [full for full in linear if within(full, saved)]


def _targets(
    transformer: PreTrainedModel, default: LoraTargets, asked: Any, saved: Sequence[str]
) -> tuple[Any, list[str], list[str]]:
    """(target_modules, exclude_modules, notes) for PEFT; layers in `saved` train in full and take no adapter."""
    linear = [name for name, module in transformer.named_modules() if _is_linear(module)]
    headed = transformer.base_model is not transformer
    dead = [name for name in linear if name in saved or _named(name, default.exclude)]
    if isinstance(asked, str):  # PEFT's own forms: a regular expression over full names, or "all-linear"
        everything = [name for name, _ in transformer.named_modules() if name]
        targets: Any = [name for name in linear if name not in dead] if asked == "all-linear" else asked
        if asked != "all-linear" and not any(_matches(asked, name) for name in everything):
            fix = f"It is a regular expression over full names. For layers by name pass a list: [{asked!r}]"
            raise ConfigError(f"{asked!r} matches no module", where="target_modules", fix=fix)
        return targets, dead, _left_out(dead, saved, headed)
    if asked is None:
        names: Sequence[str] = default.names or sorted({name.rsplit(".", 1)[-1] for name in linear if name not in dead})
    else:
        names = list(asked)
        if not names:
            raise ConfigError("the list is empty", where="target_modules", fix="Pass None for the family's layers")
    everything = [name for name, _ in transformer.named_modules()]
    for name in names:
        if not any(_named(full, (name,)) for full in everything):
            known = sorted({full.rsplit(".", 1)[-1] for full in linear})
            raise ConfigError(
                f"no module is called {name!r}", where="target_modules", fix=f"Linear layers here: {', '.join(known)}"
            )
    hit = [name for name in dead if _named(name, names)]
    return list(names), hit, _left_out(hit, saved, headed)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        fix = "Pass a list of names, or mend the expression"
        raise ConfigError(f"{pattern!r} is no regular expression ({error})", where="target_modules", fix=fix) from error


def _check_saved_modules(transformer: PreTrainedModel, names: Iterable[str] | None) -> None:
    everything = [name for name, _ in transformer.named_modules() if name]
    for name in names or ():
        if not any(_named(full, (name,)) for full in everything):
            known = sorted({full.rsplit(".", 1)[-1] for full in everything} - {str(index) for index in range(1000)})
            fix = f"Modules here: {', '.join(known)}"
            raise ConfigError(f"no module is called {name!r}", where="modules_to_save", fix=fix)


def _initialisation(settings: dict[str, Any]) -> dict[str, Any]:
    """`loftq_config` with its defaults, after refusing what would be ignored or needs more than weights."""
    start, loftq = settings.get("init_lora_weights", True), settings.get("loftq_config")
    # These start from the activations or gradients of a data set, which a call on a model alone does not have.
    if start in ("eva", "corda", "lora_ga"):
        fix = 'Pass True, False, "gaussian", "pissa", "olora", "orthogonal" or "loftq"'
        raise ConfigError(f"{start!r} needs a pass over data", where="init_lora_weights", fix=fix)
    if loftq and start != "loftq":
        fix = 'Pass init_lora_weights="loftq" too, or drop loftq_config'
        raise ConfigError("it acts only on LoftQ's initialisation", where="loftq_config", fix=fix)
    if start != "loftq":
        return {}
    if odd := sorted(set(loftq or ()) - {"loftq_bits", "loftq_iter"}):
        raise ConfigError(f"{odd[0]!r} is unknown", where="loftq_config", fix="It takes loftq_bits and loftq_iter")
    if find_spec("bitsandbytes") is not None and not torch.cuda.is_available():
        fix = "Use a CUDA device, or another initialisation"
        raise ConfigError("LoftQ quantises on a CUDA device, and none is here", where="init_lora_weights", fix=fix)
    return {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1, **(loftq or {})}}


def _check_quantised(transformer: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Refuse what a quantised base cannot take: there PEFT fails half-way, or bitsandbytes trains in fewer bits."""
    found = dict(layers(transformer))
    if not found:
        return
    start = str(settings.get("init_lora_weights", True))
    if start in ("loftq", "orthogonal") or start.startswith("pissa"):
        fix = 'Pass True, False, "gaussian" or "olora"'
        raise ConfigError(f"{start!r} does not start from quantised weights", where="init_lora_weights", fix=fix)
    if start == "olora" and any(has_short_rows(layer) for layer in found.values()):
        raise ConfigError(_SHORT_ROWS, where="init_lora_weights", fix='Pass True, False or "gaussian"')
    saved = settings.get("modules_to_save") or ()
    for name in saved:
        inside = [full for full in found if _named(full, (name,)) or f".{name}." in f".{full}."]
        if inside:
            what = f"{inside[0]} is quantised and cannot train in full"
            raise ConfigError(what, where="modules_to_save", fix="Adapt it (target_modules), or load a plain base")
    check_over_quantised(transformer, bias=settings.get("bias", "none"), dora=bool(settings.get("use_dora")))


def check_over_quantised(transformer: PreTrainedModel, *, bias: str, dora: bool) -> None:
    """Refuse an adapter, new or loaded, that a quantised base does not train right.

    * A quantised layer casts its bias to the dtype it computes in, in place, at every forward.
    * On a CPU, DoRA's forward (`peft.utils.integrations.dequantize_module_weight`) puts a new weight into an 8-bit
      layer, which then lacks its scales, and reads some 4-bit layers as bitsandbytes does (`short_rows`).

    Raises:
        ConfigError: If it is such a one.
    """
    found = [layer for _, layer in layers(transformer)]
    dtypes = {transformer.dtype, *(getattr(layer, "compute_dtype", None) for layer in found)}
    if found and bias != "none" and (halves := dtypes & {torch.float16, torch.bfloat16}):
        what = f"bitsandbytes casts the biases of quantised layers to {halves.pop()}, where small updates are lost"
        raise ConfigError(what, where=f"bias={bias!r}", fix='Pass bias="none", or load with dtype="float32"')
    if dora and any(has_short_rows(layer) for layer in found):
        raise ConfigError(_SHORT_ROWS, where="use_dora", fix="Use plain LoRA")
    if dora and transformer.device.type == "cpu" and getattr(transformer, "is_loaded_in_8bit", False):
        raise ConfigError("PEFT breaks 8-bit layers on a CPU", where="use_dora", fix="Use load_in_4bit, or plain LoRA")


def reads_saved_modules() -> bool:
    """Whether the transformers installed here reads `modules_to_save` back from an adapter's folder."""
    import transformers
    from packaging.version import Version

    return Version(transformers.__version__) >= Version("5.18")


def _reading_note(config: Any) -> list[str]:
    """What plain Sentence Transformers cannot read back from a saved adapter with the transformers installed here."""
    import transformers

    if config.modules_to_save and not reads_saved_modules():
        what = f"transformers {transformers.__version__} does not read modules_to_save back from an adapter folder"
        return [f"{what}: Burnish does, transformers 5.18 does, and a merged folder needs neither"]
    return []


def remove_adapter(transformer: PreTrainedModel) -> None:
    """Take every adapter layer out again, also after an injection that broke off half-way."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for path, module in list(transformer.named_modules()):
        owner, _, leaf = path.rpartition(".")
        if isinstance(module, BaseTunerLayer):
            setattr(transformer.get_submodule(owner), leaf, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            setattr(transformer.get_submodule(owner), leaf, module.original_module)
    transformer._hf_peft_config_loaded = False
    if hasattr(transformer, "peft_config"):
        del transformer.peft_config


def lora_layers(transformer: nn.Module, default: LoraTargets) -> tuple[list[str], list[str]]:
    """(the layers a family's default targets adapt, the linear layers it leaves out as dead), by full name."""
    linear = [name for name, module in transformer.named_modules() if _is_linear(module)]
    dead = [name for name in linear if _named(name, default.exclude)]
    return [name for name in linear if name not in dead and (not default.names or _named(name, default.names))], dead


def _left_out(layers: list[str], saved: Sequence[str], headed: bool) -> list[str]:
    """Why these layers get no adapter; those that train in full are told elsewhere."""
    why = "it belongs to the head, which stays as it is" if headed else "nothing reads its output"
    return [f"{name} gets no adapter: {why}" for name in layers if name not in saved]


def _is_linear(module: nn.Module) -> bool:
    # Quantised layers subclass nn.Linear; GPT-2's kin use Conv1D, a linear layer with transposed weights.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _named(full: str, suffixes: Iterable[str]) -> bool:
    return any(full == suffix or full.endswith(f".{suffix}") for suffix in suffixes)


def wake_adapters(transformer: PreTrainedModel) -> None:
    """Make a loaded adapter trainable as it was: PEFT loads it frozen, and a run on it would train nothing."""
    if not getattr(transformer, "_hf_peft_config_loaded", False):
        return
    active = transformer.active_adapters()
    transformer.set_adapter(active)
    config = transformer.peft_config[active[0]]
    bias = getattr(config, "bias", "none")
    check_over_quantised(transformer, bias=bias, dora=getattr(config, "use_dora", False))
    for name, parameter in transformer.named_parameters():
        if name.endswith("bias") and (bias == "all" or (bias == "lora_only" and ".base_layer." in name)):
            parameter.requires_grad_(True)
    float32_adapters(transformer)


def adapter_base(transformer: PreTrainedModel | None) -> str | None:
    """The folder or Hub id of the model that the active adapter was made for; None without an adapter."""
    if not getattr(transformer, "_hf_peft_config_loaded", False) or transformer is None:
        return None
    return getattr(transformer.peft_config[transformer.active_adapters()[0]], "base_model_name_or_path", None)


def read_adapter(transformer: PreTrainedModel, name: str, **hub: Any) -> None:
    """Load an adapter's weights again through PEFT, in float32, whose reader knows what transformers' own leaves out.

    transformers rounds an adapter to the dtype of its base. Versions 5.17 to 5.23 miss the magnitudes of DoRA, and 5.17
    misses `modules_to_save`; both log it and go on with fresh values.

    Raises:
        ModelError: If the file and the adapter do not fit each other.
    """
    wake_adapters(transformer)
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    known = {key: value for key, value in hub.items() if value is not None}
    weights = load_peft_weights(name, device="cpu", **known)
    bare = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
    try:
        outcome: Any = set_peft_model_state_dict(transformer, bare)
    except (KeyError, RuntimeError) as error:
        raise ModelError(f"its weights do not fit ({error})", where=f"adapter {name}", fix="Save it again") from error
    if outcome.unexpected_keys:
        what = f"its weight {outcome.unexpected_keys[0]} fits no module"
        raise ModelError(what, where=f"adapter {name}", fix="Save it again")


def mend_saved(folder: Path) -> None:
    """Name DoRA's magnitudes in a saved adapter so that transformers finds them: "…magnitude_vector.weight".

    PEFT writes them without the ending and takes both; transformers inserts the adapter's name before the ending. And
    name a base whose transformer has a folder of its own by that, for readers look for a config in what is named.
    """
    from safetensors.torch import load_file, save_file

    if (said := folder / "adapter_config.json").exists():
        config = json.loads(said.read_text(encoding="utf-8"))
        base = Path(config["base_model_name_or_path"] or "")
        if (base / "modules.json").exists() and not (base / "config.json").exists():
            inner = json.loads((base / "modules.json").read_text(encoding="utf-8"))[0]["path"]
            said.write_text(json.dumps({**config, "base_model_name_or_path": str(base / inner)}, indent=2) + "\n")
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        return
    weights = load_file(path)
    named = {f"{key}.weight" if key.endswith("lora_magnitude_vector") else key: weights[key] for key in weights}
    if named.keys() != weights.keys():
        save_file(named, path, metadata={"format": "pt"})


def float32_adapters(transformer: PreTrainedModel) -> None:
    """Hold trainable weights in float32: a bfloat16 one loses updates smaller than 1/256 of itself. Adapter layers take
    what a narrower base gives them; modules that train in full are handed it in float32."""
    from peft.utils import ModulesToSaveWrapper

    for parameter in transformer.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    for module in transformer.modules():
        if isinstance(module, ModulesToSaveWrapper) and _widen_inputs not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_widen_inputs)


def _widen_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Narrow tensors in float32, where the module's own weights are."""
    first = next((one for one in module.parameters() if one.requires_grad), None)
    if first is None or first.dtype != torch.float32:
        return inputs
    narrow = (torch.float16, torch.bfloat16)
    return tuple(one.float() if isinstance(one, torch.Tensor) and one.dtype in narrow else one for one in inputs)
