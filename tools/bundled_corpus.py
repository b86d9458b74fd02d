#!/usr/bin/env python3
"""Gathers free English text from Debian packages, to train the bundled model on.

    tools/bundled_corpus.py OUTPUT [--packages DIR]

Downloads the packages below with apt-get (1.4 GB, or takes them from DIR), unpacks them without
installing anything, and writes OUTPUT/<package>.jsonl, one document a line: {"source": path, "text":
...}. OUTPUT/SOURCES.md lists the packages with their licences.

What is kept is prose: paragraphs that look like English sentences, each once in the whole corpus.
Listings, tables, indices, translations and navigation are left out. Of a package that has more than
its share, documents are taken at even distances, so that no subject outweighs the others.
"""

import argparse
import gzip
import hashlib
import html.parser
import json
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Callable, NamedTuple

# So that a small vocabulary is not spent on ways to write quotes and dashes.
PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...",
                       "\u00a0": " ", "\u00ad": "", "\u2003": " "})
WORDS = set("the of and to in is that it a for on with as be are this by or not was i you he she his her"
            " they we at from but have had my your me him".split())
BLOCKS = set("p para li dd dt h1 h2 h3 h4 h5 td div section blockquote title item".split())
SKIPPED = set("script style pre nav table screen programlisting".split())


