"""The packaged corpus: what the splits promise, that every stored byte is what the index says, and where it is from."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
import unicodedata
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image, ImageFont

from sailvl import assets

ROOT = Path(assets.__file__).resolve().parent
LICENCES = {"MIT", "Apache-2.0", "ISC", "BSD-3-Clause", "CC0-1.0", "LicenseRef-public-domain"}


def plain(name: str) -> str:
    """Names compared without case, accents, punctuation and article, written apart from the build's own function."""
    letters = "".join(c for c in unicodedata.normalize("NFKD", name).casefold() if not unicodedata.combining(c))
    return re.sub(r"^(?:a|an|the) (?=.)", "", re.sub(r"[\W_]+", " ", letters).strip())


def test_no_concept_and_no_name_is_in_two_splits():
    where = defaultdict(set)
    for item in assets.items():
        where["concept", item.concept].add(item.split)
        where["en", plain(item.name_en)].add(item.split)
        if item.name_zh:
            where["zh", plain(item.name_zh)].add(item.split)
    assert {key: splits for key, splits in where.items() if len(splits) > 1} == {}


def test_the_split_follows_from_the_concept_alone():
    for concept, split in assets.splits().items():
        bucket = int(hashlib.sha256(concept.encode()).hexdigest()[:16], 16) % 100
        assert split == ("train" if bucket < 90 else "validation" if bucket < 95 else "test"), concept


def test_skin_tones_and_both_styles_of_an_emoji_are_one_concept():
    by_concept = defaultdict(set)
    for item in assets.items(kind="emoji"):
        by_concept[item.concept].add(item.source)
        code = Path(item.path).stem
        assert not re.search(r"1f3f[b-f]", code), item.id
    assert sum(sources >= {"fluent", "noto"} for sources in by_concept.values()) > 1000


def test_a_country_has_one_concept_in_all_its_flags():
    concepts = defaultdict(set)
    for item in assets.items(kind="flag"):
        concepts[plain(item.name_en)].add(item.concept)
    assert len(concepts) > 220
    assert all(len(of_name) == 1 for of_name in concepts.values())
    france = {item.source for item in assets.items(kind="flag") if item.name_en == "France"}
    assert france == {"fluent", "noto", "flag-icons"}


def test_every_drawing_decodes_to_what_the_index_says():
    for item in assets.items():
        data = assets.sprite_bytes(item)
        assert len(data) == item.size, item.id
        assert hashlib.sha256(data).hexdigest() == item.sha256, item.id
        image = Image.open(io.BytesIO(data))
        image.load()
        assert image.format == "WEBP" and image.size == (item.width, item.height), item.id
        assert 8 <= max(image.size) <= 160, item.id


def test_pictures_fill_their_files_without_gaps():
    ends = defaultdict(int)
    for item in assets.items():
        assert item.offset == ends[item.source], item.id
        ends[item.source] += item.size
    for source, end in ends.items():
        assert (ROOT / "corpus" / f"{source}.bin").stat().st_size == end


def test_sprites_have_visible_pixels_up_to_their_border():
    for item in assets.items()[::9]:
        image = assets.sprite(item)
        assert image.mode == "RGBA"
        left, top, right, bottom = image.getchannel("A").getbbox()
        assert right - left >= image.width - 2 and bottom - top >= image.height - 2, item.id


def test_provenance_is_complete_and_allowed():
    known = assets.packages()
    for item in assets.items():
        assert item.licence in LICENCES, item.id
        assert item.source in known and item.path and item.name_en.strip(), item.id
        assert re.fullmatch(r"(npm|deb|pypi) \S+[@=]\S+", item.package), item.id
    for package in known.values():
        assert re.fullmatch(r"[0-9a-f]{64}", package["sha256"]) and package["credit"] and package["licence"]


def test_notice_names_every_package_and_every_artist():
    notice = (ROOT / "corpus" / "NOTICE").read_text(encoding="utf-8")
    flat = " ".join(notice.split())
    for package in assets.packages().values():
        assert package["package"] in notice
        assert " ".join(package["credit"].split()) in flat
    for item in assets.items(kind="clipart"):
        assert item.author is None or " ".join(item.author.split()) in flat, item.id
    assert (ROOT.parent.parent / "NOTICE").read_text(encoding="utf-8") == notice


def test_ids_are_unique_and_found_again():
    everything = assets.items()
    assert len({item.id for item in everything}) == len(everything)
    assert assets.item(everything[17].id) is everything[17]
    with pytest.raises(KeyError):
        assets.item("fluent/no-such-thing")


