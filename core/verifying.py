"""`burnish verify`: what another runtime makes of a saved folder, compared with the folder's golden vectors.

The runtime runs in a process, and where it is named in a Python, of its own: what reads a model seldom agrees with what
trains it on versions. The scripts are in `consumers`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import deploy, endpoint_scales, endpoints, golden, neighbours
from .consumer_runs import Environment, run_script
from .errors import ConfigError, ModelError
from .runtimes import CHECKED, RUNTIMES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from .endpoint_calls import Endpoint

# Another order of summation moves a float32 vector by 1e-7 of its length; a wrong pooling or a lost prompt by 1e-2.
COSINE = 0.9999
# Of the largest score: logits have no unit.
SCORES = 1e-3
# What the reference tells apart by less than this has no order that another runtime could get wrong.
TIE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How one runtime compares with the golden vectors.

    Args:
        runtime: Its name.
        versions: What computed the answers, by name.
        inputs: How many texts or pairs were compared.
        cosine: The smallest cosine of an embedding with its golden one; None for scores.
        difference: The largest absolute difference of a number; of a similarity, where a store was asked.
        rank: Share of the pairs of results that are in the same order as by the golden ones; 1.0 if nothing is.
        tokens: Whether every input became the same tokens; None where the runtime does not tell.
        faults: What is not as it must be, one line each.
        notes: What else has to be known, one line each.
    """

    runtime: str
    versions: dict[str, str]
    inputs: int
    cosine: float | None
    difference: float
    rank: float
    tokens: bool | None
    faults: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether the runtime computes this model."""
        return not self.faults


def verify(
    folder: Path, runtime: str | None = None, *, python: Path | None = None, node_modules: Path | None = None,
    variant: str | None = None, cosine: float | None = None, difference: float | None = None,
) -> Verdict:  # fmt: skip
    """Run a consumer of a saved folder and compare.

    Args:
        folder: What Burnish saved or exported.
        runtime: One of `RUNTIMES`; None for the one that the folder was made for.
        python: The Python that has it, if it is of Python; None for this one.
        node_modules: The folder that has it, if it is of JavaScript; None for the one that npm would use here.
        variant: A file of the folder in place of its main one, such as "onnx/model_fp16.onnx".
        cosine: The smallest cosine of an embedding that is good; None for `COSINE`, or what the folder was measured to
            have where it holds rounded weights.
        difference: The largest difference of a score that is good; None for `SCORES`, or what was measured.

    Raises:
        ConfigError: For an unknown runtime, or one that is not installed there.
        ModelError: If the folder holds no golden vectors, or the runtime does not read it.
    """
    described = deploy.read(folder)
    reference = _golden(folder, described)
    name = runtime_of(described, runtime)
    environment = Environment(python=python, node_modules=node_modules)
    environment.check([name])
    if variant is not None and not (folder / variant).is_file():
        raise ConfigError(f"the folder has no {variant}", where="--variant", fix="Name one of its files")
    request = {
        "folder": str(folder.absolute()), "deploy": described, "variant": variant, "kind": reference["kind"],
        **{key: reference.get(key) for key in ("inputs", "prompts", "texts")},
    }  # fmt: skip
    answer = run_script(name, request, environment)
    wanted, off = _expected(described, variant, reference)
    wanted, off = wanted if cosine is None else cosine, off if difference is None else difference
    verdict = _compare(name, reference, answer, wanted, deploy.changed(folder, described), off)
    if (found := answer.get("neighbours")) is None:
        return verdict
    rank, difference, faults = neighbours.compare(reference["outputs"], described["similarity"], found)
    return replace(verdict, rank=rank, difference=difference, faults=(*verdict.faults, *faults))


def verify_url(
    folder: Path, endpoint: Endpoint, *, cosine: float | None = None, difference: float | None = None
) -> Verdict:
    """Ask a running server for what a folder's golden vectors hold, and compare.

    Args:
        folder: What the server serves, as Burnish saved or exported it.
        endpoint: Where the server is, and how it is spoken to.
        cosine: As in `verify`.
        difference: As in `verify`.

    Raises:
        ConfigError: If what the server speaks gives nothing of this kind.
        ModelError: If the folder holds no golden vectors, or the server does not answer.
    """
    described = deploy.read(folder)
    reference = _golden(folder, described)
    asked = {key: reference.get(key) for key in ("kind", "inputs", "texts", "token_ids")}
    answer = endpoints.answers(endpoint, {"folder": str(folder), "deploy": described, **asked})
    reference, answer, notes = endpoint_scales.comparable(reference, answer)
    if not answer["outputs"]:
        raise ModelError(f"it refuses every input: {answer['notes'][0]}", where=endpoint.url)
    wanted, off = _expected(described, None, reference)
    wanted, off = wanted if cosine is None else cosine, off if difference is None else difference
    verdict = _compare(endpoint.api, reference, answer, wanted, deploy.changed(folder, described), off)
    return replace(verdict, notes=(*answer["notes"], *notes, *verdict.notes))


def runtime_of(described: deploy.Description, asked: str | None = None) -> str:
    """The runtime that is asked for, or that a folder was made for.

    Raises:
        ConfigError: If there is no such runtime.
    """
    name: str = asked or described.get("runtime", "sentence-transformers")
    if name in CHECKED:
        fix = "Run `burnish verify`, or tei.check of burnish.core"
        raise ConfigError(f"{name} is only read about, and not run", where="runtime", fix=fix)
    if name not in RUNTIMES:
        known = ", ".join([*RUNTIMES, *CHECKED])
        raise ConfigError(f"{name!r} is unknown", where="--runtime", fix=f"Known: {known}")
    return name


def _golden(folder: Path, described: deploy.Description) -> dict[str, Any]:
    if described.get("golden") is None:
        reason = described.get("golden_reason") or "none were made"
        raise ModelError(f"there are no golden vectors ({reason})", where=str(folder), fix="Verify a merged folder")
    reference: dict[str, Any] = json.loads((folder / described["golden"]).read_text(encoding="utf-8"))
    if reference.get("schema") != golden.SCHEMA:
        raise ModelError(f"is not of the schema {golden.SCHEMA}", where=str(folder / golden.FILE), fix="Save it again")
    return reference


def _expected(described: deploy.Description, variant: str | None, reference: Mapping[str, Any]) -> tuple[float, float]:
    """(smallest cosine, largest difference of a score) that are good for a file: what it was measured to have when its
    weights were rounded, and half of that more."""
    least = _least(reference["outputs"])
    file = variant or described.get("runtime_file")
    quality = next((row for row in described.get("quality", []) if row["file"] == file and row.get("rounded")), None)
    if quality is None:
        return COSINE, least
    cosine = quality["cosine_min"]
    bound = COSINE if cosine is None else min(COSINE, 1 - 1.5 * (1 - cosine))
    return bound, max(least, 1.5 * quality["largest_difference"])


def _least(scores: Any) -> float:
    """The largest difference of a score that is good where no weights were rounded."""
    return SCORES * max(1.0, float(np.abs(_table(scores)).max()))


def _compare(
    name: str, reference: dict[str, Any], answer: dict[str, Any], wanted: float, faults: Sequence[str],
    off: float | None = None,
) -> Verdict:  # fmt: skip
    ours = _table(reference["outputs"])
    try:
        theirs = _table(answer["outputs"])
    except ValueError as error:  # such as a state for each token, where nothing pools
        fix = "See how it pools, and whether the folder says so"
        raise ModelError("it does not give one row of numbers for each input", where=name, fix=fix) from error
    found = [*faults]
    scores = reference["kind"] == "scores"
    narrower = theirs.shape[1] < ours.shape[1] and scores  # of scores the first say nothing of the others
    if ours.shape[0] != theirs.shape[0] or theirs.shape[1] > ours.shape[1] or narrower:
        shapes = f"{theirs.shape[0]} x {theirs.shape[1]} numbers, not {ours.shape[0]} x {ours.shape[1]}"
        found.append(f"it gives {shapes}")
        theirs = np.full_like(ours, np.nan)
    whole, ours = ours, ours[:, : theirs.shape[1]]  # a model that is cut to fewer dimensions gives the first ones
    difference = float(np.abs(ours - theirs).max())
    cosines = _cosines(ours, theirs)
    cosine = None if scores else float(cosines.min())
    tokens = _same_tokens(reference["token_ids"], answer["token_ids"])
    if not scores and theirs.shape == whole.shape and endpoint_scales.unit(whole) and not endpoint_scales.unit(theirs):
        lengths = np.linalg.norm(theirs, axis=1)
        found.append(
            f"its vectors are {lengths.min():.3g} to {lengths.max():.3g} long, and the model's are of length 1"
        )
    if cosine is not None and not cosine >= wanted:
        which = _named(reference, "texts", int(cosines.argmin()))
        found.append(f"the smallest cosine is {cosine:.6f}, below {wanted:.6f}{which}")
    if scores and not difference <= (_least(reference["outputs"]) if off is None else off):
        which = _named(reference, "inputs", int(np.abs(ours - theirs).max(axis=1).argmax()))
        found.append(f"a score is off by {difference:.2e}{which}")
    if tokens is False:
        found.append(f"{_odd_tokens(reference, answer)} of {len(ours)} inputs became other tokens")
    shorter = ours.shape[1] < whole.shape[1]
    notes = [f"it gives the first {ours.shape[1]} of {whole.shape[1]} dimensions"] if shorter else []
    return Verdict(
        runtime=name, versions=answer["versions"], inputs=len(ours), cosine=cosine, difference=difference,
        rank=_same_order(ours, theirs, scores), tokens=tokens, faults=tuple(found), notes=tuple(notes),
    )  # fmt: skip


def _named(reference: Mapping[str, Any], column: str, place: int) -> str:
    """The input that is furthest off, cut to a few words."""
    given = reference.get(column)
    said = json.dumps(given[place], ensure_ascii=False) if given is not None else ""
    return f", of {said if len(said) <= 80 else said[:77] + '…'}" if said else ""


def _table(rows: Any) -> NDArray[np.float64]:
    """(N, numbers) of N rows, or of N numbers.

    Raises:
        ValueError: If they are of several lengths, or hold rows themselves.
    """
    table = np.asarray([row if isinstance(row, list) else [row] for row in rows], dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"{table.ndim} dimensions")
    return table


def _cosines(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine of each row with its counterpart; two rows without a direction agree."""
    lengths = np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1)
    nothing = (lengths[0] == 0) & (lengths[1] == 0)
    product = np.maximum(lengths[0] * lengths[1], 1e-300)
    cosines: NDArray[np.float64] = np.where(nothing, 1.0, (ours * theirs).sum(1) / product)
    return cosines


