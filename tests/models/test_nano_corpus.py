"""The text that nano is trained on: the same on every machine, and nothing of it is held out."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nano_corpus import (
    END,
    KNOWN_WORDINGS,
    REFUSAL,
    TOPICS,
    UNSEEN,
    Document,
    documents,
    expand,
    fingerprint,
    is_held_out,
    normalised,
    patterns_of,
)

SEED = 20
TRAINING = 20_000
HELD_OUT = 1_000


@pytest.fixture(scope="module")
def training() -> list[Document]:
    return list(itertools.islice(documents(SEED, "train"), TRAINING))


@pytest.fixture(scope="module")
def held_out() -> list[Document]:
    return list(itertools.islice(documents(SEED, "held-out"), HELD_OUT))


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    first, again, other = (fingerprint(documents(seed, "train"), 500) for seed in (SEED, SEED, SEED + 1))
    assert first == again != other


def test_the_text_is_the_one_the_shipped_model_was_trained_on() -> None:
    """The card of the model names this hash; a change of the grammar needs a new model."""
    from train_nano import FINGERPRINT_DOCUMENTS, SHIPPED

    assert fingerprint(documents(SEED, "train"), FINGERPRINT_DOCUMENTS) in (SHIPPED / "README.md").read_text()


def test_no_held_out_wording_is_in_the_training_text(training: list[Document], held_out: list[Document]) -> None:
    known = {normalised(turn.core) for document in training for turn in document.turns}
    kept = {normalised(turn.core) for document in held_out for turn in document.turns}
    assert kept
    assert not known & kept
    assert all(is_held_out(turn.core) for document in held_out for turn in document.turns)


def test_no_held_out_prompt_or_story_is_in_the_training_text(training: list[Document], held_out: list[Document]) -> None:
    prompts = {normalised(turn.prompt) for document in training for turn in document.turns}
    answers = {turn.answer for document in training for turn in document.turns}
    for document in held_out:
        for turn in document.turns:
            # A request for a story may name no place, and so be one that was seen; the story itself never was.
            unseen = turn.answer not in answers if document.kind == "story" else normalised(turn.prompt) not in prompts
            assert unseen, turn


def test_every_topic_is_taught_and_every_kind_is_held_out(
    held_out: list[Document],
) -> None:
    assert all(len(patterns_of(topic, "train")) >= 2 for topic in TOPICS)
    assert {document.kind for document in held_out} == {
        "sky",
        "nexus",
        "story",
        "talk",
        "outside",
    }


def test_no_wording_asks_for_two_different_answers() -> None:
    owner: dict[str, str] = {}
    for topic in TOPICS:
        for ask in topic.asks:
            assert owner.setdefault(normalised(ask), topic.lead) == topic.lead, ask


def test_freely_worded_questions_are_in_no_training_text(
    training: list[Document],
) -> None:
    prompts = {normalised(turn.prompt) for document in training for turn in document.turns}
    assert len(UNSEEN) >= 50
    assert not {normalised(ask) for ask, _ in UNSEEN} & (prompts | KNOWN_WORDINGS)
    said = [
        REFUSAL,
        *(sentence for topic in TOPICS for sentence in (topic.lead, *topic.more)),
    ]
    assert all(any(part in sentence for sentence in said) for ask, part in UNSEEN if "story" not in ask.lower())


@given(
    st.lists(
        st.lists(st.text(alphabet="ab c", max_size=4), min_size=1, max_size=3),
        max_size=3,
    )
)
def test_a_pattern_stands_for_every_combination_of_its_choices(
    choices: list[list[str]],
) -> None:
    wordings = expand("-".join(f"[{'|'.join(options)}]" for options in choices))
    assert len(wordings) == math.prod(len(options) for options in choices)
    assert "-".join(options[-1] for options in choices) in wordings


def test_no_wording_has_a_bracket_left() -> None:
    assert not [ask for topic in TOPICS for ask in topic.asks if set(ask) & set("[]{}|")]


def test_answers_are_short_and_every_placeholder_is_filled(
    training: list[Document],
) -> None:
    for document in training[:5000]:
        assert document.text.rstrip("\n").endswith(END)
        for turn in document.turns:
            assert "{" not in turn.answer
            assert turn.answer.startswith(turn.lead)
            assert 1 <= sum(turn.answer.count(mark) for mark in ".!?") <= 5, turn.answer
