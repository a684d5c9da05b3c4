"""LangChain: HuggingFaceEmbeddings, with prompts by their names, and HuggingFaceCrossEncoder."""

import sys
from importlib.metadata import version

import torch
from exchange import answer, asked
from langchain_huggingface import HuggingFaceEmbeddings

PACKAGES = ("langchain-huggingface", "langchain-community", "sentence-transformers", "transformers")


def scores(request):
    """A row of one number a pair, before the activation, as the golden ones are."""
    from langchain_community.cross_encoders import HuggingFaceCrossEncoder

    if len(request["deploy"]["labels"] or [None]) > 1:
        sys.exit("of several labels LangChain gives the second alone")
    options = {"device": "cpu", "activation_fn": torch.nn.Identity()}
    encoder = HuggingFaceCrossEncoder(model_name=request["folder"], model_kwargs=options)
    return [[float(number)] for number in encoder.score([tuple(pair) for pair in request["inputs"]])]


def embeddings(request):
    """Documents without a prompt, queries with the one that each was asked with."""
    rows = list(zip(request["inputs"], request["prompts"]))  # noqa: B905 (Python 3.9 has no `strict`)
    found = [None] * len(rows)
    for name in sorted({name or "" for _, name in rows}):
        # Queries get what documents get unless they are told otherwise, so both are told.
        options = {"prompt_name": name} if name else {"prompt": ""}
        model = HuggingFaceEmbeddings(
            model_name=request["folder"],
            model_kwargs={"device": "cpu"},
            encode_kwargs={"prompt": ""},
            query_encode_kwargs=options,
        )
        if not name:
            places = [place for place, (_, one) in enumerate(rows) if not one]
            vectors = model.embed_documents([rows[place][0] for place in places])
            for place, vector in zip(places, vectors):  # noqa: B905
                found[place] = vector
            continue
        for place, (text, one) in enumerate(rows):
            if one == name:
                found[place] = model.embed_query(text)
    return found


def main() -> None:
    """Answer the request in the file that is named first, in the file named second."""
    request = asked()
    outputs = scores(request) if request["kind"] == "scores" else embeddings(request)
    versions = {"langchain": version("langchain-huggingface"), **{name: version(name) for name in PACKAGES[1:]}}
    answer([], outputs, versions=versions)


if __name__ == "__main__":
    main()
