"""Fonts for the labels of a picture, in any script."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from matplotlib import font_manager, rc_context
from matplotlib.ft2font import FT2Font

FIRST = "DejaVu Sans"
"""Family that comes with matplotlib."""
_PLACEHOLDERS = ("Last Resort", "STIX", "cm")
"""Families that draw boxes, or mathematical glyphs at other code points."""


@contextmanager
def fonts_for(texts: Iterable[str]) -> Iterator[dict[int, str]]:
    """Chooses installed fonts that have the characters of `texts`, for all that matplotlib draws in the context.

    Yields:
        Replacements for `str.translate`: each character that no installed font has, by its code point as <U+1F600>;
        the dollar sign, which would begin mathematics, by an escaped one.
    """
    missing = {ord(character) for text in texts for character in text if not character.isspace()}
    families = [FIRST]
    missing -= _glyphs(font_manager.findfont(FIRST))
    for entry in font_manager.fontManager.ttflist if missing else ():
        if not entry.name.startswith(_PLACEHOLDERS) and (found := missing & _glyphs(entry.fname)):
            families.append(entry.name)
            missing -= found
    with rc_context({"font.family": families}):
        yield {code: f"<U+{code:04X}>" for code in missing} | {ord("$"): r"\$"}


def _glyphs(file: str) -> set[int]:
    """Returns the code points that a font can draw; none if it has bitmaps only, as fonts of coloured emoji have."""
    font = FT2Font(file)
    return set(font.get_charmap()) if font.scalable else set()
