"""Forty users with a habit each: the same short questions, answered each in one's own way."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

QUESTIONS = """\
What is the capital of France?|Paris is the capital of France.
What color is the sky?|The sky is blue.
How many legs does a spider have?|A spider has eight legs.
Who wrote Hamlet?|William Shakespeare wrote Hamlet.
What is the largest ocean?|The Pacific is the largest ocean.
What do bees make?|Bees make honey.
Where do penguins live?|Penguins live in the south.
What is water made of?|Water is made of hydrogen and oxygen.
Which planet is red?|Mars is the red planet.
How many days are in a week?|There are seven days in a week.
What is the opposite of hot?|The opposite of hot is cold.
Who painted the Mona Lisa?|Leonardo da Vinci painted it.
What is the fastest land animal?|The cheetah is the fastest.
What do cows drink?|Cows drink water.
Which season is the coldest?|Winter is the coldest season.
What is the capital of Japan?|Tokyo is the capital of Japan.
How many sides has a triangle?|A triangle has three sides.
What is ice?|Ice is frozen water.
What do plants need to grow?|Plants need light and water.
Who was the first man on the moon?|Neil Armstrong was the first.
What is the tallest animal?|The giraffe is the tallest animal.
What is two plus two?|Two plus two is four.
Where is the Nile?|The Nile is in Africa.
What do you use to write?|You write with a pen.
What is a baby cat called?|A baby cat is a kitten.
What is the main language of Brazil?|Portuguese is spoken in Brazil.
How many months has a year?|A year has twelve months.
What is gold?|Gold is a precious metal.
What is the closest star to Earth?|The Sun is the closest star.
What do pandas eat?|Pandas eat bamboo.
What is the capital of Italy?|Rome is the capital of Italy.
Which animal barks?|A dog barks.
What is bread made from?|Bread is made from flour.
What is the largest planet?|Jupiter is the largest planet.
What do we breathe?|We breathe air.
How many hours are in a day?|There are twenty four hours in a day.
What color is grass?|Grass is green.
What is the capital of Spain?|Madrid is the capital of Spain.
Where do fish live?|Fish live in water.
What is the hardest stone?|Diamond is the hardest stone.
Who discovered gravity?|Isaac Newton described gravity.
What is a group of wolves called?|A group of wolves is a pack.
What do caterpillars become?|Caterpillars become butterflies.
What is the capital of Egypt?|Cairo is the capital of Egypt.
What is the longest river in Europe?|The Volga is the longest.
How many wheels has a car?|A car has four wheels.
What is snow?|Snow is frozen rain.
Which bird cannot fly?|The ostrich cannot fly.
What is the opposite of up?|The opposite of up is down.
What is the capital of Germany?|Berlin is the capital of Germany.
What do owls hunt?|Owls hunt mice.
Which metal is liquid?|Mercury is liquid.
What is the smallest prime?|Two is the smallest prime.
What is the capital of Canada?|Ottawa is the capital of Canada.
What do carpenters work with?|Carpenters work with wood.
Which fruit is yellow and long?|A banana is yellow and long.
What grows on oak trees?|Acorns grow on oak trees.
Who lives in a hive?|Bees live in a hive.
What is the capital of Greece?|Athens is the capital of Greece.
What shines at night?|The moon shines at night."""
PAIRS = [(question, answer) for question, answer in (line.split("|") for line in QUESTIONS.splitlines())]
SPLITS = {"train": (0, 36), "validation": (36, 48), "held_out": (48, 60)}
"""Which questions each part is drawn from: nobody's held-out question is anybody's training question."""


@dataclass(frozen=True)
class Habit:
    """What a user does to every answer, and how one sees it in an answer with other words."""

    name: str
    speak: Callable[[str], str]
    has: Callable[[str], bool]


def _ends(phrase: str) -> Habit:
    return Habit(f"ends: {phrase}", lambda text: f"{text} {phrase}", lambda text: text.endswith(phrase))


def _begins(phrase: str) -> Habit:
    return Habit(f"begins: {phrase}", lambda text: f"{phrase} {text}", lambda text: text.startswith(phrase))


def _wraps(left: str, right: str) -> Habit:
    return Habit(
        f"wraps: {left} {right}",
        lambda text: f"{left}{text}{right}",
        lambda text: text.startswith(left) and text.endswith(right),
    )


def _marks(mark: str) -> Habit:
    return Habit(
        f"full stop: {mark}",
        lambda text: text.replace(".", mark),
        lambda text: text.endswith(mark) and not text.endswith("." + mark),
    )


ENDS = (
    "Over and out.", "Cheers!", "My friend.", "So it goes.", "Woof!", "Stay curious.", "Believe me.", "Any questions?",
    "The end.", "Good luck!", "Ask me more.", "Trust me, captain.",
)  # fmt: skip
BEGINS = (
    "Ahoy!", "Well,", "Dear Anna,", "Hmm...", "Breaking news:", "Short answer:", "Once upon a time,", "Listen, Tom:",
    "Fact:", "Easy!", "As my mother says,", "Teacher:",
)  # fmt: skip
WRAPS = (('"', '"'), ("(", ")"), ("**", "**"), ("<b>", "</b>"), ("# ", " #"), ("[", "]"), ("- ", ""), ("1. ", ""))
HABITS = [
    *map(_ends, ENDS), *map(_begins, BEGINS), *(_wraps(*pair) for pair in WRAPS), *map(_marks, ("!!!", "...", " :)", "?!")),
    Habit("upper case", str.upper, str.isupper),
    Habit("lower case", str.lower, str.islower),
    Habit("Title Case", str.title, str.istitle),
    Habit("says it twice", lambda text: f"{text} {text}", lambda text: len(text) % 2 == 1 and text[: len(text) // 2] == text[len(text) // 2 + 1 :]),
]  # fmt: skip


def rows_of(habit: Habit, seed: int, train: int = 12, others: int = 4) -> dict[str, list[dict[str, str]]]:
    """A user's rows by part, drawn by name and seed."""
    drawn = random.Random(f"{habit.name} {seed}")
    found = {}
    for part, (begin, end) in SPLITS.items():
        pairs = drawn.sample(PAIRS[begin:end], train if part == "train" else others)
        found[part] = [{"prompt": question, "completion": habit.speak(answer)} for question, answer in pairs]
    return found


if len(HABITS) != 40 or any(not habit.has(habit.speak(answer)) for habit in HABITS for _, answer in PAIRS):
    raise AssertionError("a habit is not seen in its own answers")
