"""The vision-language model against transformers' own, bit for bit; directories that are no such model."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import forget_weights
from pictures import pixels
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from services.vl.loading import load_vision_model
from services.vl.model import Inputs, VisionModel
from services.vl.scaling import scale
from services.vl.settings import VlSettings
from shared.checkpoint import UnusableModel
from shared.errors import InvalidField, NumericalError
from shared.language.options import Sampling

SIZES = [(256, 256), (96, 64), (33, 500), (640, 416), (1200, 900)]


def layout(count: int, text: str = "") -> str:
    """The text of a turn with a picture, as Qwen3-VL's chat template has it."""
    picture = f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"
    return f"<|im_start|>user\n{picture}{text}<|im_end|>\n<|im_start|>assistant\n"


def given(theirs: Any, inputs: Inputs) -> dict[str, torch.Tensor]:
    ids = torch.tensor([list(inputs.ids)])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": inputs.patches,
        "image_grid_thw": inputs.grid,
        "mm_token_type_ids": (ids == theirs.config.image_token_id).int(),
    }


def prepared(model: VisionModel, width: int = 96, height: int = 64, text: str = "") -> Inputs:
    return model.prepare(pixels(width, height), text, None, max_tokens=8192)


@pytest.mark.parametrize("size", SIZES)
def test_inputs_are_those_of_the_processor(
    vision_model: VisionModel, tiny_vision_checkpoint: Path, size: tuple[int, int]
) -> None:
    read = Qwen2VLImageProcessorPil.from_pretrained(tiny_vision_checkpoint)(images=[pixels(*size)], return_tensors="pt")
    count = int(read["image_grid_thw"].prod()) // 4
    tokenizer = AutoTokenizer.from_pretrained(tiny_vision_checkpoint)
    inputs = prepared(vision_model, *size, text="A description, with 中文.")
    assert torch.equal(inputs.patches, read["pixel_values"])
    assert torch.equal(inputs.grid, read["image_grid_thw"])
    expected = tokenizer(layout(count, "A description, with 中文."), add_special_tokens=False).input_ids
    assert list(inputs.ids) == expected


def test_a_square_picture_of_256_pixels_has_64_tokens(vision_model: VisionModel) -> None:
    inputs = prepared(vision_model, 256, 256)
    assert inputs.grid.tolist() == [[1, 16, 16]]
    image = vision_model.hidden_states(inputs, -2, image_tokens_only=True)
    assert image.shape == (64, vision_model.facts.width)


@pytest.mark.parametrize("layer", range(-6, 0))
@pytest.mark.parametrize("size", SIZES[:4])
def test_hidden_states_equal_transformers_own(
    vision_model: VisionModel, theirs: Any, layer: int, size: tuple[int, int]
) -> None:
    inputs = prepared(vision_model, *size, text="a cat")
    with torch.no_grad():
        output = theirs(**given(theirs, inputs), output_hidden_states=True, use_cache=False)
    whole = vision_model.hidden_states(inputs, layer, image_tokens_only=False)
    assert torch.equal(whole, output.hidden_states[layer][0])
    of_picture = torch.tensor(inputs.ids) == theirs.config.image_token_id
    assert torch.equal(vision_model.hidden_states(inputs, layer, image_tokens_only=True), whole[of_picture])


def test_special_tokens_in_a_text_are_text(vision_model: VisionModel) -> None:
    plain = prepared(vision_model)
    tricky = prepared(vision_model, text="<|image_pad|><|vision_start|><|im_end|>")
    image = vision_model._layout.image
    assert list(tricky.ids).count(image) == list(plain.ids).count(image)
    assert vision_model.hidden_states(tricky, -2, image_tokens_only=False).shape[0] == len(tricky.ids)


def test_unloading_and_loading_again_changes_nothing(vision_model: VisionModel) -> None:
    inputs = prepared(vision_model)
    before = vision_model.hidden_states(inputs, -2, image_tokens_only=False)
    vision_model.unload()
    assert not vision_model.loaded
    assert torch.equal(vision_model.hidden_states(inputs, -2, image_tokens_only=False), before)


def test_writing_follows_transformers_own_scores(vision_model: VisionModel, theirs: Any) -> None:
    """Every token is the likeliest by a forward of all that came before, with extractions in between."""
    inputs = prepared(vision_model, text="What is it?")
    written = vision_model.write(inputs, Sampling(seed=1, temperature=0.9))
    tokens = []
    for token in itertools.islice(written, 6):
        tokens.append(token)
        vision_model.hidden_states(prepared(vision_model, 200, 64), -1, image_tokens_only=False)
    greedy = vision_model.write(
        Inputs([*inputs.ids, *tokens], inputs.patches, inputs.grid), Sampling(seed=1, temperature=0)
    )
    with torch.no_grad():
        output = theirs(**given(theirs, Inputs([*inputs.ids, *tokens], inputs.patches, inputs.grid)))
    assert next(greedy) == output.logits[0, -1].argmax().item()
    again = vision_model.write(inputs, Sampling(seed=1, temperature=0.9))
    assert list(itertools.islice(again, 6)) == tokens


def test_too_many_tokens_are_refused(vision_model: VisionModel) -> None:
    with pytest.raises(InvalidField, match="the limit is 20"):
        vision_model.prepare(pixels(256, 256), "", None, max_tokens=20)


def test_large_pictures_are_scaled_into_the_budget(tiny_vision_checkpoint: Path) -> None:
    model = load_vision_model(VlSettings(vl_model_path=tiny_vision_checkpoint, vl_max_pixels=128 * 128))
    assert int(prepared(model, 3000, 2000).grid.prod()) * 16 * 16 <= 128 * 128


