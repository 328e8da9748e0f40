"""Reading a page back without a browser."""

import re
from html.parser import HTMLParser

VOID = {"meta", "input", "br", "link", "img", "hr"}
UNITS = {"T": 1e12, "G": 1e9, "M": 1e6, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1, "s": 1, "ms": 1e-3, "µs": 1e-6, "%": 0.01, "×": 1,
         "J": 1, "mJ": 1e-3, "µJ": 1e-6, "nJ": 1e-9}  # fmt: skip


class Page(HTMLParser):
    """Elements with their attributes, the text of the body by what it stands in, and whether every tag is closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.faults, self.elements, self.data, self.texts, self.scripts = [], [], [], [], [], []
        self.feed(text)
        self.close()
        self.faults += [f"never closed: {name}" for name, _ in self.open]

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append((name, dict(attributes)))

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        if not self.open or self.open[-1][0] != name:
            self.faults.append(f"</{name}> at {self.getpos()} closes {self.open[-1][0] if self.open else 'nothing'}")
        else:
            self.open.pop()

    def handle_data(self, text):
        names = [name for name, _ in self.open]
        if not names or not text.strip() or "style" in names:
            return
        if names[-1] == "script":
            self.scripts.append((self.open[-1][1], text))
        elif names[-1] == "data":
            self.data.append((self.open[-1][1]["value"], text))
        else:
            self.texts.append((names, self.open[-1][1], text))


def numbers(value):
    """Every number in a document, and every text."""
    if isinstance(value, dict):
        found = [numbers(held) for held in value.values()] + [([], list(value))]
    elif isinstance(value, list):
        found = [numbers(held) for held in value]
    else:
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        return ([value] if plain else []), ([value] if isinstance(value, str) else [])
    return [n for held in found for n in held[0]], [t for held in found for t in held[1]]


def says(text, value):
    """Whether a shown number is `value` rounded to the digits that are shown."""
    match = re.fullmatch(r"(?:[a-z]+ )?([+−-]?[\d,]+(?:\.\d+)?(?:e[+-]\d+)?) ?(\S*)", text.strip())
    if not match or match[2] not in ("", *UNITS):
        return False
    shown = match[1].replace(",", "").replace("−", "-")
    mantissa, _, exponent = shown.partition("e")
    digits = len(mantissa.partition(".")[2]) - int(exponent or 0)
    return abs(float(shown) - value / UNITS.get(match[2], 1)) <= 0.5001 * 10.0**-digits
