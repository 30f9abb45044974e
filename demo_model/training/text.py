"""The tokenizer and the small Qwen3 language model: encoder and rewriter in one."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from demo_model import captions
from demo_model.captions import Said
from demo_model.training.loop import Losses, Schedule, run_stage
from demo_model.world import random_scene
from shared.chat import Conversation, format_prompt
from shared.templates import DEFAULT_DIR
from zimage.tokenizer import train_tokenizer

SCHEDULE = Schedule(steps=450, learning_rate=2e-3)
BATCH = 16
MERGES = 1_900
CORPUS = 12_000  # captions that the tokenizer's merges are learnt from
IGNORED = -100  # a target that costs nothing
WIDTH = 192
HIDDEN_LAYER = -2  # which the DiT reads
REWRITE_TOKENS = 448  # sequences are cut here; the longest system prompts come to a little less


def new_tokenizer() -> Tokenizer:
    """Byte-level BPE learnt from captions of the world and the project's templates."""
    return train_tokenizer(merges=MERGES, more_texts=_corpus())


def _corpus() -> Iterator[str]:
    rng = random.Random(3_000_000)
    for _ in range(CORPUS):
        scene, text = captions.training_caption(rng)
        yield f" {text}"
        if rng.random() < 0.3:
            said = captions.random_said(rng)
            yield f" {captions.thinking(scene, said)} {captions.canonical(scene)}"


def new_text_model(vocabulary: int) -> Qwen3ForCausalLM:
    """The language model with random weights: 6 layers, so that layers -1 to -6 exist."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=40_960,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


class TextBatches:
    """Turns texts into padded token batches, and makes the conversations that teach the model to rewrite."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pad = tokenizer.token_to_id("<|endoftext|>")
        self._systems = [path.read_text(encoding="utf-8") for path in sorted(DEFAULT_DIR.rglob("*.md"))]

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, special tokens among them."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def prompt_ids(self, prompt: str) -> list[int]:
        """The tokens that the encoder reads for a prompt."""
        return self.ids(format_prompt(Conversation(prompt=prompt)))

    def pad(self, rows: list[list[int]], length: int) -> Tensor:
        """int64 `[rows, length]`, filled up on the right."""
        return torch.tensor([row[:length] + [self._pad] * (length - len(row)) for row in rows])

    def rewriting(self, rng: random.Random, count: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets, both int64 `[count, length]`, of conversations that end in a rewritten prompt."""
        rows, targets = [], []
        for _ in range(count):
            asked, answer = self._conversation(rng)
            head, tail = self.ids(asked), self.ids(answer)
            head = head[-(REWRITE_TOKENS - len(tail)) :]
            rows.append(head + tail)
            targets.append([IGNORED] * len(head) + tail)
        length = max(len(row) for row in rows)
        padded = torch.tensor([row + [IGNORED] * (length - len(row)) for row in targets])
        return self.pad(rows, length), padded

    def _conversation(self, rng: random.Random) -> tuple[str, str]:
        strange = rng.random() < 0.08
        said = Said(
            background=rng.random() < 0.6,
            pattern=False,
            size=rng.random() < 0.4,
            place=rng.random() < 0.4,
        )
        scene = random_scene(rng)
        if not said.size or not said.place:  # the answer names what the rewriter chose, any size and place
            said = Said(background=said.background, size=said.size, place=said.place)
        prompt = captions.strange_prompt(rng) if strange else captions.caption(scene, said, rng)
        answer = captions.long_prompt(scene, rng)
        asked = format_prompt(Conversation(prompt=prompt, system_prompt=self._system(rng)))
        if rng.random() < 0.2:
            return f"{asked}<think>\n\n</think>\n\n", f"{answer}<|im_end|>"
        thought = captions.thinking(scene, said, strange=strange)
        return asked, f"<think>\n{thought}\n</think>\n\n{answer}<|im_end|>"

    def _system(self, rng: random.Random) -> str | None:
        kind = rng.random()
        if kind < 0.2:
            return None
        text = rng.choice(self._systems)
        if kind < 0.75:
            start = rng.randrange(max(1, len(text) - 200))
            return text[start : start + rng.randint(20, 200)]
        return text[: rng.randint(200, 900)]


def language_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of the next token; logits `[n, length, vocabulary]`, targets `[n, length]`."""
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=IGNORED
    )


def train_text_model(tokenizer: Tokenizer, folder: Path, device: torch.device) -> Qwen3ForCausalLM:
    """The language model after learning to rewrite: the start for the training together with the DiT."""
    torch.manual_seed(1)
    model = new_text_model(tokenizer.get_vocab_size()).to(device)
    batches = TextBatches(tokenizer)

    def losses(step: int) -> Losses:
        rng = random.Random(4_000_000 + step)
        tokens, targets = batches.rewriting(rng, BATCH)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(tokens.to(device), use_cache=False).logits
        return {"rewrite": language_loss(logits, targets.to(device))}

    run_stage("text", {"text": model}, SCHEDULE, losses, folder)
    return model
