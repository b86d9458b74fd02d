#!/usr/bin/env python3
"""Gathers free English text from Debian packages, to train the bundled model on.

    tools/bundled_corpus.py OUTPUT [--packages DIR]

Downloads the packages below with apt-get (or takes them from DIR), unpacks them without installing
anything, and writes OUTPUT/<package>.jsonl, one document a line: {"source": path, "text": ...}. The
licence is that which the package's copyright file states; SOURCES.md in OUTPUT lists them.

What is kept is prose: paragraphs that look like English sentences, each once in the whole corpus.
Listings, tables, indices, translations and navigation are left out.
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

# package: licence, and which of its files to read
PACKAGES = {
    "anarchism": ("GFDL-1.1+ or GPL-2+", r"\.html$"),
    "apache2-doc": ("Apache-2.0", r"\.html\.en$|\.html$"),
    "aptitude-doc-en": ("GPL-2+", r"\.html$"),
    "debian-faq": ("GPL-2+", r"\.en\.html$|\.en\.txt"),
    "debian-policy": ("GPL-2+", r"\.html$"),
    "debian-reference-en": ("GPL-2+", r"\.en\.html$"),
    "developers-reference": ("GPL-2+", r"reference/[^/]*\.html$"),
    "dict-devil": ("public domain", r"\.dict\.dz$"),
    "dict-foldoc": ("GFDL-1.2+", r"\.dict\.dz$"),
    "dict-gcide": ("GPL-3+", r"\.dict\.dz$"),
    "dict-jargon": ("public domain", r"\.dict\.dz$"),
    "exim4-doc-html": ("GPL-2+", r"\.html$"),
    "fortunes": ("mixed free, see the package", r"fortunes/[a-z-]+$"),
    "git-doc": ("GPL-2", r"\.html$"),
    "gnome-user-docs": ("CC-BY-SA-3.0", r"help/C/.*\.page$"),
    "linux-doc-6.1": ("GPL-2", r"html/.*\.html$"),
    "manpages": ("GPL-2+ and BSD", r"man/man[0-9].*\.gz$"),
    "mercurial-common": ("GPL-2+", r"\.txt$|\.html$"),
    "mh-book": ("GPL-2+", r"\.html?$"),
    "miscfiles": ("public domain", r"share/state/"),
    "perl-doc": ("Artistic or GPL-1+", r"\.pod$"),
    "postgresql-doc-15": ("PostgreSQL", r"\.html$"),
    "python-django-doc": ("BSD-3-clause", r"\.html$"),
    "python3.11-doc": ("PSF-2", r"html/.*\.html$"),
    "r-doc-html": ("GPL-2+", r"\.html$"),
    "sqlite3-doc": ("public domain", r"\.html$"),
    "sword-text-kjv": ("public domain", r"\.bzz$"),
    "zsh-doc": ("MIT", r"\.html$"),
}

# So that a small vocabulary is not spent on ways to write quotes and dashes.
PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...",
                       "\u00a0": " ", "\u00ad": ""})
WORDS = set("the of and to in is that it a for on with as be are this by or not was".split())
BLOCKS = set("p li dd dt h1 h2 h3 h4 h5 td div section blockquote title item".split())
SKIPPED = set("script style pre nav code table screen programlisting".split())


class Paragraphs(html.parser.HTMLParser):
    """The text of the blocks of an HTML or Mallard page, without what is no prose."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.blocks, self.text, self.skipped = [], [], 0

    def end_block(self):
        self.blocks.append(" ".join("".join(self.text).split()))
        self.text = []

    def handle_starttag(self, tag, attributes):
        if tag in SKIPPED and tag != "code":
            self.skipped += 1
        if tag in BLOCKS:
            self.end_block()

    def handle_endtag(self, tag):
        if tag in SKIPPED and tag != "code" and self.skipped:
            self.skipped -= 1
        if tag in BLOCKS:
            self.end_block()

    def handle_data(self, data):
        if not self.skipped:
            self.text.append(data)


def of_html(text):
    parser = Paragraphs()
    parser.feed(text)
    parser.end_block()
    return parser.blocks


def of_man(text):
    """Of a manual page in roff: macros go, paragraphs stay."""
    text = re.sub(r'^\.(B|I|BR|IR|BI|RB|RI)\s+(.*)$', lambda m: m[2].replace('"', ""), text, flags=re.M)
    text = re.sub(r"^\.nf$.*?^\.fi$", "\n\n", text, flags=re.M | re.S)
    text = re.sub(r"^[.'].*$", "", text, flags=re.M)
    text = re.sub(r"\\f[A-Z]|\\\*.|\\&|\\/", "", text).replace("\\-", "-").replace("\\(aq", "'")
    return of_plain(text)


