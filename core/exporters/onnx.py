"""ONNX: the transformer, pooling and all that follows in one graph, checked by ONNX Runtime before it is handed over.

`onnx/model.onnx` takes input_ids, attention_mask and, where the model has them, token_type_ids, all int64 (batch,
sequence). An embedding model gives `last_hidden_state` (batch, sequence, hidden), which transformers.js and FastEmbed
pool by themselves, and `sentence_embedding` (batch, dimensions); a reranker or classifier gives `logits`.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import deploy
from ..contracts import ExporterSpec, ExportRequest, Needs
from ..errors import ModelError
from ..hookspecs import hookimpl
from ..verifying import Verdict, verify
from .source import check_options, check_target, read_model, write_around, written

# Of each precision, the name that transformers.js looks for.
FILES = {"fp32": "onnx/model.onnx", "fp16": "onnx/model_fp16.onnx", "int8": "onnx/model_quantized.onnx"}
NEEDS = Needs(packages=("onnx", "onnxscript", "onnxruntime"))
OPTIONS = {"dtype": tuple(FILES), "exporter": ("dynamo", "torchscript")}
# A rounded model that is further off than this is another model.
WORST = {"fp16": 0.999, "int8": 0.9}
_FASTEMBED_POOLS = ("mean", "cls", "lasttoken")
# A file of protobuf holds 2 GiB, and a graph more than its weights.
_ONE_FILE = 2**31 - 2**27


class Graph(nn.Module):
    """A Sentence Transformers model as a function of tensors alone."""

    def __init__(self, model: Any, names: Sequence[str], *, scores: bool) -> None:
        super().__init__()
        self.transformer: Any = model[0].model
        self.rest = nn.ModuleList(list(model.children())[1:])
        self.names, self.scores = tuple(names), scores

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(batch, labels) logits, or token states and the (batch, dimensions) embeddings."""
        given = dict(zip(self.names, inputs, strict=True))
        found = self.transformer(**given)
        if self.scores:
            logits: Tensor = found.logits
            return logits
        states: Tensor = found.last_hidden_state
        features = {"token_embeddings": states, "attention_mask": given["attention_mask"]}
        for module in self.rest:
            features = module(features)
        return states, features["sentence_embedding"]


def write_graph(model: Any, path: Path, *, dynamo: bool) -> None:
    """Export a plain model to an ONNX file; dimensions of batch and sequence stay open."""
    from sentence_transformers import CrossEncoder

    scores = isinstance(model, CrossEncoder)
    sample = model.preprocess(["one", "two and a longer one"])
    takes = signature(model[0].model.forward).parameters
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in sample and name in takes]
    inputs = tuple(sample[name].to("cpu") for name in names)
    gives = ["logits"] if scores else ["last_hidden_state", "sentence_embedding"]
    open_axes = {0: "batch", 1: "sequence"}
    axes = {name: open_axes for name in names}
    for name in gives:
        axes[name] = open_axes if name == "last_hidden_state" else {0: "batch"}
    shapes: Any = {"dynamic_axes": axes}
    if dynamo:
        # By itself it puts weights of any size in a second file, which a browser is not told of.
        size = sum(parameter.nbytes for parameter in model.parameters())
        shapes = {"dynamic_shapes": ((open_axes,) * len(names),), "external_data": size > _ONE_FILE}
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of tracing: what comes out is compared below, whatever it warned of
        torch.onnx.export(
            Graph(model, names, scores=scores).eval(), inputs, str(path), input_names=names, output_names=gives,
            dynamo=dynamo, **shapes,
        )  # fmt: skip


def _rounded(source: Path, path: Path, precision: str) -> None:
    """A graph in fewer bits, from the float32 one."""
    if precision == "fp16":
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(str(source)), keep_io_types=True), str(path))
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(source), str(path), weight_type=QuantType.QInt8, per_channel=True)


def build(
    request: ExportRequest, target: str, wanted: Sequence[str], runtime: str = "onnxruntime",
    refused: Callable[[deploy.Description], str | None] = lambda found: None,
) -> Sequence[Path]:  # fmt: skip
    """Write the model in each precision of `wanted`, the first of which is the folder's main one.

    Raises:
        ModelError: If the family or `refused` knows the target to be wrong, or a graph does not compute the model.
    """
    model, family = read_model(request)
    check_target(target, family, request.source)
    if (reason := refused(deploy.describe(model, request.source))) is not None:
        raise ModelError(reason, where=f"--target {target}, model {request.source}", fix="Choose another target")
    if not family.exports.onnx:
        raise ModelError(f"family {family.name} is not exported to ONNX", where=f"--target {target}")
    write_around(model, family, request.output)
    whole = request.output / FILES["fp32"]
    write_graph(model, whole, dynamo=request.options.get("exporter", "dynamo") == "dynamo")
    for precision in wanted:
        if precision != "fp32":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of numbers that float16 cuts off: measured below
                _rounded(whole, request.output / FILES[precision], precision)
    facts = {"runtime": "onnxruntime", "runtime_file": FILES["fp32"]}
    deploy.write(model, request.output, **facts)
    quality = [_measured(request.output, precision) for precision in ("fp32", *(p for p in wanted if p != "fp32"))]
    if "fp32" not in wanted:
        for left in whole.parent.glob("model.onnx*"):
            left.unlink()
    described = deploy.read(request.output)
    kept = [row for row in quality if row["precision"] in wanted]
    main = {"runtime": runtime, "runtime_file": FILES[wanted[0]], "quality": kept}
    deploy.write_description(request.output, described | main)
    return written(request.output)


