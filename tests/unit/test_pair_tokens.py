"""Pairs put together in numpy: token for token what tokenizers make of them, or a reason why not."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import CrossEncoder as Stock
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import RobertaProcessing, TemplateProcessing

from burnish.core import stream
from burnish.core.cross_encoder import CrossEncoder
from burnish.core.pair_cuts import cut_lengths, cuts_each
from burnish.core.pair_tokens import PairRecipe, TextRecipe, TokenisedText, find_template, tokenised

WORDS = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, **{f"w{number}": number + 3 for number in range(20)}}
SPECIAL = [("[CLS]", 0), ("[SEP]", 1)]
BERT = TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=SPECIAL)
LAST = TemplateProcessing(single="$A [SEP]", pair="$A $B [SEP]", special_tokens=SPECIAL)
SWAPPED = TemplateProcessing(single="$A", pair="$B [SEP] $A", special_tokens=SPECIAL)
FORMS = {"bert": BERT, "roberta": RobertaProcessing(("[SEP]", 1), ("[CLS]", 0)), "last": LAST, "none": None}


def backend(form: Any) -> Any:
    made: Any = Tokenizer(WordLevel(dict(WORDS), unk_token="[UNK]"))
    made.pre_tokenizer = WhitespaceSplit()
    if form is not None:
        made.post_processor = form
    return made


def words(count: int, first: int = 0) -> str:
    return " ".join(f"w{(first + place) % 20}" for place in range(count))


def test_a_text_with_tokens_is_a_str_and_survives_the_way_out_of_a_worker() -> None:
    tokens = np.asarray([4, 5, 6], np.int32)
    text = TokenisedText("some text", tokens, "query: ")
    assert text == "some text" and hash(text) == hash("some text") and f"{text}!" == "some text!"
    again = pickle.loads(pickle.dumps([text]))[0]
    assert type(again) is TokenisedText and again == text and again.prompt == "query: "
    assert again.tokens.dtype == np.int32 and again.tokens.tolist() == [4, 5, 6]
    assert type(text + "") is str and not hasattr(text.lower(), "tokens"), "what is changed has no tokens"


@pytest.mark.parametrize("form", FORMS)
def test_templates_are_found(form: str) -> None:
    made = backend(FORMS[form])
    for texts in (("w1 w2",), ("w1 w2", "w3")):
        template = find_template(made, *texts)
        assert template is not None
        expected = made.encode(*texts)
        parts = [made.encode(text, add_special_tokens=False).ids for text in texts]
        joined = [*template.pieces[0]]
        for part, piece in zip(parts, template.pieces[1:], strict=True):
            joined += [*part, *piece]
        assert joined == expected.ids
        lengths = np.asarray([[len(part) for part in parts]] * 2, np.int64)
        assert template.types(lengths).tolist() == expected.type_ids * 2


def test_a_template_of_another_form_is_none() -> None:
    assert find_template(backend(SWAPPED), "w1", "w2") is None
    assert find_template(backend(SWAPPED), "w1") is not None


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6),
    limit=st.integers(4, 60),
    strategy=st.sampled_from(["longest_first", "only_first", "only_second"]),
    side=st.sampled_from(["left", "right"]),
    parts=st.integers(1, 2),
)
def test_texts_are_cut_as_the_library_cuts_them(
    lengths: list[tuple[int, int]], limit: int, strategy: str, side: str, parts: int
) -> None:
    made = backend(BERT)
    template = find_template(made, *["w1", "w2"][:parts])
    assert template is not None
    each = cuts_each(made, template.size)  # as one release does
    made.enable_truncation(limit, strategy=strategy, direction=side)
    for sizes in lengths:
        texts = [words(size, place * 7) for place, size in enumerate(sizes[:parts])]
        counted = np.asarray([sizes[:parts]], np.int64)
        counted = np.minimum(counted, limit) if each and strategy == "longest_first" else counted
        ours = cut_lengths(counted, limit - template.size, strategy)
        try:
            found = made.encode(*texts)
        except Exception as error:  # the library raises nothing more special
            assert ours is None, (sizes, error)
            continue
        kept = [sum(of == place for of in found.sequence_ids) for place in range(parts)]
        assert ours is not None and ours.tolist() == [kept]


def test_cutting_a_batch_leaves_what_fits_as_it_is() -> None:
    lengths = np.asarray([[3, 4], [30, 2], [9, 40], [21, 20], [20, 21]], np.int64)
    cut = cut_lengths(lengths, 21, "longest_first")
    assert cut is not None and cut.tolist() == [[3, 4], [19, 2], [9, 12], [11, 10], [10, 11]]


def model_of(folder: Path, **settings: Any) -> Any:
    return CrossEncoder(str(folder), num_labels=1, device="cpu", **settings)


def recipes_of(model: Any, *prompts: str) -> dict[str, TextRecipe]:
    return {prompt: TextRecipe(model, prompt) for prompt in ("", *prompts)}


TEXTS = ["a cat", "", "what runs far away, and why?", "x " * 90, "Ünder the [SEP] é 漢字 bridge", "w" * 40]


@pytest.mark.parametrize("prompt", ["", "query: "])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cut", [True, "only_first", "only_second"])
def test_pairs_are_the_models_own(tiny_bert: Path, prompt: str, side: str, cut: Any) -> None:
    model = model_of(tiny_bert, max_length=48)
    model[0].tokenizer.truncation_side = side
    model[0].processing_kwargs = {"text": {"truncation": cut}}
    recipes = recipes_of(model, prompt)
    first, second = tokenised(recipes[prompt], TEXTS), tokenised(recipes[""], TEXTS[::-1])
    recipe = PairRecipe(model)
    pairs = [(one, other) for one in first for other in second]
    if cut is not True:  # the tokenizer refuses where one text alone cannot make up for the length
        pairs = [(one, other) for one, other in pairs if min(len(one.tokens), len(other.tokens)) < 10]
        place = 0 if cut == "only_first" else 1
        pairs = [pair for pair in pairs if len(pair[1 - place].tokens) < 30]
        recipe._odd = lambda *_, **__: pairs[:3]  # type: ignore[method-assign]
    assert recipe.features(pairs, prompt) is None, "nothing before the comparison"
    assert recipe.settle(pairs, recipes, prompt) is None
    found = recipe.features(pairs, prompt)
    own = model.preprocess([(str(one), str(other)) for one, other in pairs], prompt=prompt or None)
    assert found is not None and found.pop("texts") == len(pairs)
    assert found.keys() == own.keys() and own["token_type_ids"].any()
    assert int(own["max_length_q"]) == 48, "something was cut"
    for key, value in own.items():
        assert (
            torch.equal(found[key], value.long() if "cu_" not in key else value)
            if torch.is_tensor(value)
            else (found[key] == value)
        ), key
    padded = Stock(str(tiny_bert), num_labels=1, device="cpu", max_length=48)
    padded[0].tokenizer.truncation_side = side
    padded[0].processing_kwargs = model[0].processing_kwargs
    grid = padded.preprocess([(str(one), str(other)) for one, other in pairs], prompt=prompt or None)
    assert torch.equal(found["input_ids"][0], grid["input_ids"][grid["attention_mask"].bool()]), "as nobody packs them"
    assert torch.equal(found["token_type_ids"][0], grid["token_type_ids"][grid["attention_mask"].bool()])


def test_single_texts_too(tiny_bert: Path) -> None:
    model = model_of(tiny_bert, max_length=32)
    recipes = recipes_of(model)
    texts = tokenised(recipes[""], TEXTS)
    recipe = PairRecipe(model)
    assert recipe.settle(texts, recipes) is None
    found, own = recipe.features(texts), model.preprocess(TEXTS)
    assert found is not None and torch.equal(found["input_ids"], own["input_ids"])
    assert torch.equal(found["cu_seq_lens_q"], own["cu_seq_lens_q"])


def test_streams_are_filled_up_and_the_scores_are_the_same(tiny_bert: Path) -> None:
    model = model_of(tiny_bert, max_length=48).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    recipes = recipes_of(model)
    texts = tokenised(recipes[""], TEXTS)
    pairs = list(zip(texts, texts[::-1], strict=True))
    filled = PairRecipe(model, stream.fit_eighths, stream.fit_octave)
    assert filled.settle(pairs, recipes) is None
    found = filled.features(pairs)
    assert found is not None and found["texts"] == 6 and len(found["cu_seq_lens_q"]) > 7
    assert found["token_type_ids"].shape == found["input_ids"].shape
    with torch.no_grad():
        scores = model(found)["scores"]
        own = model(model.preprocess([(str(one), str(other)) for one, other in pairs]))["scores"]
    assert scores.shape == (6, 1) and scores.std() > 1e-3
    torch.testing.assert_close(scores, own, rtol=0, atol=1e-6)


def test_what_differs_is_said(tiny_bert: Path) -> None:
    model = model_of(tiny_bert, max_length=48)
    recipes = recipes_of(model)
    texts = tokenised(recipes[""], TEXTS)
    pairs = list(zip(texts, texts[::-1], strict=True))
    recipe = PairRecipe(model)
    recipe.settings["max_length"] = 40  # another length than the model's own
    assert "another" in str(recipe.settle(pairs, recipes)) and recipe.features(pairs) is None
    wrong = [(TokenisedText("a cat", texts[2].tokens), other) for _, other in pairs]
    assert "another" in str(PairRecipe(model).settle(wrong, recipes))
    recipe = PairRecipe(model)
    recipe.templates.pop(2)
    assert "in a way of its own" in str(recipe.why_not())


def test_texts_without_tokens_or_after_another_prompt_are_left_to_the_model(tiny_bert: Path) -> None:
    model = model_of(tiny_bert)
    recipes = recipes_of(model, "query: ")
    plain, asked = tokenised(recipes[""], TEXTS), tokenised(recipes["query: "], TEXTS)
    pairs = list(zip(asked, plain, strict=True))
    recipe = PairRecipe(model)
    assert recipe.settle(pairs, recipes, "query: ") is None
    assert recipe.features(pairs, "query: ") is not None
    assert recipe.features(pairs) is None, "tokens of another prompt"
    assert recipe.features(list(zip(plain, asked, strict=True)), "query: ") is None, "the other way round"
    assert recipe.features([(asked[0], "of the loss's own making")], "query: ") is None
    assert recipe.features([pairs[0], asked[0]], "query: ") is None, "a pair and a single text"


def test_texts_are_stored_apart_from_those_with_special_tokens(tiny_bert: Path) -> None:
    from burnish.core.tokenising import Recipe

    model = model_of(tiny_bert, max_length=48)
    assert TextRecipe(model).key != Recipe(model).key
    values, lengths = TextRecipe(model).tokenise(["a cat", "x " * 300])
    assert lengths.tolist() == [2, 300], "neither special tokens nor cut"
    assert {*values.tolist()}.isdisjoint({101, 102})


def test_reasons_against_it(tiny_bert: Path) -> None:
    model = model_of(tiny_bert)
    assert PairRecipe(model).why_not() is None
    model[0].processing_kwargs = {"text": {"truncation": False}}
    assert "truncation=False" in str(PairRecipe(model).why_not())
    model[0].processing_kwargs = {}
    model.max_seq_length = 3
    assert "max_seq_length=3" in str(PairRecipe(model).why_not())
