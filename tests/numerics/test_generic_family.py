"""Architectures that no family claims: loaded, trained and saved exactly as plain Sentence Transformers would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer as PlainModel
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from burnish import BurnishError, FastSentenceTransformer
from burnish.core.errors import ConfigError, ModelError

# DeBERTa-v3's module in transformers 5.17 calls torch.jit.script when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
TEXTS = ["hello world", "a", "", "日本語のテキスト", "one more sentence, of middling length, " * 12]
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def roberta(vocabulary: int) -> PretrainedConfig:
    from transformers import RobertaConfig

    return RobertaConfig(vocab_size=vocabulary, max_position_embeddings=130, pad_token_id=0, **SMALL)


def electra(vocabulary: int) -> PretrainedConfig:
    from transformers import ElectraConfig

    return ElectraConfig(vocab_size=vocabulary, embedding_size=16, max_position_embeddings=128, **SMALL)


def nomic_bert(vocabulary: int) -> PretrainedConfig:
    from transformers import NomicBertConfig

    return NomicBertConfig(vocab_size=vocabulary, max_position_embeddings=128, pad_token_id=0, **SMALL)


def eurobert(vocabulary: int) -> PretrainedConfig:
    from transformers import EuroBertConfig

    return EuroBertConfig(
        vocab_size=vocabulary, max_position_embeddings=128, num_key_value_heads=2, pad_token_id=0, bos_token_id=101,
        eos_token_id=102, mask_token_id=103, **SMALL,
    )  # fmt: skip


def deberta(vocabulary: int) -> PretrainedConfig:
    """DeBERTa-v3: relative positions in three ways, no attention interface."""
    from transformers import DebertaV2Config

    published: dict[str, Any] = {"position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True}
    return DebertaV2Config(
        vocab_size=vocabulary, max_position_embeddings=128, relative_attention=True, pos_att_type=["p2c", "c2p"],
        position_biased_input=False, type_vocab_size=0, pad_token_id=0, **published, **SMALL,
    )  # fmt: skip


def qwen2(vocabulary: int) -> PretrainedConfig:
    """A causal one."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=vocabulary, max_position_embeddings=128, num_key_value_heads=2, pad_token_id=0, **SMALL
    )


def albert(vocabulary: int) -> PretrainedConfig:
    """One without gradient checkpointing in transformers; its layers share their weights."""
    from transformers import AlbertConfig

    return AlbertConfig(vocab_size=vocabulary, embedding_size=16, max_position_embeddings=128, pad_token_id=0, **SMALL)


CONFIGS: dict[str, Callable[[int], PretrainedConfig]] = {
    "roberta": roberta,
    "electra": electra,
    "nomic_bert": nomic_bert,
    "eurobert": eurobert,
    "deberta": deberta,
    "qwen2": qwen2,
    "albert": albert,
}


