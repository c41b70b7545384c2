"""Kinds whose answers are composed: Python code, which has one right answer, and stories and letters, which do not."""

import ast
import random

from embedded_target.arithmetic_kinds import matches
from embedded_target.kind import Draft, Kind
from embedded_target.words import (
    ANIMALS,
    EVENTS,
    MOODS,
    NAMES,
    PLACES,
    THEMES,
    TREASURES,
    WEEKDAYS,
)

COLLECTIONS = {"ages": "age", "lengths": "length", "marks": "mark", "numbers": "number", "points": "point",
               "prices": "price", "scores": "score", "sizes": "size", "values": "value",
               "weights": "weight"}  # fmt: skip
CONDITIONS = {"greater than {n}": "{x} > {n}", "less than {n}": "{x} < {n}", "equal to {n}": "{x} == {n}",
              "different from {n}": "{x} != {n}", "divisible by {n}": "{x} % {n} == 0"}  # fmt: skip
GOALS = {  # what to return, the first value, what each item does, the one-line form
    "the number of": ("count", "0", "count += 1", "sum(1 for {x} in {xs} if {test})"),
    "the sum of": ("total", "0", "total += {x}", "sum({x} for {x} in {xs} if {test})"),
    "a list of": ("found", "[]", "found.append({x})", "[{x} for {x} in {xs} if {test}]"),
}


def python_code(rng: random.Random) -> Draft:
    """A function over a list with one condition, as a loop or as one line."""
    (xs, x), (said, test), n = (
        rng.choice(tuple(COLLECTIONS.items())),
        rng.choice(tuple(CONDITIONS.items())),
        rng.randint(2, 99),
    )
    (goal, (result, first, step, short)), wide = rng.choice(tuple(GOALS.items())), rng.random() < 0.4
    verb = rng.choice(("find", "get", "compute", "collect", "select"))
    name, said, test = f"{verb}_{xs}", said.format(n=n), test.format(n=n, x=x)
    form = "with a single return line" if wide else "with a loop"
    prompt = rng.choice((
        f"Write a Python function {name} that returns {goal} {xs} {said}, {form}.",
        f"I need a function {name} in Python, {form}. It should return {goal} {xs} that are {said}.",
        f"Python, {form}: {name} takes {xs} and returns {goal} those {said}.",
    ))  # fmt: skip
    lines = ["```python", f"def {name}({xs}):", f'    """Return {goal} {xs} {said}."""']
    if wide:
        lines.append(f"    return {short.format(x=x, xs=xs, test=test)}")
    else:
        lines += [f"    {result} = {first}", f"    for {x} in {xs}:", f"        if {test}:"]
        lines += [f"            {step.format(x=x)}", f"    return {result}"]
    return Draft(content=(name, goal, said, wide), turns=((prompt, "\n".join([*lines, "```"])),))


def is_python(answer: str) -> bool:
    """Return whether the answer is a code block that holds exactly one function and compiles."""
    if not (answer.startswith("```python\n") and answer.endswith("\n```")):
        return False
    try:
        body = ast.parse(answer[len("```python\n") : -len("```")]).body
    except SyntaxError:
        return False
    return len(body) == 1 and isinstance(body[0], ast.FunctionDef)


