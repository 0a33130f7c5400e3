"""Drawings kept as SVG: national flags, two sets of icons, clip art. Rendered by resvg, without fonts of the machine.

Left out of the clip art: folders of interface icons, plain shapes, maps, flags of history, playing cards, weapons and
religion; drawings with text or embedded photographs; titles that name nothing, or the series instead of the drawing.
"""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import resvg_py
from corpus.drafts import Draft, fit, normalise, refused
from corpus.emoji import PARENT_FLAG, flag_names
from corpus.kinds import agreed, first_match, is_noun
from corpus.packages import members
from PIL import Image

_MAX_SVG_BYTES = 400_000
_NUMERALS = frozenset("one two three four five six seven eight nine ten h v".split())


def render(svg: str, side: int) -> Image.Image:
    """An SVG as RGBA, its longer side ``side`` pixels, drawn at twice that size first. ValueError if it is empty."""
    data = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * side, dpi=96, skip_system_fonts=True))
    image = Image.open(io.BytesIO(data))
    if image.width * image.height > 32_000_000:
        raise ValueError(f"{image.size} pixels")
    return fit(image, side)


def flags(folder: Path) -> list[Draft]:
    """The flags of ISO 3166 countries and territories, with capital and continent as facts."""
    chinese = flag_names(folder)
    wanted = re.compile(r"package/(country\.json|flags/4x3/.*\.svg)")
    files = members(folder, "flag-icons", lambda path: bool(wanted.fullmatch(path)))
    found = []
    for country in sorted(json.loads(files["package/country.json"]), key=lambda entry: entry["code"]):
        if country["iso"] and f"flag:{country['code']}" not in PARENT_FLAG:
            path = f"package/{country['flag_4x3']}"
            facts = {key: country[key] for key in ("capital", "continent") if country.get(key)}
            found.append(
                Draft(
                    source="flag-icons",
                    path=path,
                    kind="flag",
                    key=f"flag:{country['code']}",
                    name_en=country["name"],
                    name_zh=chinese.get(country["code"]),
                    category="flag",
                    licence="MIT",
                    image=render(files[path].decode(), 112),
                    facts=facts,
                )
            )
    return found


# icon-park category -> the kind it suggests (kinds.agreed decides); categories of interface parts, brands, hands and
# people in interfaces are not listed and left out.
_ICON_PARK = {
    "Foods": "food", "Travel": "vehicle", "Sports": "sport", "Clothes": "clothing", "Health": None, "Build": "building",
    "Music": "music", "Animals": "animal", "Baby": "household", "Makeups": None, "Game": None, "Life": "household",
    "Hardware": "device", "Weather": "weather", "Energy": "plant", "Industry": "tool", "Measurement": "tool",
    "Graphics": None, "Time": None, "Office": "stationery", "Constellation": None,
}  # fmt: skip
_ICON_PARK_COLOURS = ("#333", "#2F88FF", "#FFF", "#43CCF8")
_INTERFACE = re.compile(
    r"\b(off|on|add|remove|delete|close|open|disable\w*|download|upload|search|user|users|people|peoples|file|folder|app|"
    r"list|page|edit|error|success|failure|tips|key|collect\w*|share|code|handle|block|mail|doc|txt|excel|ppt|pdf|"
    r"word|html|zip|data|server|plus|minus|check|sort|menu|view|form|full|mini|vip|application|index|setting\w*|other|zodiac|pinwheel)\b"
)