def save(folder: Path, minilm: Path, name: str, kind: Any = AutoModel) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(str(minilm))
    torch.manual_seed(0)
    kind.from_config(CONFIGS[name](len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("generic")
    return {name: save(root / name, minilm, name) for name in CONFIGS}


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def plain(folder: Path) -> Any:
    return PlainModel(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})


def step(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One optimizer step with the model's own dropout: (gradients, parameters after it)."""
    model.train()
    torch.manual_seed(3)
    out = model(model.preprocess(TEXTS))["sentence_embedding"]
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    model.eval()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found, {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_step_is_bit_equal_to_the_plain_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = FastSentenceTransformer.from_pretrained(str(folder), full_finetuning=True, device="cpu")
    said = capsys.readouterr().err
    theirs = plain(folder)
    assert ours.burnish is not None and ours.burnish.decision.family.family.name == "generic"
    assert "nobody claims model type" in said and "every padding token is computed" in said
    for line in ours.burnish.decision.family.family.leaves:
        assert line in said
    assert ours.burnish.packed is None and not ours.burnish.plan.entries
    assert (ours.encode(TEXTS) == theirs.encode(TEXTS)).all()
    found, expected = step(ours), step(theirs)
    assert found[0].keys() == expected[0].keys() and len(expected[0]) > 10
    for mine, stock in zip(found, expected, strict=True):
        assert all(torch.equal(mine[name], stock[name]) for name in stock)
    before = FastSentenceTransformer.from_pretrained(str(folder), full_finetuning=True, device="cpu").encode(TEXTS)
    assert (ours.encode(TEXTS) == theirs.encode(TEXTS)).all() and abs(ours.encode(TEXTS) - before).max() > 1e-3


def test_an_adapter_trains_and_reads_back(folder: Path, tmp_path: Path) -> None:
    model = FastSentenceTransformer.from_pretrained(str(folder), device="cpu")
    model = FastSentenceTransformer.get_peft_model(model, r=4)
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    dead = ("pooler.dense", "classifier", "lm_head")
    linear = {
        name
        for name, module in plain(folder).named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith(dead)
    }
    assert adapted == linear and len(linear) > 5
    before = model.encode(TEXTS)
    step(model)
    live = model.encode(TEXTS)
    assert abs(live - before).max() > 1e-3
    model.save_pretrained(str(tmp_path / "adapter"))
    model.save_pretrained_merged(tmp_path / "merged")
    for name in ("adapter", "merged"):
        assert abs(plain(tmp_path / name).encode(TEXTS) - live).max() <= 1e-5, name


def test_packed_true_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^packed=True: family generic does not say .*Pass packed=None"):
        FastSentenceTransformer.from_pretrained(str(folder), packed=True, device="cpu")


@pytest.mark.parametrize("name", ["roberta", "electra", "nomic_bert", "eurobert", "deberta", "qwen2"])
def test_checkpointed_gradients_equal_unchecked_ones(folders: dict[str, Path], name: str) -> None:
    kept, checked = (
        FastSentenceTransformer.from_pretrained(
            str(folders[name]), full_finetuning=True, device="cpu", use_gradient_checkpointing=option
        )
        for option in (False, True)
    )
    found, expected = step(checked)[0], step(kept)[0]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)


def test_albert_has_no_checkpointing_and_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    message = r"^use_gradient_checkpointing: transformers has no gradient checkpointing for AlbertModel"
    with pytest.raises(ModelError, match=message):
        FastSentenceTransformer.from_pretrained(str(folders["albert"]), use_gradient_checkpointing=True, device="cpu")
    model = FastSentenceTransformer.from_pretrained(str(folders["albert"]), device="cpu")
    with pytest.raises(ModelError, match=message):
        FastSentenceTransformer.get_peft_model(model, use_gradient_checkpointing="unsloth")
    assert not any("lora" in name for name, _ in model.named_parameters())
    with pytest.raises(BurnishError, match=r"^gradient_checkpointing: transformers has no"):
        model.gradient_checkpointing_enable()


@pytest.mark.parametrize("kind, mode", [(AutoModel, "mean"), (AutoModelForCausalLM, "lasttoken")])
def test_pooling_without_modules_json_is_sentence_transformers_own(
    minilm: Path, tmp_path: Path, kind: Any, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "qwen2", minilm, "qwen2", kind)
    ours, theirs = FastSentenceTransformer.from_pretrained(str(folder), device="cpu"), plain(folder)
    assert ours[1].pooling_mode == theirs[1].pooling_mode == mode
    assert f"{mode}, not normalised (default of family generic, no modules.json)" in capsys.readouterr().err
    assert (ours.encode(TEXTS) == theirs.encode(TEXTS)).all()


def test_roberta_knows_how_many_tokens_it_can_place(folders: dict[str, Path]) -> None:
    """130 positions, of which RoBERTa's kin never use the first padding_idx + 1."""
    model = FastSentenceTransformer.from_pretrained(str(folders["roberta"]), max_seq_length=129, device="cpu")
    assert model.max_seq_length == 129 and model.encode("word " * 500).shape == (32,)
    with pytest.raises(ConfigError, match=r"^max_seq_length: 130 is not between 1 and the 129 positions"):
        FastSentenceTransformer.from_pretrained(str(folders["roberta"]), max_seq_length=130, device="cpu")
