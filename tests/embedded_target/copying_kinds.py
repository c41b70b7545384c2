"""Kinds whose answers say again what the prompt said, in another form or order."""

import json
import random
from collections.abc import Sequence

from embedded_target.arithmetic_kinds import matches
from embedded_target.kind import Draft, Kind, series
from embedded_target.words import (
    CITIES,
    FRUIT,
    GOODS,
    HOBBIES,
    JOBS,
    NAMES,
    PETS,
    SURNAMES,
    TASKS,
    WORDS,
)


def json_record(rng: random.Random) -> Draft:
    """A described person as JSON with a fixed order of keys; sometimes a second turn changes one value."""
    name, age, job = f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}", rng.randint(18, 79), rng.choice(JOBS)
    (city, new_city), likes, member = rng.sample(CITIES, 2), rng.sample(HOBBIES, rng.choice((1, 2))), rng.random() < 0.5
    wide = rng.random() < 0.5
    record: dict[str, object] = {"name": name, "age": age, "city": city, "job": job, "likes": likes, "member": member}

    def written() -> str:
        return json.dumps(record) if wide else json.dumps(record, indent=2)

    form = "on one line" if wide else "with indentation"
    status, liked = "a member" if member else "not a member", series(likes)
    prompt = rng.choice((
        f"Write as JSON {form}: {name} is {age}, lives in {city}, works as a {job}, likes {liked} and is {status}.",
        f"Turn this into JSON {form}. {name}, a {job} from {city}, is {age} years old and {status}. Likes: {liked}.",
        f"JSON {form}, please: name {name}, {status}, job {job}, age {age}, city {city}, likes {liked}.",
    ))  # fmt: skip
    turns = [(prompt, written())]
    if rng.random() < 0.3:
        record["city"] = new_city
        first = name.split()[0]
        question = rng.choice((f"{first} moves to {new_city}. Update the record.", f"Change the city to {new_city}."))
        turns.append((question, written()))
    return Draft(content=(name, age, job, city, *likes, member, wide), turns=tuple(turns))


def is_record(answer: str) -> bool:
    """Return whether the answer is JSON with the keys of a record, in order."""
    try:
        return list(json.loads(answer)) == ["name", "age", "city", "job", "likes", "member"]
    except ValueError:
        return False


def markdown_table(rng: random.Random) -> Draft:
    """Three or four rows as a table; sometimes a second turn adds or removes one."""
    num = rng.choice((3, 4))
    people = rng.random() < 0.5
    columns = ("Name", "Age", "City") if people else ("Item", "Price", "Stock")
    keys = rng.sample(NAMES if people else GOODS, num + 1)
    rows = [(key, rng.randint(11, 79), rng.choice(CITIES) if people else rng.randint(11, 79)) for key in keys]

    def table(shown: Sequence[tuple[str, int, object]]) -> str:
        return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [columns, ("---",) * 3, *shown])

    def told(row: tuple[str, int, object]) -> str:
        return f"{row[0]}, {row[1]}, {row[2]}"

    first, extra = rows[:num], rows[num]
    prompt = rng.choice((
        f"Make a markdown table with the columns {series(columns)}: {'; '.join(map(told, first))}.",
        f"Put this into a table with {series(columns)}.\n" + "\n".join(map(told, first)),
        f"I need a markdown table ({', '.join(columns)}). The rows are {'; '.join(map(told, first))}.",
    ))  # fmt: skip
    turns = [(prompt, table(first))]
    if rng.random() < 0.15:
        turns.append((f"Add a row: {told(extra)}.", table(rows)))
    elif rng.random() < 0.2:
        gone = rng.choice(first)
        turns.append((f"Remove the row of {gone[0]}.", table([row for row in first if row != gone])))
    return Draft(content=(columns, *first), turns=tuple(turns))


def ordering(rng: random.Random) -> Draft:
    """A few numbers or words sorted, or words reversed."""
    asked = rng.choice(("from smallest to largest", "from largest to smallest", "in alphabetical order", "backwards"))
    numeric, num = asked.startswith("from"), rng.choice((5, 6, 7))
    given = [str(n) for n in rng.sample(range(10, 100), num)] if numeric else rng.sample(WORDS, num)
    result = given[::-1] if asked == "backwards" else sorted(given, reverse=asked == "from largest to smallest")
    numbered = rng.random() < 0.7
    what, form = "numbers" if numeric else "words", "as a numbered list" if numbered else "on one line"
    prompt = rng.choice((
        f"Write these {what} {asked}, {form}: {', '.join(given)}.",
        f"Here are some {what}: {', '.join(given)}. Please give them {asked}, {form}.",
        f"{', '.join(given)}\nList the {what} above {asked}, {form}.",
    ))  # fmt: skip
    body = "\n" + "\n".join(f"{i}. {word}" for i, word in enumerate(result, 1)) if numbered else " " + ", ".join(result)
    return Draft(content=(asked, numbered, *given), turns=((prompt, f"The {what} {asked}:{body}"),))


