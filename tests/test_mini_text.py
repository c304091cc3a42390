"""The miniature's text encoders: words to tokens, CLIP and T5, and what can be read from them."""

from functools import partial

import numpy as np
import pytest
import torch
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

from withanyone.mini import PRETRAINED, text, words, world
from withanyone.mini.base import SHORT_TEXT
from withanyone.mini.loop import TrainingLoop


@pytest.fixture(scope="module")
def tokenizer():
    return text.build_tokenizer()


def test_every_word_of_the_vocabulary_is_a_token_or_silent(tokenizer):
    for word in world.VOCABULARY:
        tokens = tokenizer.tokenize(word)
        assert tokens == ([] if word in text.SILENT_WORDS else [word])


def test_captions_have_no_unknown_word_and_fit(tokenizer):
    rng = np.random.default_rng(3)
    captions, _ = text.sample_captions(rng, 300)
    ids = tokenizer(captions).input_ids
    assert max(map(len, ids)) <= text.MAX_TEXT_TOKENS
    assert not any(tokenizer.unk_token_id in row for row in ids)


def test_captions_of_one_person_fit_the_short_length(tokenizer):
    rng = np.random.default_rng(4)
    captions = [
        world.caption_of(text.random_people(rng, 1), *text.random_setting(rng), rng) for _ in range(400)
    ]
    assert max(len(row) for row in tokenizer(captions).input_ids) <= SHORT_TEXT


def test_spelling_case_and_silent_words_do_not_matter(tokenizer):
    plain = tokenizer("smiling person blond hair wearing t-shirt").input_ids
    assert tokenizer("A SMILING woman with golden hair, wearing a tshirt").input_ids == plain


def test_unknown_words_are_marked(tokenizer):
    assert tokenizer.tokenize("a person with a spaceship") == ["person", "<unk>"]


def test_padding_as_fluxpipeline_asks_for_it(tokenizer):
    ids = tokenizer(["a person"], padding="max_length", max_length=12, truncation=True).input_ids[0]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "person", "</s>"] + ["<pad>"] * (12 - 3)


def test_answers_tie_attributes_to_places():
    rng = np.random.default_rng(0)
    people = text.random_people(rng, 2)
    labels = text.answers(people, "beach", "daylight")
    for index, question in enumerate(text.QUESTIONS):
        if question.person is not None:
            wanted = people[question.person].attributes()[question.attribute] if question.person < 2 else None
            assert (labels[index] == -1) == (wanted is None)
            assert wanted is None or question.values[labels[index]] == wanted


def test_text_training_resumes_exactly(tmp_path, monkeypatch):
    def weights(encoders):
        return torch.cat([parameter.detach().flatten() for parameter in encoders.parameters()])

    through = weights(text.train(tmp_path / "a", 3, batch_size=4))
    calls = []

    def stopping(*args):
        calls.append(1)
        if len(calls) > 4:  # two losses a step: in the third step
            raise KeyboardInterrupt
        return reading_loss(*args)

    reading_loss = text.reading_loss
    monkeypatch.setattr(text, "TrainingLoop", partial(TrainingLoop, save_seconds=0.0))
    with monkeypatch.context() as patch:
        patch.setattr(text, "reading_loss", stopping)
        with pytest.raises(KeyboardInterrupt):
            text.train(tmp_path / "b", 3, batch_size=4)
    assert torch.equal(weights(text.train(tmp_path / "b", 3, batch_size=4)), through)


# The shipped encoders


@pytest.fixture(scope="module")
def shipped():
    return (
        PreTrainedTokenizerFast.from_pretrained(PRETRAINED / "tokenizer_2"),
        CLIPTextModel.from_pretrained(PRETRAINED / "text_encoder").eval(),
        T5EncoderModel.from_pretrained(PRETRAINED / "text_encoder_2").eval(),
    )


def test_shipped_tokenizer_is_the_vocabularys(shipped, tokenizer):
    captions, _ = text.sample_captions(np.random.default_rng(5), 20)
    assert shipped[0](captions).input_ids == tokenizer(captions).input_ids
    assert shipped[0].model_max_length == text.MAX_TEXT_TOKENS


def test_shipped_encoders_load_in_full_precision(shipped):
    assert shipped[1].dtype == shipped[2].dtype == torch.float32


@torch.no_grad()
def test_pooled_text_does_not_see_padding(shipped):
    tokenizer, clip, _ = shipped
    ids = text.tokenize(tokenizer, ["a sad person with a cap in the snow"])
    padded = text.tokenize(tokenizer, ["a sad person with a cap in the snow"], 64)
    assert torch.allclose(clip(ids).pooler_output, clip(padded).pooler_output, atol=1e-5)


@torch.no_grad()
def test_swapping_two_people_changes_the_text_but_synonyms_hardly(shipped):
    tokenizer, clip, t5 = shipped
    prompts = [
        "two people at the beach: from left to right a person with red hair; a person with a beanie",
        "two people on the beach: from left to right a person with red hair; a person with a wool hat",
        "two people at the beach: from left to right a person with a beanie; a person with red hair",
    ]
    pooled = clip(text.tokenize(tokenizer, prompts, 64)).pooler_output
    cosine = torch.nn.functional.cosine_similarity(pooled[:1], pooled[1:])
    assert cosine[0] > cosine[1]
    assert words.unknown_words(prompts[0]) == []
