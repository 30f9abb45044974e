"""Reads a generation request off the wire: the header is judged before the tensors' bytes are taken in."""

from collections.abc import AsyncIterator, Callable

from pydantic import ValidationError

from services.diffusion.parts import ModelFacts
from shared.errors import InvalidField, MalformedBody
from shared.problems import from_validation
from shared.schemas.diffusion import NEGATIVE, PARAMETERS, TEXT, DiffusionParameters
from shared.wire import PREFIX_BYTES, Header, TensorMeta, WireError, header_bytes, parse_header

MAX_TEXT_TOKENS = 40_960  # Qwen3's own longest sequence
FLOATS = ("BF16", "F32", "F16")


async def read_message(
    body: AsyncIterator[bytes], judge: Callable[[Header], DiffusionParameters]
) -> tuple[bytearray, Header, DiffusionParameters]:
    """The whole message in one buffer, its header, and the parameters that `judge` finds in the header.

    `judge` may refuse before the rest is read. Raises InvalidField for a body that is not what its header announces.
    """
    message = bytearray()
    header, parameters = None, None
    try:
        async for piece in body:
            message += piece
            if header is None and len(message) >= PREFIX_BYTES and len(message) >= header_bytes(message):
                header = parse_header(message)
                parameters = judge(header)
            if header is not None and len(message) > header.total_bytes:
                break
    except WireError as error:
        raise InvalidField(f"The safetensors body cannot be used: {error}.") from None
    if header is None or parameters is None or len(message) != header.total_bytes:
        raise InvalidField("The safetensors body is shorter or longer than its header says.")
    return message, header, parameters


def judge_header(header: Header, facts: ModelFacts, *, max_pixels: int) -> DiffusionParameters:
    """The parameters of a message whose tensors the model can take. Raises InvalidField, MalformedBody."""
    parameters = _read_parameters(header)
    _check_size(parameters, facts, max_pixels)
    negative = (NEGATIVE,) if parameters.guidance_scale > 0 else ()
    for name in (TEXT, *negative, *parameters.references):
        _check_embeddings(name, header.tensor(name), facts.text_width)
    return parameters


def _read_parameters(header: Header) -> DiffusionParameters:
    text = header.metadata.get(PARAMETERS)
    if text is None:
        raise InvalidField(f"The metadata entry '{PARAMETERS}' is required.")
    try:
        return DiffusionParameters.model_validate_json(text)
    except ValidationError as error:
        errors = [{**item, "loc": (PARAMETERS, *item["loc"])} for item in error.errors()]
        if errors[0]["type"] in ("json_invalid", "string_unicode"):
            raise MalformedBody(f"The metadata entry '{PARAMETERS}' is not JSON.") from None
        raise from_validation(errors) from None


def _check_size(parameters: DiffusionParameters, facts: ModelFacts, max_pixels: int) -> None:
    pixels = parameters.width * parameters.height
    if pixels > max_pixels:
        raise InvalidField(f"'width' times 'height' must be at most {max_pixels} pixels, not {pixels}.")
    for name, side, longest in (
        ("width", parameters.width, facts.max_width_px),
        ("height", parameters.height, facts.max_height_px),
    ):
        if side > longest:
            raise InvalidField(f"'{name}' must be at most {longest} pixels for this model, not {side}.")


def _check_embeddings(name: str, meta: TensorMeta | None, width: int) -> None:
    if meta is None:
        raise InvalidField(f"The tensor '{name}' is required.")
    if meta.dtype not in FLOATS:
        raise InvalidField(f"The tensor '{name}' must be one of {', '.join(FLOATS)}, not {meta.dtype}.")
    if len(meta.shape) != 2 or meta.shape[1] != width:
        raise InvalidField(f"The tensor '{name}' must have the shape [tokens, {width}], not {list(meta.shape)}.")
    if not 1 <= meta.shape[0] <= MAX_TEXT_TOKENS:
        raise InvalidField(f"The tensor '{name}' must have 1 to {MAX_TEXT_TOKENS} tokens, not {meta.shape[0]}.")