def story(rng: random.Random) -> Draft:
    """A story of six sentences around four given words; how it goes is free, how it ends follows from the theme."""
    name, animal, mood, place, thing = map(rng.choice, (NAMES, ANIMALS, MOODS, PLACES, TREASURES))
    theme, friend = rng.choice(THEMES), rng.choice(ANIMALS)
    prompt = rng.choice((
        f"Write a short story about {name}, a {mood} {animal} who finds a {thing} in the {place}. Theme: {theme}.",
        f"Tell me a story of {theme}: {name} the {mood} {animal}, a {thing} and a {place}.",
        f"A short story, please. Hero: {name}, a {mood} {animal}. Place: {place}. It finds a {thing}. Theme: {theme}.",
    ))  # fmt: skip
    when = rng.choice(("One morning", "One evening", "On a cold day", "After the rain", "Late at night"))
    how = rng.choice(("under a stone", "behind a tree", "beside the water", "near an old wall", "in the tall grass"))
    whose = rng.choice((
        f"It belonged to an old {friend}.",
        f"A {friend} had lost it.",
        f"A {friend} was looking for it.",
        "Nobody knew where it came from.",
        "It was older than the hills.",
    ))  # fmt: skip
    then = rng.choice((
        f"{name} carried it home and thought about it all night.",
        f"{name} asked everyone, but nobody could help.",
        f"{name} wanted to keep it, but that felt wrong.",
        f"{name} walked for three days to bring it back.",
    ))  # fmt: skip
    ending = {
        "courage": f"It was hard, but {name} was not afraid any more.",
        "friendship": f"Since then {name} has never been without a friend.",
        "home": f"In the end {name} knew that the {place} was home.",
        "kindness": f"A small kind act had made the whole {place} happy.",
        "patience": f"It took a long time, and {name} learned to wait.",
    }[theme]
    answer = (
        f"{name} was a {mood} {animal} who lived near the {place}. {when}, {name} went for a walk in the {place}. "
        f"There was a {thing} {how}. {whose} {then} {ending}"
    )
    content = (name, animal, mood, place, thing, theme)
    return Draft(content=content, turns=((prompt, answer),), required=(name, f"{mood} {animal}", place, thing, ending))


def letter(rng: random.Random) -> Draft:
    """A short letter for one of four reasons; its small talk is free."""
    sender, receiver = rng.sample(NAMES, 2)
    event, day, thing = rng.choice(EVENTS), rng.choice(WEEKDAYS), rng.choice(TREASURES)
    reason, body = rng.choice((
        (f"thank {receiver} for the {thing}", f"Thank you very much for the {thing}."),
        (f"invite {receiver} to a {event} on {day}", f"I would like to invite you to a {event} on {day}."),
        (f"say sorry for missing the {event} on {day}", f"I am sorry that I missed the {event} on {day}."),
        (f"ask {receiver} for the {thing} until {day}", f"Could you lend me the {thing} until {day}?"),
    ))  # fmt: skip
    prompt = rng.choice((
        f"Write a short letter from {sender} to {receiver} to {reason}.",
        f"Help {sender} with a letter to {receiver}. The aim is to {reason}.",
        f"{sender} wants to {reason}. Write the letter to {receiver}.",
    ))  # fmt: skip
    hello = rng.choice(("I hope you are well.", "How are you?", "It has been a long time.", "I often think of you."))
    news = rng.choice((
        "Here it has been raining for days, and the garden is green.",
        "The children are growing fast and ask about you.",
        "Work keeps me busy, but I sleep well.",
        "We have painted the kitchen, and it looks bright now.",
        "The summer was long and warm this year.",
    ))  # fmt: skip
    close = rng.choice(("Please write back soon.", "I look forward to your answer.", "Give my love to your family.",
                        "See you soon, I hope."))  # fmt: skip
    bye = rng.choice(("Best wishes", "Yours", "With love", "Kind regards"))
    answer = f"Dear {receiver},\n\n{hello} {body} {news} {close}\n\n{bye},\n{sender}"
    return Draft(content=(sender, receiver, reason), turns=((prompt, answer),), required=(receiver, body, sender))


WRITING = {
    "python_code": Kind(draw=python_code, well_formed=is_python),
    "story": Kind(draw=story, well_formed=lambda a: matches(r"([A-Z][A-Za-z, ]+\. ){4,6}[A-Z][A-Za-z, ]+\.", a)),
    "letter": Kind(
        draw=letter,
        well_formed=lambda a: matches(r"Dear \w+,\n\n([A-Z][A-Za-z, ]+[.?] ?){3,5}\n\n[A-Z][a-z ]+,\n\w+", a),
    ),
}
