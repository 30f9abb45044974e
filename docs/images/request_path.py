"""Draw request_path.svg, a request's path through the services: `python3 docs/images/request_path.py`.

Standard library only. The picture brings its own background, so it is legible on any page, and follows the reader's
dark mode where the viewer passes it on.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

TARGET = Path(__file__).with_suffix(".svg")
WIDTH, HEIGHT = 980, 510
STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
.page { fill: #ffffff; stroke: #d5dae1; }
.box { fill: #f4f6f9; stroke: #8a94a3; stroke-width: 1.25; }
.main { fill: #e8f0fe; stroke: #3b6fd4; stroke-width: 1.5; }
.wire { stroke: #566072; stroke-width: 1.5; fill: none; }
.head { fill: #566072; }
.name { fill: #1b2330; font-size: 17px; font-weight: 600; }
.note { fill: #4a5464; font-size: 13px; }
.badge { fill: #3b6fd4; }
.number { fill: #ffffff; font-size: 12px; font-weight: 600; }
@media (prefers-color-scheme: dark) {
  .page { fill: #161b22; stroke: #343c48; }
  .box { fill: #202732; stroke: #6b7686; }
  .main { fill: #1c2f52; stroke: #6d9bf1; }
  .wire { stroke: #a3adbb; }
  .head { fill: #a3adbb; }
  .name { fill: #eef2f7; }
  .note { fill: #b4bdca; }
  .badge { fill: #6d9bf1; }
  .number { fill: #10151c; }
}"""


def box(place: tuple[int, int, int, int], name: str, notes: list[str], *, kind: str = "box") -> str:
    """A service at (x, y, width, height): its name, and below it what it does."""
    x, y, width, height = place
    middle = x + width // 2
    lines = [
        f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="10"/>',
        f'<text class="name" x="{middle}" y="{y + 30}" text-anchor="middle">{escape(name)}</text>',
    ]
    for row, note in enumerate(notes):
        at = f'x="{middle}" y="{y + 53 + 19 * row}"'
        lines.append(f'<text class="note" {at} text-anchor="middle">{escape(note)}</text>')
    return "\n".join(lines)


def arrow(start: tuple[int, int], end: tuple[int, int], number: int, notes: list[str]) -> str:
    """A level arrow with its number in the middle; the first note stands above it, the second below."""
    (x1, y), (x2, _) = start, end
    middle, tip = (x1 + x2) // 2, 9 if x2 > x1 else -9
    lines = [
        f'<path class="wire" d="M{x1} {y}H{x2 - tip}"/>',
        f'<path class="head" d="M{x2} {y}l{-tip} -5v10z"/>',
        f'<circle class="badge" cx="{middle}" cy="{y}" r="10"/>',
        f'<text class="number" x="{middle}" y="{y + 4}" text-anchor="middle">{number}</text>',
    ]
    for note, shift in zip(notes, (-17, 27), strict=False):
        at = f'x="{middle}" y="{y + shift}"'
        lines.append(f'<text class="note" {at} text-anchor="middle">{escape(note)}</text>')
    return "\n".join(lines)


def down(x: int, y1: int, y2: int, number: int, note: str) -> str:
    """An arrow from top to bottom with its number in the middle and the note to its right."""
    middle = (y1 + y2) // 2
    lines = [
        f'<path class="wire" d="M{x} {y1}V{y2 - 9}"/>',
        f'<path class="head" d="M{x} {y2}l-5 -9h10z"/>',
        f'<circle class="badge" cx="{x}" cy="{middle}" r="10"/>',
        f'<text class="number" x="{x}" y="{middle + 4}" text-anchor="middle">{number}</text>',
        f'<text class="note" x="{x + 18}" y="{middle + 4}">{escape(note)}</text>',
    ]
    return "\n".join(lines)


def draw() -> str:
    """The whole picture."""
    parts = [
        f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="14"/>',
        box((24, 120, 116, 160), "Client", ["curl, Python,", "zimage"]),
        box((310, 30, 200, 340), "Gateway", GATEWAY, kind="main"),
        box((726, 30, 230, 150), "Encoder", ["Qwen3 text encoder", "text to hidden states", "many texts a forward"]),
        box((726, 220, 230, 150), "Diffusion", ["DiT and VAE", "hidden states to PNG", "one thread owns the device"]),
        box((310, 415, 200, 72), "Redis", ["history, on disk"]),
        arrow((140, 165), (310, 165), 1, ["POST /api/generate", "JSON"]),
        arrow((510, 75), (726, 75), 2, ["POST /v1/hidden_states", "formatted prompt"]),
        arrow((726, 140), (510, 140), 3, ["", "hidden states, safetensors"]),
        arrow((510, 265), (726, 265), 4, ["POST /v1/generate", "the same bytes + parameters"]),
        arrow((726, 330), (510, 330), 5, ["", "PNG, thumbnail"]),
        down(410, 370, 415, 6, "request, PNG, thumbnail"),
        arrow((310, 240), (140, 240), 7, ["", "PNG, X-Seed,"]),
        '<text class="note" x="225" y="286" text-anchor="middle">Server-Timing</text>',
    ]
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    title = "<title>A request's path: client, gateway, encoder, gateway, diffusion, gateway, Redis, client</title>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n{title}\n<style>{STYLE}\n</style>'
    return "\n".join([head, *parts, "</svg>\n"])


GATEWAY = [
    "validates the fields",
    "draws a missing seed",
    "applies the template",
    "writes the chat format",
    "",
    "passes tensor bytes on,",
    "never reads them",
    "",
    "writes the parameters",
    "into the PNG",
]

if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
