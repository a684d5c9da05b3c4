"""A base in 4 or 8 bits on a CPU: every family, loading, training, beside a dense model of the same weights."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from sentence_transformers import SentenceTransformer as PlainModel
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, RobertaConfig

from burnish import FastSentenceTransformer, SentenceTransformer
from burnish.core.errors import ConfigError, ModelError
from burnish.core.quantised import CPU_FLOOR, dequantised, is_quantised, layers
from burnish.core.saving import merged_state_dict
from burnish.core.testing.subject import (
    Subject,
    backward,
    compare_gradients,
    compare_outputs,
    embed,
    quietly,
)  # fmt: skip

try:
    INSTALLED = Version(version("bitsandbytes"))
except PackageNotFoundError:
    INSTALLED = Version("0")
# Below that, tests/unit/test_precision.py shows that it is refused.
pytestmark = pytest.mark.skipif(Version(CPU_FLOOR) > INSTALLED, reason=f"bitsandbytes {CPU_FLOOR} has the CPU path")

Make = Callable[..., Any]
FAMILIES = ["bert", "mpnet", "distilbert", "modernbert", "xlm_roberta", "gemma", "qwen3", "generic"]
FLAGS: dict[str, dict[str, Any]] = {"4bit": {"load_in_4bit": True}, "8bit": {"load_in_8bit": True}}


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    if request.param == "generic":
        config: Any = RobertaConfig(
            vocab_size=250, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=63,
            max_position_embeddings=98, pad_token_id=1, type_vocab_size=1,
        )  # fmt: skip
    else:
        config = import_module(f"burnish.families.{request.param}").sample("tiny")
    return Subject(config=config, folder=tmp_path_factory.mktemp(request.param))


def adapted(model: Any, seed: int = 5, **lora: Any) -> Any:
    """The model with an adapter that acts: every trainable weight away from where it starts."""
    with quietly():
        FastSentenceTransformer.get_peft_model(model, **{"r": 4, **lora})
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


SHORT = r"on a CPU, PEFT reads 4-bit layers wrong whose inputs are no multiple of 64, and this model has some"


def dense_twin(subject: Subject, quantised: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A plain model whose weights are what the quantised one (without an adapter) stores."""
    twin = subject.ours(adapters=True, dtype=dtype)
    twin.transformers_model.load_state_dict(merged_state_dict(quantised.transformers_model, dtype))
    return twin


