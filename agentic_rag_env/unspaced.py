"""Knows the scripts that are written without blanks between words."""

from __future__ import annotations

import re

#: The characters of these scripts, to stand in a class of a pattern: Thai and Lao, Myanmar, Khmer, and the signs, kana
#: and ideographs of Chinese and Japanese.
UNSPACED_CHARS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
#: One of these characters with its marks, such as vowel signs and tones, which Python's `\w` lacks.
UNSPACED = re.compile(rf"[{UNSPACED_CHARS}](?:(?!\w)[{UNSPACED_CHARS}])*")
