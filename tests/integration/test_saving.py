"""What is saved is read back by everything: the adapter folder, the merged folder, with and without Burnish."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer as PlainModel
from transformers import AutoModel, AutoTokenizer

from burnish import FastSentenceTransformer
from burnish.core.errors import ConfigError

Make = Callable[..., Any]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 4},
    "dora": {"use_dora": True},
    "bias lora_only": {"bias": "lora_only"},
    "bias all": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["LayerNorm"], "target_modules": ["query", "value"]},
    "pissa": {"init_lora_weights": "pissa"},
    "one layer": {"layers_to_transform": [1], "lora_dropout": 0.1},
}
# transformers 5.17 leaves modules_to_save out of an adapter it reads; 5.18 does not.
READS_SAVED_MODULES = Version(transformers.__version__) >= Version("5.18")


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, adapted: Make, texts: list[str], tmp_path_factory: Any) -> Any:
    """(name, trained model, its embeddings, its adapter folder, its merged folder)."""
    model = adapted(**VARIANTS[request.param])
    folder = tmp_path_factory.mktemp("saved")
    live = model.encode(texts)
    model.save_pretrained(str(folder / "adapter"))
    model.save_pretrained_merged(str(folder / "merged"))
    assert (model.encode(texts) == live).all(), "saving moved the live model"
    return request.param, model, live, folder / "adapter", folder / "merged"


def by_hand(folder: Path, texts: list[str]) -> np.ndarray[Any, Any]:
    """Mean-pooled, normalised embeddings from `transformers.AutoModel` alone."""
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"][..., None]
    pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    return pooled.numpy()


def difference(first: Any, second: Any) -> float:
    return float(np.abs(first - second).max())


def test_the_training_moved_the_model(variant: Any, load: Make, tiny_bert_st: Path, texts: list[str]) -> None:
    assert difference(variant[2], load(tiny_bert_st).encode(texts)) > 1e-3


def test_the_adapter_folder_reads_back_in_plain_sentence_transformers(
    variant: Any, plain: Make, texts: list[str]
) -> None:
    name, _, live, folder, _ = variant
    files = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "modules.json", "tokenizer.json"} <= files
    assert not files & {"config.json", "model.safetensors"}
    error = difference(plain(folder).encode(texts), live)
    if name == "modules_to_save" and not READS_SAVED_MODULES:
        assert error > 1e-3, "transformers reads modules_to_save after all: drop the note in adapters.py"
        return
    assert error <= 1e-5


def test_the_adapter_folder_reads_back_in_burnish_and_trains_on(
    variant: Any, load: Make, step: Make, texts: list[str]
) -> None:
    _, model, live, folder, _ = variant
    again = load(folder)
    assert difference(again.encode(texts), live) <= 1e-6
    trainable = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, again)]
    assert trainable[0] == trainable[1] and trainable[0]
    before = {name: p.detach().clone() for name, p in again.named_parameters()}
    step(again)
    moved = {name for name, p in again.named_parameters() if not torch.equal(before[name], p)}
    assert moved and moved <= trainable[1]


def test_the_merged_folder_is_a_stock_model(variant: Any, plain: Make, texts: list[str], tiny_bert_st: Path) -> None:
    _, _, live, _, folder = variant
    assert difference(plain(folder).encode(texts), live) <= 1e-5
    assert difference(by_hand(folder, texts), live) <= 1e-5
    weights, stock = load_file(folder / "model.safetensors"), load_file(tiny_bert_st / "model.safetensors")
    assert weights.keys() == stock.keys()
    assert {name: tensor.shape for name, tensor in weights.items()} == {name: t.shape for name, t in stock.items()}
    assert (folder / "README.md").exists() and not any("adapter" in path.name for path in folder.rglob("*"))
    assert "burnish" not in (folder / "config.json").read_text() + (folder / "modules.json").read_text()


def test_the_live_model_trains_on_after_merging(
    adapted: Make, step: Make, plain: Make, texts: list[str], tmp_path: Path
) -> None:
    model = adapted()
    adapter = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained_merged(tmp_path / "first")
    assert adapter and all(torch.equal(dict(model.named_parameters())[name], p) for name, p in adapter.items())
    step(model)
    model.save_pretrained_merged(tmp_path / "second")
    first, second = plain(tmp_path / "first").encode(texts), plain(tmp_path / "second").encode(texts)
    assert difference(first, second) > 1e-3
    assert difference(second, model.encode(texts)) <= 1e-5
    assert model.active_adapters() == ["default"] and model[0].can_flatten_inputs


def test_merged_in_memory(adapted: Make, texts: list[str]) -> None:
    model = adapted()
    merged = model.merged()
    assert type(merged) is PlainModel and not merged[0].can_flatten_inputs
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert {type(module).__module__.split(".")[0] for module in merged.modules()} <= {
        "sentence_transformers", "transformers", "torch"
    }  # fmt: skip
    assert difference(merged.encode(texts), model.encode(texts)) <= 1e-5


@pytest.mark.parametrize(
    "checkpoint, options, method, expected",
    [
        (None, {}, None, torch.float32),
        (None, {}, "merged_16bit", torch.float16),
        (None, {}, "merged_32bit", torch.float32),
        ("bfloat16", {"load_in_16bit": True}, None, torch.bfloat16),
        ("bfloat16", {"load_in_16bit": True}, "merged_16bit", torch.bfloat16),
        ("bfloat16", {"load_in_16bit": True}, "merged_32bit", torch.float32),
        ("float16", {"dtype": "auto"}, None, torch.float16),
        ("bfloat16", {}, None, torch.float32),
    ],
    ids=str,
)
def test_save_method_and_dtype(
    adapted: Make, half_bert: Make, plain: Make, texts: list[str], tmp_path: Path, checkpoint: Any, options: Any,
    method: Any, expected: torch.dtype,
) -> None:  # fmt: skip
    model = adapted(half_bert(checkpoint) if checkpoint else None, load_options=options)
    model.save_pretrained_merged(tmp_path / "merged", save_method=method)
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {expected}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == str(expected).removeprefix("torch.")
    # A 16-bit merge rounds W + sBA once: eps of the coarser dtype, through two layers and a normalisation.
    coarser = torch.bfloat16 if torch.bfloat16 in (expected, model.dtype) else expected
    close = 1e-5 if model.dtype == expected == torch.float32 else 8 * torch.finfo(coarser).eps
    found = plain(tmp_path / "merged").encode(texts)
    assert difference(found.astype(np.float32), model.encode(texts).astype(np.float32)) <= close


def test_save_method_lora_and_unknown(adapted: Make, plain: Make, texts: list[str], tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained_merged(tmp_path / "lora", save_method="lora")
    assert (tmp_path / "lora" / "adapter_config.json").exists() and not (tmp_path / "lora" / "config.json").exists()
    assert difference(plain(tmp_path / "lora").encode(texts), model.encode(texts)) <= 1e-5
    with pytest.raises(ConfigError, match=r"^save_method: 'merged_4bit' is unknown\. Pass None or one of merged_16bit"):
        model.save_pretrained_merged(tmp_path / "no", save_method="merged_4bit")
    with pytest.raises(ConfigError, match=r"^save_method: 'lora' is an adapter, not a merged model"):
        model.merged("lora")
    with pytest.raises(ConfigError, match=r"^safe_serialization=False: only safetensors are written"):
        model.save_pretrained(str(tmp_path / "no"), safe_serialization=False)
    assert not (tmp_path / "no").exists()


def test_the_tokenizer_argument(adapted: Make, tmp_path: Path) -> None:
    model = adapted()
    other = AutoTokenizer.from_pretrained(model.config._name_or_path)
    other.add_tokens(["<made-up>"])
    model.save_pretrained_merged(tmp_path / "given", tokenizer=other)
    model.save_pretrained_merged(tmp_path / "own")
    assert AutoTokenizer.from_pretrained(tmp_path / "given").tokenize("<made-up>") == ["<made-up>"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "own").tokenize("<made-up>")) > 1


def test_without_an_adapter_both_ways_save_the_full_model(
    load: Make, step: Make, plain: Make, texts: list[str], tmp_path: Path, tiny_bert_st: Path
) -> None:
    model = load(tiny_bert_st, full_finetuning=True)
    step(model)
    model.save_pretrained(str(tmp_path / "full"))
    model.save_pretrained_merged(tmp_path / "merged")
    for name in ("full", "merged"):
        assert difference(plain(tmp_path / name).encode(texts), model.encode(texts)) <= 1e-5
        assert difference(by_hand(tmp_path / name, texts), model.encode(texts)) <= 1e-5
    assert "burnish" not in (tmp_path / "full" / "config.json").read_text()


def test_saving_over_an_older_save_keeps_the_users_own_files(
    adapted: Make, plain: Make, step: Make, texts: list[str], tmp_path: Path
) -> None:
    model, folder = adapted(), tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    model.save_pretrained(str(folder))
    assert difference(plain(folder).encode(texts), model.encode(texts)) <= 1e-5
    step(model)
    model.save_pretrained_merged(folder)  # a merged model where an adapter was: nothing of it may be read
    assert not (folder / "adapter_config.json").exists() and not (folder / "adapter_model.safetensors").exists()
    assert difference(plain(folder).encode(texts), model.encode(texts)) <= 1e-5
    model.save_pretrained(str(folder))
    assert not (folder / "config.json").exists() and not (folder / "model.safetensors").exists()
    assert difference(plain(folder).encode(texts), model.encode(texts)) <= 1e-5
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "a staging folder is left"


def test_an_adapter_never_takes_its_base_models_place(
    load: Make, plain: Make, step: Make, texts: list[str], tiny_bert_st: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_bert_st, tmp_path / "base")
    model = FastSentenceTransformer.get_peft_model(load(folder), r=2)
    with pytest.raises(ConfigError, match=r"base: the adapter needs the base model in this folder\. Save to another"):
        model.save_pretrained(str(folder))
    assert (plain(folder).encode(texts) == plain(tiny_bert_st).encode(texts)).all()
    model.save_pretrained(str(tmp_path / "adapter"))
    again = load(tmp_path / "adapter")
    step(again)
    again.save_pretrained(str(tmp_path / "adapter"))  # over the adapter it was loaded from
    assert difference(plain(tmp_path / "adapter").encode(texts), again.encode(texts)) <= 1e-5
    again.save_pretrained_merged(folder)  # the merged model may: it is whole
    assert difference(plain(folder).encode(texts), again.encode(texts)) <= 1e-5


WITHOUT_BURNISH = """
import importlib.util, json, sys
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