def still(model: Any) -> Any:
    """The model without dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def difference(first: Any, second: Any) -> float:
    return float(np.abs(np.asarray(first, np.float32) - np.asarray(second, np.float32)).max())


@pytest.mark.parametrize("kind", FLAGS)
def test_every_family_computes_what_a_dense_model_does(subject: Subject, kind: str) -> None:
    ours = subject.ours(adapters=True, **FLAGS[kind])
    transformer = ours.transformers_model
    linear = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    quantised = {name for name, _ in layers(transformer)}
    assert quantised and quantised == linear, "not every linear layer is quantised"
    assert f"{len(linear)} linear layers in {kind} (" in str(ours.burnish) and f"{kind} storage" in str(ours.burnish)
    others = {p.dtype for p in transformer.parameters() if type(p).__name__ not in ("Params4bit", "Int8Params")}
    assert others == {torch.float32}
    twin, full = dense_twin(subject, ours), subject.ours(adapters=True)
    assert not any(is_quantised(module) for module in twin.modules())
    for model in (ours, twin, full):
        adapted(model)
    (out, gradients), (wanted, reference) = backward(ours, subject.texts), backward(twin, subject.texts)
    compare_outputs(out, wanted, 1e-5)
    compare_gradients(gradients, reference, 1e-4)
    assert gradients and all(".lora_" in name for name in gradients)
    with pytest.raises(AssertionError, match="embeddings are off"):
        compare_outputs(out, backward(full, subject.texts)[0], 1e-4)  # the rounding to few bits is there


@pytest.mark.parametrize("kind", FLAGS)
def test_bfloat16_is_off_by_its_own_rounding_only(subject: Subject, kind: str) -> None:
    ours = subject.ours(adapters=True, dtype="bfloat16", **FLAGS[kind])
    # The same stored weights in both: in bfloat16, and beyond its reach.
    twin, exact = (dense_twin(subject, ours, dtype) for dtype in (torch.bfloat16, torch.float32))
    for model in (ours, twin, exact):
        adapted(model)
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    outs = [backward(model, subject.texts)[0].float() for model in (ours, twin, exact)]
    plain = float((outs[1] - outs[2]).abs().max())
    assert 0 < float((outs[0] - outs[2]).abs().max()) <= 2 * plain + 1e-3


def test_4_bits_are_read_as_they_are_defined(tiny_bert: Path, minilm: Path, load: Make) -> None:
    """NF4's table and the scales of 64 weights each, by hand. The tiny model's rows are no whole number of blocks."""
    from bitsandbytes.functional import dequantize_4bit, get_4bit_type

    apart = {}
    for folder in (tiny_bert, minilm):
        model, full = load(folder, load_in_4bit=True), load(folder).transformers_model
        found = dict(layers(model.transformers_model))
        for name, layer in found.items():
            weight, state = full.get_submodule(name).weight, layer.weight.quant_state
            blocks = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
            above = state.state2.absmax.repeat_interleave(256)[: len(blocks)]
            scales = state.state2.code[state.absmax.long()].view(-1) * above + state.offset
            gap = state.state2.code.diff().max() * above  # its table has no -1: the ends are off by most of a gap
            assert bool(((scales - blocks.abs().amax(1)).abs() <= gap).all())
            table = get_4bit_type("nf4", device="cpu")  # type: ignore[no-untyped-call]
            codes = torch.stack([layer.weight.data.view(-1) >> 4, layer.weight.data.view(-1) & 15], 1).view(-1).long()
            wanted = (table[codes].view(-1, 64) * scales[:, None]).view(-1)[: weight.numel()].view(weight.shape)
            torch.testing.assert_close(dequantised(layer), wanted, rtol=1e-5, atol=1e-7)
            identity = torch.eye(weight.shape[1])
            bias = 0 if layer.bias is None else layer.bias
            torch.testing.assert_close(layer(identity) - bias, wanted.T, rtol=1e-4, atol=1e-5)
            error = dequantize_4bit(layer.weight.data, state) - wanted
            apart[(folder, weight.shape[1])] = float(error.abs().max() / wanted.abs().max())
    assert all(error < 1e-5 for (_, width), error in apart.items() if width % 64 == 0) and len(apart) == 4
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert apart[(tiny_bert, 32)] > 0.1, "bitsandbytes reads these right now: core/short_rows.py can go"


def cpu_repacks() -> bool:
    from bitsandbytes import functional

    return bool(functional.has_avx512bf16())  # type: ignore[no-untyped-call]


def test_evaluation_leaves_training_as_it_was(minilm: Path, load: Make, texts: list[str], tmp_path: Path) -> None:
    """bitsandbytes repacks 4-bit weights in evaluation on some CPUs, and then no gradient passes them."""
    model = still(adapted(load(minilm, load_in_4bit=True)))
    _, before = backward(model, texts)
    first = model.encode(texts)
    stored = {name: layer.weight.data.clone() for name, layer in layers(model)}
    _, after = backward(model, texts)
    assert max(float(value.abs().max()) for value in before.values()) > 0
    compare_gradients(after, before, 0.0)
    assert all(torch.equal(layer.weight.data, stored[name]) for name, layer in layers(model)) and stored
    assert (model.encode(texts) == first).all()
    # Evaluation computes in float32, as training does.
    model.train()
    with torch.no_grad():
        compare_outputs(embed(model, texts), torch.from_numpy(first), 1e-5)
    if not cpu_repacks():
        return
    stock = load(minilm, for_inference=True, model_kwargs={"quantization_config": nf4()})
    stock.encode(texts)
    with pytest.raises(
        ModelError, match=r"^this model: bitsandbytes has repacked its 4-bit weights .*without for_infer"
    ):
        stock.save_pretrained(str(tmp_path / "no"))
    with pytest.raises(ModelError, match="has repacked"):
        stock.save_pretrained_merged(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def nf4(**settings: Any) -> Any:
    given = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **settings}
    return BitsAndBytesConfig(load_in_4bit=True, **given)  # type: ignore[no-untyped-call]


CONFIGS: dict[str, Callable[[], Any]] = {
    "nf4": nf4,
    "nf4 bf16": lambda: nf4(bnb_4bit_compute_dtype=torch.bfloat16),
    "nf4 single": lambda: nf4(bnb_4bit_use_double_quant=False),
    "fp4": lambda: nf4(bnb_4bit_quant_type="fp4"),
    "stored as bf16": lambda: nf4(bnb_4bit_quant_storage=torch.bfloat16),
    "8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),  # type: ignore[no-untyped-call]
}


@pytest.fixture(scope="module", params=CONFIGS)
def stored(request: pytest.FixtureRequest, tiny_bert_st: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(name, folder as plain Sentence Transformers and transformers write it, its quantised state dict)."""
    dtype = torch.bfloat16 if "bf16" in request.param else torch.float32
    plain: Any = PlainModel(
        str(tiny_bert_st),
        device="cpu",
        model_kwargs={"quantization_config": CONFIGS[request.param](), "dtype": dtype, "device_map": {"": "cpu"}},
    )
    folder = tmp_path_factory.mktemp("stored") / "checkpoint"
    plain.save_pretrained(str(folder))
    return request.param, folder, plain.transformers_model.state_dict()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_prequantised_checkpoints(
    stored: Any, load: Make, step: Make, texts: list[str], tmp_path: Path, dtype: Any
) -> None:
    name, folder, state = stored
    kind = "8bit" if name == "8bit" else "4bit"
    models = [load(folder, dtype=dtype, **flags) for flags in ({}, FLAGS[kind])]
    assert (models[0].encode(texts) == models[1].encode(texts)).all()
    model = models[0]
    wanted = torch.bfloat16 if dtype else torch.float32
    assert f"{kind} storage of the checkpoint" in str(model.burnish)
    beside = {p.dtype for p in model.parameters() if type(p).__name__ not in ("Params4bit", "Int8Params")}
    assert beside == {wanted}
    own = model.transformers_model.state_dict()
    assert state.keys() == own.keys()
    codes = [
        key for key, value in state.items() if value.dtype in (torch.uint8, torch.int8) and "quant_state" not in key
    ]
    assert codes and all(torch.equal(own[key], state[key]) for key in codes), "the stored bits are others"
    # Trains as a dense model with these weights, in the chosen dtype whatever the checkpoint's config names.
    adapted(model)
    moved = model.encode(texts)
    step(model)
    assert difference(model.encode(texts), moved) > 1e-3
    model.save_pretrained(str(tmp_path / "adapter"))
    again = load(tmp_path / "adapter", dtype=dtype)
    assert difference(again.encode(texts), model.encode(texts)) == 0
    assert {p.dtype for p in again.parameters() if p.requires_grad} == {torch.float32}
    live = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert live and all(torch.equal(dict(again.named_parameters())[key], value) for key, value in live.items())
    step(again)
    assert difference(again.encode(texts), model.encode(texts)) > 1e-3


