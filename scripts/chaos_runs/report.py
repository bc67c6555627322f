"""What a run came to: every answer compared with the undisturbed one of the same request, and a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from scripts.chaos_runs.streams import Answer, Request


@dataclass(frozen=True, slots=True)
class Loss:
    """An answer that did not end, that differs from the undisturbed one, or whose receipts do not all hold. `at_s`: when it was
    asked for, seconds after the faults began."""

    stream: int
    at_s: float
    prompt: str
    tokens: int
    why: str


@dataclass(frozen=True, slots=True)
class Report:
    """`longest_pause_s`: between two tokens of one answer; `longest_first_s`: from asking to the first token; the `undisturbed_`
    ones are those of the run without faults, on the same machine with one answer at a time. `failovers`: chains begun beyond the
    first one of each answer. `problems`: of the nodes themselves, such as one that does not end or does not come back."""

    seed: int
    minutes: float
    nodes: int
    streams: int
    answers: int
    tokens: int
    faults: Mapping[str, int]
    failovers: int
    answers_that_failed_over: int
    longest_pause_s: float
    longest_first_s: float
    undisturbed_pause_s: float
    undisturbed_first_s: float
    longest_return_s: float
    losses: Sequence[Loss]
    problems: Sequence[str]

    @property
    def held(self) -> bool:
        return not self.losses and not self.problems and self.answers > 0 and sum(self.faults.values()) > 0

    def as_json(self) -> dict[str, object]:
        return {"schema": 1, "chaos": "testnet"} | asdict(self) | {"held": self.held}

    def as_text(self) -> str:
        faults = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.faults.items())) or "none"
        lines = [
            f"seed {self.seed}: {self.nodes} nodes, {self.streams} streams, {self.minutes:g} minutes",
            f"faults            {faults}",
            f"answers           {self.answers} with {self.tokens} tokens; {len(self.losses)} lost or different",
            f"failovers         {self.failovers}, in {self.answers_that_failed_over} answers",
            f"longest pause     {self.longest_pause_s:.2f} s between two tokens; undisturbed {self.undisturbed_pause_s:.2f} s",
            f"first token       {self.longest_first_s:.2f} s at the most; undisturbed {self.undisturbed_first_s:.2f} s",
            f"back again        {self.longest_return_s:.1f} s at the most from a fault until the node was whole",
            *(f"PROBLEM           {problem}" for problem in self.problems),
            *(
                f"LOST              stream {loss.stream} at {loss.at_s:.1f} s after {loss.tokens} tokens: {loss.why}"
                for loss in self.losses
            ),
            f"holds             {'yes' if self.held else 'NO'}",
        ]
        return "\n".join(lines)


def loss_of(stream: int, answer: Answer, expected: Answer) -> Loss | None:
    why = ""
    if answer.error:
        why = answer.error
    elif answer.tokens != expected.tokens or answer.text != expected.text or answer.reason != expected.reason:
        same = next(
            (at for at, (one, other) in enumerate(zip(answer.tokens, expected.tokens, strict=False)) if one != other),
            min(len(answer.tokens), len(expected.tokens)),
        )
        why = f"it differs from token {same} on ({len(answer.tokens)} tokens instead of {len(expected.tokens)}, {answer.reason})"
    elif not answer.verified:
        why = "not every receipt holds"
    return Loss(stream, round(answer.began_s, 2), answer.request.prompt, len(answer.tokens), why) if why else None


def report_of(
    options: Mapping[str, int | float],
    expected: Mapping[Request, Answer],
    answers: Sequence[Sequence[Answer]],
    faults: Mapping[str, int],
    problems: Sequence[str],
    longest_return_s: float,
) -> Report:
    """`answers`: by stream."""
    every = [answer for stream in answers for answer in stream]
    losses = [loss_of(number, answer, expected[answer.request]) for number, stream in enumerate(answers) for answer in stream]
    return Report(
        seed=int(options["seed"]),
        minutes=float(options["minutes"]),
        nodes=int(options["nodes"]),
        streams=len(answers),
        answers=len(every),
        tokens=sum(len(answer.tokens) for answer in every),
        faults=dict(faults),
        failovers=sum(max(0, answer.plans - 1) for answer in every),
        answers_that_failed_over=sum(answer.plans > 1 for answer in every),
        longest_pause_s=round(max((answer.pause_s for answer in every), default=0.0), 3),
        longest_first_s=round(max((answer.first_s for answer in every), default=0.0), 3),
        undisturbed_pause_s=round(max(answer.pause_s for answer in expected.values()), 3),
        undisturbed_first_s=round(max(answer.first_s for answer in expected.values()), 3),
        longest_return_s=round(longest_return_s, 1),
        losses=[loss for loss in losses if loss is not None],
        problems=list(problems),
    )
