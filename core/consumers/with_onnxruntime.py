"""ONNX Runtime and the tokenizers library, without torch: the exported graph pools and normalises by itself."""

import os

import onnxruntime
import tokenizers
from encoding import graph_answers
from exchange import answer, asked


def main() -> None:
    """Answer the request in the file that is named first, in the file named second."""
    request = asked()
    folder, deploy = request["folder"], request["deploy"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    path = os.path.join(folder, request["variant"] or deploy["runtime_file"])
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    takes = {one.name for one in session.get_inputs()}
    gives = "logits" if request["kind"] == "scores" else "sentence_embedding"
    outputs, ids = graph_answers(request, takes, lambda fed: session.run([gives], fed)[0])
    answer([onnxruntime, tokenizers], outputs, ids)


if __name__ == "__main__":
    main()
