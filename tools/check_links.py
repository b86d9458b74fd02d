#!/usr/bin/env python3
"""Checks that the relative links of the Markdown pages lead to files of this tree."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def main():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("models/**/*.md")]
    broken = 0
    for page in sorted(pages):
        for target in LINK.findall(FENCE.sub("", page.read_text())):
            if "://" not in target and not (page.parent / target).exists():
                print(f"{page.relative_to(ROOT)}: broken link: {target}")
                broken += 1
    print(f"check_links: {len(pages)} pages, {broken} broken links")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
