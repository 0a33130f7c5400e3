"""A drawing on its way into the corpus, and the rules every source shares: names, concepts, licences, refusals."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

LICENCES = frozenset({"MIT", "Apache-2.0", "ISC", "BSD-3-Clause", "CC0-1.0", "LicenseRef-public-domain"})
"""What a stored drawing may be under. Share-alike and attribution-only-by-page licences stay out of the core."""

# Gestures, religion, politics, brands, gore, weapons, alcohol, tobacco, sex: a picture book for a small model
# needs none of them.
_REFUSED = (
    r"pistol|guns?|rifles?|revolver|bombs?|grenade|dagger|swords?|knives|weapons?|missile|cannon|ammunition|"
    r"bullets?|tank|blood\w*|corpse|coffin|headstone|gravestone|grave|tomb\w*|funeral|skulls?|skeleton|death|"
    r"dead|kill\w*|suicide|gallows|noose|guillotine|murder|war|army|soldiers?|military|nazi|swastika|hitler|"
    r"stalin|lenin|mao|beers?|wine|whisky|whiskey|vodka|sake|cocktail|champagne|alcohol\w*|martini|drunk|"
    r"clinking|toast|brandy|liquor|cigarettes?|cigars?|smoking|tobacco|cannabis|marijuana|drugs?|church\w*|"
    r"mosque|temple|synagogue|shrine|kaaba|crucifix\w*|jesus|christ|bible|koran|quran|buddha\w*|hindu|islam\w*|"
    r"muslim|jewish|christian\w*|catholic|orthodox|priest|nun|monk|pope|bishop|rabbi|prayer|praying|saints?|"
    r"angel|devil|satan\w*|demon|menorah|khanda|dharma|worship|religio\w*|ganesha?|krishna|shiva|allah|torah|"
    r"nativity|communis\w*|socialis\w*|fascis\w*|anarch\w*|politic\w*|president|bush|obama|hammer and sickle|"
    r"party logo|protest|sex\w*|nude\w*|naked|porn\w*|breast\w*|penis|vagina|kiss\w*|love hotel|bikini|"
    r"lingerie|logos?|brand|trademark|trade mark|copyright|registered|linux|tux|debian|ubuntu|gnu|microsoft|"
    r"windows|apple inc|google|facebook|twitter|tiktok|github|gitlab|bitcoin|ethereum|litecoin|dogecoin|"
    r"middle finger|pile of poo|poop|weixin|wechat|bytedance|alipay|baokemeng|pokeball|nintendo|airplay|xbox|"
    r"playstation|hummer|sperm|http|crossbones|chevrolet|toyota|skoda|pimp|pantyhose|thongs|poison|liqueur|airpods|disney|"
    r"avengers|panties|briefs|pregnan\w*|death star|frigate|tattoo|bong|ankh|torii|swearing|toilet paper"
)
REFUSED = re.compile(rf"(?<![a-z])(?:{_REFUSED})(?![a-z])")


@dataclass(frozen=True, kw_only=True)
class Draft:
    """One drawing of one source. ``image`` is RGBA at its stored size; ``key`` is its own concept before joining."""

    source: str
    path: str
    kind: str
    key: str
    name_en: str
    name_zh: str | None
    category: str | None
    licence: str
    image: Image.Image
    author: str | None = None
    keywords_en: Sequence[str] = field(default=())
    keywords_zh: Sequence[str] = field(default=())
    description: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def normalise(name: str) -> str:
    """The form in which two names are compared: no case, accents, punctuation or article."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c)).casefold()
    words = re.sub(r"[\W_]+", " ", plain).split()
    while len(words) > 1 and words[0] in ("a", "an", "the"):
        words.pop(0)
    return " ".join(words)


def refused(*names: str | None) -> bool:
    """Whether any of the names is on the list of things the corpus leaves out."""
    return any(REFUSED.search(normalise(name)) for name in names if name)


def join(drafts: Sequence[Draft]) -> list[str]:
    """The concept of each draft: drafts that share a key, an English name or a Chinese name are one concept.

    A concept is called after its smallest member in the order emoji, flag, name, so that adding a source to the
    corpus rarely renames (and so rarely moves) what is already there.
    """
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for draft in drafts:
        names = [f"name:{normalise(draft.name_en)}"]
        if draft.name_zh:
            names.append(f"zh:{normalise(draft.name_zh)}")
        for name in names:
            first, second = sorted((root(draft.key), root(name)), key=_rank)
            parent[second] = first
    return [root(draft.key) for draft in drafts]


def _rank(node: str) -> tuple[int, str]:
    return ("emoji", "flag", "name", "zh").index(node.split(":")[0]), node


def split_of(concept: str) -> str:
    """``train`` (90 %), ``validation`` (5 %) or ``test`` (5 %), from the concept alone."""
    bucket = int.from_bytes(hashlib.sha256(concept.encode()).digest()[:8], "big") % 100
    return "train" if bucket < 90 else "validation" if bucket < 95 else "test"


def fit(image: Image.Image, side: int) -> Image.Image:
    """Trim fully transparent borders and scale down so that the longer side is at most ``side`` pixels."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box is None:
        raise ValueError("fully transparent")
    image = image.crop(box)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image
