"""OpenVINO and the tokenizers library, without torch: the exported graph pools and normalises by itself."""

import os

import openvino
import tokenizers
from encoding import graph_answers
from exchange import answer, asked


def main() -> None:
    """Answer the request in the file that is named first, in the file named second."""
    request = asked()
    folder, deploy = request["folder"], request["deploy"]
    core = openvino.Core()
    model = core.read_model(os.path.join(folder, request["variant"] or deploy["runtime_file"]))
    # By itself it computes in bfloat16 where the processor has it.
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    takes = {one.get_any_name() for one in compiled.inputs}
    gives = compiled.output("logits" if request["kind"] == "scores" else "sentence_embedding")
    outputs, ids = graph_answers(request, takes, lambda fed: compiled(fed)[gives])
    answer([openvino, tokenizers], outputs, ids)


if __name__ == "__main__":
    main()
