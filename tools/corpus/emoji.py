"""Two styles of emoji (Fluent 3D, Noto) named in English and Chinese by emojibase.

Files are named by code points. The variation selector ``fe0f`` is dropped on both sides before joining, skin tones are
left out, and the gender signs are dropped from the concept key: a man and a woman rowing are drawn almost alike.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from corpus.drafts import Draft, fit, refused
from corpus.packages import members
from PIL import Image

SIDE = 112
_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")

# emojibase subgroup -> category. None keeps the drawing without one; a subgroup that is not listed is left out
# (hands and gestures, religion, gender signs, skin tones, heart and hair components).
_CATEGORY: dict[str, str | None] = {
    **dict.fromkeys(
        ("face-smiling face-affection face-tongue face-hand face-neutral-skeptical face-sleepy face-unwell face-hat "
         "face-glasses face-concerned face-negative").split(),
        "face",
    ),
    "face-costume": None, "cat-face": "animal", "monkey-face": "animal", "heart": "symbol", "emotion": "symbol",
    "body-parts": "body", "person": "person", "person-role": "person", "person-fantasy": None,
    "person-activity": "person", "person-sport": "sport", "person-resting": "person", "family": "person",
    "person-symbol": None,
    **{f"animal-{k}": "animal" for k in ("mammal", "bird", "amphibian", "reptile", "marine", "bug")},
    "plant-flower": "plant", "plant-other": "plant",
    **{f"food-{k}": "food" for k in ("fruit", "vegetable", "prepared", "asian", "sweet")},
    "drink": "drink", "dishware": "household",
    "place-map": None, "place-geographic": "place", "place-building": "building", "place-other": None,
    "transport-ground": "vehicle", "transport-water": "vehicle", "transport-air": "vehicle", "hotel": None,
    "time": None, "sky-weather": "weather", "event": None, "award-medal": None, "sport": "sport", "game": None,
    "arts-crafts": None, "clothing": "clothing", "sound": None, "music": "music", "musical-instrument": "music",
    "phone": "device", "computer": "device", "light-video": None, "book-paper": "stationery", "money": "money",
    "mail": None, "writing": "stationery", "office": "stationery", "lock": None, "tool": "tool", "science": None,
    "medical": None, "household": "household", "other-object": None,
    "transport-sign": "symbol", "warning": "symbol", "arrow": "symbol", "zodiac": "symbol", "av-symbol": "symbol",
    "math": "symbol", "punctuation": "symbol", "currency": "symbol", "other-symbol": "symbol", "keycap": "symbol",
    "alphanum": "symbol", "geometric": "symbol", "flag": None, "country-flag": "flag", "subdivision-flag": "flag",
}  # fmt: skip

# Members that do not belong to what their subgroup says: no category rather than a wrong one.
_UNCLEAR = frozenset(
    (
        "anchor|seat|bus stop|motorway|railway track|oil drum|fuel pump|wheel|police car light|"
        "horizontal traffic light|vertical traffic light|stop sign|construction|station|ring buoy|satellite|"
        "flying saucer|parachute|skateboard|roller skate|brick|rock|wood|wedding|building construction|houses|"
        "Statue of Liberty|feather|wing|spider web|microbe|spiral shell|coral|paw prints|pig nose|rosette|bouquet|"
        "empty nest|nest with eggs|mushroom|baby bottle|teapot|ice|pouring liquid|camping|national park|"
        "thermometer|ringed planet|milky way|comet|star|glowing star|shooting star|high voltage|fire|droplet|"
        "water wave|closed umbrella|umbrella|umbrella on ground|snowman|snowman without snow|gem stone|"
        "hair pick|lipstick|prayer beads|folding hand fan|purse|handbag|clutch bag|shopping bags|backpack|"
        "goal net|flag in hole|bow and arrow|link|broken chain|chains|shield|balance scale|white cane|magnet|"
        "wastebasket|bar chart|chart increasing|chart decreasing|chart increasing with yen|receipt|coin|"
        "treasure chest|kiss mark|hole|love letter|broom|bathtub|hot dog|canned food|egg|salt|ginger root|level slider|"
        "control knobs|radio|headphone|studio microphone|microphone|amphora|tropical fish|fried shrimp|"
        "takeout box|label|bookmark|bookmark tabs|bomb|boomerang|map of Japan|mechanical arm|mechanical leg|bone|"
        "horse racing|running shirt|martial arts uniform|fishing pole|diving mask|battery|low battery|"
        "electric plug|computer disk|optical disk|dvd|abacus|mountain cableway|aerial tramway|suspension railway|"
        "dodo|dragon|dragon face|unicorn|phoenix|sauropod|T-Rex|mammoth|fight cloud|speaking head|"
        "rescue worker’s helmet"
    ).split("|")
)
_UNCLEAR_KEPT = frozenset(("tropical fish", "dodo", "sauropod", "T-Rex", "mammoth"))

_LEFT_OUT = re.compile(
    r"turban|skullcap|headscarf|veil$|pregnant|feeding|baby angel|Mx Claus|bunny ears|levitating|kiss|"
    r"couple with heart|transgender|rainbow flag|pirate flag|Japanese “|symbols on mouth|horns|nazar|hamsa|"
    r"briefs|pinched|finger|biting lip|crossed-out|vomiting|one under eighteen|statue of liberty",
    re.IGNORECASE,
)

# Territories and islands that fly the flag of their state: the picture does not say which it is. In this Noto
# package Sark (cq) is drawn as Saudi Arabia.
PARENT_FLAG = frozenset(
    f"flag:{code}" for code in "ac bl bq bv cp cq dg ea gf gp hm ic mf mq nc pm re sh sj ta tf um wf yt".split()
)


def _code(hexcode: str) -> str:
    return hexcode.lower().replace("-fe0f", "")


def concept_key(code: str) -> str:
    """Concept of an emoji: its code points without fe0f and skin tone, gender made neutral; flags by country code.

    >>> concept_key("1f6a3-200d-2640"), concept_key("1f1eb-1f1f7")
    ('emoji:1f6a3', 'flag:fr')
    """
    points = [p for p in code.split("-") if p not in (*_TONES, "fe0f")]
    if len(points) == 2 and all(0x1F1E6 <= int(p, 16) <= 0x1F1FF for p in points):
        return "flag:" + "".join(chr(int(p, 16) - 0x1F1E6 + ord("a")) for p in points)
    points = ["1f9d1" if p in ("1f468", "1f469") else p for p in points]
    neutral = "-".join(points)
    for sign in ("-200d-2640", "-200d-2642"):
        neutral = neutral.replace(sign, "")
    return "emoji:" + neutral


def labels(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any], str]]:
    """Code without fe0f -> (English entry, Chinese entry, subgroup name)."""
    base = "package/"
    wanted = {base + "en/data.json", base + "zh/data.json", base + "meta/groups.json"}
    files = {path: json.loads(data) for path, data in members(folder, "emojibase", wanted.__contains__).items()}
    chinese = {entry["hexcode"]: entry for entry in files[base + "zh/data.json"]}
    groups = files[base + "meta/groups.json"]["subgroups"]
    return {
        _code(entry["hexcode"]): (entry, chinese[entry["hexcode"]], groups[str(entry["subgroup"])])
        for entry in files[base + "en/data.json"]
        if "subgroup" in entry
    }


def flag_names(folder: Path) -> dict[str, str]:
    """Lower-case ISO country code -> Chinese name."""
    found = {}
    for code, (_, chinese, group) in labels(folder).items():
        if group == "country-flag":
            found[concept_key(code).removeprefix("flag:")] = chinese["label"].split(":", 1)[1].strip()
    return found


def drafts(folder: Path) -> list[Draft]:
    """Every kept emoji of both styles."""
    known = labels(folder)
    found = []
    for source, prefix, suffix, licence in (
        ("fluent", "package/assets/", ".webp", "MIT"),
        ("noto", "package/img/google/64/", ".png", "Apache-2.0"),
    ):
        taken: set[str] = set()

        def wanted(path: str, prefix: str = prefix, suffix: str = suffix) -> bool:
            return path.startswith(prefix) and path.endswith(suffix)

        for path, data in members(folder, source, wanted).items():
            code = _code(path.removeprefix(prefix).removesuffix(suffix))
            if code not in known or code in taken:
                continue
            taken.add(code)
            draft = _draft(source, path, licence, code, known[code], data)
            if draft is not None:
                found.append(draft)
    return found


def _draft(
    source: str, path: str, licence: str, code: str, entry: tuple[dict[str, Any], dict[str, Any], str], data: bytes
) -> Draft | None:
    english, chinese, group = entry
    name_en, name_zh = english["label"], chinese["label"]
    if group not in _CATEGORY or _LEFT_OUT.search(name_en) or refused(name_en):
        return None
    category = None if name_en in _UNCLEAR - _UNCLEAR_KEPT else _CATEGORY[group]
    if category == "flag" and concept_key(code) in PARENT_FLAG:
        return None
    if category == "flag":
        name_en, name_zh = (name.split(":", 1)[1].strip() for name in (name_en, name_zh))
    return Draft(
        source=source,
        path=path,
        kind="flag" if category == "flag" else "emoji",
        key=concept_key(code),
        name_en=name_en.replace("’", "'"),
        name_zh=name_zh,
        category=category,
        licence=licence,
        image=fit(Image.open(io.BytesIO(data)), SIDE),
        keywords_en=english.get("tags", ())[:6],
        keywords_zh=chinese.get("tags", ())[:6],
    )
