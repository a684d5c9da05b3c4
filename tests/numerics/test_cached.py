"""GradCache on a stream: loss and gradients of Sentence Transformers' cached loss and of the whole batch at once."""

from __future__ import annotations

import random
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from sentence_transformers.sentence_transformer import losses
from torch import Tensor, nn

from burnish import FastSentenceTransformer
from burnish.core import stream
from burnish.core.cached import BUDGET, budget_of, cached_step, cut, loss_of, spans
from burnish.core.tiled_loss import tile
from burnish.kernels.infonce import tiled_infonce

# Before 6.2 Sentence Transformers multiplies embeddings and their gradients in float32, whatever they are in.
STOCK_BOUND = 1e-10 if Version(sentence_transformers.__version__) >= Version("6.2") else 1e-5
COLUMNS = (
    ["a cat", "dogs run far away from here and never come back", "the third", "x y z", "one more"],
    ["kitten", "a very long sentence about dogs and all that they do", "3", "letters", "and another"],
    ["no", "nope", "never ever", "none of it, not even the half of it", "nil"],
)


def load(folder: Path, dropout: float) -> Any:
    config = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = FastSentenceTransformer.from_pretrained(
        str(folder), packed=True, full_finetuning=True, device="cpu", config_kwargs=config
    )
    return model.double().train()


@pytest.fixture(scope="module", params=["tiny", "real"])
def folder(request: pytest.FixtureRequest, tiny_bert_st: Path, minilm: Path) -> Path:
    return tiny_bert_st if request.param == "tiny" else minilm


@pytest.fixture(scope="module")
def still(folder: Path) -> Any:
    """A model without dropout."""
    return load(folder, 0.0)


@pytest.fixture(scope="module")
def dropping(tiny_bert_st: Path) -> Any:
    return load(tiny_bert_st, 0.3)


def batch_of(model: Any, **options: Any) -> dict[str, Any]:
    columns = [[np.array(ids, np.int32) for ids in model.tokenizer(texts)["input_ids"]] for texts in COLUMNS]
    return stream.flatten(columns, **options)


class Embed:
    """A model as `cached_step` takes it, which notes each forward: with a graph or not, its stream, its embeddings.

    No graph of an earlier forward may be alive by the next.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.graphs, self.lengths, self.outputs = model, list[bool](), list[int](), list[Tensor]()
        self.last: Callable[[], Tensor | None] = lambda: None

    def __call__(self, chunk: Mapping[str, Any]) -> Tensor:
        assert self.last() is None
        out: Tensor = self.model(stream.model_inputs(chunk))["sentence_embedding"]
        self.graphs.append(out.requires_grad)
        self.lengths.append(chunk[stream.IDS].shape[1])
        self.outputs.append(out.detach().clone())
        self.last = weakref.ref(out)
        return out


def ranking(model: Any, **options: Any) -> Any:
    return partial(
        losses.MultipleNegativesRankingLoss(model, **options).compute_loss_from_embeddings, labels=torch.empty(0)
    )


def run(model: Any, step: Callable[[], Tensor], weight: float = 1.0) -> list[Tensor]:
    """[the loss, each gradient of `weight` times it], all random numbers from the same seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    random.seed(3)
    loss = step()
    torch.autograd.backward(weight * loss)
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) > 30 and max(float(grad.abs().max()) for grad in gradients) > 1e-4
    return [loss.detach(), *gradients]


def assert_same(found: list[Tensor], expected: list[Tensor], bound: float = 1e-10) -> None:
    assert len(found) == len(expected)
    torch.testing.assert_close(found[0], expected[0], rtol=bound, atol=0)
    top = max(float(grad.abs().max()) for grad in expected[1:])
    assert max(float((a - b).abs().max()) for a, b in zip(found[1:], expected[1:], strict=True)) <= bound * top


@pytest.mark.parametrize("budget", [1, 12, 40, 60])
def test_equals_the_whole_batch_and_the_stock_cached_loss(still: Any, budget: int) -> None:
    batch, embed = batch_of(still), Embed(still)
    whole = run(still, lambda: cached_step(Embed(still), batch, ranking(still), 10**6))
    found = run(still, lambda: cached_step(embed, batch, ranking(still), budget))
    chunks = len(embed.graphs) // 2
    assert chunks > 1 and embed.graphs == [True] * 2 * chunks
    assert_same(found, whole)
    stock = losses.CachedMultipleNegativesRankingLoss(still, mini_batch_size=2)
    expected = run(still, lambda: stock([still.preprocess(list(texts)) for texts in COLUMNS], torch.empty(0)))
    assert_same(found, expected, STOCK_BOUND)


