"""The text that the built-in model `nano` is trained on, from the facts and words of nano_facts.toml by a seeded grammar.

Four subjects: the sky, how Nexus works, very short stories, and small talk with an honest refusal of everything else.
A `Document` is one conversation or one plain paragraph. `documents(seed, split)` is an endless, deterministic stream of
them. The split is decided by a hash of the question's wording (for a story: of its character and place), so a wording
that is held out is in no document of the training split, however it is decorated with politeness, lower case or typing
errors.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
import string
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

END = "<|end|>"
USER, NEXUS = "User:", "Nexus:"

Split = Literal["train", "held-out"]
Form = Literal["chat", "bare", "plain"]
Kind = Literal["sky", "nexus", "story", "talk", "outside"]

HELD_OUT_IN_256 = 26
"""About one wording in ten is held out."""

MIX: tuple[tuple[Kind, float], ...] = (
    ("sky", 0.38),
    ("nexus", 0.24),
    ("story", 0.16),
    ("talk", 0.1),
    ("outside", 0.12),
)

ALPHABETS = (
    (0x20, 0x7E),  # ASCII
    (0xC0, 0x17F),  # Latin
    (0x3B1, 0x3C9),  # Greek
    (0x410, 0x44F),  # Cyrillic
    (0x5D0, 0x5EA),  # Hebrew
    (0x905, 0x939),  # Devanagari
    (0x4E00, 0x9FA5),  # Han
    (0x1F300, 0x1F320),  # symbols
)
"""Code points of prompts that are no English, all assigned long ago, so that no newer Unicode table changes the data."""

_FACTS: dict[str, Any] = tomllib.loads((Path(__file__).parent / "nano_facts.toml").read_text(encoding="utf-8"))
_WORDS, _WORDINGS, _ANSWERS = _FACTS["words"], _FACTS["wordings"], _FACTS["answers"]
ANIMALS: list[str] = _WORDS["animals"].split()
PEOPLE: list[str] = _WORDS["people"]
OUTSIDE_NOUNS: list[str] = _WORDS["outside_nouns"].split()
REFUSAL: str = _ANSWERS["refusal"]
REFUSALS: list[str] = [form.format(refusal=REFUSAL, subjects=_ANSWERS["subjects"]) for form in _ANSWERS["refusals"]]


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer.

    `core`: the wording before decoration, on which the split is decided. `lead`: what the answer begins with if it is right.
    """

    prompt: str
    answer: str
    core: str
    lead: str


@dataclass(frozen=True, slots=True)
class Document:
    """One training text. A plain document has a single turn whose prompt is empty."""

    kind: Kind
    form: Form
    turns: tuple[Turn, ...]

    def segments(self) -> Iterator[tuple[str, bool]]:
        """The text in order, each part with whether the model is to learn to write it."""
        for turn in self.turns:
            if self.form == "chat":
                yield f"{USER} {turn.prompt}\n{NEXUS}", False
                yield f" {turn.answer}{END}", True
                yield "\n", False
            elif self.form == "bare":
                yield turn.prompt, False
                yield f" {turn.answer}{END}", True
            else:
                yield f"{turn.answer}{END}", True

    @property
    def text(self) -> str:
        return "".join(part for part, _ in self.segments())


@dataclass(frozen=True, slots=True)
class Topic:
    """One thing the model knows: `lead` answers every wording in `patterns`; sentences of `more` may follow.

    Wordings are drawn by pattern first, so that a pattern with many choices does not crowd out the others.
    """

    kind: Kind
    lead: str
    patterns: tuple[tuple[str, ...], ...]
    more: tuple[str, ...]

    @property
    def asks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(ask for pattern in self.patterns for ask in pattern))


