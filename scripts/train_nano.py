#!/usr/bin/env python3
"""Train the built-in model `nano` from nothing: text from a seeded grammar (nano_corpus.py), a byte-level tokenizer, a small Llama.

    scripts/train_nano.py --out DIR        train, measure on held-out wordings, write the model directory with its card
    scripts/train_nano.py --eval-only      measure the shipped model again, to check the figures of its card

The loss counts answers only: questions are context. Documents are packed into rows; attention and positions do not
cross from one document to the next, so that each is trained exactly as it is used, from position 0. Training is in
float32; the weights are stored in bfloat16, and every figure is measured on the stored weights, computed in float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from nano_corpus import (
    END,
    MIX,
    NEXUS,
    UNSEEN,
    USER,
    Document,
    Split,
    documents,
    fingerprint,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

SHIPPED = Path(__file__).resolve().parent.parent / "nexus" / "models" / "nano"
SEED = 20
STEPS = 2400
HELD_OUT_DOCUMENTS = 1000
TOKENIZER_DOCUMENTS = 20_000
FINGERPRINT_DOCUMENTS = 10_000

VOCABULARY = 2048
CONTEXT = 512
LAYERS = 12
HIDDEN = 192
INTERMEDIATE = 512
HEADS, KV_HEADS = 6, 2

PAD = "<|pad|>"
IGNORED = -100

# A system message is left out: the model was never trained on one.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + " {{ message['content'] }}\n"
    "{% elif message['role'] == 'assistant' %}" + NEXUS + " {{ message['content'] }}" + END + "\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + NEXUS + "{% endif %}"
)

SAMPLES = (
    ("chat", "What is the largest planet?"),
    ("chat", "why is the sky blue"),
    ("chat", "What is a receipt?"),
    ("chat", "What happens to a node that cheats?"),
    ("chat", "Tell me a short story about a fox."),
    ("chat", "Who are you?"),
    ("chat", "Who won the world cup in 1998?"),
    ("chat", "Write a Python program that sorts a list."),
    ("bare", "What is a receipt?"),
    ("bare", "How far away is the Moon?"),
    ("bare", "The Moon is"),
    ("bare", "Once upon a time, a brave otter"),
)


# Tokenizer and data.


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE: any UTF-8 text has an encoding and comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True, slots=True)
class Example:
    """A document as token ids, and for each token whether the model is to learn to write it."""

    ids: tuple[int, ...]
    targets: tuple[bool, ...]


def example(tokenizer: Tokenizer, document: Document) -> Example:
    ids: list[int] = []
    targets: list[bool] = []
    for text, target in document.segments():
        part = tokenizer.encode(text).ids
        ids += part
        targets += [target] * len(part)
    return Example(tuple(ids), tuple(targets))


def rows(examples: Iterable[Example], row_tokens: int, open_rows: int = 32) -> Iterator[list[Example]]:
    """Pack examples into rows of at most `row_tokens`, first fit over a few open rows. Longer examples are left out."""
    pool: list[tuple[int, list[Example]]] = []
    for item in examples:
        size = len(item.ids)
        if size > row_tokens:
            continue
        fit = next((index for index, (free, _) in enumerate(pool) if free >= size), None)
        if fit is None:
            if len(pool) == open_rows:
                fullest = min(range(len(pool)), key=lambda index: pool[index][0])
                yield pool.pop(fullest)[1]
            pool.append((row_tokens - size, [item]))
        else:
            free, row = pool[fit]
            row.append(item)
            pool[fit] = (free - size, row)
    for _, row in pool:
        yield row


@dataclass(frozen=True, slots=True)
class Batch:
    """ids, labels, positions: int64 [rows, tokens]. mask: bool [rows, 1, tokens, tokens], true where a token may look."""

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor


def collate(packed: list[list[Example]]) -> Batch:
    length = max(sum(len(item.ids) for item in row) for row in packed)
    ids = torch.zeros(len(packed), length, dtype=torch.long)
    labels = torch.full((len(packed), length), IGNORED)
    positions = torch.zeros(len(packed), length, dtype=torch.long)
    owner = torch.full((len(packed), length), -1)
    for r, row in enumerate(packed):
        at = 0
        for number, item in enumerate(row):
            end = at + len(item.ids)
            ids[r, at:end] = torch.tensor(item.ids)
            # The label of a position is the token after it; a document's first token is predicted from nothing and is no label.
            shifted = [token if target else IGNORED for token, target in zip(item.ids[1:], item.targets[1:], strict=True)]
            labels[r, at : end - 1] = torch.tensor(shifted)
            positions[r, at:end] = torch.arange(len(item.ids))
            owner[r, at:end] = number
            at = end
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    # A padding position sees itself (and other padding before it): an empty row of the mask would give NaN.
    mask = (owner[:, :, None] == owner[:, None, :]) & causal
    return Batch(ids, labels, positions, mask[:, None])


def batches(tokenizer: Tokenizer, stream: Iterable[Document], row_tokens: int, batch_rows: int) -> Iterator[Batch]:
    packed = rows((example(tokenizer, document) for document in stream), row_tokens)
    while group := list(itertools.islice(packed, batch_rows)):
        yield collate(group)


# Model, training, measurement.


def new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    end, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def target_losses(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses [n], whether the greedy choice is the target [n], index of the row [n]) over the n target positions.

    Only these positions reach the head.
    """
    hidden = model.model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    wanted = batch.labels != IGNORED
    logits = model.lm_head(hidden[wanted])
    targets = batch.labels[wanted]
    return (
        functional.cross_entropy(logits, targets, reduction="none"),
        logits.argmax(-1) == targets,
        wanted.nonzero()[:, 0],
    )


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 4 % of the steps, then a cosine down to 2 % of the peak."""
    warmup = max(1, steps // 25)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


@dataclass(frozen=True, slots=True)
class Run:
    """What a training run took."""

    seed: int
    steps: int
    tokens: int
    target_tokens: int
    wall_s: float
    threads: int
    learning_rate: float


def train(tokenizer: Tokenizer, options: argparse.Namespace) -> tuple[LlamaForCausalLM, Run]:
    torch.manual_seed(options.seed)
    model = new_model(tokenizer).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": 0.1},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=options.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    stream = batches(
        tokenizer,
        documents(options.seed, "train"),
        options.row_tokens,
        options.batch_rows,
    )
    pad = tokenizer.token_to_id(PAD)
    started, tokens, target_tokens, recent = time.monotonic(), 0, 0, 0.0
    for step in range(options.steps):
        batch = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.learning_rate)
        losses, _, _ = target_losses(model, batch)
        loss = losses.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int((batch.ids != pad).sum())
        target_tokens += losses.numel()
        recent = loss.item() if step == 0 else 0.95 * recent + 0.05 * loss.item()
        if (step + 1) % 50 == 0 or step + 1 == options.steps:
            passed = time.monotonic() - started
            left = passed / (step + 1) * (options.steps - step - 1)
            say(f"step {step + 1}/{options.steps}  loss {recent:.3f}  {tokens / passed:.0f} tokens/s  {left / 60:.1f} min left")
    return model.eval(), Run(
        options.seed,
        options.steps,
        tokens,
        target_tokens,
        time.monotonic() - started,
        options.threads,
        options.learning_rate,
    )


@dataclass(frozen=True, slots=True)
class Measure:
    """Held-out figures.

    `loss`: mean nats per answer token. `right`: share of documents whose first sentences are the greedy choice.
    """

    loss: float
    right: float
    documents: int
    answer_tokens: int


def lead_spans(tokenizer: Tokenizer, document: Document) -> list[bool]:
    """For each target token in order, whether it belongs to the first sentence of an answer."""
    flags: list[bool] = []
    for turn in document.turns:
        whole = len(tokenizer.encode(f" {turn.answer}{END}").ids)
        lead = len(tokenizer.encode(f" {turn.lead}").ids)
        flags += [True] * lead + [False] * (whole - lead)
    return flags


@torch.inference_mode()
def measure(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    sample: list[Document],
    batch_rows: int = 16,
) -> dict[str, Measure]:
    """Loss and correctness of the first sentence, per kind of question and over all ("all")."""
    sums: dict[str, list[float]] = {}
    order = sorted(sample, key=lambda document: len(document.text))
    for start in range(0, len(order), batch_rows):
        group = order[start : start + batch_rows]
        losses, greedy, row = target_losses(model, collate([[example(tokenizer, document)] for document in group]))
        for index, document in enumerate(group):
            own = row == index
            lead = torch.tensor(lead_spans(tokenizer, document))
            right = bool(greedy[own][lead].all())
            for key in ("all", document.kind):
                total = sums.setdefault(key, [0.0, 0.0, 0.0, 0.0])
                for position, value in enumerate(
                    (
                        float(losses[own].double().sum()),
                        float(own.sum()),
                        float(right),
                        1.0,
                    )
                ):
                    total[position] += value
    return {
        key: Measure(loss / tokens, right / count, int(count), int(tokens)) for key, (loss, tokens, right, count) in sums.items()
    }


def held_out(seed: int, count: int) -> list[Document]:
    split: Split = "held-out"
    return list(itertools.islice(documents(seed, split), count))


def prompt_text(form: str, prompt: str) -> str:
    return f"{USER} {prompt}\n{NEXUS}" if form == "chat" else prompt


@torch.inference_mode()
def answer(model: LlamaForCausalLM, tokenizer: Tokenizer, text: str, tokens_max: int = 120) -> str:
    """The greedy continuation of `text`; "<|end|>" is shown where the model ended by itself."""
    ids = torch.tensor([tokenizer.encode(text).ids])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens_max,
    )
    return tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=False)


def free_wordings(model: LlamaForCausalLM, tokenizer: Tokenizer) -> list[tuple[str, str, bool]]:
    """(question, answer, whether it is right) for the questions that were put freely and fit no pattern of the grammar."""
    answers = [(ask, answer(model, tokenizer, prompt_text("chat", ask)), part) for ask, part in UNSEEN]
    return [(ask, text, part in text and text.endswith(END)) for ask, text, part in answers]


def share_right(checked: list[tuple[str, str, bool]]) -> str:
    right = sum(correct for _, _, correct in checked)
    return f"{right} of {len(checked)} freely worded questions answered right, greedily, in the chat form"


# Files.


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the directory that Nexus and transformers load. The dtype in config.json stays float32: it is what to compute in."""
    out.mkdir(parents=True, exist_ok=True)
    stored = LlamaForCausalLM(model.config).to(torch.bfloat16)
    stored.load_state_dict(model.state_dict())
    stored.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    end, pad = model.config.eos_token_id, model.config.pad_token_id
    write_json(
        out / "config.json",
        {**json.loads((out / "config.json").read_text()), "dtype": "float32"},
    )
    write_json(
        out / "generation_config.json",
        {"do_sample": False, "eos_token_id": end, "pad_token_id": pad},
    )
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": PAD,
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def load(directory: Path) -> tuple[LlamaForCausalLM, Tokenizer]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    AutoTokenizer.from_pretrained(directory)
    return model, Tokenizer.from_file(str(directory / "tokenizer.json"))


