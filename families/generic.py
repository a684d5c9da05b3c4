"""Any encoder that `AutoModel` loads and no other family claims: correct, unpatched, and frank about the cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..core.contracts import Family, FamilySpec, LoraTargets, Pooling
from ..core.hookspecs import hookimpl

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def build(config: PretrainedConfig) -> Family:
    """Defaults that are right for any encoder, fast for none."""
    return Family(
        name="generic",
        pooling=pooling,
        # Every linear layer but those that only a task head would read.
        lora=LoraTargets(exclude=("pooler.dense", "classifier", "lm_head", "score")),
        leaves=(
            "input stays padded: every padding token is computed in every layer",
            "no patches: attention, norms and activations are transformers' own",
            "no dtype policy of its own: check that the architecture runs in bfloat16 before training it there",
        ),
    )


def pooling(config: PretrainedConfig, files: frozenset[str]) -> Pooling:
    """The last token for causal models, the mean for the rest, as Sentence Transformers chooses."""
    causal = any(name.endswith("ForCausalLM") for name in config.architectures or ())
    return Pooling(mode="lasttoken" if causal else "mean")


@hookimpl
def burnish_register_families() -> Iterable[FamilySpec]:
    return [FamilySpec(name="generic", build=build, fallback=True)]