def test_splits_and_kinds_partition_the_corpus():
    everything = [item.id for item in assets.items()]
    assert sorted(everything) == sorted(item.id for split in assets.SPLITS for item in assets.items(split))
    shares = {split: len(assets.items(split)) / len(everything) for split in assets.SPLITS}
    assert shares["train"] > 0.85 and shares["validation"] > 0.03 and shares["test"] > 0.03
    kinds = {item.kind for item in assets.items()}
    assert kinds == {"emoji", "flag", "icon", "clipart"}
    assert sorted(everything) == sorted(item.id for kind in kinds for item in assets.items(kind=kind))


@pytest.mark.parametrize("bad", [{"split": "dev"}, {"kind": "photo"}])
def test_an_unknown_selection_is_refused(bad):
    with pytest.raises(ValueError, match=r"dev|photo"):
        assets.items(**bad)


def test_callers_cannot_change_the_corpus():
    assets.items().clear()
    assert assets.items()


def test_categories_are_the_shared_ones():
    used = {item.category for item in assets.items()} - {None}
    assert used == set(assets.CATEGORIES)
    assert {i.category for i in assets.items() if plain(i.name_en) in ("cat", "dog", "elephant")} <= {"animal", None}
    for split in assets.SPLITS:
        of_split = {item.category for item in assets.items(split)}
        assert {"animal", "food", "vehicle", "person", "clothing", "building", "plant", "flag"} <= of_split


def test_what_a_picture_book_leaves_out_is_left_out():
    names = [plain(item.name_en) for item in assets.items()]
    unwanted = re.compile(
        r"\b(gun|rifle|pistol|bomb|beer|whisky|vodka|jesus|crucifix|mosque|swastika|logo|github|naked)\b"
    )
    assert [name for name in names if unwanted.search(name)] == []
    assert not any("thumbs up" in name or "middle finger" in name for name in names)


def test_tables_are_rectangular_in_every_split_and_allowed():
    allowed = re.compile(r"public domain|U\.S\. Government|CC0|Creative Commons Zero|MIT|BSD", re.IGNORECASE)
    assert sorted(t.name for t in assets.tables()) == sorted(t.name for s in assets.SPLITS for t in assets.tables(s))
    files = defaultdict(set)
    for table in assets.tables():
        files[table.source, table.path].add(table.split)
        assert len(table.columns) == len(table.columns_zh) >= 2 and len(table.rows) >= 3, table.name
        assert all(len(row) == len(table.columns) and None not in row for row in table.rows), table.name
        assert allowed.search(table.licence) and table.credit and table.source in assets.packages(), table.name
        assert len({row[0] for row in table.rows}) == len(table.rows) or table.name == "sprint", table.name
    assert all(len(splits) == 1 for splits in files.values())
    assert all(assets.tables(split) for split in assets.SPLITS)
    with pytest.raises(ValueError, match="dev"):
        assets.tables("dev")


def test_a_known_value_survived_the_grouping():
    capitals = next(table for table in assets.tables() if table.name == "state capitals")
    assert ("Alabama", "Montgomery") in capitals.rows
    elements = next(table for table in assets.tables() if table.name == "elements")
    assert ("Helium", "He", 2, 4.003, 1) in elements.rows


def test_lines_are_short_and_in_one_split():
    seen = {}
    for split in assets.SPLITS:
        for lang in ("en", "zh"):
            texts = assets.lines(split, lang)
            assert len(texts) > 200 and len(set(texts)) == len(texts)
            assert all(3 <= len(text) <= 40 for text in texts)
            for text in texts:
                assert seen.setdefault(text, split) == split, text
    assert all(text.isascii() for text in assets.lines("test", "en"))
    with pytest.raises(ValueError, match="fr"):
        assets.lines("train", "fr")


def test_the_font_draws_every_character_the_corpus_writes():
    font = ImageFont.truetype(str(assets.font_path()), 24)
    missing = bytes(font.getmask("\U0010ffff"))
    texts = [item.name_zh for item in assets.items() if item.name_zh]
    texts += [text for split in assets.SPLITS for lang in ("en", "zh") for text in assets.lines(split, lang)]
    characters = sorted({char for text in texts for char in text if not char.isspace()})
    assert len(characters) > 3000
    blank = [char for char in characters if bytes(font.getmask(char)) == missing]
    assert blank == []


def test_the_assets_stay_small_and_few():
    files = [path for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) < 25
    assert sum(path.stat().st_size for path in files) <= 25_000_000


def test_reading_the_corpus_needs_no_torch():
    code = "import sys; from sailvl import assets; assets.sprite(assets.items()[0]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
