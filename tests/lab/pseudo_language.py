"""A language pack for JupyterLab in which every message of our catalogue is there, in letters that no English text has: wide ones.

What is still plain in a page has not gone through the translator, or is not in the catalogue.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po

ROOT = Path(__file__).resolve().parents[2]
CATALOGUE = ROOT / "labextension" / "nbgpu_lab" / "locale" / "nbgpu_lab.pot"
DOMAIN = "nbgpu_lab"
LOCALE = "eo"
SETTINGS = "lab/api/settings/@jupyterlab/translation-extension:plugin"
TEXTS = """selectors => {
    const texts = [];
    for (const root of document.querySelectorAll(selectors)) {
        const walk = document.createTreeWalker(root, NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_TEXT);
        for (let node = root; node; node = walk.nextNode()) {
            const said = node.nodeType === Node.TEXT_NODE ? [node.data]
                : ['aria-label', 'aria-valuetext', 'title', 'placeholder'].map(name => node.getAttribute(name));
            texts.push(...said.filter(Boolean));
        }
    }
    return texts;
}"""


def pseudo(text: str) -> str:
    """Return a message with every ASCII letter in its wide form; placeholders stay."""
    return re.sub("[A-Za-z]", lambda letter: chr(ord(letter[0]) + 0xFEE0), text)


def write_pack(folder: Path) -> None:
    """Write the language pack as an installed distribution in a folder that is on the server's Python path.

    JupyterLab's pages read its JSON, its server, for the settings, the binary catalogue.
    """
    with CATALOGUE.open("rb") as file:
        catalogue = read_po(file)
    translated: dict[str, Any] = {"": {"domain": DOMAIN, "language": LOCALE, "plural_forms": "nplurals=2; plural=(n != 1);"}}
    for message in catalogue:
        forms = [message.id] if isinstance(message.id, str) else list(message.id)
        if forms[0]:
            said = [pseudo(form) for form in forms]
            message.string = said[0] if isinstance(message.id, str) else tuple(said)
            translated[f"{message.context}\x04{forms[0]}" if message.context else forms[0]] = said
    package = folder / f"jupyterlab_language_pack_{LOCALE}"
    place = package / "locale" / LOCALE / "LC_MESSAGES"
    place.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (place / f"{DOMAIN}.json").write_text(json.dumps(translated))
    with (place / f"{DOMAIN}.mo").open("wb") as file:
        write_mo(file, catalogue)
    about = folder / f"{package.name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[jupyterlab.languagepack]\n{LOCALE} = {package.name}\n")


def plain(texts: list[str], *data: str) -> list[str]:
    """Return the texts in which words are left that are neither data nor units."""
    found = []
    for text in texts:
        rest = text
        for known in data:
            rest = rest.replace(known, "")
        rest = re.sub(r"\b(GiB|MiB|min|AM|PM)\b", "", rest)
        if re.search("[A-Za-z]{2}", rest):
            found.append(text)
    return found
