"""What the gateway does with PNGs without opening them: adds the parameters that made one, joins several."""

import json
import secrets
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

KEYWORD = b"zimage"
_HEADER_END = 33  # signature (8 bytes) and the IHDR chunk (25), which every PNG begins with


def with_parameters(png: bytes, parameters: Mapping[str, Any]) -> bytes:
    """The PNG with a `tEXt` chunk "zimage" that holds the parameters as ASCII JSON."""
    content = KEYWORD + b"\0" + json.dumps(dict(parameters), separators=(",", ":")).encode("ascii")
    checksum = struct.pack(">I", zlib.crc32(b"tEXt" + content))
    chunk = struct.pack(">I", len(content)) + b"tEXt" + content + checksum
    return b"".join((memoryview(png)[:_HEADER_END], chunk, memoryview(png)[_HEADER_END:]))


def multipart(parts: Sequence[tuple[Mapping[str, str], bytes]]) -> tuple[str, list[bytes]]:
    """The media type and the pieces of a `multipart/mixed` body (RFC 2046) of parts with headers."""
    boundary = f"zimage-{secrets.token_hex(16)}"
    pieces = []
    for headers, body in parts:
        lines = [f"--{boundary}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        pieces += ["\r\n".join(lines).encode(), body, b"\r\n"]
    return f"multipart/mixed; boundary={boundary}", [*pieces, f"--{boundary}--\r\n".encode()]
