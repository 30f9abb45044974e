"""`TextEncoder` against transformers' own hidden states."""

import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import forget_weights
from transformers import AutoTokenizer, Qwen3ForCausalLM

from services.encoder.model import TextEncoder, load_text_encoder
from services.encoder.settings import EncoderSettings
from shared.chat import Conversation, format_prompt
from shared.checkpoint import UnusableModel
from shared.errors import InvalidField, OutOfMemory

LAYERS = 4
TEXTS = [
    format_prompt(Conversation(prompt=prompt))
    for prompt in ("A cat", "A cat sleeping in the sun on a red sofa", "两只猫", "x " * 120)
]


@pytest.fixture(scope="module")
def text_encoder_bf16(tiny_checkpoint_bf16: Path) -> TextEncoder:
    return load_text_encoder(EncoderSettings(model_path=tiny_checkpoint_bf16, text_encoder_device="cpu"))


@pytest.fixture(scope="module")
def references(tiny_checkpoint: Path, tiny_checkpoint_bf16: Path) -> dict[str, Any]:
    """transformers' own model of each checkpoint, loaded as diffusers' pipeline has it."""
    return {
        "float32": Qwen3ForCausalLM.from_pretrained(tiny_checkpoint / "text_encoder", dtype=torch.float32).eval(),
        "bfloat16": Qwen3ForCausalLM.from_pretrained(
            tiny_checkpoint_bf16 / "text_encoder", dtype=torch.bfloat16
        ).eval(),
    }


@pytest.fixture(params=["float32", "bfloat16"])
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    name = "text_encoder" if request.param == "float32" else "text_encoder_bf16"
    encoder: TextEncoder = request.getfixturevalue(name)
    assert encoder.facts.dtype == request.param
    return encoder


@torch.inference_mode()
def reference(model: Any, ids: Sequence[int]) -> tuple[torch.Tensor, ...]:
    states: tuple[torch.Tensor, ...] = model(
        input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False
    ).hidden_states
    return states


@pytest.mark.parametrize("layer", range(-LAYERS, 0))
@pytest.mark.parametrize("text", TEXTS, ids=["short", "middle", "Chinese", "long"])
def test_every_layer_is_transformers_bit_for_bit(
    encoder: TextEncoder, references: dict[str, Any], layer: int, text: str
) -> None:
    ids = encoder.tokenize([text])[0]
    (states,) = encoder.hidden_states([ids], layer)
    expected = reference(references[encoder.facts.dtype], ids)[layer][0]
    assert states.dtype == expected.dtype
    assert states.shape == (len(ids), 64)
    assert torch.equal(states, expected)


def test_the_layers_differ(text_encoder: TextEncoder) -> None:
    ids = text_encoder.tokenize(TEXTS[:1])[0]
    layers = [text_encoder.hidden_states([ids], layer)[0] for layer in range(-LAYERS, 0)]
    assert not any(torch.equal(a, b) for a, b in pairwise(layers))