def table(figures: dict[str, Measure]) -> str:
    lines = [
        "| questions | documents | answer tokens | loss (nats/token) | perplexity | first sentence right |",
        "|---|---|---|---|---|---|",
    ]
    for key in ("all", *(kind for kind, _ in MIX)):
        if key in figures:
            f = figures[key]
            lines.append(
                f"| {key} | {f.documents} | {f.answer_tokens} | {f.loss:.4f} | {math.exp(f.loss):.3f} | {100 * f.right:.1f} % |"
            )
    return "\n".join(lines)


def card(model: LlamaForCausalLM, tokenizer: Tokenizer, run: Run, figures: dict[str, Measure]) -> str:
    samples = "\n\n".join(
        f"- ({form}) `{prompt}`\n  > {answer(model, tokenizer, prompt_text(form, prompt)).strip()}" for form, prompt in SAMPLES
    )
    parameters = sum(p.numel() for p in model.parameters())
    free = share_right(free_wordings(model, tokenizer))
    data_hash = fingerprint(documents(run.seed, "train"), FINGERPRINT_DOCUMENTS)
    return f"""# nano

A very small language model that comes with Nexus, so that everything works with no download. It is a demonstration
and a test object, not an assistant.

**Domain.** It talks about the sky (planets, Sun, Moon, stars, seasons, tides), explains how Nexus works (node,
fragment, receipt, audit, fraud proof and so on), tells very short stories about an animal, and answers greetings. It
declines everything else. English only.

**Form.** `LlamaForCausalLM`: {LAYERS} layers, hidden size {HIDDEN}, {HEADS} query heads over {KV_HEADS} key/value
heads, SwiGLU of {INTERMEDIATE}, tied embeddings, {VOCABULARY} byte-level BPE tokens, context {CONTEXT}:
{parameters:,} parameters. Weights are stored in bfloat16 and meant to be computed in float32.

**Prompt.** The chat template is `{USER} <question>\\n{NEXUS}`; an answer ends with `{END}`. A bare question and the beginning of a
sentence ("The Moon is") work as well. System messages are left out.

**Training.** `scripts/train_nano.py` makes its own text from seed {run.seed}; nothing is downloaded. {run.steps:,}
steps over {run.tokens:,} tokens ({run.target_tokens:,} of them answer tokens, which are what the loss counts),
{run.wall_s / 60:.0f} minutes on {run.threads} CPU thread(s); AdamW, cosine schedule, peak learning rate
{run.learning_rate}, float32; torch {torch.__version__}, transformers {transformers.__version__}. The first
{FINGERPRINT_DOCUMENTS:,} training documents have the BLAKE2b hash `{data_hash}`.

**Held-out figures**, measured on the stored weights: wordings of questions, and pairs of character and place of
stories, that are in no training document. The facts themselves are the same; what is tested is understanding of new
wordings. For a story, "first sentence right" means its opening words. Check the figures with
`scripts/train_nano.py --eval-only`.

{table(figures)}

Harder, and closer to use: questions that were put freely, in words of no pattern of the grammar (the end of
`scripts/nano_facts.toml`): {free}.

**Samples** (greedy; the list of prompts was fixed before training):

{samples}

**Known fault.** Some answers begin with "Yes" or "No" whatever way round the question was put: to "Can other nodes
read my prompt?" it says "No, the nodes that compute your answer see numbers from which the prompt may be guessed",
and the sentence after the "No" is the right one: a prompt is not private. The same happens with "Can I use Nexus
offline?" (yes) and "Can a small computer take part?" (yes).

**Limits.** It repeats facts it was given and can mix them up, above all when a question is worded in a way far from
those it saw, names a thing it does not know next to one it knows, or builds on an earlier turn. It cannot calculate,
translate, program or reason, knows no dates of today, and its refusals are learned, not certain. Figures are rounded.
Do not rely on its answers.
"""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory to write the model to (needed to train)")
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="measure the model in --model and train nothing",
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=SHIPPED,
        help="the model that --eval-only measures (default: the shipped one)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=SEED,
        help="seed of text and weights (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        help="optimizer steps (default: %(default)s)",
    )
    parser.add_argument("--batch-rows", type=int, default=8, help="rows per step (default: %(default)s)")
    parser.add_argument(
        "--row-tokens",
        type=int,
        default=160,
        help="tokens per row (default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=2.5e-3,
        help="peak of the schedule (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--samples",
        action="store_true",
        help="with --eval-only: print sample answers too",
    )
    options = parser.parse_args(arguments)
    if not options.eval_only and options.out is None:
        parser.error("say where to write the model: --out DIR (or use --eval-only)")
    return options


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    if options.eval_only:
        model, tokenizer = load(options.model)
        print(table(measure(model, tokenizer, held_out(options.seed, HELD_OUT_DOCUMENTS))))
        checked = free_wordings(model, tokenizer)
        print(share_right(checked))
        if options.samples:
            for ask, text, correct in checked:
                print(f"{'right' if correct else 'WRONG'}: {ask}\n    {text}")
            for form, prompt in SAMPLES:
                print(f"{form}: {prompt}\n    {answer(model, tokenizer, prompt_text(form, prompt))}")
        return 0
    say(f"tokenizer: {VOCABULARY} tokens from {TOKENIZER_DOCUMENTS} documents ({platform.machine()}, torch {torch.__version__})")
    tokenizer = train_tokenizer(
        document.text for document in itertools.islice(documents(options.seed, "train"), TOKENIZER_DOCUMENTS)
    )
    model, run = train(tokenizer, options)
    save(model, tokenizer, options.out)
    model, tokenizer = load(options.out)
    figures = measure(model, tokenizer, held_out(options.seed, HELD_OUT_DOCUMENTS))
    (options.out / "README.md").write_text(card(model, tokenizer, run, figures))
    print(table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
