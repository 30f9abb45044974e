"""Loads the rewriter's own language model."""

from pathlib import Path

import structlog
from transformers import AutoTokenizer

from services.rewriter.settings import RewriterSettings
from shared.checkpoint import UnusableModel, checkpoint_dtype, require_parts, weight_bytes
from shared.fingerprint import fingerprint_of
from shared.language.model import LanguageModel, load_qwen3
from shared.tensors import dtype_of, pick_device, require_memory

MEMORY_ADVICE = "free some of it, choose another device with devices.rewriter, or rewriter.backend = 'encoder'"

log = structlog.get_logger(__name__)


def load_language_model(settings: RewriterSettings) -> LanguageModel:
    """The language model of `rewriter.model_path`, else of the model directory's text encoder. Raises UnusableModel."""
    name, folder, tokenizer = _folders(settings)
    device = pick_device(settings.rewriter_device)
    dtype = dtype_of(settings.rewriter_dtype, checkpoint_dtype(folder), device)
    require_memory(
        device, weight_bytes(folder, dtype.itemsize), what=f"the language model of {folder}", advice=MEMORY_ADVICE
    )
    model, writes = load_qwen3(folder, device=device, dtype=dtype)
    if not writes:
        raise UnusableModel(f"{folder} holds a language model without its head, which cannot write")
    log.info("language model loaded", folder=str(folder), device=str(device), dtype=str(dtype))
    fingerprint = fingerprint_of(dict.fromkeys((folder, tokenizer)), str(dtype))
    return LanguageModel(model, AutoTokenizer.from_pretrained(tokenizer), name, fingerprint)


def _folders(settings: RewriterSettings) -> tuple[str, Path, Path]:
    """The model's name, the folder of its weights, and that of its tokenizer."""
    if settings.rewriter_model_path is not None:
        folder = require_parts(settings.rewriter_model_path)
        return folder.resolve().name, folder, folder
    root = require_parts(settings.model_folder, *settings.parts)
    return root.resolve().name, root / "text_encoder", root / "tokenizer"
