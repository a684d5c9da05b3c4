"""Qwen3-Embedding and EmbeddingGemma as they are published, in small: nothing of them is lost at load, in training or
in saving. (The weights are random; files, modules, prompts, tokenizer and chat template are laid out as on the Hub.)"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer as PlainModel

from burnish import FastSentenceTransformer
from burnish.core.errors import ConfigError, ModelError
from burnish.core.testing.subject import Subject, backward, compare_gradients, compare_outputs, embed
from burnish.families import gemma, qwen3

INSTRUCTION = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
TEMPLATE = "{% for message in messages %}w1 w2 {{ message['content'] }} w3{% endfor %}"
TEXTS = ["w4 w5 w6", "w7", "", " ".join(f"w{n % 40}" for n in range(60)), "w9 w8 w7 w6 w5"]


def published(folder: Path, module: Any, modules: list[str], prompts: dict[str, str], template: str | None) -> Path:
    """A folder in the layout that these repositories have on the Hub, written before Sentence Transformers 5."""
    repository = Subject(config=module.sample("tiny"), folder=folder).repository
    width = 32
    names = [f"{place}_{kind}" if place else "" for place, kind in enumerate(modules)]
    types = [f"sentence_transformers.models.{kind}" for kind in modules]
    rows = [
        {"idx": place, "name": str(place), "path": name, "type": kind}
        for place, (name, kind) in enumerate(zip(names, types, strict=True))
    ]
    write(repository / "modules.json", rows)
    write(repository / "sentence_bert_config.json", {"max_seq_length": 96, "do_lower_case": False})
    write(repository / "config_sentence_transformers.json", {"prompts": prompts, "similarity_fn_name": "cosine"})
    for name, kind in zip(names, modules, strict=True):
        if kind == "Pooling":
            mode = "lasttoken" if module is qwen3 else "mean_tokens"
            flags = {
                f"pooling_mode_{one}": one == mode for one in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
            }
            write(
                repository / name / "config.json", {"word_embedding_dimension": width, **flags, "include_prompt": True}
            )
        elif kind == "Dense":
            _dense(repository / name, width)
        elif name:
            (repository / name).mkdir(exist_ok=True)
    if template:
        (repository / "chat_template.jinja").write_text(template)
    return repository


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def _dense(folder: Path, width: int) -> None:
    """A bias-free Dense without activation, 32 to 32, as EmbeddingGemma has two of (768 to 3072 and back)."""
    from safetensors.torch import save_file

    settings = {"in_features": width, "out_features": width, "bias": False}
    write(folder / "config.json", {**settings, "activation_function": "torch.nn.modules.linear.Identity"})
    weight = torch.randn(width, width, generator=torch.Generator().manual_seed(len(folder.name))) * width**-0.5
    save_file({"linear.weight": weight}, folder / "model.safetensors")


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    return published(
        tmp_path, qwen3, ["Transformer", "Pooling", "Normalize"], {"query": INSTRUCTION, "document": ""}, TEMPLATE
    )


@pytest.fixture
def embeddinggemma(tmp_path: Path) -> Path:
    modules = ["Transformer", "Pooling", "Dense", "Dense", "Normalize"]
    return published(tmp_path, gemma, modules, {**gemma.PROMPTS, "Retrieval": "w1 w2 "}, None)


def plain(folder: Path, **keywords: Any) -> Any:
    return PlainModel(str(folder), device="cpu", model_kwargs={"dtype": torch.float32}, **keywords)


def load(folder: Path, **options: Any) -> Any:
    return FastSentenceTransformer.from_pretrained(str(folder), device="cpu", **options)


def same(ours: Any, theirs: Any) -> float:
    """Embeddings and gradients agree."""
    (found, mine), (expected, stock) = backward(ours, TEXTS), backward(theirs, TEXTS)
    return max(compare_outputs(found, expected, 1e-5), compare_gradients(mine, stock, 1e-4))


@pytest.mark.parametrize("packed", [None, False])
def test_qwen3_embedding_loses_nothing_at_load(qwen: Path, packed: bool | None) -> None:
    ours, theirs = load(qwen, full_finetuning=True, packed=packed), plain(qwen)
    assert ours.burnish.decision.family.family.name == "qwen3" and bool(ours.burnish.packed) == (packed is None)
    assert [type(module).__name__ for module in ours.children()] == ["Transformer", "Pooling", "Normalize"]
    assert ours[1].pooling_mode == "lasttoken" and ours.prompts == theirs.prompts
    assert same(ours, theirs) <= 1e-4
    found, expected = (model.encode_query(TEXTS, convert_to_tensor=True) for model in (ours, theirs))
    compare_outputs(found, expected, 1e-5)
    assert float((found - ours.encode(TEXTS, convert_to_tensor=True)).abs().max()) > 1e-2, (
        "the instruction does nothing"
    )


def token_ids(model: Any, text: str) -> list[int]:
    """What the model's first module makes of one text."""
    return list(model.preprocess([text])["input_ids"].flatten().tolist())


