from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer

from nexus.core.errors import ModelFormatError, UsageError
from nexus.engine.tokenizer import Tokenizer

CORPUS = [
    "the cat sat on the mat",
    "où est le café ?",
    "漢字かな交じり文",
    "🙂🙃 emoji 👩‍👩‍👧 and ﷽",
    "def f(x):\n\treturn x ** 2  # ok\n",
] * 3


def byte_level() -> FastTokenizer:
    """As GPT-2, Llama 3 and Qwen: BPE over bytes, so that a character may be split over tokens."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    fast.train_from_iterator(CORPUS, trainer)
    return fast


def byte_fallback() -> FastTokenizer:
    """As Llama 2, Mistral and Gemma: pieces with "▁" for a space, and bytes for what is not in the vocabulary."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for piece in ["▁", *sorted(set("the cat sat on mat".replace(" ", "▁")))]:
        vocab.setdefault(piece, len(vocab))
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    fast.add_special_tokens(["<s>", "</s>"])
    return fast


def save(directory: Path, fast: FastTokenizer, **configs: dict[str, object]) -> dict[str, Path]:
    fast.save(str(directory / "tokenizer.json"))
    files = {"tokenizer.json": directory / "tokenizer.json"}
    for name, content in configs.items():
        files[f"{name}.json"] = directory / f"{name}.json"
        files[f"{name}.json"].write_text(json.dumps(content))
    return files


@pytest.fixture(scope="module", params=[byte_level, byte_fallback])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(save(tmp_path_factory.mktemp("tokenizer"), request.param()))


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(save(tmp_path_factory.mktemp("tokenizer"), byte_level()))


def streamed(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token) for token in tokens), stream.flush()]


@given(text=st.text())
def test_a_stream_says_what_decoding_at_once_says(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens)


@given(tokens=st.lists(st.integers(0, 450), max_size=60))
def test_also_for_tokens_that_are_no_text(bytes_tokenizer: Tokenizer, tokens: list[int]) -> None:
    """Any ids: broken UTF-8, special tokens, ids outside the vocabulary."""
    parts = streamed(bytes_tokenizer, tokens)
    assert "".join(parts) == bytes_tokenizer.decode(tokens)


@given(text=st.text())
def test_what_was_encoded_comes_back(bytes_tokenizer: Tokenizer, text: str) -> None:
    assert bytes_tokenizer.decode(bytes_tokenizer.encode(text)) == text


def test_half_a_character_is_held_back(bytes_tokenizer: Tokenizer) -> None:
    parts = streamed(bytes_tokenizer, bytes_tokenizer.encode("a🦜b"))
    assert "".join(parts) == "a🦜b"
    assert not any("\ufffd" in part for part in parts)


def test_a_long_answer_is_not_decoded_again_and_again(bytes_tokenizer: Tokenizer) -> None:
    stream = bytes_tokenizer.stream()
    for token in bytes_tokenizer.encode("the cat sat on the mat. " * 200):
        stream.push(token)
        assert len(stream._window) < 8


def test_minilm_encodes_as_transformers_does(minilm: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(minilm)
    ours = Tokenizer.load({path.name: path for path in minilm.glob("*.json")}, 256)
    for text in ["hello world", "", "Ünïcödé 漢字 🙂", "word " * 600]:
        # Its tokenizer.json cuts at 128 and pads to 128: that is not how texts are read.
        assert ours.encode(text) == theirs(text, truncation=True, max_length=256)["input_ids"]


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("add_bos", [None, False, True])
def test_outer_tokens_are_those_of_transformers(outer: bool, add_bos: bool | None, tmp_path: Path) -> None:
    """tokenizer.json decides; transformers 5 leaves `add_bos_token` aside where it is there, and so do we."""
    from transformers import AutoTokenizer

    fast = byte_level()
    if outer:
        fast.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 0)])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    settings = config if add_bos is None else {**config, "add_bos_token": add_bos}
    files = save(tmp_path, fast, tokenizer_config=settings, config={"model_type": "llama"})
    assert Tokenizer.load(files).encode("the cat") == AutoTokenizer.from_pretrained(tmp_path)("the cat")["input_ids"]


def test_end_tokens(tmp_path: Path) -> None:
    fast = byte_level()
    assert Tokenizer.load(save(tmp_path, fast)).end_tokens == ()
    assert Tokenizer.load(save(tmp_path, fast, config={"eos_token_id": 2})).end_tokens == (2,)
    both = save(tmp_path, fast, config={"eos_token_id": 2}, generation_config={"eos_token_id": [7, 2, 7]})
    assert Tokenizer.load(both).end_tokens == (7, 2)
    for bad in ("2", [True], [-1], [2**32], list(range(65)), {"a": 1}):
        with pytest.raises(ModelFormatError):
            Tokenizer.load(save(tmp_path, fast, config={"eos_token_id": bad}))


def test_bad_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ModelFormatError, match="no tokenizer"):
        Tokenizer.load({})
    for content in (b"", b"\xff\xfe", b"[]", b"{}", b'{"version": "1.0", "model": {"type": "Evil"}}', b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ModelFormatError):
            Tokenizer.load({"tokenizer.json": path})


def test_text_that_is_not_unicode_is_refused(bytes_tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="Unicode"):
        bytes_tokenizer.encode("half a pair: \ud800")


def test_a_tokenizer_that_panics_is_a_bad_model(tmp_path: Path) -> None:
    """Its pattern takes exponential time; the library gives up with a BaseException, which ended the daemon."""
    fast = FastTokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex("(a|aa)+$"), "isolated")
    evil = Tokenizer.load(save(tmp_path, fast))
    assert evil.encode("ab")
    with pytest.raises(ModelFormatError, match="retry-limit"):
        evil.encode("a" * 40 + "b")


def test_endless_halves_of_characters_do_not_cost_more_and_more(bytes_tokenizer: Tokenizer) -> None:
    """A malicious last stage may send nothing else, and each token was decoded together with all before it."""
    half = bytes_tokenizer.encode("\N{GRINNING FACE}")[0]
    stream = bytes_tokenizer.stream()
    said = [stream.push(half) for _ in range(1000)]
    assert len(stream._window) < 100
    assert "".join([*said, stream.flush()]) == bytes_tokenizer.decode([half] * 1000)
