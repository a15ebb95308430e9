"""Texts as bytes."""

from __future__ import annotations


def cut_text(text: bytes, max_bytes: int) -> bytes:
    """The longest beginning of a text in UTF-8 that has at most so many bytes and only whole characters."""
    if len(text) <= max_bytes:
        return text
    end = max_bytes
    while end and text[end] & 0xC0 == 0x80:  # a byte inside a character
        end -= 1
    return text[:end]