assert importlib.util.find_spec("burnish") is None, "burnish is here"
folder, texts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
expected = np.load(folder + "/live.npy")
for name in ("adapter", "merged"):
    found = SentenceTransformer(f"{folder}/{name}", device="cpu").encode(texts)
    assert np.abs(found - expected).max() <= 1e-5, name
tokens = AutoTokenizer.from_pretrained(folder + "/merged")(texts, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    states = AutoModel.from_pretrained(folder + "/merged")(**tokens).last_hidden_state
mask = tokens["attention_mask"][..., None]
mean = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
assert np.abs(mean.numpy() - expected).max() <= 1e-5, "AutoModel"
print("loaded without")
"""


@pytest.fixture(scope="module")
def python_without_burnish(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that sees the libraries of this one, and no Burnish.

    Site-packages come in as a plain path, whose own .pth files (an editable install is one) are not read.
    """
    folder = tmp_path_factory.mktemp("venv") / "without"
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "libraries.pth").write_text(str(Path(np.__file__).parents[1]) + "\n", encoding="utf-8")
    return folder / "bin" / "python"


def test_another_environment_without_burnish_loads_both_folders(
    adapted: Make, texts: list[str], tmp_path: Path, python_without_burnish: Path
) -> None:
    model = adapted()
    model.save_pretrained(str(tmp_path / "adapter"))
    model.save_pretrained_merged(tmp_path / "merged")
    np.save(tmp_path / "live.npy", model.encode(texts))
    done = subprocess.run(
        [str(python_without_burnish), "-c", WITHOUT_BURNISH, json.dumps(str(tmp_path)), json.dumps(texts)],
        capture_output=True, text=True, timeout=180, env={**os.environ, "PYTHONPATH": ""}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "loaded without", done.stderr


@pytest.mark.parametrize("how", ["adapter", "merged", "full"])
def test_prompts_similarity_and_width_survive(
    adapted: Make, load: Make, plain: Make, texts: list[str], tmp_path: Path, tiny_bert_st: Path, how: str
) -> None:
    options = {"prompts": {"query": "find: ", "document": "text: "}, "similarity_fn_name": "dot", "truncate_dim": 12}
    full = load(tiny_bert_st, full_finetuning=True, **options) if how == "full" else None
    model = full or adapted(load_options=options)
    folder = str(tmp_path / how)
    _ = model.save_pretrained_merged(folder) if how == "merged" else model.save_pretrained(folder)
    for again in (plain(folder), load(folder)):
        assert again.prompts == options["prompts"]
        assert again.similarity_fn_name == "dot" and again.max_seq_length == 64
        assert again.truncate_dim == 12 and again.encode_query(texts).shape == (len(texts), 12)
        assert difference(again.encode_query(texts), model.encode_query(texts)) <= 1e-5
        assert difference(again.encode_document(texts), model.encode_document(texts)) <= 1e-5


def test_the_seeds_snippet_on_a_saved_model(
    minilm: Path, adapted: Make, load: Make, plain: Make, tmp_path: Path
) -> None:
    model = adapted(minilm, r=8)
    model.save_pretrained_merged(tmp_path / "saved")
    query = "Which planet is known as the Red Planet?"
    documents = [
        "Venus is often called Earth's twin because of its similar size and proximity.",
        "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
        "火星は、その赤みを帯びた外観から、しばしば「赤い惑星」と呼ばれています。",
        "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
    ]
    results = []
    for ours in (load(tmp_path / "saved", for_inference=True), plain(tmp_path / "saved")):
        queries, answers = ours.encode_query(query), ours.encode_document(documents)
        results.append((queries, answers, ours.similarity(queries, answers)))
    assert results[0][0].shape == (384,) and results[0][1].shape == (4, 384) and results[0][2].shape == (1, 4)
    assert all((a == b).all() for a, b in zip(results[0], results[1], strict=True))
    packed = load(tmp_path / "saved")
    assert packed.burnish is not None and packed.burnish.packed is not None
    assert difference(packed.encode_document(documents), results[1][1]) <= 1e-5
    assert difference(model.encode_document(documents), results[1][1]) <= 1e-5
