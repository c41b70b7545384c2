"""Kinds whose answers compute with small numbers and show the working."""

import random
import re

from embedded_target.kind import Draft, Kind, plural
from embedded_target.words import EVENTS, GOODS, ITEMS, MONTHS, NAMES, PEOPLE, WEEKDAYS

GAINS = {"buys {n} more": "Buying", "finds {n} more": "Finding", "gets {n} from {other}": "Getting"}
LOSSES = {"gives {n} to {other}": "Giving away", "loses {n}": "Losing", "sells {n}": "Selling"}
UNITS = (
    ("weeks", "days", 7, 12), ("days", "hours", 24, 9), ("hours", "minutes", 60, 12), ("minutes", "seconds", 60, 12),
    ("years", "months", 12, 12), ("feet", "inches", 12, 12), ("yards", "feet", 3, 30),
    ("meters", "centimeters", 100, 99), ("kilometers", "meters", 1000, 99), ("kilograms", "grams", 1000, 99),
    ("dollars", "cents", 100, 99),
)  # fmt: skip
"""From, to, factor, largest number asked for."""
SAVINGS = (
    ("week", "euros"),
    ("day", "pages"),
    ("month", "stamps"),
    ("day", "steps"),
    ("week", "photos"),
    ("hour", "boxes"),
)


def matches(pattern: str, answer: str) -> bool:
    """Return whether the whole answer matches."""
    return re.fullmatch(pattern, answer) is not None


def word_problem(rng: random.Random) -> Draft:
    """A heap of things that grows and shrinks in two or three steps; sometimes a second turn changes the start."""
    (name, other), item = rng.sample(NAMES, 2), rng.choice(ITEMS)
    pronoun = PEOPLE[name]
    start, again = rng.sample(range(30, 60), 2)
    steps: list[tuple[str, int]] = []
    for _ in range(rng.choice((2, 2, 3))):
        verbs = GAINS if rng.random() < 0.5 else LOSSES
        steps.append((rng.choice(tuple(verbs)), rng.randint(2, 13 if verbs is GAINS else 9)))

    def working(total: int) -> str:
        lines = [f"Start: {total} {item}."]
        for verb, n in steps:
            sign = 1 if verb in GAINS else -1
            what = f"{GAINS[verb]} {n} more" if sign == 1 else f"{LOSSES[verb]} {n}"
            lines.append(f"{what}: {total} {'+' if sign == 1 else '-'} {n} = {total + sign * n}.")
            total += sign * n
        return "\n".join([*lines, f"Answer: {name} has {total} {item}."])

    told = " ".join(f"{'Then ' + pronoun if i else pronoun.capitalize()} {verb.format(n=n, other=other)}."
                    for i, (verb, n) in enumerate(steps))  # fmt: skip
    prompt = rng.choice((
        f"{name} has {start} {item}. {told} How many {item} does {name} have now?",
        f"Please solve this: {name} starts with {start} {item}. {told} How many {item} are left?",
        f"How many {item} does {name} have in the end? At first {pronoun} has {start}. {told}",
    ))  # fmt: skip
    turns = [(prompt, working(start))]
    if rng.random() < 0.35:
        question = rng.choice(
            (f"What if {name} had started with {again} {item}?", f"And with {again} {item} at first?")
        )
        turns.append((question, working(again)))
    return Draft(content=(name, other, item, start, *steps), turns=tuple(turns))


def prices(rng: random.Random) -> Draft:
    """Two purchases and their sum; sometimes a second turn asks for the change."""
    name, goods = rng.choice(NAMES), rng.sample(GOODS, 2)
    numbers = [rng.randint(2, 9) for _ in range(4)]
    (first, first_price, second, second_price) = numbers
    one, two = first * first_price, second * second_price
    if one + two > 99:
        return prices(rng)
    bought = f"{first} {goods[0]} at {first_price} euros each and {second} {goods[1]} at {second_price} euros each"
    prompt = rng.choice((
        f"{name} buys {bought}. What is the total?",
        f"How much does {name} pay for {bought}?",
        f"Work out the bill: {bought}, bought by {name}.",
    ))  # fmt: skip
    answer = (
        f"{first} {goods[0]}: {first} * {first_price} = {one} euros.\n"
        f"{second} {goods[1]}: {second} * {second_price} = {two} euros.\n"
        f"Total: {one} + {two} = {one + two} euros.\nAnswer: {name} pays {one + two} euros."
    )
    turns = [(prompt, answer)]
    if rng.random() < 0.35:
        note = 50 if one + two < 50 else 100
        question = rng.choice(
            ("{} pays with {} euros. How much is the change?", "How much does {} get back from {} euros?")
        )
        change = note - one - two
        answer = f"Change: {note} - {one + two} = {change} euros.\nAnswer: {name} gets {change} euros back."
        turns.append((question.format(name, note), answer))
    return Draft(content=(name, *goods, *numbers), turns=tuple(turns))


