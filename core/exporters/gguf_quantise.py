"""A script, run in a process of its own: llama.cpp's library turns a GGUF file into one with weights in fewer bits.

    python -P gguf_quantise.py LIBRARY SOURCE OUT TYPE

It calls what every release has had, and no binding: those come for one release each.
"""

import ctypes
import os
import sys


class Parameters(ctypes.Structure):
    """`llama_model_quantize_params`: its first two members, and more room than any release has needed for the others.

    The library fills it in and reads it; of what stands behind the two only the defaults are passed on.
    """

    _fields_ = (("threads", ctypes.c_int32), ("type", ctypes.c_int32), ("others", ctypes.c_char * 1024))


def main() -> None:
    """Quantise; what goes wrong ends the process with a line of its own."""
    path, source, out, kind = sys.argv[1:]
    import gguf

    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    library.llama_model_quantize_default_params.restype = Parameters
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
    library.llama_model_quantize.restype = ctypes.c_uint32
    library.llama_backend_init()
    parameters = library.llama_model_quantize_default_params()
    parameters.threads = max(1, (os.cpu_count() or 2) // 2)
    parameters.type = int(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    code = library.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(parameters))
    if code != 0:
        sys.exit(f"llama_model_quantize failed with {code}")


if __name__ == "__main__":
    main()