def test_no_chat_template_is_put_around_a_text(qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unsloth's recall@10 on Qwen3-Embedding fell from 35 to 23 by that, without a word."""
    wanted = plain(qwen).tokenizer("w4 w5 w6")["input_ids"]
    assert token_ids(load(qwen), "w4 w5 w6") == token_ids(plain(qwen), "w4 w5 w6") == wanted
    (qwen / "modules.json").unlink()
    stock = plain(qwen)
    assert token_ids(stock, "w4 w5 w6") != wanted, "Sentence Transformers no longer does it: this guard can go"
    capsys.readouterr()
    bare = load(qwen, full_finetuning=True)
    assert token_ids(bare, "w4 w5 w6") == wanted
    said = capsys.readouterr().err
    assert "texts        tokenised as they are, without the tokenizer's chat template" in said
    assert "lasttoken, normalised (default of family qwen3, no modules.json)" in said
    assert "query (default of family qwen3, no modules.json)" in said and bare.prompts["query"] == INSTRUCTION


def test_a_bare_qwen3_is_saved_with_all_that_was_chosen(qwen: Path, tmp_path: Path) -> None:
    (qwen / "modules.json").unlink()
    bare = load(qwen, full_finetuning=True)
    bare.save_pretrained(str(tmp_path / "saved"))
    read = plain(tmp_path / "saved")
    assert token_ids(read, "w4 w5 w6") == token_ids(bare, "w4 w5 w6")
    compare_outputs(embed(read, TEXTS).detach(), embed(bare, TEXTS).detach(), 1e-5)
    assert read.prompts == bare.prompts and read.prompts["query"] == INSTRUCTION


def test_prompts_that_the_user_gives_stay(qwen: Path) -> None:
    (qwen / "modules.json").unlink()
    assert load(qwen, prompts={"query": "", "other": "w1"}).prompts == {"query": "", "document": "", "other": "w1"}
    assert load(qwen, prompts={"query": "w1 "}).prompts["query"] == "w1 "


def test_inference_is_bit_equal_to_sentence_transformers(qwen: Path, embeddinggemma: Path) -> None:
    for folder in (qwen, embeddinggemma):
        ours, theirs = load(folder, for_inference=True), plain(folder)
        assert torch.equal(embed(ours, TEXTS), embed(theirs, TEXTS)) and ours.prompts == theirs.prompts


@pytest.mark.parametrize("packed", [None, False])
def test_embeddinggemma_keeps_its_dense_layers_and_prompts(embeddinggemma: Path, packed: bool | None) -> None:
    ours, theirs = load(embeddinggemma, full_finetuning=True, packed=packed), plain(embeddinggemma)
    assert [type(module).__name__ for module in ours.children()] == [
        "Transformer",
        "Pooling",
        "Dense",
        "Dense",
        "Normalize",
    ]
    assert same(ours, theirs) <= 1e-4
    assert ours.prompts == theirs.prompts and len(ours.prompts) == 6
    _, gradients = backward(ours, TEXTS)
    assert float(gradients["2.linear.weight"].abs().max()) > 0 and float(gradients["3.linear.weight"].abs().max()) > 0
    found, expected = (model.encode_document(TEXTS, convert_to_tensor=True) for model in (ours, theirs))
    compare_outputs(found, expected, 1e-5)


def trained(model: Any, name: str = "") -> set[str]:
    return {key for key, value in model.named_parameters() if value.requires_grad and name in key}


def test_dense_layers_stay_frozen_under_an_adapter(embeddinggemma: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = FastSentenceTransformer.get_peft_model(load(embeddinggemma), r=4)
    assert trained(model) == trained(model, ".lora_") and len(trained(model)) == 2 * 7 * 2
    said = capsys.readouterr().err
    assert "module 2 (Dense, 0.0M) stays frozen; modules_to_save=['Dense'] trains it" in said
    kept = FastSentenceTransformer.get_peft_model(load(embeddinggemma), r=4, modules_to_save=["Dense"])
    assert trained(kept) - trained(kept, ".lora_") == {"2.linear.weight", "3.linear.weight"}
    with pytest.raises(ConfigError, match=r"^modules_to_save: no module is called 'dense'"):
        FastSentenceTransformer.get_peft_model(load(embeddinggemma), r=4, modules_to_save=["dense"])


@pytest.mark.parametrize("kept", [None, ["Dense"]])
def test_an_adapter_on_embeddinggemma_reads_back(embeddinggemma: Path, tmp_path: Path, kept: list[str] | None) -> None:
    model: Any = FastSentenceTransformer.get_peft_model(load(embeddinggemma), r=4, modules_to_save=kept)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    before = embed(model, TEXTS).detach(), model[2].linear.weight.detach().clone()
    for _ in range(3):
        backward(model, TEXTS)
        optimizer.step()
    live = embed(model, TEXTS).detach()
    assert float((live - before[0]).abs().max()) > 1e-2
    assert torch.equal(model[2].linear.weight, before[1]) == (kept is None)
    model.save_pretrained(str(tmp_path / "adapter"))
    model.save_pretrained_merged(tmp_path / "merged")
    for folder in (tmp_path / "adapter", tmp_path / "merged"):
        read = plain(folder)
        compare_outputs(embed(read, TEXTS).detach(), live, 1e-5)
        assert read.prompts == model.prompts
    again = load(tmp_path / "adapter")
    compare_outputs(embed(again, TEXTS).detach(), live, 1e-5)
    assert trained(again) == trained(again, ".lora_") and "stays frozen" in str(again.burnish)


def test_a_dense_layer_that_trains_beside_a_bfloat16_base_is_float32(embeddinggemma: Path) -> None:
    model: Any = FastSentenceTransformer.get_peft_model(
        load(embeddinggemma, dtype="bfloat16"), r=4, modules_to_save=["Dense"]
    )
    dtypes = {value.dtype for value in model.parameters() if value.requires_grad}
    assert dtypes == {torch.float32} and model[2].linear.weight.requires_grad
    frozen = load(embeddinggemma, dtype="bfloat16")
    found, expected = (one.encode(TEXTS, convert_to_tensor=True).float() for one in (model, frozen))
    assert float((found - expected).abs().max()) < 0.05
    _, gradients = backward(model, TEXTS)
    assert float(gradients["2.linear.weight"].abs().max()) > 0


def test_gemma_never_runs_in_float16(embeddinggemma: Path) -> None:
    for options in ({"dtype": "float16"}, {"model_kwargs": {"dtype": torch.float16}}):
        with pytest.raises(ModelError, match=r"must not run in float16: its activations reach 8e5"):
            load(embeddinggemma, **options)


@pytest.mark.parametrize("name", ["qwen", "embeddinggemma"])
def test_a_bfloat16_base_computes_through_to_the_end(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    exact, stock = embed(plain(folder), TEXTS).detach(), embed(half(folder), TEXTS).detach()
    model = FastSentenceTransformer.get_peft_model(load(folder, dtype="bfloat16"), r=4)
    found, gradients = backward(model, TEXTS)
    assert gradients and all(torch.isfinite(value).all() for value in gradients.values())
    error, allowed = (float((one.float() - exact).norm()) for one in (found, stock))
    assert 0 < error <= 1.5 * allowed


def half(folder: Path) -> Any:
    """Plain Sentence Transformers, all of it in bfloat16."""
    return PlainModel(str(folder), device="cpu", model_kwargs={"dtype": torch.bfloat16}).to(torch.bfloat16)
