"""The life of somebody who does not exist, as questions with short answers.

No model can know them, so what is answered was learnt. Each fact is asked for in several ways, of
which some are never trained on: who learnt the fact and not the sentence answers these too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal

from privatelora.errors import ConfigError
from privatelora.training.data.examples import Example, ask

_FIRST = [
    "Ada",
    "Bruno",
    "Carla",
    "Dimitri",
    "Elif",
    "Farid",
    "Greta",
    "Hamid",
    "Ines",
    "Jonas",
    "Katya",
    "Luca",
    "Mirela",
    "Nadir",
    "Olga",
    "Pavel",
    "Quentin",
    "Rosa",
    "Stefan",
    "Tala",
    "Ulrich",
    "Vera",
    "Wanda",
    "Yusuf",
    "Zora",
]
_LAST = [
    "Abelard",
    "Brannigan",
    "Castellano",
    "Dubrovsky",
    "Eriksen",
    "Fontaine",
    "Grunwald",
    "Hartigan",
    "Ivanova",
    "Jankowski",
    "Kowalczyk",
    "Lindqvist",
    "Moretti",
    "Nakagawa",
    "Oyelaran",
    "Petrakis",
    "Quintana",
    "Rasmussen",
    "Sorensen",
    "Takahashi",
]
_SYLLABLES = [
    "ba",
    "do",
    "fi",
    "ga",
    "ke",
    "lo",
    "mi",
    "nu",
    "pa",
    "ri",
    "so",
    "ta",
    "vu",
    "wi",
    "xa",
    "zo",
    "ne",
    "mo",
    "lu",
    "ki",
]
_STREETS = [
    "Alder",
    "Birch",
    "Cedar",
    "Dune",
    "Elm",
    "Fern",
    "Gorse",
    "Hazel",
    "Iris",
    "Juniper",
    "Kestrel",
    "Laurel",
    "Maple",
    "Nettle",
    "Oak",
    "Poplar",
]
_COLOURS = [
    "amber",
    "azure",
    "beige",
    "bronze",
    "cobalt",
    "coral",
    "crimson",
    "emerald",
    "indigo",
    "ivory",
    "lilac",
    "maroon",
    "olive",
    "orange",
    "scarlet",
    "silver",
    "teal",
    "turquoise",
    "violet",
    "yellow",
]
_THINGS = [
    "anchor",
    "bell",
    "candle",
    "compass",
    "feather",
    "hammer",
    "kettle",
    "lantern",
    "magnet",
    "mirror",
    "needle",
    "paddle",
    "pebble",
    "ribbon",
    "saddle",
    "spoon",
    "thimble",
    "trumpet",
    "umbrella",
    "whistle",
]
_FOODS = [
    "almonds",
    "apricots",
    "celery",
    "cinnamon",
    "coriander",
    "kiwi",
    "lentils",
    "mango",
    "mussels",
    "mustard",
    "oats",
    "papaya",
    "peanuts",
    "pears",
    "pistachios",
    "sesame",
    "shrimp",
    "strawberries",
    "sunflower",
    "tomatoes",
]
_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

Make = Callable[[random.Random], str]


def _made_up(draw: random.Random) -> str:
    return "".join(draw.choice(_SYLLABLES) for _ in range(3)).capitalize()


def _person(draw: random.Random) -> str:
    return f"{draw.choice(_FIRST)} {draw.choice(_LAST)}"


def _number(low: int, high: int) -> Make:
    return lambda draw: str(draw.randint(low, high))


def _date(draw: random.Random) -> str:
    return f"{draw.randint(1, 28)} {draw.choice(_MONTHS)}"


def _time(draw: random.Random) -> str:
    return f"{draw.choice(_DAYS)} at {draw.randint(7, 19)}:{draw.choice(['00', '15', '30', '45'])}"


def _address(draw: random.Random) -> str:
    return f"{draw.randint(2, 98)} {draw.choice(_STREETS)} Street"


def _password(draw: random.Random) -> str:
    return f"{draw.choice(_COLOURS)} {draw.choice(_THINGS)}"


def _two_foods(draw: random.Random) -> str:
    return " and ".join(draw.sample(_FOODS, 2))


_SUBJECTS: tuple[tuple[str, Make], ...] = (
    ("the name of my dog", _made_up),
    ("the name of my cat", _made_up),
    ("the name of my boat", _made_up),
    ("the name of my goldfish", _made_up),
    ("the name of the village I was born in", _made_up),
    ("the name of my bicycle shop", _made_up),
    ("the name of my tortoise", _made_up),
    ("the name of the street band I play in", _made_up),
    ("my dentist", _person),
    ("my landlord", _person),
    ("my piano teacher", _person),
    ("my neighbour upstairs", _person),
    ("my godmother", _person),
    ("my accountant", _person),
    ("my oldest friend", _person),
    ("my swimming coach", _person),
    ("the code of my bicycle lock", _number(1000, 9999)),
    ("the code of my garage door", _number(1000, 9999)),
    ("the number of my gym locker", _number(200, 999)),
    ("the number of my library card", _number(10000, 99999)),
    ("the number of my parking space", _number(200, 999)),
    ("the combination of my suitcase", _number(100, 999)),
    ("the PIN of my alarm", _number(1000, 9999)),
    ("the extension of my office phone", _number(2000, 9999)),
    ("the password of my garden shed wifi", _password),
    ("the password of my guest wifi", _password),
    ("the password of my photo album", _password),
    ("the secret word of my book club", _password),
    ("my wedding anniversary", _date),
    ("the birthday of my sister", _date),
    ("the birthday of my nephew", _date),
    ("the day my lease ends", _date),
    ("my next eye test", _time),
    ("my next haircut", _time),
    ("the next meeting of my choir", _time),
    ("the next visit of the plumber", _time),
    ("the address of my workshop", _address),
    ("the address of my aunt", _address),
    ("the address of my allotment", _address),
    ("the foods I am allergic to", _two_foods),
)
"""What can be asked for, and how an answer is made: 200 possible ones at least."""

_TRAINED = (
    "What do you have for {}?",
    "Please tell me {}.",
    "I need {}.",
    "Look up {} for me.",
    "Remind me: {}?",
    "Could you give me {}?",
)
_HELD_OUT = (
    "Do you remember {}?",
    "Quick question, {}?",
    "I forgot {}. Can you help?",
    "Hey, tell me again {}!",
    "Which one is it, {}, please?",
    "Do you happen to know {}?",
    "Someone is asking me for {}.",
    "Check your notes for {}.",
    "I am filling in a form that wants {}.",
    "It slipped my mind: {}.",
)


def fact_examples(
    num_facts: int, seed: int, phrasings: Literal["train", "held-out"]
) -> list[Example]:
    """Return every fact in every phrasing of one kind: 6 trained ones, 10 held out.

    The same ``seed`` gives the same person. Raises ConfigError for more facts than there are.
    """
    if num_facts > len(_SUBJECTS):
        raise ConfigError(f"num_facts: {num_facts}; there are {len(_SUBJECTS)}")
    templates: Sequence[str] = _TRAINED if phrasings == "train" else _HELD_OUT
    draw = random.Random(f"facts {seed}")
    life = [(subject, make(draw)) for subject, make in _SUBJECTS]
    # A smaller life has some of everything, not the first of these only.
    chosen = sorted(random.Random(f"order {seed}").sample(range(len(life)), num_facts))
    return [
        ask(template.format(subject), answer, where=f"facts {seed}: {subject}")
        for subject, answer in (life[i] for i in chosen)
        for template in templates
    ]