def of_pod(text):
    text = re.sub(r"^=\w+.*$", "", text, flags=re.M)
    text = re.sub(r"[A-Z]<<*\s*([^<>|]*\|)?([^<>]*)\s*>+", r"\2", text)
    return [b for b in re.split(r"\n\s*\n", text) if not b.startswith((" ", "\t"))]


def of_plain(text):
    return [" ".join(block.split()) for block in re.split(r"\n\s*\n|\n%\n", text)]


def of_sword(path):
    """Of a bible: zlib blocks that an index of (offset, size, size unpacked) lists, in OSIS."""
    blocks, data = [], path.read_bytes()
    for offset, size, _ in struct.iter_unpack("<III", path.with_suffix(".bzs").read_bytes()):
        text = zlib.decompress(data[offset : offset + size]).decode().translate(PLAIN) if size else ""
        text = re.sub(r"<(title|note)\b.*?</\1>", "", text, flags=re.S)
        text = re.sub(r'<div [^>]*type="x-p"/>|<chapter [^>]*>', "\n\n", text)
        blocks += of_plain(re.sub(r"<[^>]*>", "", text))
    return blocks


def read_bytes(path):
    data = path.read_bytes()
    if path.suffix == ".dz" or data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    return data


def paragraphs(path):
    if path.suffix == ".bzz":
        return of_sword(path)
    text = read_bytes(path).decode("utf-8", errors="ignore").translate(PLAIN)
    text = text.replace("\r\n", "\n")
    name = path.name.removesuffix(".gz").removesuffix(".dz")
    if re.search(r"\.(html?|page|en)$", name):
        return of_html(text)
    if re.search(r"\.pod$", name):
        return of_pod(text)
    if re.search(r"\.[1-9][a-z]*$", name):
        return of_man(text)
    return of_plain(text)


def is_prose(paragraph):
    """English sentences, as far as counting tells."""
    words = paragraph.lower().split()
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    common = sum(word.strip(".,;:()\"'") in WORDS for word in words)
    return (
        len(words) >= 12
        and paragraph.isascii()
        and letters > 0.88 * len(paragraph)
        and common > 0.15 * len(words)
        and paragraph.rstrip("\"')")[-1:] in ".!?:;,"
    )


def documents(root, pattern, seen):
    for path in sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink()):
        relative = str(path.relative_to(root))
        if not re.search(pattern, relative) or "/changelog" in relative:
            continue
        kept = []
        for paragraph in paragraphs(path):
            paragraph = " ".join(paragraph.split())
            digest = hashlib.sha1(paragraph.encode()).digest()[:10]
            if is_prose(paragraph) and digest not in seen:
                seen.add(digest)
                kept.append(paragraph)
        # Files without structure are as long as books: documents of a few pages are enough.
        for begin in range(0, len(kept), 200):
            text = "\n\n".join(kept[begin : begin + 200])
            if len(text) >= 400:
                yield {"source": relative, "text": text}


def unpack(package, packages, scratch):
    """The directory with the package's files."""
    found = sorted(packages.glob(f"{package}_*.deb"))
    if not found:
        subprocess.run(["apt-get", "-q", "download", package], cwd=packages, check=True)
        found = sorted(packages.glob(f"{package}_*.deb"))
    root = Path(scratch) / package
    subprocess.run(["dpkg-deb", "-x", found[-1], root], check=True)
    return found[-1].stem, root


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--packages", type=Path, help="where the .deb files are or go to")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    seen, sources, total = set(), [], 0
    with tempfile.TemporaryDirectory() as scratch:
        packages = arguments.packages or Path(scratch) / "packages"
        packages.mkdir(parents=True, exist_ok=True)
        for package, (licence, pattern) in PACKAGES.items():
            name, root = unpack(package, packages, scratch)
            lines = [json.dumps(d) for d in documents(root, pattern, seen)]
            text = "".join(line + "\n" for line in lines)
            (arguments.output / f"{package}.jsonl").write_text(text)
            sources.append(f"| {name} | {licence} | {len(lines)} | {len(text) / 1e6:.2f} |")
            total += len(text)
            print(f"{package}: {len(lines)} documents, {len(text) / 1e6:.2f} MB", file=sys.stderr)
    head = ["| package | licence | documents | MB |", "|---|---|---|---|"]
    (arguments.output / "SOURCES.md").write_text("\n".join(head + sources) + "\n")
    print(f"{arguments.output}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
