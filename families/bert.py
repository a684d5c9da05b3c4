"""BERT (Devlin et al. 2019): MiniLM, bge, e5, mxbai and their kin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

from torch import Tensor
from transformers.models.bert.modeling_bert import BertModel, BertPooler

from ..core.contracts import Exports, Family, FamilySpec, Head, LoraTargets, Machine, Packing, Patch, Pooling
from ..core.hookspecs import hookimpl

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class UnreadBertPooler(BertPooler):
    """A pooler whose output nothing reads: it keeps its weights, so that they are saved, and computes nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """None in place of the (batch, hidden) vector that `BertModel` would return as `pooler_output`."""
        return cast(Tensor, None)


def build(config: PretrainedConfig) -> Family:
    """What holds for every BERT encoder."""
    return Family(
        name="bert",
        pooling=Pooling(mode="mean", normalize=False),
        # "dense" is also the name of the pooler's layer, whose output no embedding reads: an adapter there is dead.
        lora=LoraTargets(names=("query", "key", "value", "dense"), exclude=("pooler.dense",)),
        packing=Packing(position_offset=0),
        patches=patches,
        heads={"sequence-classification": Head(reads="first")},
        exports=Exports(
            gguf="bert", onnx=True, refused={"gguf-reranker": "the converter drops the pooler before the classifier"}
        ),
        leaves=("query, key and value are three GEMMs each layer; one would do",),
    )


def patches(model: PreTrainedModel, machine: Machine) -> Sequence[Patch]:
    """Leave out the pooler of an encoder without a head: it costs a GEMM a step, and on packed input it would read the
    first token of the first text only."""
    if not isinstance(model, BertModel) or model.pooler is None:
        return ()
    why = "nothing reads its output in an embedding model"
    return (Patch(path="pooler", old=BertPooler, new=UnreadBertPooler, why=why),)


@hookimpl
def burnish_register_families() -> Iterable[FamilySpec]:
    return [FamilySpec(name="bert", model_types=("bert",), build=build)]