def test_a_prequantised_checkpoint_trains_as_a_dense_model(stored: Any, load: Make, tiny_bert_st: Path) -> None:
    _, folder, _ = stored
    texts = ["hello world", "a", "one more sentence, of middling length, " * 4]
    ours, twin = load(folder), load(tiny_bert_st)
    twin.transformers_model.load_state_dict(merged_state_dict(ours.transformers_model, torch.float32))
    for model in (ours, twin):
        still(adapted(model))
    (out, gradients), (wanted, reference) = backward(ours, texts), backward(twin, texts)
    compare_outputs(out, wanted, 1e-5)
    compare_gradients(gradients, reference, 1e-4)


@pytest.mark.parametrize("kind", FLAGS)
def test_a_checkpoint_for_inference_is_plain_sentence_transformers(
    minilm: Path, load: Make, plain: Make, texts: list[str], tmp_path: Path, kind: str
) -> None:
    load(minilm, **FLAGS[kind]).save_pretrained(str(tmp_path / "stored"))
    expected = plain(tmp_path / "stored").encode(texts)
    model = load(tmp_path / "stored", for_inference=True)
    assert (model.encode(texts) == expected).all() and len(list(layers(model))) == 37


STORED_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"load_in_8bit": True}, r"^load_in_8bit: the checkpoint is stored as 4bit\. Drop load_in_8bit"),
    ({"load_in_16bit": True}, r"^load_in_16bit: the weights are stored as 4bit\. Drop"),
    ({"full_finetuning": True}, r"^full_finetuning: the weights are stored as 4bit, which cannot be trained in full"),
    (
        {"model_kwargs": {"quantization_config": nf4()}},
        r"^model_kwargs\['quantization_config'\]: there are two, with the checkpoint's own \(4bit\)\. Drop it",
    ),
]