def test_one_chunk_is_one_forward_and_the_host_reads_nothing(still: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, embed = batch_of(still), Embed(still)
    expected = run(still, lambda: ranking(still)([
        column["sentence_embedding"]
        for column in stream.columns_of(Embed(still)(batch), batch[stream.COLUMNS])
    ]))  # fmt: skip
    monkeypatch.setattr("burnish.core.cached.cut", None)
    found = run(still, lambda: cached_step(embed, batch, ranking(still), batch[stream.IDS].shape[1]))
    assert embed.graphs == [True]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_dropout_is_repeated_exactly(dropping: Any) -> None:
    batch, embed = batch_of(dropping), Embed(dropping)
    found = run(dropping, lambda: cached_step(embed, batch, ranking(dropping), 30))
    chunks = len(embed.outputs) // 2
    pairs = list(zip(embed.outputs[:chunks], embed.outputs[chunks:], strict=True))
    assert chunks > 2 and all(torch.equal(first, again) for first, again in pairs)

    def at_once() -> Tensor:
        """The same chunks with a graph each, all held: what the replay stands for."""
        parts = torch.cat([Embed(dropping)(chunk) for chunk in cut(batch, 30)])
        value: Tensor = ranking(dropping)(list(torch.split(parts, list(batch[stream.COLUMNS]))))
        return value

    assert_same(found, run(dropping, at_once))
    without = run(dropping.eval(), lambda: cached_step(embed, batch, ranking(dropping), 30))
    dropping.train()
    assert not torch.allclose(found[0], without[0])


def test_dropout_of_the_stock_cached_loss(dropping: Any) -> None:
    """Text by text both draw the same numbers in the same order."""
    batch = batch_of(dropping)
    stock = losses.CachedMultipleNegativesRankingLoss(dropping, mini_batch_size=1)
    expected = run(dropping, lambda: stock([dropping.preprocess(list(t)) for t in COLUMNS], torch.empty(0)))
    found = run(dropping, lambda: cached_step(Embed(dropping), batch, ranking(dropping), 1))
    assert_same(found, expected, STOCK_BOUND)


def test_random_numbers_go_on_as_after_the_first_forwards(dropping: Any) -> None:
    batch = batch_of(dropping)
    torch.manual_seed(3)
    loss = cached_step(Embed(dropping), batch, ranking(dropping), 30)
    found = [torch.rand(4)]  # drawn between, which the backward must not take back
    torch.autograd.backward(loss)
    found.append(torch.rand(4))
    torch.manual_seed(3)
    with torch.no_grad():
        for chunk in cut(batch, 30):
            Embed(dropping)(chunk)
    assert torch.equal(torch.stack(found), torch.rand(2, 4))


def test_the_gradient_is_scaled_as_the_loss_is(dropping: Any) -> None:
    batch = batch_of(dropping)
    full, quarter = (
        run(dropping, lambda: cached_step(Embed(dropping), batch, ranking(dropping), 30), weight)
        for weight in (1.0, 0.25)
    )
    assert_same([full[0], *(0.25 * grad for grad in full[1:])], quarter)


def test_evaluation_has_no_graph(still: Any) -> None:
    batch, embed = batch_of(still), Embed(still)
    with torch.no_grad():
        loss = cached_step(embed, batch, ranking(still), 30)
        whole = cached_step(embed, batch, ranking(still), 10**6)
    assert not loss.requires_grad and not any(embed.graphs)
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)


def test_gradients_are_exchanged_with_the_last_chunk_alone(still: Any) -> None:
    embed, kept = Embed(still), list[int]()

    @contextmanager
    def no_sync() -> Iterator[None]:
        before = len(embed.graphs)
        yield
        kept.append(len(embed.graphs) - before)

    run(still, lambda: cached_step(embed, batch_of(still), ranking(still), 30, no_sync=no_sync))
    assert kept == [1] * (len(embed.graphs) - 1) and len(kept) > 2


def test_processes_with_unlike_numbers_of_chunks(tmp_path: Path) -> None:
    """Two of them, real ones: gradients are the mean over both, with embeddings gathered and without."""
    script = Path(__file__).with_name("cached_processes.py")
    ran = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    found = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*-*-*")}
    for gather in (False, True):
        assert [found[f"{gather}-0-{budget}"] for budget in (18, 10**6, 30)] == ["3", "1", "2"]
        assert [found[f"{gather}-1-{budget}"] for budget in (18, 10**6, 30)] == ["8", "1", "4"]


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_autocast_is_repeated(tiny_bert_st: Path, inside: bool) -> None:
    model = load(tiny_bert_st, 0.0).float()
    batch, embed = batch_of(model), Embed(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model, lambda: cached_step(Embed(model), batch, ranking(model), 10**6))
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cached_step(embed, batch, ranking(model), 30)
        if inside:
            torch.autograd.backward(loss)
    if not inside:
        torch.autograd.backward(loss)
    chunks = len(embed.outputs) // 2
    assert all(torch.equal(*pair) for pair in zip(embed.outputs[:chunks], embed.outputs[chunks:], strict=True))
    found = [weight.grad for weight in model.parameters() if weight.grad is not None]
    size, apart = (
        torch.cat([tensor.flatten() for tensor in tensors]).norm()
        for tensors in (expected[1:], [ours - theirs for ours, theirs in zip(found, expected[1:], strict=True)])
    )
    assert size > 1e-3 and apart < 0.05 * size  # bfloat16 products of other shapes