def normalised(text: str) -> str:
    """Lower case, letters and digits only: two wordings that differ in less are one wording."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def is_held_out(core: str) -> bool:
    return hashlib.blake2b(normalised(core).encode(), digest_size=1).digest()[0] < HELD_OUT_IN_256


# Topics, from the file of facts.


def expand(pattern: str) -> tuple[str, ...]:
    """All wordings of a pattern in which [a|b] stands for either a or b."""
    pieces = re.split(r"\[([^\]]*)\]", pattern)
    choices = [piece.split("|") if index % 2 else [piece] for index, piece in enumerate(pieces)]
    return tuple("".join(parts) for parts in itertools.product(*choices))


def _drawn(rng: random.Random, patterns: list[str]) -> str:
    return rng.choice(expand(rng.choice(patterns)))


def _about(things: list[str], *, forms: list[str]) -> list[str]:
    return [form.format(x=thing) for thing in things for form in forms]


def _topic(kind: Kind, entry: dict[str, Any]) -> Topic:
    about, term = entry.get("about", []), entry.get("term", [])
    patterns = [
        *entry.get("asks", []),
        *_about([*about, *term], forms=_WORDINGS["about"]),
        *_about(term, forms=_WORDINGS["term"]),
    ]
    lead, *more = (sentence.format(subjects=_ANSWERS["subjects"]) for sentence in (entry["lead"], *entry.get("more", [])))
    return Topic(kind, lead, tuple(expand(pattern) for pattern in patterns), tuple(more))


def _bodies() -> Iterator[Topic]:
    for body in _FACTS["bodies"]:
        yield _topic(
            "sky",
            {
                "lead": body["what"],
                "more": body["more"],
                "about": [body["name"], body["also"]],
            },
        )
        for attribute, forms in _FACTS["grid"].items():
            yield _topic(
                "sky",
                {"lead": body[attribute], "asks": _about([body["name"]], forms=forms)},
            )


def _listed(kind: Kind) -> list[Topic]:
    return [_topic(kind, entry) for entry in _FACTS[kind]]


TOPICS: tuple[Topic, ...] = (
    *_listed("sky"),
    *_bodies(),
    *_listed("nexus"),
    *_listed("talk"),
)
UNSEEN: tuple[tuple[str, str], ...] = tuple((entry["ask"], entry["answer"]) for entry in _FACTS["unseen"])
"""Questions put freely, in words of no pattern, each with a part of the right answer. They are never trained on."""
KNOWN_WORDINGS = frozenset(normalised(ask) for topic in TOPICS for ask in topic.asks)


@cache
def patterns_of(topic: Topic, split: Split) -> tuple[tuple[str, ...], ...]:
    """A topic's wordings in a split, by pattern, without the patterns that have none."""
    kept = (tuple(ask for ask in pattern if is_held_out(ask) == (split == "held-out")) for pattern in topic.patterns)
    return tuple(pattern for pattern in kept if pattern)


@cache
def _choices(kind: Kind, split: Split) -> tuple[Topic, ...]:
    return tuple(topic for topic in TOPICS if topic.kind == kind and patterns_of(topic, split))


def _answer(rng: random.Random, topic: Topic) -> str:
    count = min(len(topic.more), rng.choice((0, 1, 1, 2)))
    chosen = sorted(rng.sample(range(len(topic.more)), count))
    return " ".join((topic.lead, *(topic.more[index] for index in chosen)))


# Stories: the character and the place come from the request, or are drawn; every sentence fits every character.


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0].lower() in "aeio" else f"a {noun}"


ONSETS = (
    "b",
    "d",
    "f",
    "g",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "z",
    "bl",
    "dr",
    "gr",
    "pl",
    "sn",
    "tr",
    "fl",
    "w",
    "sh",
    "ch",
)
ENDINGS = ("b", "n", "m", "rt", "x", "zz", "l", "p", "ck", "g", "nd", "s", "t", "")


def _invented_word(rng: random.Random) -> str:
    """A word that nobody knows: the model is to learn to copy a name it never saw, and to say that it does not know a thing."""
    start = "".join(rng.choice(ONSETS) + rng.choice("aeiou") for _ in range(rng.randint(1, 2)))
    return start + rng.choice(ONSETS) + rng.choice("aeiou") + rng.choice(ENDINGS)


def _story(rng: random.Random, split: Split) -> tuple[str, str, str]:
    """(request, story, core) with a character and a place of this split."""
    while True:
        source = rng.random()
        animal = _invented_word(rng) if source < 0.12 else rng.choice(PEOPLE if source < 0.3 else ANIMALS)
        place = rng.choice(_WORDS["places"])
        core = f"{animal} {place}"
        if is_held_out(core) == (split == "held-out"):
            break
    friend = _article(rng.choice([other for other in ANIMALS if other != animal]))
    trait = rng.choice(_WORDS["traits"]) if rng.random() < 0.7 else ""
    name = ""
    if rng.random() < 0.22:
        name = _invented_word(rng).capitalize() if rng.random() < 0.2 else rng.choice(_WORDS["names"])
    character = _article(f"{trait} {animal}".strip()) + (f" named {name}" if name else "")
    plot = " ".join(rng.choice(_FACTS["stories"]["plots"]))
    opening = rng.choice(_FACTS["stories"]["openings"]).format(x=character, p=place)
    story = plot.replace("A {b}", "{B}").replace("a {b}", "{b_}").replace("{b}", friend.split()[1])
    story = story.format(a=animal, b_=friend, B=friend.capitalize(), o=rng.choice(_WORDS["objects"]))
    if rng.random() < 0.08 and split == "train":
        request = _drawn(rng, _WORDINGS["story_open"])
    else:
        wanted = character if (trait and rng.random() < 0.4) or name else _article(animal)
        if rng.random() < 0.45:
            wanted += f" {place}" if rng.random() < 0.6 else f" who lives {place}"
        request = _drawn(rng, _WORDINGS["story"]).format(x=wanted)
    return request, f"{opening} {story}", core