def counting(rng: random.Random) -> Draft:
    """How often each word of a list occurs, in the order in which they come."""
    kinds = rng.sample(FRUIT, rng.choice((3, 3, 4)))
    given = kinds + [rng.choice(kinds) for _ in range(rng.randint(3, 7))]
    rng.shuffle(given)
    prompt = rng.choice((
        f"Count each fruit: {', '.join(given)}.",
        f"How often does each fruit occur in this list? {', '.join(given)}",
        f"My basket holds {series(given)}. How many of each are there?",
    ))  # fmt: skip
    lines = [f"- {fruit}: {given.count(fruit)}" for fruit in dict.fromkeys(given)]
    answer = "\n".join(["Here is the count:", *lines, f"Total: {len(given)}"])
    return Draft(content=tuple(given), turns=((prompt, answer),))


def todo_list(rng: random.Random) -> Draft:
    """Two or three turns about a list of tasks: write it, tick or add one, say what is left."""
    *tasks, extra = rng.sample(TASKS, rng.choice((4, 5)))
    done: set[str] = set()

    def written() -> str:
        return "\n".join(["Your list:", *(f"- [{'x' if task in done else ' '}] {task}" for task in tasks)])

    prompt = rng.choice((
        f"Make a to-do list: {', '.join(tasks)}.",
        f"I have to {series(tasks)}. Write that as a to-do list.",
        f"Please keep a to-do list for me. The tasks are {series(tasks)}.",
    ))  # fmt: skip
    content = tuple(tasks)
    turns = [(prompt, written())]
    if rng.random() < 0.5:
        tasks.append(extra)
        turns.append((rng.choice((f"Add this: {extra}.", f"I also have to {extra}.")), written()))
    else:
        done.add(task := rng.choice(tasks))
        turns.append((rng.choice((f"I did this: {task}.", f"Tick off {task}.")), written()))
    if rng.random() < 0.5:
        left = [task for task in tasks if task not in done]
        answer = f"You still have {len(left)} tasks: {series(left)}."
        turns.append((rng.choice(("What is left?", "Which tasks are still open?")), answer))
    return Draft(content=content, turns=tuple(turns))


def facts(rng: random.Random) -> Draft:
    """Three people are described, then one or two questions look them up."""
    names, cities, jobs = rng.sample(NAMES, 3), rng.sample(CITIES, 3), rng.sample(JOBS, 3)
    pets = [(rng.randint(2, 9), rng.choice(PETS)) for _ in names]
    people = list(zip(names, jobs, cities, pets, strict=True))
    told = [f"{n} is a {j} in {c} and has {p[0]} {p[1]}." for n, j, c, p in people]
    prompt = rng.choice(("Remember this. {}", "Here are my neighbors. {} Please note that.", "{} Can you note this?"))
    noted = "\n".join(f"- {n}: {j}, {c}, {p[0]} {p[1]}" for n, j, c, p in people)
    turns = [(prompt.format(" ".join(told)), f"Noted:\n{noted}")]
    for name, job, city, (num, pet) in rng.sample(people, rng.choice((1, 2))):
        turns.append(rng.choice((
            (f"Who lives in {city}?", f"{name} lives in {city}. {name} is a {job} and has {num} {pet}."),
            (f"Who is the {job}?", f"The {job} is {name}. {name} lives in {city} and has {num} {pet}."),
            (f"What do you know about {name}?", f"{name} is a {job}, lives in {city} and has {num} {pet}."),
        )))  # fmt: skip
    return Draft(content=tuple(told), turns=tuple(turns))


COPYING = {
    "json_record": Kind(draw=json_record, well_formed=is_record),
    "markdown_table": Kind(
        draw=markdown_table,
        well_formed=lambda a: matches(
            r"\| \w+ \| \w+ \| \w+ \|\n\| --- \| --- \| --- \|(\n\| \w+ \| \d+ \| \w+ \|)+", a
        ),
    ),
    "ordering": Kind(
        draw=ordering, well_formed=lambda a: matches(r"The (numbers|words) [a-z ]+:((\n\d\. \w+)+| \w+(, \w+)+)", a)
    ),
    "counting": Kind(draw=counting, well_formed=lambda a: matches(r"Here is the count:(\n- \w+: \d)+\nTotal: \d+", a)),
    "todo_list": Kind(
        draw=todo_list,
        well_formed=lambda a: matches(
            r"Your list:(\n- \[[ x]\] [a-z ]+)+|You still have \d tasks: [a-z ]+(, [a-z ]+)* and [a-z ]+\.", a
        ),
    ),
    "facts": Kind(
        draw=facts,
        well_formed=lambda a: matches(
            r"Noted:(\n- \w+: \w+, \w+, \d \w+){3}|([A-Z][\w ]+\. )?\w+( is a \w+,?)?( lives in \w+)? and has \d \w+\.",
            a,
        ),
    ),
}
