"""Loading Qwen3, its chat format, and the tokens that end a text."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from language import load_language_model, prompt_ids
from transformers import AutoTokenizer, Qwen3ForCausalLM, Qwen3Model

from shared.checkpoint import UnusableModel
from shared.errors import InvalidField, Unready
from shared.language.model import LanguageModel, load_qwen3
from shared.language.options import Message

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture
def copied(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny text encoder's folder, to be changed."""
    return Path(shutil.copytree(tiny_checkpoint / "text_encoder", tmp_path / "text_encoder"))


def changed(folder: Path, file: str, **fields: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_tied_embeddings_take_no_second_memory(tiny_checkpoint: Path) -> None:
    model, writes = load_qwen3(tiny_checkpoint / "text_encoder", **CPU)
    assert writes
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_head_of_its_own(copied: Path) -> None:
    model = Qwen3ForCausalLM.from_pretrained(copied, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    model.save_pretrained(copied)
    loaded, writes = load_qwen3(copied, **CPU)
    assert writes
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight + 1)


def test_a_checkpoint_without_a_head_still_has_its_layers(copied: Path) -> None:
    whole = Qwen3ForCausalLM.from_pretrained(copied, dtype=torch.float32)
    changed(copied, "config.json", tie_word_embeddings=False, architectures=["Qwen3Model"])
    model = Qwen3Model.from_pretrained(copied, dtype=torch.float32)
    model.save_pretrained(copied)
    loaded, writes = load_qwen3(copied, **CPU)
    assert not writes
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, whole.model.layers[0].mlp.up_proj.weight)


def test_another_architecture(copied: Path) -> None:
    changed(copied, "config.json", model_type="llama")
    with pytest.raises(UnusableModel, match="not a Qwen3 language model, but of the type 'llama'"):
        load_qwen3(copied, **CPU)


def test_sliding_windows_are_refused(copied: Path) -> None:
    changed(copied, "config.json", layer_types=["full_attention", "sliding_attention"] * 2, sliding_window=16)
    with pytest.raises(UnusableModel, match="another kind than full attention"):
        load_qwen3(copied, **CPU)


def test_pickled_weights_are_refused(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(UnusableModel, match="pickled"):
        load_qwen3(copied, **CPU)


def test_conversations_are_formatted_by_the_tokenizers_template(loaded: LanguageModel, tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    messages = [Message("system", "Be brief."), Message("user", "两只猫")]

    def text(**options: Any) -> str:
        formatted: str = tokenizer.decode(loaded.prompt(messages, **options).ids)
        return formatted

    plain = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n两只猫<|im_end|>\n<|im_start|>assistant\n"
    assert text() == text(enable_thinking=None) == text(enable_thinking=True) == plain
    assert text(enable_thinking=False) == plain + "<think>\n\n</think>\n\n"


def with_template(loaded: LanguageModel, tiny_checkpoint: Path, template: str | None) -> LanguageModel:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    tokenizer.chat_template = template
    return LanguageModel(loaded.batch._model, tokenizer, "tiny")


def test_a_conversation_that_the_template_refuses(loaded: LanguageModel, tiny_checkpoint: Path) -> None:
    language = with_template(loaded, tiny_checkpoint, "{{ raise_exception('a library\\'s own text') }}")
    with pytest.raises(InvalidField, match="do not fit the model's chat template") as refused:
        prompt_ids(language, "A cat")
    assert "library" not in refused.value.detail


def test_a_tokenizer_without_a_template(loaded: LanguageModel, tiny_checkpoint: Path) -> None:
    with pytest.raises(Unready, match="no chat template"):
        prompt_ids(with_template(loaded, tiny_checkpoint, None), "A cat")


@pytest.mark.parametrize("named", [None, 7, [7, 8]])
def test_what_ends_a_text(tiny_checkpoint: Path, named: Any) -> None:
    language = load_language_model(tiny_checkpoint)
    model: Any = language.batch._model
    model.generation_config.eos_token_id = named
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    ends = LanguageModel(model, tokenizer, "tiny").facts.ends
    known = set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert ends == known | {None: set(), 7: {7}}.get(named if isinstance(named, int) else None, set()) | (
        set(named) if isinstance(named, list) else set()
    )
    assert language.facts.context == 40_960