def icon_park(folder: Path) -> list[Draft]:
    """Icons in their own four colours, with Chinese title and English slug."""
    base = "package/"
    wanted = re.compile(r"package/(icons\.json|es/icons/.*\.js)")
    files = members(folder, "icon-park", lambda path: bool(wanted.fullmatch(path)))
    found = []
    for entry in json.loads(files[base + "icons.json"]):
        words = entry["name"].split("-")
        while len(words) > 1 and words[-1] in _NUMERALS:
            words.pop()
        name = " ".join(words).removeprefix("clothes ")
        path = f"{base}es/icons/{''.join(part.capitalize() for part in entry['name'].split('-'))}.js"
        skip = entry["category"] not in _ICON_PARK or refused(name) or _INTERFACE.search(name)
        if skip or path not in files or not is_noun(folder, name):
            continue
        title = re.sub(r"[\d一-十]?\d*$", "", entry["title"]).strip() or entry["title"]
        found.append(
            Draft(
                source="icon-park",
                path=path,
                kind="icon",
                key=f"name:{normalise(name)}",
                name_en=name,
                name_zh=title if re.search(r"[一-鿿]", title) else None,
                category=agreed(folder, name, _ICON_PARK[entry["category"]]),
                licence="Apache-2.0",
                author=entry["author"],
                image=render(_icon_park_svg(files[path].decode()), 96),
                keywords_zh=[tag for tag in entry["tag"] if tag != title][:4],
            )
        )
    return found


def _icon_park_svg(script: str) -> str:
    """The SVG that an icon's script returns, by reading its string concatenation instead of running it."""
    values = {"size": "96", "strokeWidth": "4", "strokeLinecap": "round", "strokeLinejoin": "round", "id": "i"}
    body = script[script.index("return ") :]
    parts = []
    for text, name, number in re.findall(r"'((?:[^'\\]|\\.)*)'|props\.(\w+)(?:\[(\d)\])?", body):
        parts.append(_ICON_PARK_COLOURS[int(number)] if name == "colors" else values[name] if name else text)
    return "".join(parts)


_TABLER = {
    "Food": "food", "Vehicles": "vehicle", "Buildings": "building", "Nature": "plant", "Animals": "animal",
    "Sport": "sport", "Games": None, "Health": None, "Weather": "weather", "Photography": None, "Electrical": None,
    "Shapes": None,
    "Map": None, "Devices": "device", "Media": None, "E-commerce": None, "Communication": None, "Zodiac": None,
    "Math": None, "Currencies": None,
}  # fmt: skip


def tabler(folder: Path) -> list[Draft]:
    """Outline icons of one plain noun each: variants with badges, bars and numbers are interface parts."""
    base = "package/icons/outline/"
    files = members(folder, "tabler", lambda path: path == "package/icons.json" or path.startswith(base))
    entries = json.loads(files["package/icons.json"])
    found = []
    for slug, entry in sorted(entries.items()):
        words, category, path = slug.split("-"), entry.get("category"), f"{base}{slug}.svg"
        plain = len(words) == 1 or (len(words) == 2 and words[1].isalpha() and words[0] not in entries)
        name = " ".join(words[1:] if plain and len(words) == 2 and words[0] in ("ball", "device", "zodiac") else words)
        if category not in _TABLER or not plain or path not in files or refused(name) or _INTERFACE.search(name):
            continue
        if is_noun(folder, name) and len(slug) > 2 and re.fullmatch(r"[a-z-]+", slug):
            found.append(
                Draft(
                    source="tabler",
                    path=path,
                    kind="icon",
                    key=f"name:{normalise(name)}",
                    name_en=name,
                    name_zh=None,
                    category=agreed(folder, name, _TABLER[category]),
                    licence="MIT",
                    image=render(files[path].decode(), 96),
                    keywords_en=[str(tag) for tag in entry["tags"][:4]],
                )
            )
    return found


_CLIP_ROOT = "./usr/share/openclipart/svg/"
_CLIP_OUT = re.compile(
    r"computer/|shapes/|logos/|special/|buttons/|tools/weapons|recreation/(religion|games/cards)|"
    r"signs_and_symbols/(flags|led|map_symbols)|geography/(?!astronomy)|people/[^/]*$|clip/"
)
_MAX_PER_TITLE = 4
_CLIP_KINDS = {
    "animals": "animal", "buildings": "building", "electronics": "device", "food/beverages": "drink", "food": "food",
    "office": "stationery", "people/bodypart": "body", "people/clothing": "clothing", "plants": "plant",
    "recreation/music": "music", "recreation/sports": "sport", "signs_and_symbols/weather": "weather", "tools": "tool",
    "transportation": "vehicle",
}  # fmt: skip
_BAD_TITLE = re.compile(
    r"flat icon|gramastar|untitled|collection|clip ?art|layer|icon\b|@|https?:|www\.|\.svg|test\b|drawing|image|"
    r"version|copy of|svg|unknown|various|misc|black and white|lineart|template|outline|"
    r"map symbols?|advertising|contour|illustration|experience|lightning|"
    r"boating|moons$|clouds$|pieces$|flourish|theme|sample|submission|logo",
    re.IGNORECASE,
)


