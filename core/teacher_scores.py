"""What a larger reranker scores the pairs of a data set, computed once, kept on disk, and found again by later runs.

Pairs are scored 4,096 at a time, and each part is a file of its own, named by a hash over its texts, the teacher and
the settings. So a run that was interrupted goes on where it stopped, rows that were added cost only themselves, and a
teacher that was named, not loaded, is loaded only where something is missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from .errors import ConfigError, DataError, ModelError
from .runs import say as _say
from .stores import cache_folder, kept
from .teachers import Pairs, Teacher, find_teacher
from .token_store import is_list, list_bounds, texts_in_chunks

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]

PART = 4_096
"""Pairs in a file: what an interruption loses at most."""
LABELS = ("label", "labels", "score", "scores")
"""Columns that Sentence Transformers takes for labels."""
_FORMAT = 1
_FILE, _KIND, _AGAIN = "scores.npy", "stores of teachers' scores", "its pairs are scored again"

Scores: TypeAlias = "NDArray[np.float32]"


def with_teacher_scores(
    dataset: datasets.Dataset,
    teacher: Any,
    *,
    margins: bool = True,
    identity: str | None = None,
    prompt: str | None = None,
    raw: bool = True,
    batch_size: int = 32,
    load: Mapping[str, Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = _say,
) -> datasets.Dataset:
    """The data set with a teacher's scores as the label that losses for distillation want.

    | Columns | Label | Losses of `sentence_transformers.cross_encoder` |
    | --- | --- | --- |
    | query, document | `label`: a score | MSELoss |
    | query, positive, negative | `label`: score of the positive minus that of the negative | MarginMSELoss |
    | query, positive, negatives … | `label`: a list of those, one for each negative | MarginMSELoss |
    | query, a list of documents | `labels`: a list of scores | ListNetLoss, RankNetLoss, ListMLELoss, … |

    Args:
        dataset: Of texts, the query first, without a label.
        teacher: A loaded `CrossEncoder` with one label, a loaded `SentenceTransformer` (its similarity), a function of
            a list of (query, document) that returns as many numbers, or a cross-encoder's Hub id or folder.
        margins: False gives tuples the scores themselves, the positive's first, which MarginMSELoss takes too.
        identity: What the scores of a function are kept under: change it when the function changes.
        prompt: Put before the queries by a cross-encoder, in the model's own way.
        raw: A cross-encoder's logits. False puts its own activation on them, for most a sigmoid: then the student's
            loss needs one as well.
        batch_size: Pairs in a forward pass.
        load: Parameters of `FastCrossEncoder.from_pretrained` for a named teacher. Left out: float32.
        folder: Where scores are kept; left out, `teacher` in the user's cache, as the token store.
        say: Told, in one line each, what was found and what is damaged.

    Returns:
        A new data set with one column more, float32.

    Raises:
        ConfigError: If columns are none of those above, or a parameter does not fit the teacher.
        DataError: If a text is missing.
        ModelError: If the teacher's scores are not finite, or not one a pair.
    """
    from datasets import Features, List, Value

    names = list(dataset.column_names)
    if found := [name for name in names if name in LABELS]:
        fix = f"Pass dataset.remove_columns({found[0]!r})"
        raise ConfigError(f"the data has a label already: {found[0]}", where="dataset", fix=fix)
    if len(names) < 2:
        raise ConfigError("a query and a document are two columns", where="dataset", fix="Add the other")
    settings: dict[str, Any] = {
        "identity": identity, "prompt": prompt, "raw": raw, "batch_size": batch_size, "load": load, "folder": folder,
    }  # fmt: skip
    query, *documents = names
    found_scores = [score_column(dataset, query, one, teacher, say=say, **settings) for one in documents]
    listed = [one for one in documents if is_list(_kind(dataset, one))]
    name, column, kind = "label", list[Any](), Value("float32")
    if listed:
        if len(documents) > 1:
            fix = "Keep the query and one column of lists"
            raise ConfigError(f"{listed[0]} holds lists beside other documents", where="dataset", fix=fix)
        bounds = list_bounds(dataset, listed[0])
        name, kind = "labels", List(Value("float32"))
        column = [part.tolist() for part in np.split(found_scores[0], bounds[1:-1])]
    elif len(documents) == 1:
        column = found_scores[0].tolist()
    else:
        table = np.stack(found_scores, axis=1)
        table = table[:, :1] - table[:, 1:] if margins else table
        kind = List(Value("float32")) if table.shape[1] > 1 else kind
        column = table.tolist() if table.shape[1] > 1 else table[:, 0].tolist()
    features = Features({**dataset.features, name: kind})
    return dataset.add_column(name, column, feature=features[name])


def score_column(
    dataset: datasets.Dataset,
    query: str,
    document: str,
    teacher: Any,
    *,
    identity: str | None = None,
    prompt: str | None = None,
    raw: bool = True,
    batch_size: int = 32,
    load: Mapping[str, Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = _say,
) -> Scores:
    """(pairs,) float32 scores of each row's query with its document, or with its documents one after another.

    Takes the parameters of `with_teacher_scores` and raises as it does; `query` and `document` name columns.
    """
    who = find_teacher(teacher, identity=identity, prompt=prompt, raw=raw, batch_size=batch_size, load=load)
    place = cache_folder("teachers' scores", "teacher", folder)
    parts, made, seconds = list[Scores](), 0, 0.0
    for pairs in _in_parts(dataset, query, document):
        # The pairs are named in full, so that no change of the data meets scores of other texts.
        key = xxhash.xxh3_128_hexdigest(f"{_FORMAT} {_content(pairs)} {who.key}".encode())

        def make(file: Path, pairs: Pairs = pairs) -> dict[str, Any]:
            with file.open("wb") as sink:
                np.save(sink, _scores(who, pairs))
            return {"pairs": len(pairs), "teacher": who.name}

        file, took = kept(place, key, _FILE, make, say=say, kind=_KIND, again=_AGAIN)
        parts.append(np.load(file))
        made, seconds = made + (len(pairs) if took else 0), seconds + took
    total = sum(map(len, parts))
    how = "found scored" if not made else f"{made:,} of them scored now in {seconds:.1f} s"
    say(f"teacher {who.name}: {total:,} pairs of {query} and {document}, {how} ({place})")
    return np.concatenate([np.zeros(0, np.float32), *parts])


def _kind(dataset: datasets.Dataset, column: str) -> Any:
    return dataset.data.schema.field(column).type


def _in_parts(dataset: datasets.Dataset, query: str, document: str) -> Iterator[Pairs]:
    """The pairs of two columns in the order of the rows, `PART` at a time."""
    lengths = np.diff(list_bounds(dataset, document)) if is_list(_kind(dataset, document)) else 1
    owners = np.repeat(np.arange(len(dataset)), lengths)
    start = 0
    for texts in texts_in_chunks(dataset, document):
        for place in range(0, len(texts), PART):
            documents = texts.slice(place, PART).to_pylist()
            rows = owners[start : start + len(documents)]
            queries = dataset.with_format(None, columns=[query])[int(rows[0]) : int(rows[-1]) + 1][query]
            found = [queries[row] for row in (rows - rows[0]).tolist()]
            if not all(isinstance(text, str) for text in found):
                row = rows[next(at for at, text in enumerate(found) if not isinstance(text, str))]
                raise DataError("there is no text", where=f"row {row} of column {query}", fix="Leave the row out")
            yield list(zip(found, documents, strict=True))
            start += len(documents)


def _content(pairs: Pairs) -> str:
    """A hash over pairs of texts in their order."""
    digest = xxhash.xxh3_128()
    for pair in pairs:
        for text in pair:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()


def _scores(who: Teacher, pairs: Pairs) -> Scores:
    """The scores of pairs, equal ones scored once."""
    known = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}
    scores = np.asarray(who.score(list(known)), np.float32)
    if scores.shape != (len(known),):
        what = f"gives {scores.shape} numbers for {len(known)} pairs"
        raise ModelError(what, where=f"teacher {who.name}", fix="A teacher gives one score a pair: load one label")
    if not np.isfinite(scores).all():
        pair = list(known)[int(np.flatnonzero(~np.isfinite(scores))[0])]
        what = f"its score of {pair[0][:40]!r} with {pair[1][:40]!r} is not finite"
        raise ModelError(what, where=f"teacher {who.name}", fix="Load it in float32, or leave the pair out")
    return scores[[known[pair] for pair in pairs]]


__all__ = ["LABELS", "PART", "score_column", "with_teacher_scores"]