class Paragraphs(html.parser.HTMLParser):
    """The text of the blocks of an HTML, DocBook or Mallard page, without what is no prose."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.blocks, self.text, self.skipped = [], [], 0

    def end_block(self):
        self.blocks.append("".join(self.text))
        self.text = []

    def handle_starttag(self, tag, attributes):
        self.skipped += tag in SKIPPED
        if tag in BLOCKS:
            self.end_block()

    def handle_endtag(self, tag):
        self.skipped -= tag in SKIPPED and self.skipped > 0
        if tag in BLOCKS:
            self.end_block()

    def handle_data(self, data):
        if not self.skipped:
            self.text.append(data)


def decoded(path):
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    return data.decode("utf-8", errors="ignore").replace("\r\n", "\n")


# The readers: the paragraphs of a file.


def pages(path):
    parser = Paragraphs()
    parser.feed(decoded(path))
    parser.end_block()
    return parser.blocks


def split_plain(text):
    return re.split(r"\n\s*\n|\n%+\n", text)


def plain(path):
    return split_plain(decoded(path))


def book(text):
    """Of a Project Gutenberg text: emphasis is between underscores."""
    return split_plain(re.sub(r"_([^_]*)_", r"\1", text.replace("\r\n", "\n")))


def dictionary(path):
    """Definitions: a head word on a line of its own, cross references in braces."""
    return split_plain(re.sub(r"[{}]", "", decoded(path)))


def manual(path):
    """A manual page in roff: macros go, paragraphs stay."""
    text = decoded(path)
    text = re.sub(r'^\.(B|I|BR|IR|BI|RB|RI)\s+(.*)$', lambda m: m[2].replace('"', ""), text, flags=re.M)
    text = re.sub(r"^\.nf$.*?^\.fi$", "\n\n", text, flags=re.M | re.S)
    text = re.sub(r"^[.'].*$", "", text, flags=re.M)
    return split_plain(re.sub(r"\\f[A-Z]|\\\*.|\\&|\\/", "", text).replace("\\-", "-").replace("\\(aq", "'"))


def pod(path):
    text = re.sub(r"^=\w+.*$", "", decoded(path), flags=re.M)
    text = re.sub(r"[A-Z]<<*\s*([^<>|]*\|)?([^<>]*)\s*>+", r"\2", text)
    return [b for b in re.split(r"\n\s*\n", text) if not b.startswith((" ", "\t"))]


def sword(path):
    """A bible or a commentary: zlib blocks that an index of (offset, size, size unpacked) lists, in OSIS."""
    blocks, data = [], path.read_bytes()
    for offset, size, _ in struct.iter_unpack("<III", path.with_suffix(path.suffix[:-1] + "s").read_bytes()):
        text = zlib.decompress(data[offset : offset + size]).decode() if size else ""
        text = re.sub(r"<(title|note|table)\b.*?</\1>", "", text, flags=re.S)
        text = re.sub(r'<div [^>]*type="x-(p|m|q\d?)"[^>]*>|<chapter [^>]*>|<lb[^>]*>|</?(p|lg)\b[^>]*>', "\n\n", text)
        blocks += split_plain(re.sub(r"<[^>]*>", "", text).replace("¶", ""))
    return blocks


def book_file(path):
    return book(decoded(path))


def r_books(path):
    """A database of R: zlib blocks after their size, of serialised values; a text is a vector of lines or
    one string, each after its encoding and type (00 xx xx 09) and its length."""
    data, lines, at = path.read_bytes(), [], 0
    while at < len(data):
        unpacker = zlib.decompressobj()
        block = unpacker.decompress(data[at + 4 :])
        at = len(data) - len(unpacker.unused_data)
        position = 0
        while string := re.compile(rb"\0[\0\4\10][\0\x80]\t(....)", re.S).search(block, position):
            position = string.end() + int.from_bytes(string[1], "big")
            lines.append(block[string.end() : position].decode("utf-8", errors="ignore"))
    return book("\n".join(lines))


def game_texts(texts):
    blocks = []
    for text in texts:
        text = text.replace('\\"', '"').replace('""', '"').replace("\\'", "'").replace("\\t", " ")
        text = re.sub(r"</?(i|b|small|br|em|name|color)\b[^<>]*>", "", text)
        blocks += re.split(r"\\n|\n\s*\n", text)
    return blocks


def strings(path):
    """The texts of a game: string constants of a line, in JSON and in the notation of Endless Sky."""
    return game_texts(map("".join, re.findall(r'"((?:[^"\\\n]|\\.)*)"|`([^`\n]*)`', decoded(path))))


def translated(path):
    """The texts of a game: string constants marked for translation, in Lua and WML."""
    found = re.findall(r'_\s*\(?\s*(?:\[\[(.*?)\]\]|"((?:[^"\\]|\\.|"")*)")', decoded(path), flags=re.S)
    return game_texts(map("".join, found))


class Source(NamedTuple):
    licence: str
    pattern: str  # which of the package's files to read
    read: Callable = pages
    share: float = 3.0  # at most as many MB


GAME = 4.0
PACKAGES = {
    # Stories and essays
    "r-cran-janeaustenr": Source("public domain (the novels), MIT", r"/data/Rdata\.rdb$", r_books, 5),
    "r-cran-tokenizers": Source("public domain (Moby-Dick), MIT", r"/data/Rdata\.rdb$", r_books, 5),
    "golang-1.19-src": Source("public domain (Newton's Opticks), BSD-3-clause",
                              r"Newton-Opticks\.txt$", book_file),
    "sword-text-kjv": Source("public domain", r"\.bzz$", sword),
    "sword-text-web": Source("public domain", r"\.bzz$", sword),
    "sword-comm-mhcc": Source("public domain", r"\.bzz$", sword),
    "sword-comm-tdavid": Source("public domain", r"\.czz$", sword, 4),
    "anarchism": Source("GPL-2+", r"\.html$"),
    "dict-devil": Source("public domain", r"\.dict\.dz$", dictionary),
    "dict-jargon": Source("public domain", r"\.dict\.dz$", dictionary),
    "dict-foldoc": Source("GFDL-1.1+ without invariant sections", r"\.dict\.dz$", dictionary),
    "fortunes": Source("mixed free, see the package", r"fortunes/[a-z-]+$", plain),
    "miscfiles": Source("public domain", r"share/state/", plain),
    "debian-history": Source("GPL-2+", r"\.en\.html$"),
    # Games with stories to tell
    "cataclysm-dda-data": Source("CC-BY-SA-3.0", r"/(json|mods)/.*\.json$", strings, GAME),
    "crawl-common": Source("GPL-2+", r"dat/(descript|database)/[a-z]+\.txt$", plain, GAME),
    "endless-sky-data": Source("GPL-3+", r"/data/.*\.txt$", strings, GAME),
    "freedroidrpg-data": Source("GPL-2+", r"\.lua$|\.dat$", translated, GAME),
    "naev-data": Source("GPL-3+", r"/dat/(missions|events|scripts)/.*\.lua$", translated, GAME),
    "stellarium-data": Source("GPL-2+", r"\.en\.utf8$", pages, GAME),
    **{
        f"wesnoth-1.16-{campaign}": Source("GPL-2", r"\.cfg$", translated, GAME)
        for campaign in "did dm dw ei httt l low nr sof sota sotbe thot trow tsg ttb utbs".split()
    },
    # Manuals
    "apache2-doc": Source("Apache-2.0", r"\.html\.en$|\.html$", pages, 1),
    "aptitude-doc-en": Source("GPL-2+", r"\.html$"),
    "debian-faq": Source("free to copy and change under the same terms", r"\.en\.html$"),
    "debian-handbook": Source("GPL-2+ or CC-BY-SA-3.0", r"html/en-US/.*\.html$"),
    "debian-kernel-handbook": Source("GPL-2+", r"\.html$"),
    "debian-policy": Source("GPL-2+", r"\.html$"),
    "debian-reference-en": Source("GPL-2+", r"\.en\.html$"),
    "developers-reference": Source("GPL-2+", r"reference/[^/]*\.html$"),
    "exim4-doc-html": Source("GPL-2+", r"\.html$", pages, 1),
    "git-doc": Source("GPL-2", r"\.html$"),
    "gimp-help-en": Source("GFDL-1.2+ without invariant sections", r"help/en/.*\.html$"),
    "gnome-user-docs": Source("CC-BY-SA-3.0", r"help/C/.*\.page$"),
    "gnucash-docs": Source("GFDL-1.1+ without invariant sections", r"help/C/.*\.(xml|docbook)$"),
    "harden-doc": Source("GPL-2", r"html/en-US/.*\.html$|html/en/.*\.html$"),
    "installation-guide-amd64": Source("GPL-2", r"/en/.*\.html$"),
    "libreoffice-help-en-us": Source("MPL-2.0", r"en-US/text/.*\.html$", pages, 2),
    "lilypond-doc-html": Source("GFDL-1.3+ without invariant sections",
                                r"Documentation/(essay|learning|music-glossary|web|usage|notation)/[^.]*\.html$"),
    "linux-doc-6.1": Source("GPL-2", r"html/.*\.html$", pages, 4),
    "manpages": Source("GPL-2+, BSD and the notice of man-pages", r"man/man[0-9].*\.gz$", manual, 1),
    "mercurial-common": Source("GPL-2+", r"\.txt$", plain),
    "mh-book": Source("GPL-2+", r"\.html?$", pages, 1),
    "perl-doc": Source("GPL-1+ or Artistic", r"\.pod$", pod),
    "postgresql-doc-15": Source("PostgreSQL", r"\.html$"),
    "python-django-doc": Source("BSD-3-clause", r"\.html$", pages, 2),
    "python-sklearn-doc": Source("BSD-3-clause", r"html/(modules|tutorial)/[^.]*\.html$", pages, 2),
    "python3.11-doc": Source("PSF-2", r"html/.*\.html$"),
    "r-doc-html": Source("GPL-2", r"\.html$", pages, 1),
    "racket-doc": Source("LGPL-2.1+ or MIT and Apache-2.0",
                         r"/(guide|reference|quick|more|continue|games|style)/.*\.html$", pages, 2),
    "rust-doc": Source("MIT or Apache-2.0", r"html/(book|cargo|embedded-book|nomicon|reference|rustc)/.*\.html$"),
    "sqlite3-doc": Source("public domain", r"\.html$"),
    "zsh-doc": Source("Zsh, much like MIT", r"\.html$", pages, 1),
}


def is_prose(paragraph, shortest):
    """English sentences, as far as counting tells."""
    words = paragraph.lower().split()
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    common = sum(word.strip(".,;:()\"'") in WORDS for word in words)
    return (
        len(words) >= shortest
        and paragraph.isascii()
        and "Gutenberg" not in paragraph
        and not re.search(r"[][_\\=<>{}|@#$%^*~`]|\w\(\)|://|\.\.\w|\+", paragraph)
        and letters > 0.9 * len(paragraph)
        and common > 0.15 * len(words)
        and paragraph.rstrip("\"')")[-1:] in ".!?:;,"
    )


def documents(root, source, seen):
    shortest = 5 if source.read in (strings, translated) else 12
    for path in sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink()):
        relative = str(path.relative_to(root))
        if not re.search(source.pattern, relative) or "/changelog" in relative:
            continue
        kept = []
        for paragraph in source.read(path):
            paragraph = " ".join(paragraph.translate(PLAIN).split())
            digest = hashlib.sha1(paragraph.encode()).digest()[:10]
            if is_prose(paragraph, shortest) and digest not in seen:
                seen.add(digest)
                kept.append(paragraph)
        # Files without structure are as long as books: documents of a few pages are enough.
        for begin in range(0, len(kept), 100):
            text = "\n\n".join(kept[begin : begin + 100])
            if len(text) >= 400:
                yield {"source": relative, "text": text}


def at_most(share, lines):
    """Of lines, at even distances, as many as `share` MB hold."""
    keep = min(1.0, share * 1e6 / max(1, sum(map(len, lines))))
    return [line for i, line in enumerate(lines) if int((i + 1) * keep) > int(i * keep)]


def unpack(package, packages, scratch):
    """Name and version of the package, and the directory with its files."""
    found = sorted(packages.glob(f"{package}_*.deb"))
    if not found:
        subprocess.run(["apt-get", "-q", "download", package], cwd=packages, check=True)
        found = sorted(packages.glob(f"{package}_*.deb"))
    root = Path(scratch) / package
    subprocess.run(["dpkg-deb", "-x", found[-1], root], check=True)
    return found[-1].stem.rsplit("_", 1)[0].replace("_", " ").replace("%3a", ":"), root


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--packages", type=Path, help="where the .deb files are or go to")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    seen, rows, total = set(), [], 0
    with tempfile.TemporaryDirectory() as packages:
        packages = arguments.packages or Path(packages)
        packages.mkdir(parents=True, exist_ok=True)
        for package, source in PACKAGES.items():
            with tempfile.TemporaryDirectory() as scratch:
                name, root = unpack(package, packages, scratch)
                lines = at_most(source.share, [json.dumps(d) + "\n" for d in documents(root, source, seen)])
            size = sum(len(json.loads(line)["text"]) for line in lines)
            (arguments.output / f"{package}.jsonl").write_text("".join(lines))
            rows.append(f"| {name} | {source.licence} | {len(lines)} | {size:,} |")
            total += size
            print(f"{name}: {len(lines)} documents, {size / 1e6:.2f} MB", file=sys.stderr)
    head = ["| package and version | licence | documents | bytes |", "|---|---|---|---|"]
    (arguments.output / "SOURCES.md").write_text("\n".join(head + rows) + "\n")
    print(f"{arguments.output}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
