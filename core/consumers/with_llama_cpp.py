"""llama.cpp by its own server, which xllamacpp has in it: tokens, pooling and unit length are the server's work.

The server refuses what is longer than the model takes, so long texts are cut here. Texts that `deploy.json` lists under
"other_tokens", since llama.cpp's tokenizer is known to cut them otherwise than the model's own, are given as the tokens
that they should be.
"""

import json
import os
import urllib.error
import urllib.request

import xllamacpp
from exchange import answer, asked


class LlamaServer:
    """llama.cpp's server with one model, asked by HTTP as any client asks it."""

    def __init__(self, path, tokens, *, scores):
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.embedding = True
        # A text is computed at once, so that every token sees every other.
        params.n_ctx = params.n_batch = params.n_ubatch = tokens
        params.n_parallel = 1
        params.warmup = False
        params.verbosity = -1
        # Threads wait in a loop for each other: one too many on a busy machine makes it a hundred times slower.
        params.cpuparams.n_threads = max(1, (os.cpu_count() or 2) // 2)
        if scores:
            params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
        self.server = xllamacpp.Server(params)

    def post(self, path, **body):
        """What the server says to a request."""
        data = json.dumps(body).encode()
        address, kind = self.server.listening_address + path, {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(address, data, kind)) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{path}: {error.read().decode()[:300]}") from error

    def tokens(self, text, *, special):
        """The numbers of a text's tokens."""
        return self.post("/tokenize", content=text, add_special=special, parse_special=True)["tokens"]


def cut(whole, bare, longest):
    """Tokens of a text, special ones included, with as many of the text's own as there is room for."""
    if longest is None or len(whole) <= longest:
        return whole
    start = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
    kept = bare[: max(0, longest - (len(whole) - len(bare)))]
    return whole[:start] + kept + whole[start + len(bare) :]


def embed(server, request, longest, given):
    """(vectors, token ids) of the texts."""
    normalize = 2 if request["deploy"]["normalize"] else -1
    vectors, ids = [], []
    for place, text in enumerate(request["texts"]):
        whole = server.tokens(text, special=True)
        kept = given.get(place) or cut(whole, server.tokens(text, special=False), longest)
        # As text where that does it: what the server adds to one is part of what is verified.
        found = server.post("/v1/embeddings", input=text if kept == whole else kept, embd_normalize=normalize)
        vectors.append(found["data"][0]["embedding"])
        ids.append(kept)
    return vectors, ids


def score(server, request, longest, given):
    """(scores, token ids) of the pairs."""
    bare, whole = (server.tokens("x", special=special) for special in (False, True))
    start = whole.index(bare[0])
    before, after = whole[:start], whole[start + len(bare) :]
    # The server does not tell what it puts between the two: as many of the closing tokens as there is room for.
    counted = server.post("/v1/rerank", query="x", documents=["x"])["usage"]["prompt_tokens"]
    between = after * (counted - len(before) - len(after) - 2 * len(bare))
    outputs, ids = [], []
    for place, (query, document) in enumerate(request["inputs"]):
        first, second = (server.tokens(text, special=False) for text in (query, document))
        whole = [*before, *first, *between, *second, *after]
        while longest is not None and len(first) + len(second) > longest - len(before + between + after):
            (first if len(first) > len(second) else second).pop()
        kept = given.get(place) or [*before, *first, *between, *second, *after]
        if kept == whole:
            found = server.post("/v1/rerank", query=query, documents=[document])
            outputs.append([found["results"][0]["relevance_score"]])
        else:
            # The first number is the score; the others are what lay in memory.
            found = server.post("/v1/embeddings", input=kept, embd_normalize=-1)
            outputs.append(found["data"][0]["embedding"][:1])
        ids.append(kept)
    return outputs, ids


def golden_tokens(request):
    """By number of input, the tokens of those that llama.cpp is known to cut otherwise."""
    with open(os.path.join(request["folder"], request["deploy"]["golden"]), encoding="utf-8") as file:
        reference = json.load(file)["token_ids"]
    return {place: reference[place] for place in request["deploy"].get("other_tokens", ())}


def main() -> None:
    """Answer the request in the file that is named first, in the file named second."""
    request = asked()
    deploy, scores = request["deploy"], request["kind"] == "scores"
    path = os.path.join(request["folder"], request["variant"] or deploy["runtime_file"])
    # No text has more tokens than bytes, but for the special ones.
    texts = ["".join(pair) for pair in request["inputs"]] if scores else request["texts"]
    room = max(len(text.encode()) for text in texts) + 8
    longest = deploy["max_seq_length"]
    server = LlamaServer(path, min(longest or room, room), scores=scores)
    given = golden_tokens(request)
    outputs, ids = (score if scores else embed)(server, request, longest, given)
    told = {"as tokens:": f"{len(given)} of {len(ids)} inputs"} if given else {}
    answer([xllamacpp], outputs, ids, versions=told)


if __name__ == "__main__":
    main()
