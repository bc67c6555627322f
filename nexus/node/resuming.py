"""Answers that outlive this node's process: written down while they grow, and taken up again by their id."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
import trio

from nexus.core.errors import LocalError, PeerError, UsageError
from nexus.core.manifest import Manifest
from nexus.node.failover import Course, Job, Part
from nexus.node.infer.coordinator import Coordinator, Ended
from nexus.proof.bundle import AnswerProof, verify_answer
from nexus.proof.receipts import tokens_to_bytes
from nexus.storage.answers import AnswerRequest, AnswerStore, KeptPart

log = structlog.get_logger("nexus.resuming")

# What is lost in a crash is computed again: about so much of an answer.
WRITE_EVERY_S = 1.0


class AnswerJournal:
    """Writes one answer down, about once a second: one that is shorter never touches the disk. A disk that fails costs the chance
    to take the answer up again, not the answer."""

    def __init__(self, store: AnswerStore, request: AnswerRequest, *, begun: bool = False) -> None:
        self._store = store
        self._request = request
        self._begun = begun
        self._session = b""
        self._windows = 0
        self._last_s = trio.current_time()

    async def note(self, course: Course, coordinator: Coordinator) -> None:
        """A result came."""
        if trio.current_time() - self._last_s < WRITE_EVERY_S:
            return
        if coordinator.session != self._session:
            self._session, self._windows = coordinator.session, 0
        first, part, answer = self._windows, len(course.parts), course.answer
        windows = coordinator.windows(first)
        if not windows:
            return

        def write() -> None:
            if not self._begun:
                self._store.begin(answer, self._request)
            self._store.add(answer, part, coordinator.header, first, windows)

        try:
            await trio.to_thread.run_sync(write)
            self._begun = True
            self._windows += len(windows)
        except LocalError as error:
            log.warning("answer_not_written", answer=answer.hex()[:16], reason=error.cause)
        self._last_s = trio.current_time()

    async def end(self, course: Course) -> None:
        """The user has the answer."""
        if not self._begun:
            return
        try:
            await trio.to_thread.run_sync(self._store.end, course.answer)
        except LocalError as error:
            log.warning("answer_not_forgotten", answer=course.answer.hex()[:16], reason=error.cause)


def request_of(job: Job, stop: Sequence[str]) -> AnswerRequest:
    return AnswerRequest(
        model_name=job.name,
        model_root=job.manifest.root,
        prompt=job.inputs[0],
        steps_max=job.steps_max,
        stages=job.stages or 0,
        temperature=job.temperature,
        top_k=job.top_k,
        top_p=job.top_p,
        min_p=job.min_p,
        repetition_penalty=job.repetition_penalty,
        seed=job.seed,
        end_tokens=job.end_tokens,
        receipts=int(job.receipts),
        verify=job.verify or "",
        stop=tuple(stop),
    )


def job_of(asked: AnswerRequest, manifest: Manifest) -> Job:
    return Job(
        name=asked.model_name,
        manifest=manifest,
        inputs=(asked.prompt,),
        steps_max=asked.steps_max,
        stages=asked.stages or None,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty,
        seed=asked.seed,
        end_tokens=asked.end_tokens,
        receipts=bool(asked.receipts),
        verify=asked.verify or None,
    )


def course_of(answer: bytes, job: Job, kept: Sequence[KeptPart], tokens: Sequence[int]) -> Course:
    """The answer as far as it was written down. `tokens`: those that the user has of it already, which the rest must go on from.

    Raises UsageError where they are not of this answer.
    """
    course = Course(job, _sound(job, kept), answer)
    shown = [tokens_to_bytes([token]) for token in tokens]
    common = min(len(shown), len(course.shown))
    if shown[:common] != course.shown[:common] or len(shown) > job.steps_max:
        raise UsageError("these are not the tokens of this answer", "Send those that came, in order, or none")
    course.shown = max(course.shown, shown, key=len)
    return course


def _sound(job: Job, kept: Sequence[KeptPart]) -> list[Part]:
    """The parts as they verify, up to the first that does not."""
    parts: list[Part] = []
    course = Course(job)
    for one in kept:
        course.begin()
        try:
            verify_answer(AnswerProof(1, (*(part.ended.bundle for part in parts), one.bundle)))
        except PeerError as error:
            log.warning("kept_part_does_not_verify", reason=error.cause)
            break
        ended = Ended(one.bundle, len(one.bundle.receipts), (None,) * len(one.bundle.plan.stages), one.traces)
        parts.append(Part(course.rest(), ended))
        course = Course(job, parts)
    return parts
