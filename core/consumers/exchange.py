"""How a script gets its request and gives its answer; it lies beside them, where Python looks first."""

import json
import sys


def asked():
    """The request in the file that is named first."""
    with open(sys.argv[1], encoding="utf-8") as file:
        return json.load(file)


def answer(libraries, outputs, token_ids=None, *, neighbours=None, versions=None):
    """Write what was computed, and the versions of the libraries that did it, to the file named second.

    `versions` are those of what is no module, or does not say its own.
    """
    said = {
        "versions": {**(versions or {}), **{one.__name__: one.__version__ for one in libraries}},
        "outputs": outputs,
        "token_ids": token_ids,
    }
    if neighbours is not None:
        said["neighbours"] = neighbours
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(said, file)