def _same_tokens(ours: Sequence[Any], theirs: Sequence[Any] | None) -> bool | None:
    known = [one for one in ours if one is not None]
    return None if theirs is None or not known else list(ours) == list(theirs)


def _odd_tokens(reference: dict[str, Any], answer: dict[str, Any]) -> int:
    return sum(one != other for one, other in zip(reference["token_ids"], answer["token_ids"], strict=True))


def _same_order(ours: NDArray[np.float64], theirs: NDArray[np.float64], scores: bool) -> float:
    """Share of pairs of results that come in the same order.

    For embeddings each text is asked for all the others by cosine; scores are ordered column by column. Pairs that the
    golden values tell apart by less than `TIE` are left out.
    """
    if scores:
        lists = list(zip(ours.T, theirs.T, strict=True))
    else:
        lists = [
            (np.delete(one, place), np.delete(other, place))
            for place, (one, other) in enumerate(zip(_gram(ours), _gram(theirs), strict=True))
        ]
    same = total = 0
    for one, other in lists:
        apart = np.triu(np.abs(one[:, None] - one[None, :]) > TIE, 1)
        agree = np.sign(one[:, None] - one[None, :]) == np.sign(other[:, None] - other[None, :])
        same, total = same + int((apart & agree).sum()), total + int(apart.sum())
    return same / total if total else 1.0


def _gram(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-300)
    product: NDArray[np.float64] = unit @ unit.T
    return product