def test_layers_may_be_asked_for_in_any_order(text_encoder: TextEncoder) -> None:
    ids = text_encoder.tokenize(TEXTS[:1])[0]
    first = [text_encoder.hidden_states([ids], layer)[0] for layer in (-1, -3, -2, -4)]
    again = [text_encoder.hidden_states([ids], layer)[0] for layer in (-1, -3, -2, -4)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("layer", [-1, -2, -LAYERS])
def test_a_batch_equals_each_alone_within_rounding(encoder: TextEncoder, layer: int) -> None:
    batch = encoder.tokenize(TEXTS)
    together = encoder.hidden_states(batch, layer)
    precision = 1e-5 if encoder.facts.dtype == "float32" else 0.05
    for ids, states in zip(batch, together, strict=True):
        (alone,) = encoder.hidden_states([ids], layer)
        assert states.shape == alone.shape == (len(ids), 64)
        torch.testing.assert_close(states, alone, rtol=precision, atol=precision)


def test_what_else_is_in_the_batch_changes_nothing(text_encoder: TextEncoder) -> None:
    mine, short, long = text_encoder.tokenize([TEXTS[1], "a", "b " * 200])
    with_short = text_encoder.hidden_states([mine, short], -2)[0]
    with_long = text_encoder.hidden_states([long, mine], -2)[1]
    torch.testing.assert_close(with_short, with_long, rtol=1e-5, atol=1e-5)


def test_states_are_contiguous_and_on_the_cpu(text_encoder: TextEncoder) -> None:
    batch = text_encoder.tokenize(TEXTS[:2])
    states = text_encoder.hidden_states(batch, -2)
    for item, ids in zip(states, batch, strict=True):
        assert item.is_contiguous()
        assert item.device.type == "cpu"
        assert item.shape == (len(ids), 64)


def test_tokens_are_the_tokenizers(text_encoder: TextEncoder, tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    texts = [*TEXTS, "plain", "<|im_start|>", "</think>"]
    assert text_encoder.tokenize(texts) == [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def test_special_tokens_are_one_token_each(text_encoder: TextEncoder) -> None:
    ids = text_encoder.tokenize(["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|im_start|><|im_end|>"])
    assert [len(item) for item in ids] == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("layer", [-LAYERS, -2, -1])
def test_layers_within_the_depth(text_encoder: TextEncoder, layer: int) -> None:
    text_encoder.check_layer(layer)
    assert len(text_encoder.hidden_states([[1, 2, 3]], layer)[0]) == 3


@pytest.mark.parametrize("layer", [-LAYERS - 1, -256, 0, 1])
def test_layers_beyond_the_depth(text_encoder: TextEncoder, layer: int) -> None:
    with pytest.raises(InvalidField, match="'hidden_layer' must be between -4 and -1"):
        text_encoder.check_layer(layer)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory, a library's own text"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory, a library's own text"),
        torch.AcceleratorError("CUDA error: out of memory, a library's own text"),
    ],
    ids=["cuda", "cpu", "driver"],
)
def test_too_little_memory_is_said_as_such(text_encoder: TextEncoder, error: Exception) -> None:
    def run_out(**_: object) -> None:
        raise error

    starved = TextEncoder(run_out, None, text_encoder.facts)  # type: ignore[arg-type]
    with pytest.raises(OutOfMemory, match="too little free memory") as failed:
        starved.hidden_states([[1, 2]], -1)
    assert failed.value.retry_after_s
    assert "library" not in failed.value.detail


def test_facts(text_encoder: TextEncoder, tiny_checkpoint: Path) -> None:
    facts = text_encoder.facts
    assert (facts.name, facts.width, facts.layers, facts.device) == (tiny_checkpoint.name, 64, LAYERS, "cpu")


def test_another_dtype_than_the_checkpoints(tiny_checkpoint: Path) -> None:
    settings = EncoderSettings(model_path=tiny_checkpoint, text_encoder_device="cpu", text_encoder_dtype="bfloat16")
    encoder = load_text_encoder(settings)
    assert encoder.facts.dtype == "bfloat16"
    assert encoder.hidden_states([[1, 2]], -2)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_a_directory_that_lacks_a_part(tiny_checkpoint: Path, tmp_path: Path, part: str) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    shutil.rmtree(folder / part)
    with pytest.raises(UnusableModel, match=f"'{part}' is missing"):
        load_text_encoder(EncoderSettings(model_path=folder, text_encoder_device="cpu"))


def test_only_the_encoders_parts_are_needed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(tiny_checkpoint / part, tmp_path / "model" / part)
    encoder = load_text_encoder(EncoderSettings(model_path=tmp_path / "model", text_encoder_device="cpu"))
    assert encoder.facts.name == "model"


def test_pickled_weights_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    weights = folder / "text_encoder" / "model.safetensors"
    torch.save({"a": torch.ones(1)}, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(UnusableModel, match="pickled"):
        load_text_encoder(EncoderSettings(model_path=folder, text_encoder_device="cpu"))


def test_weights_that_lack_a_layer_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    forget_weights(folder / "text_encoder", "layers.1.mlp.")
    with pytest.raises(UnusableModel, match=r"not complete: it lacks model\.layers\.1\.mlp\..*, one of 3 weights"):
        load_text_encoder(EncoderSettings(model_path=folder, text_encoder_device="cpu"))
