"""The pages of the documentation, committed and generated, and what stands in them: code blocks, code in the text, links."""

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from scripts import docs_pages

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if not path.name.startswith("0000"))
FENCE = re.compile(r'^(?:<!-- *(?P<said>[^\n]*?) *-->\n)?```(?P<language>\w*)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block. `said`: the comment above it, "not run: REASON" or "needs: WHAT"."""

    page: str
    line: int
    language: str
    title: str
    text: str
    said: str

    def commands(self):
        """Its lines that call secateur, as lists of words."""
        lines = self.text.replace("\\\n", " ").splitlines()
        parts = [part for line in lines if line.startswith("secateur ") for part in re.split(r";(?=\s*secateur )", line)]
        return [shlex.split(part, comments=True)[1:] for part in parts]


def blocks(path):
    return blocks_of(str(path.relative_to(ROOT)), path.read_text())


def blocks_of(page, text):
    return [Block(page, text[: m.start("text")].count("\n") + 1, m["language"], m["title"] or "", m["text"], m["said"] or "")
            for m in FENCE.finditer(text)]  # fmt: skip


@cache
def everything():
    """Name below docs/ -> text, of the committed and the generated pages."""
    return {**{str(path.relative_to(DOCS)): path.read_text() for path in PAGES}, **docs_pages.pages()}


def without_blocks(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def in_text(text):
    """Code inside sentences and tables."""
    return re.findall(r"`([^`\n]+)`", without_blocks(text))
