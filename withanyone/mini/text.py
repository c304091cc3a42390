"""The miniature's text encoders: a word-level tokenizer, a small CLIP for the pooled text and a small T5 for
the words.

Both are transformers' own classes, trained from nothing on captions of the drawn world: readers on top must
say, for every person from left to right, hair, hat, glasses, expression and so on, and the scene and the
light. FLUX gives text tokens no position, so each T5 token must carry whose word it is; the readers look at
tokens as a set, which trains just that.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from . import words, world
from .loop import TrainingLoop, learning_rate, step_rng
from .parts import add_part_arguments, save_half, start_part, write_figures

logger = logging.getLogger(__name__)

MAX_TEXT_TOKENS = 64
WIDTH = 128
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>", "<s>")
#: Words and marks that say nothing about a picture; left out before tokenizing, which halves the number of
#: tokens.
SILENT_WORDS = (
    "a",
    "an",
    "the",
    "of",
    "and",
    "with",
    "wearing",
    "is",
    "are",
    "has",
    "who",
    "there",
    "to",
    "in",
    "at",
)
MARKS = (";", ":")
#: Share of captions with 0, 1, ... 8 people while training.
PEOPLE_SHARES = (0.03, 0.37, 0.24, 0.14, 0.12, 0.03, 0.03, 0.02, 0.02)
MAX_PEOPLE = len(PEOPLE_SHARES) - 1


# Tokenizers


def build_tokenizer(max_length: int = MAX_TEXT_TOKENS) -> PreTrainedTokenizerFast:
    """One token a word of the world's vocabulary: `<s>` words `</s>`, padded on the right.

    Spellings and word forms that the world knows (`known_form`) are brought to the vocabulary's own; other
    words become `<unk>`; SILENT_WORDS are dropped.
    """
    spoken = [word for word in words.VOCABULARY if word not in SILENT_WORDS]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *MARKS, *spoken])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    silent = "|".join(SILENT_WORDS)
    other_forms = [
        normalizers.Replace(Regex(rf"(?<![\p{{L}}\p{{N}}-]){form}(?![\p{{L}}\p{{N}}-])"), word)
        for form, word in sorted(words.SPELLINGS.items())
        if form not in words.VOCABULARY
    ]
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace("’", "'"),
            *other_forms,
            normalizers.Replace(Regex(rf"(?<![\p{{L}}\p{{N}}'-])({silent})(?![\p{{L}}\p{{N}}'-])"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"[\p{L}\p{N}]+(?:[-'][\p{L}\p{N}]+)*|[;:]"), behavior="removed", invert=True
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=max_length,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def tokenize(
    tokenizer: PreTrainedTokenizerFast, captions: Sequence[str], length: int | None = None
) -> Tensor:
    """Token ids (B, T): of `length`, or of the longest caption (at most the tokenizer's own maximum)."""
    padding = "longest" if length is None else "max_length"
    return tokenizer(
        list(captions), padding=padding, max_length=length, truncation=True, return_tensors="pt"
    ).input_ids  # fmt: skip


# Models


def clip_config(tokenizer: PreTrainedTokenizerFast) -> CLIPTextConfig:
    """A CLIP text model of three layers, 128 wide; its pooled output is the hidden state at `</s>`."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_config(tokenizer: PreTrainedTokenizerFast) -> T5Config:
    """A T5 encoder of three layers, 128 wide, with T5 1.1's gated feed-forward."""
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=32,
        d_ff=2 * WIDTH,
        num_layers=3,
        num_heads=4,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        is_encoder_decoder=False,
        use_cache=False,
    )


# What a caption says


@dataclass(frozen=True)
class Question:
    """One thing to read from a caption: an attribute of one person (left to right) or of the picture."""

    attribute: str
    person: int | None
    values: tuple[str, ...]


QUESTIONS: tuple[Question, ...] = (
    *(Question(name, None, values) for name, values in world.PICTURE_ATTRIBUTES.items()),
    Question("count", None, tuple(str(count) for count in range(MAX_PEOPLE + 1))),
    *(
        Question(name, person, values)
        for person in range(MAX_PEOPLE)
        for name, values in world.PERSON_ATTRIBUTES.items()
    ),
)
OFFSETS = np.cumsum([0] + [len(question.values) for question in QUESTIONS])


def answers(people: Sequence[world.Person], scene: str, light: str) -> np.ndarray:
    """The index of the right value for every question; -1 for people who are not there."""
    told = {("scene", None): scene, ("light", None): light, ("count", None): str(len(people))}
    for index, person in enumerate(people):
        told |= {(name, index): value for name, value in person.attributes().items()}
    return np.array(
        [
            question.values.index(told[question.attribute, question.person])
            if (question.attribute, question.person) in told
            else -1
            for question in QUESTIONS
        ]
    )


