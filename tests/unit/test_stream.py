"""One flat stream of tokens: what it holds, how it is filled up, and which losses cannot take it."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer import losses
from torch import nn

from burnish.core import stream


def column(*lengths: int, first: int = 100) -> list[Any]:
    return [np.arange(first, first + length, dtype=np.int32) for length in lengths]


def test_texts_lie_column_after_column() -> None:
    batch = stream.flatten([column(2, 3), column(1, 4, first=500)], position_offset=2)
    assert batch[stream.IDS].dtype == batch[stream.POSITIONS].dtype == torch.int64
    assert batch[stream.IDS].tolist() == [[100, 101, 100, 101, 102, 500, 500, 501, 502, 503]]
    assert batch[stream.POSITIONS].tolist() == [[2, 3, 2, 3, 4, 2, 2, 3, 4, 5]]
    assert batch[stream.BOUNDS].tolist() == [0, 2, 5, 6, 10] and batch[stream.BOUNDS].dtype == torch.int32
    assert batch[stream.LONGEST] == 4 and batch[stream.COLUMNS] == (2, 2)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(0, 2))
def test_a_filled_stream_has_one_of_few_shapes_and_keeps_its_texts(lengths: list[int], offset: int) -> None:
    columns = [column(*lengths), column(*lengths[::-1])]
    plain = stream.flatten(columns, position_offset=offset)
    settings: dict[str, Any] = {"fit": stream.fit_eighths, "fit_longest": stream.fit_octave, "filler": 7}
    batch = stream.flatten(columns, position_offset=offset, **settings)
    total, texts = 2 * sum(lengths), 2 * len(lengths)
    assert torch.equal(batch[stream.IDS][0, :total], plain[stream.IDS][0])
    assert torch.equal(batch[stream.POSITIONS][0, :total], plain[stream.POSITIONS][0])
    assert torch.equal(batch[stream.BOUNDS][: texts + 1], plain[stream.BOUNDS])
    assert (batch[stream.IDS][0, total:] == 7).all() and (batch[stream.POSITIONS][0, total:] == offset).all()
    spans = batch[stream.BOUNDS].diff()
    assert int(spans.min()) >= 1, "an empty text has no mean"
    assert int(spans.max()) <= batch[stream.LONGEST] and batch[stream.BOUNDS][-1] == batch[stream.IDS].shape[1]
    # As many tokens and fillers for every total that `fit` takes to one length.
    wider = stream.fit_eighths(total) - total
    other = [column(*lengths, *([wider] if wider else [])), column(*lengths[::-1])]
    longest = {**settings, "fit_longest": lambda _: 512}
    first, second = stream.flatten(columns, **longest), stream.flatten(other, **longest)
    assert first[stream.IDS].shape == second[stream.IDS].shape
    added = len(second[stream.BOUNDS]) - len(first[stream.BOUNDS])
    assert added == bool(wider), "another number of fillers"


def test_texts_as_long_as_the_bound_are_not_filled_up() -> None:
    texts = [column(128, 128, 128), column(128, 128, 128)]
    batch = stream.flatten(texts, fit=stream.fit_eighths, fit_longest=partial(max, 128))
    assert batch[stream.IDS].shape == (1, 6 * 128) and batch[stream.BOUNDS].diff().tolist() == [128] * 6
    for other in ([column(128, 127), column(128, 128)], [column(64, 64), column(64, 64)]):
        batch = stream.flatten(other, fit=stream.fit_eighths, fit_longest=partial(max, 128))
        assert len(batch[stream.BOUNDS]) > 5 and batch[stream.LONGEST] == 128


def test_texts_cut_to_a_long_limit_are_not_filled_up() -> None:
    texts, within = [column(5056, 5056), column(5056, 5056)], partial(stream.fit_within, 5056)
    batch = stream.flatten(texts, fit=stream.fit_eighths, fit_longest=within)
    assert batch[stream.IDS].shape == (1, 4 * 5056) and batch[stream.LONGEST] == 5056
    octaves = stream.flatten(texts, fit=stream.fit_eighths, fit_longest=stream.fit_octave)
    assert octaves[stream.IDS].shape[1] > 4 * 5056, "what is to be saved was not there"
    assert [within(number) for number in (1, 300, 4096, 4097, 5056, 6000)] == [64, 512, 4096, 5056, 5056, 6000]


def test_shapes_are_few() -> None:
    shapes = {stream.fit_eighths(number) for number in range(1, 65_537)}
    assert len(shapes) <= 8 * 10 and max(stream.fit_eighths(n) / n for n in range(1024, 65_537)) <= 1.126
    assert [stream.fit_octave(number) for number in (1, 64, 65, 300)] == [64, 64, 128, 512]
    few = [stream.fit_few(number) for number in range(1, 5000)]
    assert sorted(few) == few and all(found >= number for number, found in enumerate(few, start=1))
    assert {found for found in few if found <= 2048} == set(range(256, 2049, 256)) and stream.fit_few(4097) == 4608


def test_features_and_columns_come_back_out() -> None:
    batch = stream.flatten([column(2, 3), column(1, 4)], fit=stream.fit_eighths)
    inputs = stream.model_inputs(batch)
    assert inputs["cu_seq_lens_q"] is inputs["cu_seq_lens_k"] is batch[stream.BOUNDS]
    embeddings = torch.arange(20.0).view(10, 2)
    first, second = stream.columns_of(embeddings, batch[stream.COLUMNS])
    assert torch.equal(first["sentence_embedding"], embeddings[:2])
    assert torch.equal(second["sentence_embedding"], embeddings[2:4])


class Own(nn.Module):
    """A loss of a user's own."""


def test_losses_that_read_more_than_embeddings_get_columns() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2))
    ranking = losses.MultipleNegativesRankingLoss(model)
    assert stream.needs_columns(ranking) is None
    assert "mini-batches" in str(stream.needs_columns(losses.CachedMultipleNegativesRankingLoss(model)))
    layers = losses.AdaptiveLayerLoss.__new__(losses.AdaptiveLayerLoss)  # made in full it wants a transformer
    nn.Module.__init__(layers)
    assert "layers" in str(stream.needs_columns(nn.Sequential(layers)))
    assert stream.needs_columns(Own()) == "Own is not a loss that Burnish knows"


@pytest.mark.parametrize("fit", [None, stream.fit_eighths])
def test_no_text_at_all(fit: Any) -> None:
    batch = stream.flatten([[], []], fit=fit)
    assert batch[stream.COLUMNS] == (0, 0) and (batch[stream.IDS].numel() == 0) == (fit is None)
