"""What comes out of a model with a quantised base: merged folders, adapters, checkpoints; the model itself stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer as PlainModel
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel, GPT2Config, GPT2Model, TrainerCallback

from burnish import FastSentenceTransformer, Trainer, TrainingArguments
from burnish.core.quantised import CPU_FLOOR, dequantised, layers
from burnish.core.testing.subject import embed, quietly
from burnish.core.testing.tokenizer import save_tokenizer

try:
    INSTALLED = Version(version("bitsandbytes"))
except PackageNotFoundError:
    INSTALLED = Version("0")
# Below that, tests/unit/test_precision.py shows that it is refused.
pytestmark = pytest.mark.skipif(Version(CPU_FLOOR) > INSTALLED, reason=f"bitsandbytes {CPU_FLOOR} has the CPU path")

Make = Callable[..., Any]
FLAGS: dict[str, dict[str, Any]] = {"4bit": {"load_in_4bit": True}, "8bit": {"load_in_8bit": True}}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 4},
    "dora": {"use_dora": True},
    "bias lora_only": {"bias": "lora_only"},
    "bias all": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["LayerNorm"], "target_modules": ["query", "value"]},
    "olora": {"init_lora_weights": "olora"},
    "one layer": {"layers_to_transform": [1], "lora_dropout": 0.1},
}
# PEFT reads the base for these, on a CPU right only where a layer's inputs are a multiple of 64.
READING = ("dora", "olora")
CASES = [(kind, name) for kind in FLAGS for name in VARIANTS if (kind, name) != ("8bit", "dora")]


@pytest.fixture(scope="module")
def wide_bert_st(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers have 64 and 128 inputs; those of `tiny_bert_st` have 32 and 64."""
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(tiny_bert, hidden_size=64, intermediate_size=128)
    folder = tmp_path_factory.mktemp("wide")
    BertModel(config).save_pretrained(folder / "wide-bert")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder / "wide-bert")
    trunk = Transformer(str(folder / "wide-bert"), max_seq_length=64)
    model = PlainModel(modules=[trunk, Pooling(64, pooling_mode="mean"), Normalize()], device="cpu")
    model.save_pretrained(str(folder / "wide-bert-st"))
    return folder / "wide-bert-st"


@pytest.fixture
def base(request: pytest.FixtureRequest, name: str) -> Path:
    folder: Path = request.getfixturevalue("wide_bert_st" if name in READING else "tiny_bert_st")
    return folder


def difference(first: Any, second: Any) -> float:
    return float(np.abs(np.asarray(first, np.float32) - np.asarray(second, np.float32)).max())


def storage(model: Any) -> dict[str, Tensor]:
    """Every tensor that bitsandbytes' layers hold, copied."""
    held: dict[str, Tensor] = {}
    for name, layer in layers(model):
        held |= {f"{name}.{key}": value.clone() for key, value in layer.state_dict().items()}
    return held