def clip_art(folder: Path) -> list[Draft]:
    """Open Clip Art drawings in the public domain by their own licence field, titled by their own metadata."""
    kept = members(
        folder,
        "openclipart",
        lambda path: (
            path.startswith(_CLIP_ROOT) and path.endswith(".svg") and not _CLIP_OUT.match(path, len(_CLIP_ROOT))
        ),
    )
    found = []
    for path, data in kept.items():
        draft = _clip(folder, path, data) if len(data) < _MAX_SVG_BYTES else None
        if draft is not None:
            found.append(draft)
    taken: Counter[str] = Counter()
    few = []
    for draft in found:
        taken[draft.key] += 1
        if taken[draft.key] <= _MAX_PER_TITLE:
            few.append(draft)
    return few


def _clip(folder: Path, path: str, data: bytes) -> Draft | None:
    svg = data.decode("utf-8", errors="replace")
    if "PublicDomain" not in svg or re.search(r"<(svg:)?(text|image|flowRoot)\b", svg):
        return None
    meta = _metadata(svg)
    title = re.sub(r"^.*clip ?art by [^-]*- *", "", meta["title"], flags=re.IGNORECASE)
    title = re.sub(r" *\([^)]*\)| - .*$", "", title)
    title = re.sub(r"[\s_]+", " ", re.sub(r"[\W_]*\d+[\W_]*$", "", title)).strip(" .-_")
    keywords = [word for word in meta["keywords"] if re.fullmatch(r"[A-Za-z][A-Za-z ]{1,19}", word) and word != "hash"]
    usable = 1 <= len(title.split()) <= 5 and 3 <= len(title) <= 40 and re.fullmatch(r"[A-Za-z0-9 ,'&()-]+", title)
    if not usable or _BAD_TITLE.search(title) or refused(title, path, *keywords) or not is_noun(folder, title):
        return None
    try:
        image = render(svg, 144)
    except ValueError:
        return None
    if max(image.size) > 4 * min(image.size):
        return None
    description = re.sub(r"\s+", " ", meta["description"]).strip()
    poor = not 12 <= len(description) <= 160 or _BAD_TITLE.search(description) or refused(description)
    return Draft(
        source="openclipart",
        path=path.removeprefix("./"),
        kind="clipart",
        key=f"name:{normalise(title)}",
        name_en=title if title.isupper() and len(title) < 4 else title.lower(),
        name_zh=None,
        category=agreed(folder, title, first_match(_CLIP_KINDS, path.removeprefix(_CLIP_ROOT))),
        licence="LicenseRef-public-domain",
        author=meta["author"] or None,
        image=image,
        keywords_en=keywords[:6],
        description=None if poor else description,
    )


def _metadata(svg: str) -> dict[str, Any]:
    """Title, description, author and keywords of the RDF block; empty where the drawing says nothing."""
    try:
        root = ET.fromstring(svg)
    except ET.ParseError:
        return {"title": "", "description": "", "author": "", "keywords": []}
    dc, rdf = "{http://purl.org/dc/elements/1.1/}", "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
    work = next((element for element in root.iter() if element.tag.endswith("}Work")), root)
    creator = work.find(f"{dc}creator")

    def text(element: ET.Element | None) -> str:
        return (element.text or "").strip() if element is not None else ""

    name = text(next(creator.iter(f"{dc}title"), None)) if creator is not None else ""
    return {
        "title": text(work.find(f"{dc}title")),
        "description": text(work.find(f"{dc}description")),
        "author": re.sub(r"\S+@\S+", "", name).strip(" <>()"),
        "keywords": [text(element) for element in work.iter(f"{rdf}li")],
    }