def test_chunks_may_be_filled_up(still: Any) -> None:
    batch = batch_of(still, filler=7, fit=stream.fit_eighths, fit_longest=stream.fit_octave)
    assert len(batch[stream.BOUNDS]) - 1 > sum(batch[stream.COLUMNS])
    expected = run(still, lambda: cached_step(Embed(still), batch_of(still), ranking(still), 10**6))
    embed = Embed(still)
    options: dict[str, Any] = {"filler": 7, "fit": stream.fit_eighths, "fit_longest": stream.fit_octave}
    found = run(still, lambda: cached_step(embed, batch, ranking(still), 40, **options))
    assert_same(found, expected)
    assert len(embed.lengths) > 2 and all(length % 64 == 0 for length in embed.lengths)


def test_a_cut_stream_is_the_texts_of_it(still: Any) -> None:
    batch = batch_of(still, position_offset=2)
    chunks = cut(batch, 25)
    assert torch.equal(torch.cat([chunk[stream.IDS] for chunk in chunks], 1), batch[stream.IDS])
    assert torch.equal(torch.cat([chunk[stream.POSITIONS] for chunk in chunks], 1), batch[stream.POSITIONS])
    lengths = torch.cat([torch.diff(chunk[stream.BOUNDS]) for chunk in chunks])
    assert torch.equal(lengths, torch.diff(batch[stream.BOUNDS]))
    assert [sum(chunk[stream.COLUMNS]) for chunk in chunks] == [len(chunk[stream.BOUNDS]) - 1 for chunk in chunks]
    assert all(set(chunk) == set(batch) for chunk in chunks)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(1, 200))
def test_spans_cover_all_texts_within_the_budget(lengths: list[int], budget: int) -> None:
    found = spans(lengths, budget)
    assert found[0][0] == 0 and found[-1][1] == len(lengths)
    assert all(one[1] == other[0] for one, other in pairwise(found))
    assert all(first < last for first, last in found)
    sizes = [sum(lengths[first:last]) for first, last in found]
    assert all(size <= budget or last - first == 1 for size, (first, last) in zip(sizes, found, strict=True))
    if 2 * max(lengths) <= budget:
        assert len(found) <= max(1, -(-2 * sum(lengths) // budget))


def test_chunks_are_about_equally_long() -> None:
    assert spans([10] * 34, 320) == [(0, 18), (18, 34)]
    assert spans([10] * 32, 320) == [(0, 32)]


# Deprecated in newer releases in favour of an option of MultipleNegativesRankingLoss; users still have them.
@pytest.mark.filterwarnings("ignore:The .*SymmetricRankingLoss is deprecated:DeprecationWarning")
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("name", ["CachedMultipleNegativesRankingLoss", "CachedMultipleNegativesSymmetricRankingLoss"])
def test_a_cached_loss_is_what_it_computes_from_embeddings(name: str, tiled: bool) -> None:
    model: Any = nn.Sequential(nn.Identity())
    loss = getattr(losses, name)(model, scale=7.0, mini_batch_num_tokens=500)
    embeddings = [torch.randn(9, 4, dtype=torch.float64) for _ in range(2)]
    expected = loss.calculate_loss([[column] for column in embeddings])
    if tiled:
        tile(loss, tiled_infonce, 0)
    found = loss_of(loss)
    assert found is not None and budget_of(loss, 64) == 500
    torch.testing.assert_close(found(embeddings), expected, rtol=1e-12, atol=0)


def test_other_losses_are_none_of_its_business() -> None:
    class Own(losses.CachedMultipleNegativesRankingLoss):
        def calculate_loss(self, *args: Any, **options: Any) -> Tensor:
            return 2 * super().calculate_loss(*args, **options)

    model: Any = nn.Sequential(nn.Identity())
    plain = losses.MultipleNegativesRankingLoss(model)
    bound: Any = losses.CachedMultipleNegativesRankingLoss(model)
    bound.calculate_loss = lambda *args, **options: torch.zeros(())  # as MatryoshkaLoss does
    assert loss_of(plain) is loss_of(Own(model)) is loss_of(bound) is None
    assert budget_of(losses.CachedMultipleNegativesRankingLoss(model), 10_000) == BUDGET
    assert budget_of(losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=8), 64) == 512