@pytest.mark.parametrize("layer", [-9, 0])
def test_layers_that_are_not_there(vision_model: VisionModel, layer: int) -> None:
    with pytest.raises(InvalidField, match="between -8 and -1"):
        vision_model.check_layer(layer)


def test_the_fingerprint_tells_models_apart(tiny_vision_checkpoint: Path, tmp_path: Path) -> None:
    def fingerprint(folder: Path, **settings: Any) -> str:
        return load_vision_model(VlSettings(vl_model_path=folder, **settings)).facts.fingerprint

    first = fingerprint(tiny_vision_checkpoint)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_vision_checkpoint, copy)
    assert fingerprint(copy) == first
    assert fingerprint(copy, vl_dtype="bfloat16") != first
    assert fingerprint(copy, vl_target_std=12.0) != first
    assert fingerprint(copy, vl_max_pixels=1 << 14) != first
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5000:] = bytes(5000)
    weights.write_bytes(data)
    assert fingerprint(copy) != first


def test_a_checkpoint_carries_its_own_target(tiny_vision_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(tiny_vision_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "zimage_target_std": 1.5}))
    assert load_vision_model(VlSettings(vl_model_path=folder)).facts.target_std == 1.5
    for given in (7.0, 58.75):  # what is set wins, be it the published value
        assert load_vision_model(VlSettings(vl_model_path=folder, vl_target_std=given)).facts.target_std == given
    assert load_vision_model(VlSettings(vl_model_path=tiny_vision_checkpoint)).facts.target_std == 58.75
    for broken in (0, -1.0, "large", None, True):
        (folder / "config.json").write_text(json.dumps({**config, "zimage_target_std": broken}))
        with pytest.raises(UnusableModel, match="no standard deviation"):
            load_vision_model(VlSettings(vl_model_path=folder))


def test_an_answer_begins_as_the_chat_template_says(tiny_vision_checkpoint: Path, tmp_path: Path) -> None:
    model = load_vision_model(VlSettings(vl_model_path=tiny_vision_checkpoint))
    assert model.facts.openings == {None: "", True: "", False: "<think>\n\n</think>\n\n"}
    plain = prepared(model, text="What is it?")
    opening = model.facts.openings[False]
    opened = model.prepare(pixels(), "What is it?", None, opening=opening, max_tokens=8192)
    tokenizer = AutoTokenizer.from_pretrained(tiny_vision_checkpoint)
    assert [*plain.ids, *tokenizer(opening, add_special_tokens=False).input_ids] == opened.ids
    folder = tmp_path / "own"
    shutil.copytree(tiny_vision_checkpoint, folder)
    template = folder / "chat_template.jinja"
    thinks = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    for text, expected in ((thinks, "<think>\n"), ("another form", "")):
        template.write_text(text)
        facts = load_vision_model(VlSettings(vl_model_path=folder)).facts
        assert set(facts.openings.values()) == {expected}
    template.write_text("{{ raise_exception('no') }}")
    with pytest.raises(UnusableModel, match="chat template"):
        load_vision_model(VlSettings(vl_model_path=folder))
    template.unlink()
    assert set(load_vision_model(VlSettings(vl_model_path=folder)).facts.openings.values()) == {""}


def _broken(name: str) -> Any:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(b"{")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_broken("config.json"), "config.json is missing or is not JSON"),
        (_broken("preprocessor_config.json"), "preprocessor_config.json is missing or is not JSON"),
        (_broken("model.safetensors"), "cannot be read as safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no .safetensors weights"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "qwen3"}'), "not a Qwen3-VL model"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "qwen3_vl"}'), "lacks what"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_directories_that_cannot_be_used(tiny_vision_checkpoint: Path, tmp_path: Path, spoil: Any, told: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_vision_checkpoint, folder)
    spoil(folder)
    with pytest.raises(UnusableModel, match=told):
        load_vision_model(VlSettings(vl_model_path=folder))


def test_weights_that_lack_a_layer_are_refused_once_they_are_read(tiny_vision_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_vision_checkpoint, tmp_path / "model"))
    forget_weights(folder, "language_model.layers.1.")
    with pytest.raises(UnusableModel, match=r"is not complete: it lacks model\.language_model\.layers\.1"):
        load_vision_model(VlSettings(vl_model_path=folder)).load()


def test_weights_that_come_back_are_those_of_the_start(tiny_vision_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_vision_checkpoint, tmp_path / "model"))
    model = load_vision_model(VlSettings(vl_model_path=folder))
    model.load()
    model.unload()
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"else")
    with pytest.raises(UnusableModel, match="not those that were there at the start"):
        model.load()
    assert not model.loaded


def test_no_directory_at_all() -> None:
    with pytest.raises(UnusableModel, match="--vl-model-path"):
        load_vision_model(VlSettings(model_path=Path("other")))


def test_scaling() -> None:
    states = torch.randn(20, 8) * 13
    scaled = scale(states, 58.75)
    assert scaled.original_std == pytest.approx(states.std(correction=0).item())
    assert scaled.scaled_std == pytest.approx(58.75, rel=1e-5)
    torch.testing.assert_close(scaled.states, states * 58.75 / scaled.original_std)
    assert torch.equal(scale(states, None).states, states)
    assert torch.equal(scale(torch.zeros(3, 8), 58.75).states, torch.zeros(3, 8))
    with pytest.raises(NumericalError):
        scale(torch.full((2, 8), torch.nan), 58.75)
