"""`shared.chat` against the specification's examples, its rules and the tokenizer's own template."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from shared.chat import Conversation, format_prompt

USER_CAT = "<|im_start|>user\nPaint a cat<|im_end|>\n<|im_start|>assistant\n"
SPEC_EXAMPLES = {
    "basic": (
        {"prompt": "A cat sleeping"},
        "<|im_start|>user\nA cat sleeping<|im_end|>\n<|im_start|>assistant\n",
    ),
    "system prompt": (
        {"prompt": "Paint a cat", "system_prompt": "You are a painter."},
        f"<|im_start|>system\nYou are a painter.<|im_end|>\n{USER_CAT}",
    ),
    "forced think block": (
        {"prompt": "Draw a house", "force_think_block": True},
        "<|im_start|>user\nDraw a house<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n",
    ),
    "thinking content": (
        {"prompt": "Paint a cat", "thinking_content": "Orange fur, green eyes."},
        f"{USER_CAT}<think>\nOrange fur, green eyes.\n</think>\n",
    ),
    "full": (
        {
            "prompt": "Paint a sunset",
            "system_prompt": "You are an impressionist painter.",
            "thinking_content": "Warm orange and pink hues, soft clouds.",
            "assistant_content": "Here is my painting:",
        },
        "<|im_start|>system\nYou are an impressionist painter.<|im_end|>\n"
        "<|im_start|>user\nPaint a sunset<|im_end|>\n"
        "<|im_start|>assistant\n"
        "<think>\nWarm orange and pink hues, soft clouds.\n</think>\n"
        "Here is my painting:",
    ),
    "format-prompt": (
        {
            "prompt": "Paint a cat",
            "system_prompt": "You are a painter.",
            "thinking_content": "Orange fur.",
            "assistant_content": None,
            "force_think_block": False,
            "strip_quotes": False,
        },
        f"<|im_start|>system\nYou are a painter.<|im_end|>\n{USER_CAT}<think>\nOrange fur.\n</think>\n",
    ),
    "strip_quotes": (
        {"prompt": '{"subject": "a cat"}', "strip_quotes": True},
        "<|im_start|>user\n{subject: a cat}<|im_end|>\n<|im_start|>assistant\n",
    ),
}


@pytest.mark.parametrize(("fields", "expected"), SPEC_EXAMPLES.values(), ids=SPEC_EXAMPLES.keys())
def test_examples_of_the_specification(fields: dict[str, object], expected: str) -> None:
    assert format_prompt(Conversation(**fields)) == expected


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
parts = st.none() | words
conversations = st.builds(
    Conversation,
    prompt=words,
    system_prompt=parts,
    thinking_content=parts,
    assistant_content=parts,
    force_think_block=st.booleans(),
    strip_quotes=st.booleans(),
)


@given(conversations)
def test_parts_stand_in_order_and_verbatim(conversation: Conversation) -> None:
    rest = format_prompt(conversation)
    if conversation.system_prompt:
        opening = f"<|im_start|>system\n{conversation.system_prompt}<|im_end|>\n"
        assert rest.startswith(opening)
        rest = rest.removeprefix(opening)
    prompt = conversation.prompt.replace('"', "") if conversation.strip_quotes else conversation.prompt
    turn = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    assert rest.startswith(turn)
    rest = rest.removeprefix(turn)
    thinks = bool(conversation.thinking_content) or conversation.force_think_block
    block = f"<think>\n{conversation.thinking_content or ''}\n</think>\n" if thinks else ""
    assert rest == block + (conversation.assistant_content or "")


@given(conversations)
def test_the_answer_is_left_open(conversation: Conversation) -> None:
    given_ends = sum(
        (text or "").count("<|im_end|>")
        for text in (
            conversation.user_text,
            conversation.system_prompt,
            conversation.thinking_content,
            conversation.assistant_content,
        )
    )
    ends = 2 if conversation.system_prompt else 1
    assert format_prompt(conversation).count("<|im_end|>") == ends + given_ends


@given(words, words, words)
def test_strip_quotes_removes_quotes_of_the_prompt_alone(prompt: str, thinking: str, system: str) -> None:
    quoted = {"system_prompt": f'"{system}"', "thinking_content": f'"{thinking}"', "assistant_content": '"So:"'}
    stripped = Conversation(prompt=f'"{prompt}" "', strip_quotes=True, **quoted)
    assert stripped.user_text == f"{prompt} ".replace('"', "")
    without_quotes = Conversation(prompt=stripped.user_text, **quoted)
    assert format_prompt(stripped) == format_prompt(without_quotes)


@pytest.mark.parametrize("quote", ["'", "\N{LEFT DOUBLE QUOTATION MARK}", "\N{RIGHT DOUBLE QUOTATION MARK}", "`"])
def test_strip_quotes_keeps_other_quotes(quote: str) -> None:
    assert Conversation(prompt=f"{quote}cat{quote}", strip_quotes=True).user_text == f"{quote}cat{quote}"


@given(conversations)
def test_none_and_empty_mean_the_same(conversation: Conversation) -> None:
    emptied = Conversation(
        prompt=conversation.prompt,
        system_prompt=conversation.system_prompt or "",
        thinking_content=conversation.thinking_content or "",
        assistant_content=conversation.assistant_content or "",
        force_think_block=conversation.force_think_block,
        strip_quotes=conversation.strip_quotes,
    )
    assert format_prompt(emptied) == format_prompt(conversation)


@pytest.mark.parametrize(
    "prompt", ["A cat sleeping", "两只猫", 'a sign that says "OPEN"', "  two\n\nlines  ", "naïve café 🎨", "{{ x }}"]
)
def test_plain_prompts_are_what_the_tokenizers_template_gives(tiny_checkpoint: Path, prompt: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    assert format_prompt(Conversation(prompt=prompt)) == expected


def test_the_unconditional_text_is_an_empty_user_message(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    assert format_prompt(Conversation(prompt="")) == expected