def random_people(rng: np.random.Generator, count: int) -> list[world.Person]:
    """People who have only an appearance: enough for a caption, no picture is drawn."""
    nowhere = np.zeros(4, np.float32), np.zeros((5, 2), np.float32)
    return [
        world.Person(identity=0, appearance=world.random_appearance(rng), bbox=nowhere[0], kps=nowhere[1])
        for _ in range(count)
    ]


def random_setting(rng: np.random.Generator) -> tuple[str, str]:
    """A scene and a light."""
    scenes, lights = world.PICTURE_ATTRIBUTES["scene"], world.PICTURE_ATTRIBUTES["light"]
    return str(rng.choice(scenes)), str(rng.choice(lights))


def sample_captions(rng: np.random.Generator, count: int) -> tuple[list[str], np.ndarray]:
    """`count` captions of random scenes and their answers (count, Q)."""
    captions, labels = [], []
    for _ in range(count):
        people = random_people(rng, int(rng.choice(len(PEOPLE_SHARES), p=PEOPLE_SHARES)))
        scene, light = random_setting(rng)
        captions.append(world.caption_of(people, scene, light, rng))
        labels.append(answers(people, scene, light))
    return captions, np.stack(labels)


# Readers: used in training only


class SetReader(nn.Module):
    """Answers every question from a set of tokens: a learned query per question, one head, no positions."""

    def __init__(self, width: int = WIDTH, value_width: int = 32) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(QUESTIONS), width) * width**-0.5)
        self.to_value = nn.Linear(width, value_width)
        self.heads = nn.Parameter(torch.randn(len(QUESTIONS), value_width, max_values()) * value_width**-0.5)
        self.bias = nn.Parameter(torch.zeros(len(QUESTIONS), max_values()))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (B, T, D) -> logits (B, Q, V)."""
        scores = torch.einsum("btd,qd->bqt", hidden_states, self.queries)
        read = scores.softmax(dim=-1) @ self.to_value(hidden_states)  # (B, Q, value_width)
        return torch.einsum("bqc,qcv->bqv", read, self.heads) + self.bias


class PooledReader(nn.Module):
    """Answers every question from one vector, linearly."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.heads = nn.Linear(width, len(QUESTIONS) * max_values())

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled (B, D) -> logits (B, Q, V)."""
        return self.heads(pooled).view(-1, len(QUESTIONS), max_values())


def max_values() -> int:
    """The longest list of values that a question has."""
    return max(len(question.values) for question in QUESTIONS)


def impossible_values() -> Tensor:
    """(Q, V) bool: places beyond a question's own list of values."""
    lengths = torch.tensor([len(question.values) for question in QUESTIONS])
    return torch.arange(max_values())[None] >= lengths[:, None]


def reading_loss(logits: Tensor, labels: Tensor, impossible: Tensor) -> Tensor:
    """Mean cross-entropy over the questions that have an answer. logits (B, Q, V), labels (B, Q) with -1 for
    none."""
    logits = logits.float().masked_fill(impossible, -1e4)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)


class TextEncoders(nn.Module):
    """The two encoders and their readers, trained together on the same captions."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.clip = CLIPTextModel(clip_config(tokenizer))
        self.t5 = T5EncoderModel(t5_config(tokenizer))
        self.pooled_reader = PooledReader()
        self.set_reader = SetReader()

    def forward(self, token_ids: Tensor, clip_token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, T) -> the answers' logits (B, Q, V) from the T5 tokens and from CLIP's pooled
        vector."""
        hidden_states = self.t5(token_ids)[0]
        pooled = self.clip(clip_token_ids).pooler_output
        return self.set_reader(hidden_states), self.pooled_reader(pooled)


# Training


