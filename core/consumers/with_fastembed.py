"""FastEmbed, with the model added as its users add one: it pools the token states and normalises by itself."""

import sys

import fastembed
from exchange import answer, asked
from fastembed.common.model_description import ModelSource, PoolingType


def main() -> None:
    """Answer the request in the file that is named first, in the file named second."""
    request = asked()
    folder, deploy = request["folder"], request["deploy"]
    if request["kind"] == "scores":
        from fastembed.rerank.cross_encoder import TextCrossEncoder

        TextCrossEncoder.add_custom_model("burnish/model", ModelSource(hf="burnish/model"), deploy["runtime_file"])
        model = TextCrossEncoder("burnish/model", specific_model_path=folder)
        outputs = [[float(one)] for one in model.rerank_pairs([tuple(pair) for pair in request["inputs"]])]
    else:
        kinds = {"mean": PoolingType.MEAN, "cls": PoolingType.CLS}
        kinds.update({"lasttoken": PoolingType.LAST_TOKEN} if hasattr(PoolingType, "LAST_TOKEN") else {})
        if deploy["dense"] or deploy["pooling"] not in kinds:
            sys.exit("FastEmbed pools by mean, cls or last token, and has no Dense layers after it")
        fastembed.TextEmbedding.add_custom_model(
            model="burnish/model",
            pooling=kinds[deploy["pooling"]],
            normalization=deploy["normalize"],
            sources=ModelSource(hf="burnish/model"),
            dim=deploy["dimensions"],
            model_file=request["variant"] or deploy["runtime_file"],
        )
        model = fastembed.TextEmbedding("burnish/model", specific_model_path=folder)
        outputs = [row.tolist() for row in model.embed(request["texts"], batch_size=8)]
    answer([fastembed], outputs)


if __name__ == "__main__":
    main()