@pytest.mark.parametrize("options, message", STORED_REFUSALS, ids=[str(list(entry[0])) for entry in STORED_REFUSALS])
def test_contradictions_with_a_checkpoint(
    tiny_bert_st: Path, load: Make, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "stored"
    load(tiny_bert_st, load_in_4bit=True).save_pretrained(str(folder))
    with pytest.raises(ConfigError, match=message) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", FLAGS)
def test_what_is_stored_is_what_transformers_stores(
    tiny_bert: Path, load: Make, tmp_path: Path, texts: list[str], kind: str
) -> None:
    """Both ways: our weights are transformers' to the bit, and a folder saved by either is read by the other."""
    ours = load(tiny_bert, **FLAGS[kind])
    config = ours.transformers_model.config.quantization_config
    theirs: Any = AutoModel.from_pretrained(tiny_bert, quantization_config=config, device_map={"": "cpu"})
    wanted = theirs.state_dict()
    state = ours.transformers_model.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in wanted)
    live = ours.encode(texts)
    ours.save_pretrained(str(tmp_path / "ours"))
    read = AutoModel.from_pretrained(tmp_path / "ours", device_map={"": "cpu"}).state_dict()
    assert read.keys() == wanted.keys() and all(torch.equal(read[key], wanted[key]) for key in wanted)
    assert (load(tmp_path / "ours").encode(texts) == live).all()
    assert (load(tmp_path / "ours", **FLAGS[kind]).encode(texts) == live).all()


@pytest.mark.parametrize("kind", FLAGS)
def test_a_real_model(minilm: Path, load: Make, plain: Make, tmp_path: Path, kind: str) -> None:
    sentences = ["A man is eating food.", "Someone has lunch.", "The stock market fell.", "Shares lost value."]
    ours, full = load(minilm, **FLAGS[kind]), plain(minilm)
    found, wanted = ours.encode(sentences), full.encode(sentences)
    cosines = (found * wanted).sum(1)
    assert 0.95 < cosines.min() < 0.99999 if kind == "4bit" else 0.999 < cosines.min() < 0.999999
    ours.save_pretrained(str(tmp_path / "stored"))
    size = sum(path.stat().st_size for path in (tmp_path / "stored").rglob("*.safetensors"))
    assert size < 0.7 * (minilm / "model.safetensors").stat().st_size
    again = load(tmp_path / "stored")
    assert (again.encode(sentences) == found).all()
    for (name, layer), (_, other) in zip(layers(ours), layers(again), strict=True):
        assert torch.equal(dequantised(layer), dequantised(other)), name


def test_a_script_of_sentence_transformers(tiny_bert_st: Path, texts: list[str], step: Make) -> None:
    """One changed import: the model waits for an adapter, and computes in the dtype that the script's config names."""
    from peft import LoraConfig

    with quietly():
        model = SentenceTransformer(
            str(tiny_bert_st),
            device="cpu",
            model_kwargs={"quantization_config": nf4(bnb_4bit_compute_dtype=torch.bfloat16)},
        )
    assert model.burnish is not None and model.burnish.decision.options.purpose == "adapters"
    assert "computed in bfloat16" in str(model.burnish)
    model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
    before = model.encode(texts)
    step(model)
    assert difference(model.encode(texts), before) > 1e-4


