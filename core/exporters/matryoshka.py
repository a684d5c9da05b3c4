"""An embedding model whose vectors are shorter: their first N dimensions, of unit length again where they were.

A stock Dense layer does the cutting, so that every reader gives the short vectors: `truncate_dim` is known to Sentence
Transformers alone. Only a model that was trained for it (MatryoshkaLoss) keeps most of its quality.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import deploy, dimensions
from ..contracts import ExporterSpec, ExportRequest
from ..errors import ConfigError, ModelError
from ..hookspecs import hookimpl
from ..layout import make_compatible, tokenizer_inputs
from .source import check_options, read_model, written


def shortened(model: Any, dimensions: int) -> Any:
    """The plain model with a layer that keeps the first `dimensions`, before the normalisation if that comes last.

    A Dense layer that stands there already loses the rows of the others in place of a further one.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize

    modules = list(model.children())
    ends = [modules.pop()] if isinstance(modules[-1], Normalize) else []
    while isinstance(modules[-1], Normalize):  # what comes is normalised after the cut, or not at all
        modules.pop()
    last: Any = modules[-1]
    if isinstance(last, Dense) and not last.use_residual and last.module_output_name == "sentence_embedding":
        modules[-1] = _cut(last, dimensions)
    else:
        modules.append(_selection(model.get_embedding_dimension(), dimensions, model.dtype))
    made = SentenceTransformer(
        modules=[*modules, *ends], device="cpu", prompts=dict(model.prompts),
        default_prompt_name=model.default_prompt_name, similarity_fn_name=model.similarity_fn_name,
        model_card_data=copy.copy(model.model_card_data),
    )  # fmt: skip
    made.eval()
    return made


def _selection(width: int, dimensions: int, dtype: torch.dtype) -> nn.Module:
    from sentence_transformers.base.modules import Dense

    rows = torch.eye(dimensions, width, dtype=dtype)
    return Dense(width, dimensions, bias=False, activation_function=nn.Identity(), init_weight=rows)


def _cut(layer: Any, dimensions: int) -> nn.Module:
    from sentence_transformers.base.modules import Dense

    linear = layer.linear
    return Dense(
        layer.in_features, dimensions, bias=linear.bias is not None, activation_function=layer.activation_function,
        init_weight=linear.weight.detach()[:dimensions].clone(),
        init_bias=None if linear.bias is None else linear.bias.detach()[:dimensions].clone(),
        module_input_name=layer.module_input_name,
    )  # fmt: skip


def matryoshka(request: ExportRequest) -> Sequence[Path]:
    """Option `dimensions`, also written as `--target matryoshka:256`."""
    check_options("matryoshka", request.options, {"dimensions": None})
    asked = request.options.get("dimensions", "")
    model: Any
    model, family = read_model(request)
    if not hasattr(model, "get_embedding_dimension"):
        raise ModelError("gives scores, which have no dimensions to spare", where=str(request.source))
    model.truncate_dim = None
    width = int(model.get_embedding_dimension())
    if not asked.isdigit() or not 0 < int(asked) < width:
        what = f"{asked!r} is not a number from 1 to {width - 1}"
        raise ConfigError(what, where="--target matryoshka:N", fix=f"The model has {width} dimensions")
    short = shortened(model, int(asked))
    if short.config is not None:
        kept = [one for one in dimensions.of_config(short.config) if one <= int(asked)]
        dimensions.set_on(short.config, kept)
    short.save(str(request.output))
    make_compatible(request.output, family, tokenizer_inputs(short))
    deploy.write(short, request.output)
    return written(request.output)


@hookimpl
def burnish_register_exporters() -> Iterable[ExporterSpec]:
    summary = "an embedding model cut to its first N dimensions, as matryoshka:N"
    return [ExporterSpec(target="matryoshka", summary=summary, run=matryoshka, argument="dimensions")]
