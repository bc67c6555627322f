"""A model's own tokenizer, from the files that came with it, without transformers and without any code of the model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from nexus.core.errors import ModelFormatError, UsageError
from nexus.engine.architecture import read_json

TOKENIZER_FILE = "tokenizer.json"
END_TOKENS_MAX = 64
# The largest known take half of that; parsed, a file may take twenty times its size.
_TOKENIZER_BYTES_MAX = 64 << 20
_REPLACEMENT = "\ufffd"
# A character takes four bytes at most: when this many tokens in a row complete none, they are no text.
_INCOMPLETE_MAX = 32


@contextmanager
def _contained(what: str) -> Iterator[None]:
    """The tokenizers library is written in Rust: it raises plain Exception, and where it panics (a pattern that takes too long, an
    index out of bounds) a BaseException that would end the daemon. A tokenizer comes with a model, and so from anywhere."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelFormatError(f"{what}: {error}", "Use another model, or download this one again") from error


class Tokenizer:
    """Text to token ids and back. `end_tokens`: ids that end an answer. `tokens_max`: encoding cuts longer texts, 0: never."""

    def __init__(self, fast: FastTokenizer, end_tokens: tuple[int, ...], tokens_max: int) -> None:
        self._fast = fast
        self._tokens_max = tokens_max
        self.end_tokens = end_tokens

    @classmethod
    def load(cls, files: Mapping[str, Path], tokens_max: int = 0) -> Tokenizer:
        """From a model's files by name: tokenizer.json and, for the end tokens, generation_config.json and config.json.

        `tokens_max`: give the context for encoders, which read the beginning of a text that is too long. The special tokens
        around a text are those of tokenizer.json alone, as in transformers 5. Raises ModelFormatError.
        """
        if TOKENIZER_FILE not in files:
            raise ModelFormatError(f"the model has no {TOKENIZER_FILE}", "Add a model that has one")
        read_json(files[TOKENIZER_FILE], _TOKENIZER_BYTES_MAX)
        with _contained(f"{TOKENIZER_FILE} cannot be read"):
            fast = FastTokenizer.from_file(str(files[TOKENIZER_FILE]))
            # What the file says on padding and cutting is how the author trained, not how a text is read.
            fast.no_padding()
            fast.no_truncation()
            if tokens_max:
                fast.enable_truncation(tokens_max)
        return cls(fast, _end_tokens(files), tokens_max)

    def encode(self, text: str) -> list[int]:
        """Token ids with the special tokens around them that the model expects. Raises UsageError for text that is not Unicode,
        ModelFormatError where the tokenizer fails at it."""
        return list(self._encoded(text).ids)

    def count(self, text: str) -> int:
        """Tokens of the whole text and the special ones around it, also where `encode` would cut it. Raises as `encode`."""
        encoded = self._encoded(text)
        cut = sum(len(rest.ids) - sum(rest.special_tokens_mask) for rest in encoded.overflowing)
        return len(encoded.ids) + cut

    def _encoded(self, text: str) -> Encoding:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError("the text is not valid Unicode", "Send it as UTF-8") from error
        with _contained("the model's tokenizer fails at this text"):
            return self._fast.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the tokens, without special ones; ids outside the vocabulary have none."""
        with _contained("the model's tokenizer fails at these tokens"):
            return self._fast.decode(list(tokens), skip_special_tokens=True)

    def stream(self) -> TextStream:
        return TextStream(self)


class TextStream:
    """Text of tokens that come one by one. What `push` and at last `flush` return, joined, is `decode` of all tokens.

    A token's text depends on its neighbours (a space may belong to either, a character may take several tokens), so each is decoded
    together with the tokens before it since the last complete character, and what was said already is left out. After many tokens
    without a complete character those are said as U+FFFD: a last stage that sends nothing else would make each one cost more.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._said = 0  # tokens of the window whose text is out

    def push(self, token: int) -> str:
        """The text that is certain now: nothing while a character is incomplete."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        if text.endswith(_REPLACEMENT) and len(self._window) - self._said < _INCOMPLETE_MAX:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """The rest at the end of the answer, with U+FFFD for what never became a character."""
        return self._advance(self._tokenizer.decode(self._window))

    def _advance(self, text: str) -> str:
        said = self._tokenizer.decode(self._window[: self._said])
        new = text[len(said) :]
        if new:
            del self._window[: self._said]
        self._said = len(self._window)
        return new


def _end_tokens(files: Mapping[str, Path]) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        if name not in files:
            continue
        value = read_json(files[name]).get("eos_token_id")
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and 0 <= token < 2**32 for token in tokens) or len(tokens) > END_TOKENS_MAX:
            raise ModelFormatError(f"{name} has no list of at most {END_TOKENS_MAX} token ids as eos_token_id", "Correct it")
        if tokens:
            return tuple(dict.fromkeys(tokens))
    return ()