def _measured(folder: Path, precision: str) -> dict[str, Any]:
    """How a file compares with the golden vectors.

    Raises:
        ModelError: If it does not compute the model.
    """
    file = FILES[precision]
    verdict = verify(folder, "onnxruntime", variant=file, cosine=WORST.get(precision))
    return _row(_checked(verdict, precision, file), precision, file, folder)


def _checked(verdict: Verdict, precision: str, where: str) -> Verdict:
    # Scores of rounded weights are off by what the row tells: they have no cosine to bound.
    odd = [fault for fault in verdict.faults if not (precision in WORST and fault.startswith("a score is off"))]
    if odd:
        fix = "Choose another precision, or another `--option exporter`"
        raise ModelError(f"the {precision} graph does not compute the model: {odd[0]}", where=where, fix=fix)
    return verdict


def _row(verdict: Verdict, precision: str, file: str, folder: Path) -> dict[str, Any]:
    found = asdict(verdict)
    size = sum(path.stat().st_size for path in (folder / file).parent.glob(f"{Path(file).name}*"))
    return {
        "precision": precision, "file": file, "bytes": size, "rounded": precision != "fp32",
        "cosine_min": found["cosine"], "largest_difference": found["difference"], "same_order": found["rank"],
    }  # fmt: skip


def onnx(request: ExportRequest) -> Sequence[Path]:
    """Option `dtype`: fp32, fp16, int8, or several with commas; `exporter`: dynamo or torchscript, 20 times as fast."""
    check_options("onnx", request.options, OPTIONS)
    return build(request, "onnx", request.options.get("dtype", "fp32").split(","))


def int8(request: ExportRequest) -> Sequence[Path]:
    """ONNX with the weights of its products in 8 bits, activations rounded as they come."""
    check_options("int8", request.options, {"exporter": OPTIONS["exporter"]})
    return build(request, "int8", ["int8"])


def transformers_js(request: ExportRequest) -> Sequence[Path]:
    """What transformers.js loads with dtype "fp32", "fp16" or "q8"."""
    check_options("transformers-js", request.options, OPTIONS)
    wanted = request.options.get("dtype", "fp32,fp16,int8").split(",")
    return build(request, "transformers-js", wanted, runtime="transformers-js")


def fastembed(request: ExportRequest) -> Sequence[Path]:
    """What FastEmbed loads with `add_custom_model` and `specific_model_path`."""
    check_options("fastembed", request.options, OPTIONS)
    wanted = request.options.get("dtype", "fp32").split(",")
    return build(request, "fastembed", wanted, runtime="fastembed", refused=unknown_to_fastembed)


def unknown_to_fastembed(found: deploy.Description) -> str | None:
    """Why FastEmbed would compute another model, or None: it pools by itself, and takes the first logit for a score."""
    if found["kind"] == "scores":
        labels = len(found["labels"] or ())
        return f"the model has {labels} labels, and FastEmbed's rerankers give the first alone" if labels > 1 else None
    if found["dense"]:
        return "the model has Dense layers after its pooling, which FastEmbed leaves out"
    if found["pooling"] not in _FASTEMBED_POOLS:
        return f"the model pools by {found['pooling']}, and FastEmbed by {', '.join(_FASTEMBED_POOLS)}"
    if not found["include_prompt"] and any(found["prompts"].values()):
        return "the model leaves prompts out of its pooling, which FastEmbed does not"
    return None


def openvino(request: ExportRequest) -> Sequence[Path]:
    """OpenVINO's IR. Option `dtype`: fp32, or fp16 for weights stored in 16 bits."""
    check_options("openvino", request.options, {"dtype": ("fp32", "fp16"), "exporter": OPTIONS["exporter"]})
    import openvino as runtime

    model, family = read_model(request)
    check_target("openvino", family, request.source)
    write_around(model, family, request.output)
    with tempfile.TemporaryDirectory(prefix="burnish-openvino-") as place:
        graph = Path(place) / "model.onnx"
        write_graph(model, graph, dynamo=request.options.get("exporter", "dynamo") == "dynamo")
        file = "openvino/openvino_model.xml"
        half = request.options.get("dtype") == "fp16"
        runtime.save_model(runtime.convert_model(str(graph)), str(request.output / file), compress_to_fp16=half)
    deploy.write(model, request.output, runtime="openvino", runtime_file=file)
    precision = "fp16" if half else "fp32"
    verdict = _checked(verify(request.output, "openvino", cosine=WORST.get(precision)), precision, file)
    row = _row(verdict, precision, file, request.output)
    deploy.write_description(request.output, deploy.read(request.output) | {"quality": [row]})
    return written(request.output)


@hookimpl
def burnish_register_exporters() -> Iterable[ExporterSpec]:
    both = Needs(packages=(*NEEDS.packages, "openvino"))
    return [
        ExporterSpec(target="onnx", summary="one ONNX graph, fp32, fp16 or int8", run=onnx, needs=NEEDS),
        ExporterSpec(target="int8", summary="one ONNX graph with weights in 8 bits", run=int8, needs=NEEDS),
        ExporterSpec(target="transformers-js", summary="ONNX for JavaScript", run=transformers_js, needs=NEEDS),
        ExporterSpec(target="fastembed", summary="ONNX for FastEmbed", run=fastembed, needs=NEEDS),
        ExporterSpec(target="openvino", summary="OpenVINO's IR", run=openvino, needs=both),
    ]
