"""What the gateway adds to a PNG without opening it: a text chunk with the parameters that made it."""

import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

KEYWORD = b"zimage"
_HEADER_END = 33  # signature (8 bytes) and the IHDR chunk (25), which every PNG begins with


def with_parameters(png: bytes, parameters: Mapping[str, Any]) -> bytes:
    """The PNG with a `tEXt` chunk "zimage" that holds the parameters as ASCII JSON."""
    content = KEYWORD + b"\0" + json.dumps(dict(parameters), separators=(",", ":")).encode("ascii")
    checksum = struct.pack(">I", zlib.crc32(b"tEXt" + content))
    chunk = struct.pack(">I", len(content)) + b"tEXt" + content + checksum
    return b"".join((memoryview(png)[:_HEADER_END], chunk, memoryview(png)[_HEADER_END:]))
