"""Which columns of a data set are text, which one is the label, and which loss they are made for.

The rules are those of Sentence Transformers: the label is the first of `label`, `labels`, `score`, `scores`, all
other columns are texts, and the order of the texts is their meaning (anchor, positive, negatives). Two things are
added: names of a well-known set are put into the order the losses expect, and columns that cannot be meant as text
(ids, the index that pandas writes) are left out and reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from numbers import Integral

from .errors import ConfigError, DataError

PAIRS, SCORED, LABELLED_PAIRS, CLASSES = "pairs", "scored", "labelled-pairs", "classes"

# Sentence Transformers' DEFAULT_LABEL_COLUMNS: the first one present is the label.
LABELS = ("label", "labels", "score", "scores")
# A column of one of these names holds a degree, so whole numbers in it are not read as classes of pairs.
SCORES = ("score", "scores")

# The first two columns of the sets that data sets are usually published in. Negatives may follow.
_LEADS = (
    ("hypothesis", "entailment"),
    ("anchor", "positive"),
    ("query", "positive"),
    ("question", "positive"),
    ("query", "document"),
    ("query", "passage"),
    ("query", "answer"),
    ("query", "response"),
    ("question", "answer"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
)
_NEGATIVE = re.compile(r"(?:hard_?)?neg(?:ative)?s?_?(\d*)|contradiction()")
# `query-id` is how BEIR writes it, `idx` how GLUE does; the last three are what pandas and parquet call a row number.
_NOT_TEXT = re.compile(r"(?:.*[_-])?(?:ids?|idx)|dataset_name|__index_level_\d+__|Unnamed: \d+|", re.IGNORECASE)

_LOSSES = {
    PAIRS: "MultipleNegativesRankingLoss",
    SCORED: "CoSENTLoss",
    LABELLED_PAIRS: "OnlineContrastiveLoss",
    CLASSES: "BatchAllTripletLoss",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The columns to train on, by the names that the loaded data set has.

    Args:
        texts: The text columns in the order the loss expects, e.g. anchor, positive, negative.
        label: The label column, or None.
        kind: `pairs` (two or more texts), `scored` (two texts and a number), `labelled-pairs` (two texts and 0 or
            1) or `classes` (one text and a whole number).
        ignored: Columns of the source that are left out, in its order.
        renamed: (name here, name in the source) of every column that an explicit mapping renames.
    """

    texts: tuple[str, ...]
    label: str | None = None
    kind: str
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The texts, then the label if there is one."""
        return self.texts if self.label is None else (*self.texts, self.label)

    def source(self, name: str) -> str:
        """What the source calls the column that is called `name` here."""
        return dict(self.renamed).get(name, name)


def is_ignorable(name: str) -> bool:
    """Whether a column of this name is never text: an id, a row number, the name of a data set."""
    return _NOT_TEXT.fullmatch(name) is not None


def naming(columns: Mapping[str, str]) -> str:
    """How a user says {role: column}: as flags of the command, and in a config file."""
    flags = " ".join(f"--columns {role}={column}" for role, column in columns.items())
    return f"{flags} (in a config file, columns: {{{', '.join(f'{role}: {name}' for role, name in columns.items())}}})"


# The example that errors give where the columns' names do not tell.
EXAMPLE = naming({"anchor": "my_q", "positive": "my_doc"})


def detect_columns(names: Sequence[str], where: str, mapping: Mapping[str, str] | None = None) -> Columns:
    """Say what each of the columns `names` is for.

    Args:
        names: Column names in the order of the source.
        where: The source, as errors should call it.
        mapping: What to use instead of guessing: {role: column}, e.g. {"anchor": "my_q", "positive": "my_doc"}. A
            role called label, labels, score or scores is the label. Only the columns named here are used, and the
            loaded data set has the roles as its column names.

    Returns:
        The columns. Two texts and a label are called `scored` until `refine_kind` has seen the labels.

    Raises:
        DataError: A name occurs twice, a mapped column is missing, or the columns fit no loss.
    """
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise DataError(f"column '{twice[0]}' occurs twice", where=where, fix="Give every column a name of its own")
    broken = next((name for name in names if name != name.encode("utf-8", "replace").decode()), None)
    if broken is not None:
        raise DataError(f"column name {broken!r} holds half a character", where=where, fix="Mend the name")
    if mapping:
        _check_mapping(names, where, mapping)
        roles = list(mapping)
        used = set(mapping.values())
        ignored = tuple(name for name in names if name not in used)
        renamed = tuple((role, column) for role, column in mapping.items() if role != column)
    else:
        roles = [name for name in names if not is_ignorable(name)]
        ignored, renamed = tuple(name for name in names if is_ignorable(name)), ()
    label = next((name for name in LABELS if name in roles), None)
    spare = tuple(name for name in roles if name in LABELS and name != label)
    texts = _ordered([name for name in roles if name not in LABELS], where, strict=not mapping)
    if mapping and spare:
        raise DataError(f"the mapping names two labels, '{label}' and '{spare[0]}'", where=where, fix="Keep one")
    ignored = tuple(name for name in names if name in ignored or name in spare)
    kind = _kind(texts, label, where, names)
    return Columns(texts=texts, label=label, kind=kind, ignored=ignored, renamed=renamed)


def refine_kind(columns: Columns, label_values: Iterable[object]) -> Columns:
    """Tell pairs with a graded score from pairs with a yes or no, once the labels are known.

    Two texts and a label are `labelled-pairs` if every label is a whole number by type (int or bool, not 1.0),
    except in a column called score or scores, which is a degree whatever its type. Other kinds stay as they are.
    """
    if columns.kind not in (SCORED, LABELLED_PAIRS):
        return columns
    whole = columns.label not in SCORES and all(isinstance(value, Integral) for value in label_values)
    return replace(columns, kind=LABELLED_PAIRS if whole else SCORED)


def default_loss(kind: str) -> str:
    """The name of the Sentence Transformers loss to train `kind` with.

    Raises:
        ConfigError: There is no such kind.
    """
    if kind not in _LOSSES:
        raise ConfigError(f"'{kind}' is not a kind of data", where="kind", fix=f"Use one of {', '.join(_LOSSES)}")
    return _LOSSES[kind]


def _check_mapping(names: Sequence[str], where: str, mapping: Mapping[str, str]) -> None:
    taken: dict[str, str] = {}
    for role, column in mapping.items():
        if column not in names:
            close = get_close_matches(column, names, n=1)
            hint = f"Did you mean '{close[0]}'? " if close else ""
            raise DataError(
                f"there is no such column, though the mapping takes '{role}' from it",
                where=f"{where}, column {column}",
                fix=f"{hint}The columns are: {', '.join(names)}",
            )
        if column in taken:
            raise DataError(
                f"the mapping takes both '{taken[column]}' and '{role}' from it",
                where=f"{where}, column {column}",
                fix=f"Give each its own column. The columns are: {', '.join(names)}",
            )
        taken[column] = role


def _ordered(texts: list[str], where: str, *, strict: bool) -> tuple[str, ...]:
    """The texts as the losses expect them, where their names tell; else as they came.

    With `strict`, a column that belongs to no role beside a well-known pair is refused: a loss would take a
    `source` or `lang` column for hard negatives.
    """
    lead = next((lead for lead in _LEADS if set(lead) <= set(texts)), None)
    if lead is None:
        return tuple(texts)
    rest = [name for name in texts if name not in lead]
    negatives = sorted((name for name in rest if _NEGATIVE.fullmatch(name)), key=_negative_number)
    strange = [name for name in rest if name not in negatives]
    if strange and strict:
        raise DataError(
            f"cannot tell what it is for beside '{lead[0]}' and '{lead[1]}': a loss would take it for a negative",
            where=f"{where}, column {strange[0]}",
            fix=f"Remove it, or name the columns to use, e.g. {naming({name: name for name in lead})}",
        )
    return (*lead, *negatives, *strange)


def _negative_number(name: str) -> int:
    match = _NEGATIVE.fullmatch(name)
    return int(match[1]) if match and match[1] else 0


def _kind(texts: tuple[str, ...], label: str | None, where: str, names: Sequence[str]) -> str:
    if len(texts) >= 2 and label is None:
        return PAIRS
    if len(texts) == 2:
        return SCORED
    if len(texts) == 1 and label is not None:
        return CLASSES
    found = f"The columns are: {', '.join(names) or '(none)'}"
    if not texts:
        what, fix = "no column holds text", f"Name the text columns, e.g. {EXAMPLE}"
    elif label is None:
        what = f"'{texts[0]}' is the only text column and there is no label"
        fix = "Add a second text (anchor and positive) or a label"
    else:
        what = f"{len(texts)} text columns and the label '{label}' together fit no loss"
        fix = f"Name those to use, e.g. {EXAMPLE}"
    raise DataError(what, where=where, fix=f"{fix}. {found}")
