"""Burnish fine-tunes embedding models, rerankers and encoder classifiers.

Names load on first use: `import burnish` costs nothing.

A script moves here by one changed import. From Unsloth: `FastSentenceTransformer`, `is_bf16_supported` and
`is_bfloat16_supported` are here under the names they have there. From Sentence Transformers: `SentenceTransformer` and
`CrossEncoder`, and of both the trainer and its arguments, are Burnish's subclasses; everything else of the top level
(`InputExample`, `losses`, `util`, `mine_hard_negatives`, …) is Sentence Transformers' own, handed on as it is. `losses`
and `evaluation` are those of embedding models; `sentence_transformers.cross_encoder` has those of cross-encoders. Its
other two kinds of model (`SparseEncoder`, `MultiVectorEncoder` and what goes with them) are not handed on: under this
name they would look accelerated, and are not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoderModelCardData as CrossEncoderModelCardData
    from sentence_transformers import DefaultBatchSampler as DefaultBatchSampler
    from sentence_transformers import InputExample as InputExample
    from sentence_transformers import LoggingHandler as LoggingHandler
    from sentence_transformers import MultiDatasetDefaultBatchSampler as MultiDatasetDefaultBatchSampler
    from sentence_transformers import ParallelSentencesDataset as ParallelSentencesDataset
    from sentence_transformers import SentencesDataset as SentencesDataset
    from sentence_transformers import SentenceTransformerModelCardData as SentenceTransformerModelCardData
    from sentence_transformers import SimilarityFunction as SimilarityFunction
    from sentence_transformers import export_dynamic_quantized_onnx_model as export_dynamic_quantized_onnx_model
    from sentence_transformers import export_optimized_onnx_model as export_optimized_onnx_model
    from sentence_transformers import export_static_quantized_openvino_model as export_static_quantized_openvino_model
    from sentence_transformers import mine_hard_negatives as mine_hard_negatives
    from sentence_transformers import quantize_embeddings as quantize_embeddings
    from sentence_transformers import resolve_ids as resolve_ids
    from sentence_transformers import util as util
    from sentence_transformers.sentence_transformer import datasets as datasets
    from sentence_transformers.sentence_transformer import evaluation as evaluation
    from sentence_transformers.sentence_transformer import losses as losses
    from sentence_transformers.sentence_transformer import modules as _modules
    from sentence_transformers.sentence_transformer import readers as readers
    from sentence_transformers.sentence_transformer import training_args as training_args

    from .core.arguments import CrossEncoderTrainingArguments as CrossEncoderTrainingArguments
    from .core.arguments import TrainingArguments as TrainingArguments
    from .core.classifier import Classifier as Classifier
    from .core.classifier_trainer import ClassifierTrainer as ClassifierTrainer
    from .core.cross_encoder import CrossEncoder as CrossEncoder
    from .core.cross_encoder_trainer import CrossEncoderTrainer as CrossEncoderTrainer
    from .core.errors import BurnishError as BurnishError
    from .core.fast import FastSentenceTransformer as FastSentenceTransformer
    from .core.fast_classifier import FastClassifier as FastClassifier
    from .core.fast_cross_encoder import FastCrossEncoder as FastCrossEncoder
    from .core.model import SentenceTransformer as SentenceTransformer
    from .core.precision import is_bf16_supported as is_bf16_supported
    from .core.trainer import SentenceTransformerTrainer as SentenceTransformerTrainer
    from .core.trainer import SentenceTransformerTrainingArguments as SentenceTransformerTrainingArguments
    from .core.trainer import Trainer as Trainer

    is_bfloat16_supported = is_bf16_supported
    models = _modules

_FACE = {
    "BurnishError": ".core.errors",
    "CrossEncoder": ".core.cross_encoder",
    "CrossEncoderTrainer": ".core.cross_encoder_trainer",
    "CrossEncoderTrainingArguments": ".core.arguments",
    "FastCrossEncoder": ".core.fast_cross_encoder",
    "Classifier": ".core.classifier",
    "ClassifierTrainer": ".core.classifier_trainer",
    "FastClassifier": ".core.fast_classifier",
    "FastSentenceTransformer": ".core.fast",
    "SentenceTransformer": ".core.model",
    "SentenceTransformerTrainer": ".core.trainer",
    "SentenceTransformerTrainingArguments": ".core.trainer",
    "Trainer": ".core.trainer",
    "TrainingArguments": ".core.arguments",
    "is_bf16_supported": ".core.precision",
}
# Sentence Transformers' own, handed on.
_STOCK = (
    "CrossEncoderModelCardData",
    "DefaultBatchSampler",
    "InputExample",
    "LoggingHandler",
    "MultiDatasetDefaultBatchSampler",
    "ParallelSentencesDataset",
    "SentenceTransformerModelCardData",
    "SentencesDataset",
    "SimilarityFunction",
    "export_dynamic_quantized_onnx_model",
    "export_optimized_onnx_model",
    "export_static_quantized_openvino_model",
    "mine_hard_negatives",
    "quantize_embeddings",
    "resolve_ids",
)
# Its submodules, by the names that `from sentence_transformers import …` takes; the old paths warn.
_STOCK_MODULES = {
    "datasets": "sentence_transformers.sentence_transformer.datasets",
    "evaluation": "sentence_transformers.sentence_transformer.evaluation",
    "losses": "sentence_transformers.sentence_transformer.losses",
    "models": "sentence_transformers.sentence_transformer.modules",
    "readers": "sentence_transformers.sentence_transformer.readers",
    "training_args": "sentence_transformers.sentence_transformer.training_args",
    "util": "sentence_transformers.util",
}
_NOT_HANDED_ON = ("SparseEncoder", "MultiVectorEncoder")

__all__ = [  # noqa: RUF022 - in the order a reader meets them
    "FastSentenceTransformer",
    "Trainer",
    "TrainingArguments",
    "SentenceTransformer",
    "SentenceTransformerTrainer",
    "SentenceTransformerTrainingArguments",
    "FastClassifier",
    "Classifier",
    "ClassifierTrainer",
    "FastCrossEncoder",
    "CrossEncoder",
    "CrossEncoderTrainer",
    "CrossEncoderTrainingArguments",
    "BurnishError",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("burnish")
    if name == "is_bfloat16_supported":
        name = "is_bf16_supported"
    if name in _FACE:
        return getattr(import_module(_FACE[name], __name__), name)
    if name in _STOCK:
        return getattr(import_module("sentence_transformers"), name)
    if name in _STOCK_MODULES:
        return import_module(_STOCK_MODULES[name])
    if name.startswith(_NOT_HANDED_ON):
        # An ImportError, since `from burnish import …` would swallow the words of an AttributeError.
        raise ImportError(f"burnish has no {name} of its own: import it from sentence_transformers")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
