"""Names and words of the tiny world: fixed pools of single words, some of them with letters beyond ASCII.

The pools do not depend on the seed of a world, so a tokenizer can hold every word as one token. Which entity bears
which name, and every fact about it, is drawn anew for each world.
"""

from __future__ import annotations

import random
import unicodedata

_ONSETS = "b br d dr f fl g gr h j k kl l m n p pr r s sk st t tr v w z".split()
_VOWELS = "a e i o u ai ei ou".split()
_ENDINGS = {
    "person": "n l s ra na lo mi da ko ven rin tas".split(),
    "city": "burg ville ton mar stad grad dal port".split(),
    "company": "ex corp tek soft onic works lab ium".split(),
    "work": "iad ody esta ora elia umen ine oth".split(),
    "country": "ia land istan avia".split(),
    "river": "ell ava isk onde".split(),
    "nickname": "y ie oo ette".split(),
}
_ACCENTED = str.maketrans({"a": "á", "e": "ë", "i": "ï", "o": "ö", "u": "ü", "s": "š", "l": "ł", "n": "ñ"})
_OTHER_SCRIPTS = {
    "person": ["Иван", "Ольга", "Σοφία", "Νίκος", "明美", "健太", "नीला", "ليلى"],
    "city": ["Москвина", "Αθηνόπολη", "東町", "नगरम"],
}


def _invent(kind: str, count: int, taken: set[str]) -> list[str]:
    """`count` pronounceable capitalized words, every eighth with accents; the same list on every machine."""
    draw = random.Random(f"tiny world {kind}")
    names = list(_OTHER_SCRIPTS.get(kind, []))[: count // 8]
    while len(names) < count:
        syllables = draw.choice((1, 1, 2))
        word = "".join(draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(syllables))
        word += draw.choice(_ENDINGS[kind])
        if len(names) % 8 == 0:
            word = word.translate(_ACCENTED)
        name = unicodedata.normalize("NFC", word.capitalize())
        if name not in taken:
            names.append(name)
            taken.add(name)
    return names


def _make_pools() -> dict[str, tuple[str, ...]]:
    taken: set[str] = set()
    sizes = {"person": 128, "city": 64, "company": 64, "work": 48, "country": 16, "river": 16}
    pools = {kind: tuple(_invent(kind, size, taken)) for kind, size in sizes.items()}
    pools["profession"] = tuple(
        "baker pilot nurse tailor farmer judge painter smith "
        "miner sailor tutor chemist barber weaver clerk gardener".split()
    )
    pools["instrument"] = tuple("violin piano flute drum harp cello oboe guitar horn banjo organ lute".split())
    pools["product"] = tuple("tea lamps boots paper clocks honey tiles rope soap maps glass bikes".split())
    pools["genre"] = tuple("satire romance mystery fantasy western drama horror poetry".split())
    pools["nickname"] = tuple(_invent("nickname", 24, taken))
    return pools


#: Words by kind of entity. Nicknames are the aliases of people, cities and companies.
POOLS: dict[str, tuple[str, ...]] = _make_pools()


def entity_name(kind: str, index: int) -> str:
    """The name of the index-th entity of a kind: a single word while the pool lasts, several words after that.

    Args:
        kind: A key of `POOLS`.
        index: From 0.
    """
    pool = POOLS[kind]
    words = [pool[index % len(pool)]]
    while index >= len(pool):
        index = index // len(pool) - 1
        words.append(pool[index % len(pool)])
    return " ".join(words)