LORA_REFUSALS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("4bit", {}, {"init_lora_weights": "pissa"}, r"^init_lora_weights: 'pissa' does not start from quantised weights"),
    (
        "8bit",
        {},
        {"init_lora_weights": "orthogonal"},
        r"^init_lora_weights: 'orthogonal' does not start from quantised",
    ),
    ("4bit", {}, {"modules_to_save": ["pooler"]}, r"^modules_to_save: pooler\.dense is quantised and cannot train in"),
    ("8bit", {}, {"modules_to_save": ["query"]}, r"^modules_to_save: .*query is quantised and cannot train in full"),
    ("8bit", {}, {"use_dora": True}, r"^use_dora: PEFT breaks 8-bit layers on a CPU\. Use load_in_4bit, or plain LoRA"),
    ("4bit", {}, {"use_dora": True}, rf"^use_dora: {SHORT}\. Use plain LoRA"),
    ("4bit", {}, {"init_lora_weights": "olora"}, rf"^init_lora_weights: {SHORT}\. Pass True, False or"),
    (
        "4bit",
        {"dtype": "bfloat16"},
        {"bias": "all"},
        r"^bias='all': bitsandbytes casts the biases of quantised layers to torch\.bfloat16.*Pass bias=\"none\"",
    ),
]


@pytest.mark.parametrize("kind, options, lora, message", LORA_REFUSALS, ids=[entry[-1][:50] for entry in LORA_REFUSALS])
def test_adapters_that_a_quantised_base_cannot_take(
    load: Make, tiny_bert_st: Path, kind: str, options: dict[str, Any], lora: dict[str, Any], message: str
) -> None:
    model = load(tiny_bert_st, **FLAGS[kind], **options)
    keys = list(model.state_dict())
    with pytest.raises(ConfigError, match=message) as caught:
        FastSentenceTransformer.get_peft_model(model, **lora)
    assert "\n" not in str(caught.value) and list(model.state_dict()) == keys
    FastSentenceTransformer.get_peft_model(model, r=2)  # nothing half-done is in the way


def test_a_loaded_adapter_is_held_to_the_same(load: Make, tiny_bert_st: Path, tmp_path: Path) -> None:
    with quietly():
        model = FastSentenceTransformer.get_peft_model(load(tiny_bert_st), r=2, use_dora=True)
    model.save_pretrained(str(tmp_path / "dora"))
    with pytest.raises(ConfigError, match=r"^use_dora: PEFT breaks 8-bit layers on a CPU"):
        load(tmp_path / "dora", load_in_8bit=True)
    with pytest.raises(ConfigError, match=rf"^use_dora: {SHORT}"):
        load(tmp_path / "dora", load_in_4bit=True)


def test_the_count_of_weights_is_not_that_of_bytes(
    load: Make, tiny_bert_st: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for flags in ({}, FLAGS["4bit"], FLAGS["8bit"]):
        model = load(tiny_bert_st, **flags)
        capsys.readouterr()
        FastSentenceTransformer.get_peft_model(model)
        said.append(capsys.readouterr().err)
    assert "M to train" in said[0] and said[0] == said[1] == said[2]


def test_a_model_without_linear_layers_says_so(tmp_path: Path, tiny_bert_st: Path, load: Make) -> None:
    """transformers logs a line and goes on in float32."""
    model = load(tiny_bert_st)
    model.transformers_model.is_quantized = True
    from burnish.core.quantised import settle

    with pytest.raises(ModelError, match=r"no linear layer of this bert model could be stored in fewer bits"):
        settle(model.transformers_model, model.burnish.decision.precision)


@pytest.fixture
def heard() -> Iterator[io.StringIO]:
    """What bitsandbytes logs."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("bitsandbytes")
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)


def test_8_bit_layers_do_not_log_every_forward(
    load: Make, tiny_bert_st: Path, texts: list[str], heard: io.StringIO
) -> None:
    model = load(tiny_bert_st, load_in_8bit=True)
    model.encode(texts)
    assert heard.getvalue() == "" and "rounded to 8 bits too in evaluation" in str(model.burnish)
    logging.getLogger("bitsandbytes.autograd._functions").warning("something else")
    assert "something else" in heard.getvalue()