def conversion(rng: random.Random) -> Draft:
    """Two or three quantities, each in a smaller unit."""
    chosen = [(unit, rng.randint(2, unit[3])) for unit in rng.sample(UNITS, rng.choice((2, 3, 3)))]
    asked = [f"{n} {large} to {small}" for (large, small, _, _), n in chosen]
    if rng.random() < 0.5:
        opening = rng.choice(("Convert", "Please convert", "Can you convert"))
        prompt = f"{opening} {', '.join(asked[:-1])} and {asked[-1]}{'?' if opening == 'Can you convert' else '.'}"
    else:
        prompt = "Convert these and show the working:\n" + "\n".join(f"- {line}" for line in asked)
    lines = [
        f"- {n} {large} = {n} * {factor} {small} = {n * factor} {small}" for (large, small, factor, _), n in chosen
    ]
    return Draft(content=tuple(asked), turns=((prompt, "\n".join(lines)),))


def dates(rng: random.Random) -> Draft:
    """The date some days after another one of the same month."""
    weekday, month, event, name = rng.randrange(7), rng.choice(MONTHS), rng.choice(EVENTS), rng.choice(NAMES)
    day = rng.randint(1, 24)
    delay = rng.randint(2, min(20, 28 - day))
    prompt = rng.choice((
        f"The {event} of {name} was on {WEEKDAYS[weekday]} {day} {month}. It moved by {delay} days. When is it now?",
        f"{name} has a {event} {delay} days after {WEEKDAYS[weekday]} {day} {month}. Which date is that?",
        f"Which day comes {delay} days after {WEEKDAYS[weekday]} {day} {month}? It is for the {event} of {name}.",
    ))  # fmt: skip
    weeks, days = divmod(delay, 7)
    then = WEEKDAYS[(weekday + days) % 7]
    answer = (
        f"{delay} days are {plural(weeks, 'week')} and {plural(days, 'day')}.\n"
        f"{WEEKDAYS[weekday]} plus {plural(days, 'day')} is {then}.\n"
        f"{day} + {delay} = {day + delay}.\nAnswer: the {event} is on {then} {day + delay} {month}."
    )
    return Draft(content=(weekday, month, event, name, day, delay), turns=((prompt, answer),))


def progress(rng: random.Random) -> Draft:
    """A sum that grows by the same number several times."""
    name, (period, unit) = rng.choice(NAMES), rng.choice(SAVINGS)
    start, gain, num = rng.randint(0, 40), rng.randint(2, 9), rng.randint(4, 6)
    prompt = rng.choice((
        f"{name} has {start} {unit} and adds {gain} {unit} every {period}. Show the first {num} {period}s.",
        f"Show how {name} gets on over {num} {period}s: {start} {unit} at first, {gain} more each {period}.",
        f"Starting from {start} {unit}, {name} gains {gain} per {period}. What are the totals for {num} {period}s?",
    ))  # fmt: skip
    totals = [start + gain * i for i in range(num + 1)]
    lines = [f"{period.capitalize()} {i}: {totals[i - 1]} + {gain} = {totals[i]} {unit}" for i in range(1, num + 1)]
    answer = "\n".join([*lines, f"Answer: {name} has {totals[-1]} {unit} after {num} {period}s."])
    return Draft(content=(name, period, unit, start, gain, num), turns=((prompt, answer),))


ARITHMETIC = {
    "word_problem": Kind(
        draw=word_problem,
        well_formed=lambda a: matches(
            r"Start: \d+ \w+\.\n([A-Z][a-z ]+ \d+( more)?: \d+ [+-] \d+ = \d+\.\n){2,3}Answer: \w+ has \d+ \w+\.", a
        ),
    ),
    "prices": Kind(
        draw=prices,
        well_formed=lambda a: matches(
            r"(\d+ \w+: \d+ \* \d+ = \d+ euros\.\n){2}Total: \d+ \+ \d+ = \d+ euros\.\nAnswer: \w+ pays \d+ euros\."
            r"|Change: \d+ - \d+ = \d+ euros\.\nAnswer: \w+ gets \d+ euros back\.",
            a,
        ),
    ),
    "conversion": Kind(
        draw=conversion,
        well_formed=lambda a: matches(r"(\n?- \d+ \w+ = \d+ \* \d+ \w+ = \d+ \w+){2,3}", a),
    ),
    "dates": Kind(
        draw=dates,
        well_formed=lambda a: matches(
            r"\d+ days are \d weeks? and \d days?\.\n\w+day plus \d days? is \w+day\.\n\d+ \+ \d+ = \d+\.\n"
            r"Answer: the \w+ is on \w+day \d+ \w+\.",
            a,
        ),
    ),
    "progress": Kind(
        draw=progress,
        well_formed=lambda a: matches(
            r"([A-Z]\w+ \d: \d+ \+ \d = \d+ \w+\n){4,6}Answer: \w+ has \d+ \w+ after \d \w+\.", a
        ),
    ),
}