# Everything else: what the model must decline.


def _noise(rng: random.Random) -> str:
    """Something that is no question at all: keys hit at random, or characters of any alphabet."""
    if rng.random() < 0.5:
        return "".join(rng.choice(string.ascii_lowercase + "  ;.,123") for _ in range(rng.randint(4, 18))).strip() or "qwertz"
    low, high = rng.choice(ALPHABETS)
    return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(2, 8))).strip() or "?!"


def _outside(rng: random.Random) -> str:
    if rng.random() < 0.08:
        return _noise(rng)
    ask = _drawn(rng, _WORDINGS["outside"])
    words = []
    for _ in range(2):
        word = _invented_word(rng) if rng.random() < 0.35 else rng.choice(OUTSIDE_NOUNS)
        shape = rng.random()
        words.append(
            _article(word) if shape < 0.15 else f"the {word}" if shape < 0.3 else word.capitalize() if shape < 0.35 else word
        )
    numbers = _WORDS["outside_numbers"]
    return ask.format(x=words[0], y=words[1], n=rng.choice(numbers), m=rng.choice(numbers))


# From topics to documents.


def _decorated(rng: random.Random, question: str) -> str:
    """The question as people type it: polite, in lower case, without its mark, with a typing error."""
    if rng.random() < 0.12:
        question = rng.choice(_WORDINGS["polite"]).format(q=question)
    if rng.random() < 0.3:
        question = question.lower()
    if rng.random() < 0.22:
        question = question.rstrip("?.!")
    if rng.random() < 0.02:
        question = question.upper()
    if rng.random() < 0.06 and len(question) > 8:
        at = rng.randrange(1, len(question) - 2)
        change = rng.random()
        if change < 0.4:
            question = question[:at] + question[at + 1] + question[at] + question[at + 2 :]
        elif change < 0.7:
            question = question[:at] + question[at + 1 :]
        else:
            question = question[:at] + rng.choice(string.ascii_lowercase) + question[at:]
    return question


def _turn(rng: random.Random, kind: Kind, split: Split) -> Turn:
    if kind == "story":
        request, story, core = _story(rng, split)
        return Turn(_decorated(rng, request), story, core, lead="Once upon a time")
    if kind == "outside":
        while True:
            core = _outside(rng)
            if normalised(core) not in KNOWN_WORDINGS and is_held_out(core) == (split == "held-out"):
                break
        return Turn(_decorated(rng, core), rng.choice(REFUSALS), core, lead=REFUSAL)
    topic = rng.choice(_choices(kind, split))
    core = rng.choice(rng.choice(patterns_of(topic, split)))
    return Turn(_decorated(rng, core), _answer(rng, topic), core, lead=topic.lead)


def _kind(rng: random.Random) -> Kind:
    return rng.choices([kind for kind, _ in MIX], [weight for _, weight in MIX])[0]


def _document(rng: random.Random, split: Split) -> Document:
    kind = _kind(rng)
    form = rng.random()
    if split == "train" and kind in ("sky", "nexus", "story") and form < 0.13:
        text = _story(rng, split)[1] if kind == "story" else _answer(rng, rng.choice(_choices(kind, split)))
        return Document(kind, "plain", (Turn("", text, "", ""),))
    if form < 0.45:
        return Document(kind, "bare", (_turn(rng, kind, split),))
    turns = [_turn(rng, kind, split)]
    while len(turns) < 3 and kind != "story" and rng.random() < 0.2:
        following = _kind(rng)
        if following != "story":
            turns.append(_turn(rng, following, split))
    return Document(kind, "chat", tuple(turns))


def documents(seed: int, split: Split) -> Iterator[Document]:
    """An endless stream of documents: the same for the same seed, on every machine."""
    if split not in get_args(Split):
        raise ValueError(f"no split {split!r}")
    rng = random.Random(f"{seed}/{split}")
    while True:
        yield _document(rng, split)


def fingerprint(stream: Iterator[Document], count: int) -> str:
    """A hash over the text of the next `count` documents."""
    hasher = hashlib.blake2b(digest_size=16)
    for _, document in zip(range(count), stream, strict=False):
        hasher.update(document.text.encode() + b"\0")
    return hasher.hexdigest()
