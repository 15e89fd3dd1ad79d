"""Text of strangers on a page: shown as it is, and nothing more than shown."""

from __future__ import annotations

import html
import unicodedata

HIDDEN = {"Cc", "Cf", "Cs", "Co"}
"""Unicode categories of what cannot be seen, and can turn the text around it."""
JOINERS = "\u200c\u200d"
"""Format characters that scripts and emoji are written with."""


def escaped(text: str) -> str:
    """`text` as HTML, with every control character visible."""
    return html.escape("".join(map(_visible, text)))


def _visible(character: str) -> str:
    if character in "\n\t" or character in JOINERS or unicodedata.category(character) not in HIDDEN:
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 32 else f"\u2039U+{code:04X}\u203a"


def memory(size: int) -> str:
    """Bytes, shortened: `14.2 MB`."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """Seconds, shortened: `18 ms`."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def rate(tokens_per_second: float) -> str:
    """Tokens per second, to three digits."""
    return f"{tokens_per_second:.0f}" if tokens_per_second >= 100 else f"{tokens_per_second:.3g}"


def notice(text: str, problem: bool = False) -> str:
    """The line above the answers: its first sentence stands out."""
    if problem:
        return f'<p class="lp-notice lp-problem" role="alert">{escaped(text)}</p>'
    first, stop, rest = text.partition(". ")
    return f'<p class="lp-notice" role="status"><b>{escaped(first + stop.strip())}</b> {escaped(rest)}</p>'
