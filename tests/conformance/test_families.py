"""The conformance suite of every built-in family, on tiny configs: what a plugin's author runs, run on our own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from burnish.core.testing import FamilyConformance
from burnish.core.testing.backends import model_types

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class TestBert(FamilyConformance):
    model_type = "bert"


class TestMPNet(FamilyConformance):
    model_type = "mpnet"


class TestDistilBert(FamilyConformance):
    model_type = "distilbert"


class TestModernBert(FamilyConformance):
    model_type = "modernbert"


class TestXLMRoberta(FamilyConformance):
    model_type = "xlm-roberta"


class TestGemma(FamilyConformance):
    model_type = "gemma3_text"


class TestCausalGemma(FamilyConformance):
    """Gemma 3 as its language models are: causal, read at the last token."""

    def config(self) -> PretrainedConfig:
        from burnish.families.gemma import sample

        return changed(sample("tiny"), use_bidirectional_attention=False, sliding_window=5)


class TestQwen3(FamilyConformance):
    model_type = "qwen3"


class TestWindowedQwen3(FamilyConformance):
    """Qwen3 with a sliding window in its second layer, which its configs may ask for."""

    def config(self) -> PretrainedConfig:
        from burnish.families.qwen3 import sample

        layers = ["full_attention", "sliding_attention"]
        return changed(sample("tiny"), use_sliding_window=True, sliding_window=6, layer_types=layers)


class TestModernBertWithDropout(FamilyConformance):
    """ModernBERT has none by default; a config may ask for it, and for the mean in front of a classifier."""

    def config(self) -> PretrainedConfig:
        from burnish.families.modernbert import sample

        return changed(sample("tiny"), attention_dropout=0.1, mlp_dropout=0.1, classifier_pooling="mean")


class TestGeneric(FamilyConformance):
    """An architecture that nobody claims."""

    def config(self) -> PretrainedConfig:
        from transformers import RobertaConfig

        return RobertaConfig(
            vocab_size=250, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=98, pad_token_id=1,
        )  # fmt: skip


def changed(config: PretrainedConfig, **settings: Any) -> PretrainedConfig:
    """The config made anew with other settings, so that what depends on them is worked out again."""
    values = {**config.to_dict(), **settings}
    return type(config)(**{name: value for name, value in values.items() if name not in ("model_type", "dtype")})


@pytest.mark.parametrize(
    "model_type", ["bert", "mpnet", "distilbert", "modernbert", "xlm-roberta", "gemma3_text", "qwen3"]
)
def test_every_family_is_here(model_type: str) -> None:
    classes = [kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, FamilyConformance)]
    assert model_type in {kind.model_type for kind in classes} and model_type in model_types()
