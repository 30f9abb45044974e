"""Reads a Qwen3-VL directory: configuration, processor and tokenizer; the weights come later."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from services.vl.model import ModelFacts, VisionModel
from services.vl.settings import VlSettings
from services.vl.tokens import ASSISTANT, ENDS, Layout
from shared.checkpoint import UnusableModel, checkpoint_dtype, read_json, require_weights
from shared.fingerprint import fingerprint_of
from shared.tensors import dtype_of, pick_device

MODEL_TYPE = "qwen3_vl"
TARGET_STD = "zimage_target_std"  # the key under which a checkpoint's config.json carries its own
PUBLISHED_TARGET_STD = 58.75  # standard deviation of Qwen3-4B's hidden states -2, where neither says another


def load_vision_model(settings: VlSettings) -> VisionModel:
    """Reads everything of the directory but the weights, whose headers are checked. Raises UnusableModel."""
    folder = _folder(settings)
    config = read_json(folder / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        raise UnusableModel(f"{folder} is not a Qwen3-VL model, but of the type {config.get('model_type')!r}")
    require_weights(folder)
    device, dtype = (
        pick_device(settings.vl_device),
        dtype_of(settings.vl_dtype, checkpoint_dtype(folder), pick_device(settings.vl_device)),
    )
    processor, tokenizer = _processor(folder, settings.vl_max_pixels), _tokenizer(folder)
    target_std = _target_std(settings, config)
    name = str(dtype).removeprefix("torch.")
    try:
        text = config["text_config"]
        width, layers, image = text["hidden_size"], text["num_hidden_layers"], config["image_token_id"]
    except (KeyError, TypeError):
        raise UnusableModel(f"{folder / 'config.json'} lacks what a Qwen3-VL model needs") from None
    fingerprint = partial(fingerprint_of, [folder], f"{name} {target_std!r} {dict(processor.size)}")
    facts = ModelFacts(
        name=folder.resolve().name,
        path=str(folder),
        width=width,
        layers=layers,
        dtype=name,
        device=str(device),
        target_std=target_std,
        fingerprint=fingerprint(),
        ends=_ends(config, tokenizer),
        openings={choice: _opening(tokenizer, enable_thinking=choice) for choice in (None, True, False)},
    )
    return VisionModel(folder, processor, Layout(tokenizer.backend_tokenizer, image), facts, dtype, fingerprint)


def _folder(settings: VlSettings) -> Path:
    folder = settings.vl_model_folder
    if folder is None:
        raise UnusableModel("no vision-language model is given: name its directory with --vl-model-path")
    if not folder.is_dir():
        raise UnusableModel(f"the model directory {folder} does not exist")
    return folder


def _target_std(settings: VlSettings, config: Mapping[str, Any]) -> float:
    """What is set, else the checkpoint's own, else that of the published weights. Raises UnusableModel."""
    if settings.vl_target_std is not None:
        return settings.vl_target_std
    own = config.get(TARGET_STD, PUBLISHED_TARGET_STD)
    if isinstance(own, bool) or not isinstance(own, int | float) or not 0 < own < float("inf"):
        raise UnusableModel(f"'{TARGET_STD}' of the vision-language model is {own!r}, which is no standard deviation")
    return float(own)


def _processor(folder: Path, max_pixels: int) -> Any:
    """The picture processor of the directory, with a pixel budget of at most `max_pixels`."""
    read_json(folder / "preprocessor_config.json")
    try:
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        budget = {name: processor.size[name] for name in ("shortest_edge", "longest_edge")}
    except (OSError, ValueError, TypeError, KeyError):
        raise UnusableModel(f"{folder / 'preprocessor_config.json'} is not that of a Qwen3-VL model") from None
    longest = min(budget["longest_edge"], max_pixels)
    processor.size = {"shortest_edge": min(budget["shortest_edge"], longest), "longest_edge": longest}
    return processor


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError):
        raise UnusableModel(f"{folder} holds no tokenizer that can be read") from None


def _ends(config: Mapping[str, Any], tokenizer: Any) -> frozenset[int]:
    known = tokenizer.get_added_vocab()
    named = (tokenizer.eos_token_id, config.get("eos_token_id"), *map(known.get, ENDS))
    return frozenset(token for token in named if isinstance(token, int))


def _opening(tokenizer: Any, *, enable_thinking: bool | None) -> str:
    if not tokenizer.chat_template:
        return ""
    options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    messages = [{"role": "user", "content": "-"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    except TemplateError:
        raise UnusableModel("the vision-language model's chat template takes no plain conversation") from None
    return str(text.rpartition(ASSISTANT)[2]) if ASSISTANT in text else ""
