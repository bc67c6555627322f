"""The model that ships: it loads, it is small, it answers, and the figures of its card can be checked."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nano_corpus import END
from safetensors import safe_open
from tokenizers import Tokenizer
from train_nano import SEED, Example, answer, collate, example, held_out, load, measure, prompt_text, rows, target_losses
from transformers import AutoTokenizer, LlamaForCausalLM

from nexus.models import builtin_path

NANO = builtin_path("nano")
DIRECTORY_BYTES_MAX = 12_000_000
LOSS_MAX, RIGHT_MIN = 0.20, 0.80
"""Bounds for the sample of the held-out set; the card has the figures of all of it."""
TOKENIZER = Tokenizer.from_file(str(NANO / "tokenizer.json"))


@pytest.fixture(scope="module")
def shipped() -> tuple[LlamaForCausalLM, Tokenizer]:
    return load(NANO)


def test_the_directory_is_small_and_the_model_deep_enough_to_split() -> None:
    config = json.loads((NANO / "config.json").read_text())
    assert sum(file.stat().st_size for file in NANO.iterdir()) <= DIRECTORY_BYTES_MAX
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] >= 8
    assert config["tie_word_embeddings"]


def test_weights_are_stored_in_bfloat16_and_computed_in_float32(shipped: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    with safe_open(NANO / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
        assert "lm_head.weight" not in names  # tied
    assert next(shipped[0].parameters()).dtype == torch.float32
    assert json.loads((NANO / "config.json").read_text())["dtype"] == "float32"


def test_held_out_figures_are_as_good_as_documented(shipped: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    """On a fixed part of the held-out set; scripts/train_nano.py --eval-only measures all of it."""
    figures = measure(*shipped, held_out(SEED, 160))
    assert figures["all"].loss < LOSS_MAX
    assert figures["all"].right > RIGHT_MIN


@pytest.mark.parametrize("form", ["chat", "bare"])
@pytest.mark.parametrize(
    ("prompt", "fact"),
    [
        ("What is the largest planet?", "Jupiter is the largest planet"),
        ("Why is the sky blue?", "scatters blue light"),
        ("How far away is the Moon?", "384,000 kilometres"),
        ("What is a receipt?", "signed note"),
        ("What is slashing?", "bond"),
        ("Tell me a short story about a fox.", "fox"),
        ("Who are you?", "I am nano"),
        ("How do I bake bread?", "I am a very small model"),
    ],
)
def test_it_answers_and_ends_by_itself(shipped: tuple[LlamaForCausalLM, Tokenizer], form: str, prompt: str, fact: str) -> None:
    text = answer(*shipped, prompt_text(form, prompt))
    assert fact in text
    assert text.endswith(END)


@pytest.mark.parametrize("start", ["The Moon is", "A receipt is", "Once upon a time, a brave otter", "Jupiter"])
def test_it_goes_on_with_a_sentence(shipped: tuple[LlamaForCausalLM, Tokenizer], start: str) -> None:
    text = answer(*shipped, start)
    assert text.startswith(" ")
    assert text.endswith(f".{END}")


def test_the_chat_template_is_the_form_it_was_trained_on() -> None:
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is a node?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt_text(
        "chat", "What is a node?"
    )
    told = [*messages, {"role": "assistant", "content": "A computer."}, {"role": "user", "content": "Thanks"}]
    text = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    assert text == f"User: What is a node?\nNexus: A computer.{END}\nUser: Thanks\nNexus:"


def test_transformers_and_the_plain_tokenizers_library_agree() -> None:
    theirs, plain = AutoTokenizer.from_pretrained(NANO), Tokenizer.from_file(str(NANO / "tokenizer.json"))
    for text in ("What is a receipt?", " \n\tÄ 你好 🦊", f"a{END}b", ""):
        assert theirs(text)["input_ids"] == plain.encode(text).ids
    assert theirs.eos_token_id == plain.token_to_id(END)


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_unchanged(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= token < TOKENIZER.get_vocab_size() for token in ids)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=80))
def test_packing_loses_nothing_that_fits_and_fills_no_row_too_far(sizes: list[int]) -> None:
    examples = [Example((7,) * size, (True,) * size) for size in sizes]
    packed = list(rows(examples, row_tokens=32, open_rows=4))
    assert all(sum(len(item.ids) for item in row) <= 32 for row in packed)
    assert sorted(len(item.ids) for row in packed for item in row) == sorted(size for size in sizes if size <= 32)


@torch.inference_mode()
def test_a_packed_document_is_computed_as_if_it_were_alone(shipped: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    model, tokenizer = shipped
    examples = [example(tokenizer, document) for document in held_out(SEED, 4)]
    packed, _, _ = target_losses(model, collate([examples]))
    alone = torch.cat([target_losses(model, collate([[item]]))[0] for item in examples])
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-3)