def train(folder: Path, steps: int, batch_size: int = 64, seed: int = 0) -> TextEncoders:
    """Trains both encoders in `folder`, resuming where a checkpoint is found."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    encoders = TextEncoders(tokenizer)
    optimizer = torch.optim.AdamW(encoders.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    config = {"part": "text", "batch_size": batch_size, "seed": seed, "vocabulary": len(tokenizer)}
    loop = TrainingLoop(folder, steps, {"encoders": encoders}, optimizer, config)
    impossible = impossible_values()
    for step in loop:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1.5e-3)
        rng, _ = step_rng(seed, step)
        captions, labels = sample_captions(rng, batch_size)
        clip_ids = tokenize(tokenizer, captions)  # (B, T)
        # No attention mask in FLUX: the padding must be harmless whatever its length.
        longest = clip_ids.shape[1]
        length = longest if rng.random() < 0.5 else int(rng.integers(longest, MAX_TEXT_TOKENS + 1))
        token_ids = F.pad(clip_ids, (0, length - longest), value=tokenizer.pad_token_id)
        from_tokens, from_pooled = encoders(token_ids, clip_ids)
        targets = torch.from_numpy(labels)
        token_loss = reading_loss(from_tokens, targets, impossible)
        pooled_loss = reading_loss(from_pooled, targets, impossible)
        optimizer.zero_grad(set_to_none=True)
        (token_loss + pooled_loss).backward()
        nn.utils.clip_grad_norm_(encoders.parameters(), 1.0)
        optimizer.step()
        loop.log(tokens=token_loss.item(), pooled=pooled_loss.item())
    return encoders.eval()


def explicit_caption(people: Sequence[world.Person], scene: str, light: str, rng: np.random.Generator) -> str:
    """A caption that leaves nothing out, people from left to right: for measuring, where all must be
    readable."""
    described = [words.describe_person(person.attributes(), rng, 1.0) for person in people]
    place = f"{rng.choice(words.SCENES[scene])} {rng.choice(words.LIGHTS[light])}"
    if len(people) == 1:
        return f"{described[0]} {place}"
    return f"{words.count_phrase(len(people))} {place}: from left to right " + "; ".join(described)


#: Attributes that `explicit_caption` always tells (a neutral expression and a look ahead may go unsaid).
TOLD = ("scene", "light", "count", "hair_style", "hair_color", "hat", "glasses", "beard", "clothing_color")


@torch.no_grad()
def measure(encoders: TextEncoders, captions_per_count: int = 150, seed: int = 1) -> dict[str, object]:
    """Share of told attributes read rightly: from the set of T5 tokens, and linearly from CLIP's pooled
    vector.

    Captions of 1 to 4 people that leave nothing out, from a seed that training does not use. The hair colour
    of the bald is not asked for.
    """
    tokenizer = build_tokenizer()
    rng = np.random.default_rng((seed, 0xE5))
    right: dict[str, list[tuple[bool, bool]]] = {}
    impossible = impossible_values()
    for count in (1, 2, 3, 4):
        captions, labels, scenes = [], [], []
        for _ in range(captions_per_count):
            people, setting = random_people(rng, count), random_setting(rng)
            captions.append(explicit_caption(people, *setting, rng))
            labels.append(answers(people, *setting))
            scenes.append(people)
        token_ids = tokenize(tokenizer, captions, MAX_TEXT_TOKENS)
        read = [logits.masked_fill(impossible, -1e4).argmax(-1) for logits in encoders(token_ids, token_ids)]
        truth = torch.from_numpy(np.stack(labels))
        for index, question in enumerate(QUESTIONS):
            if question.attribute not in TOLD:
                continue
            for row in (truth[:, index] >= 0).nonzero()[:, 0].tolist():
                person = scenes[row][question.person] if question.person is not None else None
                if question.attribute == "hair_color" and person.attributes()["hair_style"] == "bald":
                    continue
                pair = tuple(bool(guess[row, index] == truth[row, index]) for guess in read)
                group = "one person" if count == 1 else "two to four people"
                right.setdefault(f"{question.attribute}, {group}", []).append(pair)
    return {
        "captions": 4 * captions_per_count,
        "read_from_tokens": {
            name: round(float(np.mean([a for a, _ in pairs])), 4) for name, pairs in right.items()
        },
        "read_from_pooled": {
            name: round(float(np.mean([b for _, b in pairs])), 4) for name, pairs in right.items()
        },
    }


# Command


def export(encoders: TextEncoders, out: Path) -> None:
    """Writes both tokenizers and both encoders into a pipeline folder, in half precision."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(out / "tokenizer")
    tokenizer.save_pretrained(out / "tokenizer_2")
    for name, model in (("text_encoder", encoders.clip), ("text_encoder_2", encoders.t5)):
        save_half(model, out / name)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_part_arguments(parser, "text", steps=1200)
    parser.add_argument("--batch-size", type=int, default=64, help="captions a step")


def _run(args: argparse.Namespace) -> None:
    start_part(args)
    encoders = train(args.out, args.steps, args.batch_size, args.seed)
    export(encoders, args.pretrained)
    write_figures(args.pretrained, "text", measure(encoders))


COMMANDS = {"text": (_add_arguments, _run)}