def trained(model: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def in_training(model: Any, texts: list[str]) -> np.ndarray[Any, Any]:
    """Embeddings as a training step computes them, without dropout: 8-bit layers round no inputs there."""
    rates = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    for module in rates:
        module.p = 0.0
    model.train()
    with torch.no_grad():
        out = embed(model, texts)
    model.eval()
    for module, rate in rates.items():
        module.p = rate
    return out.float().numpy()


@pytest.mark.parametrize("kind, name", CASES, ids=[" ".join(case) for case in CASES])
def test_a_merge_is_exact_and_leaves_the_model_alone(
    adapted: Make, load: Make, step: Make, plain: Make, texts: list[str], tmp_path: Path, base: Path, kind: str,
    name: str,
) -> None:  # fmt: skip
    model = adapted(base, load_options=FLAGS[kind], **VARIANTS[name])
    live, before, weights = model.encode(texts), storage(model), {key: p.clone() for key, p in trained(model).items()}
    assert difference(live, load(base, **FLAGS[kind]).encode(texts)) > 1e-3, "the adapter does nothing"
    model.save_pretrained_merged(tmp_path / "merged")
    found = plain(tmp_path / "merged").encode(texts)
    assert difference(found, in_training(model, texts)) <= 1e-5
    if kind == "4bit":
        assert difference(found, live) <= 1e-5
    # The live model is what it was, to the bit, and its adapter trains on.
    assert (model.encode(texts) == live).all()
    after = storage(model)
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert weights.keys() == trained(model).keys() and all(
        torch.equal(trained(model)[k], v) for k, v in weights.items()
    )
    step(model)
    assert difference(model.encode(texts), live) > 1e-4
    model.save_pretrained_merged(tmp_path / "second")
    assert difference(plain(tmp_path / "second").encode(texts), in_training(model, texts)) <= 1e-5
    # The folder is a stock model's.
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    stock = load_file(base / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert "quantization_config" not in config and not any("quant" in key for key in config)
    assert {key: (value.shape, value.dtype) for key, value in merged.items()} == {
        key: (value.shape, value.dtype) for key, value in stock.items()
    }
    older = {"torch_dtype", "position_embedding_type"}
    assert config.keys() - older == json.loads((base / "config.json").read_text()).keys()
    assert type(plain(tmp_path / "merged")) is PlainModel


@pytest.mark.parametrize("kind, name", CASES, ids=[" ".join(case) for case in CASES])
def test_an_adapter_folder_goes_over_the_same_base(
    adapted: Make, load: Make, step: Make, texts: list[str], tmp_path: Path, base: Path, kind: str, name: str
) -> None:
    model = adapted(base, load_options=FLAGS[kind], **VARIANTS[name])
    model.save_pretrained(str(tmp_path / "adapter"))
    live = model.encode(texts)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert not (tmp_path / "adapter" / "config.json").exists()
    record = json.loads((tmp_path / "adapter" / "burnish.json").read_text())
    assert record["precision"]["quantization"] == kind
    again = load(tmp_path / "adapter", **FLAGS[kind])
    assert (again.encode(texts) == live).all()
    assert trained(again).keys() == trained(model).keys()
    assert {parameter.dtype for parameter in trained(again).values()} == {torch.float32}
    step(again)
    assert difference(again.encode(texts), live) > 1e-4
    dense = load(tmp_path / "adapter")  # over the full-precision base, as many serve an adapter
    assert dense.burnish.decision.precision.storage is None and difference(dense.encode(texts), live) > 1e-5


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_rounded_once(
    minilm: Path, adapted: Make, plain: Make, texts: list[str], tmp_path: Path, kind: str, dtype: str
) -> None:
    """A merge into 16 bits: no farther from the exact one than rounding every exact weight to that dtype is."""
    model = adapted(minilm, load_options=FLAGS[kind])
    model.save_pretrained_merged(tmp_path / "exact", save_method="merged_32bit")
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "float16":
        model.save_pretrained_merged(tmp_path / "half", save_method="merged_16bit")
        half = load_file(tmp_path / "half" / "model.safetensors")
    else:
        half = dict(model.merged("merged_32bit").to(torch.bfloat16)[0].model.state_dict())
    assert exact.keys() == half.keys() and all(torch.equal(half[k], v.to(kinds[dtype])) for k, v in exact.items())


@pytest.mark.parametrize("kind", FLAGS)
def test_a_bfloat16_model_merges_within_its_own_rounding(
    minilm: Path, adapted: Make, plain: Make, texts: list[str], tmp_path: Path, kind: str
) -> None:
    """The live model rounds weights, adapter and sum apart, the merged one their sum: both beside the exact one."""
    model = adapted(minilm, load_options={"dtype": "bfloat16", **FLAGS[kind]})
    model.save_pretrained_merged(tmp_path / "half")
    model.save_pretrained_merged(tmp_path / "exact", save_method="merged_32bit")
    assert {value.dtype for value in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    exact = plain(tmp_path / "exact").encode(texts)
    half = PlainModel(str(tmp_path / "half"), device="cpu", model_kwargs={"dtype": torch.bfloat16}).encode(texts)
    rounding = difference(half, exact)  # of bfloat16 arithmetic and weights, with no quantised layer in it
    assert rounding > 0 and difference(in_training(model, texts), exact) <= 3 * rounding
    assert difference(in_training(model, texts), half) <= 4 * rounding


def test_dense_modules_after_the_pooling_are_never_quantised(
    tiny_bert: Path, load: Make, step: Make, plain: Make, texts: list[str], tmp_path: Path
) -> None:
    trunk = Transformer(str(tiny_bert), max_seq_length=64)
    modules = [trunk, Pooling(32, pooling_mode="mean"), Dense(32, 48), Dense(48, 32), Normalize()]
    PlainModel(modules=modules, device="cpu").save_pretrained(str(tmp_path / "base"))
    for saved in (None, ["Dense"]):
        model = load(tmp_path / "base", load_in_4bit=True)
        with quietly():
            FastSentenceTransformer.get_peft_model(model, r=4, modules_to_save=saved)
        step(model, 0.5)
        assert [type(module.linear) for module in model if isinstance(module, Dense)] == [nn.Linear, nn.Linear]
        assert any(name.startswith("2.") for name in trained(model)) == (saved is not None)
        live, folder = model.encode(texts), tmp_path / f"of-{saved}"
        model.save_pretrained_merged(folder / "merged")
        model.save_pretrained(str(folder / "adapter"))
        assert difference(plain(folder / "merged").encode(texts), live) <= 1e-5
        assert (load(folder / "adapter", load_in_4bit=True).encode(texts) == live).all()


@pytest.mark.parametrize("kind", FLAGS)
def test_layers_whose_weights_lie_the_other_way_round(
    load: Make, step: Make, plain: Make, texts: list[str], tmp_path: Path, kind: str
) -> None:
    """GPT-2's Conv1D holds (in, out): transformers turns it for bitsandbytes, a merge turns it back."""
    config = GPT2Config(
        vocab_size=250, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1, pad_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    GPT2Model(config).save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2", config, first=False, max_length=60)
    model = load(tmp_path / "gpt2", **FLAGS[kind])
    assert len(list(layers(model))) == 8
    with quietly():
        FastSentenceTransformer.get_peft_model(model, r=4)
    step(model)
    step(model)
    model.save_pretrained_merged(tmp_path / "merged")
    assert difference(plain(tmp_path / "merged").encode(texts), in_training(model, texts)) <= 1e-5


@pytest.mark.parametrize("kind", FLAGS)
def test_reading_a_layer_touches_nothing(
    load: Make, tiny_bert_st: Path, step: Make, texts: list[str], kind: str
) -> None:
    """Before the first forward, after one, and after training; 8-bit layers keep their scales elsewhere each time."""
    model = load(tiny_bert_st, **FLAGS[kind])
    weights = {name: dequantised(layer) for name, layer in layers(model)}
    assert weights and all(value.dtype == torch.float32 for value in weights.values())
    plain = load(tiny_bert_st).transformers_model.state_dict()
    for name, value in weights.items():
        full = plain[f"{name.partition('.model.')[2]}.weight"]
        bound = 0.17 if kind == "4bit" else 0.005  # half of the widest gap: NF4's is 0.30 of the largest, 8 bits' 1/127
        assert 0 < float((value - full).abs().max()) <= bound * float(full.abs().max())
    with quietly():
        FastSentenceTransformer.get_peft_model(model, r=4)
    for _ in range(2):
        model.encode(texts)
        step(model)
        found = {name.replace(".base_layer", ""): dequantised(layer) for name, layer in layers(model)}
        assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)


class Stop(TrainerCallback):
    """Ends a run early, as a crash after a checkpoint would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= 4


@pytest.mark.parametrize("stored", [False, True], ids=["plain base, 4 bits", "stored base"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    load: Make, tiny_bert_st: Path, pairs: Any, texts: list[str], tmp_path: Path, stored: bool
) -> None:
    folder, flags = tiny_bert_st, FLAGS["4bit"]
    if stored:
        load(tiny_bert_st, **FLAGS["4bit"]).save_pretrained(str(tmp_path / "stored"))
        folder, flags = tmp_path / "stored", {}

    def run(output: str, *, callbacks: Any = (), resume: bool = False) -> tuple[Any, list[float]]:
        with quietly():
            model = FastSentenceTransformer.get_peft_model(load(folder, **flags), r=4)
        args = TrainingArguments(
            str(tmp_path / output), per_device_train_batch_size=8, max_steps=8, logging_steps=1, learning_rate=1e-2,
            report_to="none", save_strategy="steps", save_steps=4, disable_tqdm=True, use_cpu=True, token_store=False,
        )  # fmt: skip
        loss = MultipleNegativesRankingLoss(model)
        trainer = Trainer(model=model, args=args, train_dataset=pairs, loss=loss, callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=resume)
        return model, [row["loss"] for row in trainer.state.log_history if "loss" in row]

    whole, losses = run("whole")
    run("cut", callbacks=[Stop()])
    again, resumed = run("cut", resume=True)
    assert len(losses) == 8 and resumed == losses
    assert (again.encode(texts) == whole.encode(texts)).all()
    checkpoint = {path.name for path in (tmp_path / "cut" / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in checkpoint and "model.safetensors" not in checkpoint
