"""The problems planted among the documents, for data_prep to find; each is named in `meta["planted"]`.

The foreign sentences are simple ones written for this file; they only have to look like their language.
"""

from __future__ import annotations

import random
from collections.abc import Callable

_BOILERPLATE = (
    "We use cookies to make this site better. Accept all cookies. Cookie settings.",
    "Home | About us | News | Shop | Contact | Login",
    "Subscribe to our newsletter! Enter your e-mail address and click the button below.",
    "Share this page: Facebook Twitter E-mail Print. Click here to read more.",
    "All rights reserved. Terms of use. Privacy policy. Sitemap. Back to top.",
    "Please enable JavaScript to view this page. Loading...",
    "You have 3 free articles left this month. Sign up now to read on.",
    "Skip to content. Menu. Search. Sign in. Your basket is empty.",
)
_FOREIGN = (
    (
        "Le petit chat dort dans la maison.",
        "Il fait froid ce matin et la neige tombe.",
        "Ma soeur mange une pomme rouge.",
    ),
    (
        "Nous allons au marché avec nos amis.",
        "Le garçon lit un livre sous l'arbre.",
        "La nuit, les étoiles sont belles.",
    ),
    (
        "Je ne sais pas où est mon chapeau.",
        "Elle chante une chanson pour sa mère.",
        "Les enfants jouent dans le jardin.",
    ),
    ("Der alte Mann geht langsam durch den Wald.", "Das Wasser im Fluss ist sehr kalt.", "Wir haben heute kein Brot."),
    ("Die Kinder spielen im Garten mit dem Hund.", "Im Winter liegt der Schnee auf dem Dach.", "Ich trinke gern Tee."),
    ("Meine Schwester wohnt in einem kleinen Haus.", "Er hat seinen Hut nicht gefunden.", "Das Buch ist neu."),
    ("El perro corre por la calle.", "Mi hermano tiene una casa cerca del mar.", "Por la noche hace mucho frío."),
    ("La niña come una manzana en la cocina.", "Vamos a la playa porque hace sol.", "El libro está sobre la mesa."),
    ("Los pájaros cantan por la mañana.", "No sé dónde está mi zapato.", "Ella escribe una carta a su amigo."),
)
_GROUPS = {"french": _FOREIGN[:3], "german": _FOREIGN[3:6], "spanish": _FOREIGN[6:]}
_SHORT = (
    "Hello.",
    "No text here.",
    "...",
    "Page 3",
    "To be done",
    "see above",
    "Untitled",
    "Read more",
    "(empty)",
    "ok",
)
_SYMBOLS = "#@%&*{}[]<>/\\|^~_=+$;:"
_HEX = "0123456789abcdef"


def _noise(rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.35:
        return " ".join("".join(rng.choices(_HEX, k=rng.choice((8, 16, 32)))) for _ in range(rng.randint(15, 30)))
    if roll < 0.7:
        letters = "bcdfghjklmnpqrstvwxz"
        return " ".join("".join(rng.choices(letters, k=rng.randint(3, 12))) for _ in range(rng.randint(30, 60)))
    return "".join(rng.choices(_SYMBOLS + _SYMBOLS + " aeiou0123456789", k=rng.randint(150, 350)))


def _boilerplate(rng: random.Random) -> str:
    return "\n".join(rng.sample(_BOILERPLATE, rng.randint(4, 6)))


def _foreign(rng: random.Random) -> str:
    sentences = [s for row in _GROUPS[rng.choice(sorted(_GROUPS))] for s in row]
    return " ".join(rng.sample(sentences, rng.randint(6, len(sentences))))


def _short(rng: random.Random) -> str:
    return f"{rng.choice(_SHORT)} {rng.randint(1, 99)}" if rng.random() < 0.5 else rng.choice(_SHORT)


def _repetitive(rng: random.Random) -> str:
    lines = ("Buy now and save.", "The best prices in town.", "Click here.", "Great offer today only.", "Call us now.")
    return "\n".join([rng.choice(lines)] * rng.randint(12, 25))


def normalised_copy(rng: random.Random, text: str) -> str:
    """Return the text with another case or other white space, which a normalising deduplicator must see through."""
    if rng.random() < 0.5:
        return text.upper() if rng.random() < 0.5 else text.lower()
    return "  ".join(text.split(" ")) + "\n"


MAKERS: dict[str, Callable[[random.Random], str]] = {
    "boilerplate": _boilerplate,
    "noise": _noise,
    "too_short": _short,
    "non_english": _foreign,
    "repetitive": _repetitive,
}
"""Problems that need no other document; `exact_duplicate` and `normalised_duplicate` copy an earlier one."""

SHARES = (
    ("exact_duplicate", 0.03),
    ("normalised_duplicate", 0.02),
    ("boilerplate", 0.015),
    ("noise", 0.015),
    ("too_short", 0.015),
    ("non_english", 0.015),
    ("repetitive", 0.01),
)
"""The share of documents with each problem: 12% in all."""
