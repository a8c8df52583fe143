"""Little stories, diary entries, dialogues and letters about named people who do things for a reason.

A plot is a row of beats, a beat a choice of wordings; every text mentions its (novel) names again and again, so that
copying a name from the context is worth learning.
"""

from __future__ import annotations

import random

from trivium.data.microworld.names import Split, cast, towns
from trivium.data.microworld.world import ANIMALS, CARRIED, HOBBIES, PLACES, WEATHER, WORKERS, an, coloured, described

Beat = tuple[str, ...]

PLOTS: tuple[tuple[Beat, ...], ...] = (
    (
        ("{name} had {a_coloured}, and {she} loved it.", "{name} owned {a_coloured}. It was a gift from {f_name}."),
        ("One {time} the {thing} was gone.", "But one {time} {name} could not find the {thing}."),
        ("{name} was sad because the {thing} was dear to {him}.", "{She} looked in the {place}, but it was not there."),
        ('{f_name} came to help. "Where did you last see it?" {f_she} asked.', "{f_name} saw that {name} was sad."),
        ('"I had it in the {place2}," said {name}.', "{name} thought of the {place2}, where {she} had been."),
        ("They went to the {place2}, and there was the {thing}.", "{f_name} found the {thing} in the {place2}."),
        ('"Thank you, {f_name}!" said {name}.', "{name} was happy again, so {she} hugged {f_name}."),
    ),
    (
        ("It was the birthday of {f_name}.", "{f_name} had a birthday on a cold {time}."),
        ("{name} wanted to give {f_him} something, but {she} had no money.", "{name} wanted to make {f_him} happy."),
        ("So {name} made {a_thing} with {her} own hands.", "So {she} worked all day and made {a_thing}."),
        ("{She} painted it {colour} because {f_name} liked {colour} things.", "It was {colour} and small."),
        ("When {f_name} saw the {thing}, {f_she} laughed.", "{f_name} opened the box and found the {coloured}."),
        ('"I like it because you made it," said {f_name}.', '"This is the best gift of all," {f_she} said.'),
    ),
    (
        ("{name} lived in {town} near the {place}.", "In the village of {town} there lived {a_worker} called {name}."),
        ("One {time} there was a great storm.", "One {time} the wind was so strong that the trees fell."),
        ("{name} heard a small sound at the door.", "{She} heard something cry in the dark."),
        ("It was {an_animal}. It was wet and afraid.", "There sat {an_animal}, and it was very cold."),
        ("{name} gave it food so that it would grow strong.", "{She} made a fire because the {animal} was cold."),
        ("In the morning the {animal} went back to its home.", "The next day the sun came out and the {animal} left."),
        ("But every {time} it came back to see {name}.", "{name} never forgot the {animal}."),
    ),
    (
        ("{name} and {f_name} had only one {thing}.", "{name} and {f_name} both wanted the {coloured}."),
        ('"It is mine," said {name}. "No, it is mine," said {f_name}.', "They pulled and pulled until it broke."),
        (
            "Both of them were angry, so they did not speak all day.",
            "{name} went home and {f_name} went to the {place}.",
        ),
        ("In the evening {name} felt sorry.", "That night {name} could not sleep because {she} felt sorry."),
        ('{She} went to {f_name} and said, "Let us share it."', '"I am sorry," said {name}. "You are my friend."'),
        ("So {name} and {f_name} shared the {thing}, and both were happy.", "From then on they played together."),
    ),
    (
        ("{name} wanted to get better at {hobby}.", "{name} could not do much, but {she} loved {hobby}."),
        ("At first it was hard, and {she} made many mistakes.", "The first day was bad because {she} was afraid."),
        ('"Try again," said {f_name}. "I will help you."', "{f_name} showed {him} how to do it."),
        ("Every {time} {name} tried again.", "{name} worked at it for a whole {season}."),
        ("After some weeks {she} was good at it.", "One day {she} did it without a mistake."),
        ("{name} was proud because {she} had not given up.", '"I knew that you could do it," said {f_name}.'),
    ),
    (
        ("{name} went to the {place} to buy {a_thing}.", "One {time} {name} walked to the {place}."),
        ("On the way {she} met {f_name}, who was carrying a heavy bag.", "There {she} saw {f_name} with a heavy bag."),
        ("{name} carried the bag because {f_name} was tired.", '"Let me help you," said {name} and took the bag.'),
        (
            "{f_name} was glad and gave {him} {a_coloured}.",
            '"You are kind," said {f_name}. "Please take this {thing}."',
        ),
        ("{name} went home with the {thing} and told everybody about {f_name}.", "So a good deed came back to {name}."),
    ),
    (
        ("{name} and {f_name} wanted to run a race from the {place} to the {place2}.", "There was a race in {town}."),
        ("{name} was fast, but {f_name} was clever.", "{f_name} ran fast, and {name} ran behind {f_him}."),
        ("Half way {name} fell over {a_thing}.", "In the middle of the race {name} hurt {her} foot."),
        ("{f_name} stopped because a friend matters more than a race.", "{f_name} turned round and helped {him} up."),
        ("They walked to the end together.", "In the end nobody won, but nobody was sad."),
        (
            "{name} never forgot that {f_name} had stopped.",
            '"You could have won," said {name}. "I did," said {f_name}.',
        ),
    ),
    (
        ("{name} was {a_worker} in {town}.", "{name} worked as {a_worker}."),
        ("One {time} {f_name} came and asked for help.", "{f_name} came to {him} because {f_her} {thing} was broken."),
        ("{name} looked at the {thing} for a long time.", '"Can you mend my {thing}?" asked {f_name}.'),
        ('"It will take some time," {she} said.', "{She} worked until it was dark so that {f_name} would be happy."),
        ("The next day the {thing} was like new.", "Then {name} gave the {thing} back to {f_name}."),
        ("{f_name} paid {him} with {a_coloured2}.", "{f_name} thanked {name} and told all of {town} about {him}."),
    ),
)

_DIARY = (
    "Today I went to the {place} with {f_name}.",
    "The weather was good, so we stayed outside all day.",
    "I saw {an_animal} near the {place2}.",
    "{f_name} told me a story about {town}.",
    "I was a little tired because I woke up early.",
    "We ate some bread and talked about {hobby}.",
    "I found {a_coloured} on the street.",
    "{f_name} laughed when I fell into the grass.",
    "I want to go back to the {place} soon.",
    "In the evening I read a book because it was cold outside.",
    "I like {season} because {season_why_we}.",
    "{f_name} is a good friend because {f_she} always listens.",
    "Tomorrow I will give {f_name} {a_thing}.",
    "I lost my {thing}, but {f_name} found it.",
)

_TALKS: tuple[tuple[str, ...], ...] = (
    (
        "Where are you going, {f_name}?",
        "I am going to the {place}, {name}.",
        "Why are you going to the {place}?",
        "Because I want to buy {a_thing}.",
        "May I come with you?",
        "Yes, let us go to the {place} together.",
    ),
    (
        "Have you seen my {thing}, {f_name}?",
        "What colour is your {thing}?",
        "It is {colour}.",
        "I saw a {colour} {thing} in the {place}.",
        "Thank you, {f_name}. I will look in the {place}.",
    ),
    (
        "What do you like, {name}?",
        "I like {hobby} because it is {hobby_is}. And you, {f_name}?",
        "I like {hobby2}.",
        "Why do you like {hobby2}, {f_name}?",
        "Because it makes me happy.",
        "Then let us do both.",
    ),
    (
        "I am so tired, {f_name}.",
        "Why are you tired, {name}?",
        "Because I worked in the {place} all day.",
        "Then sit down and drink some tea.",
        "You are very kind, {f_name}.",
    ),
    (
        "Who lives in {town}, {f_name}?",
        "My brother lives in {town}.",
        "What does he do in {town}?",
        "He is {a_worker}.",
        "Then he works very hard.",
    ),
    (
        "Look, {f_name}! There is {an_animal}!",
        "Where is the {animal}?",
        "The {animal} is near the {place}.",
        "Now I can see it too. Let us be quiet so that it stays.",
        "What a pretty {animal}!",
    ),
)

_LETTER = (
    "I am writing to you from {town}.",
    "The {place} here is lovely.",
    "Yesterday I saw {an_animal}.",
    "I miss you very much.",
    "I have bought {a_coloured} for you.",
    "The people of {town} are kind.",
    "Every day I go to the {place} because it is quiet there.",
    "I will come home in {season}.",
    "Please tell me what is new.",
    "I have started {hobby}, and it is {hobby_is}.",
)


def slots(rng: random.Random, split: Split = "train") -> dict[str, str]:
    """Return words for all slots of the templates, with new people each time."""
    hero, friend = cast(rng, 2, split)
    thing, thing2 = rng.sample(CARRIED, 2)
    colour, coloured_thing = coloured(rng, thing)
    animal = rng.choice([a for a in ANIMALS if a.kind in ("mammal", "bird")]).name
    place, place2 = rng.sample([p for p in PLACES if p not in ("mountain", "village")], 2)
    hobby, hobby2 = rng.sample(sorted(HOBBIES), 2)
    season = rng.choice(("spring", "summer", "autumn", "winter"))
    words = hero.slots | {f"f_{key}": value for key, value in friend.slots.items()}
    words |= {"thing": thing, "a_thing": an(thing), "colour": colour, "coloured": coloured_thing}
    words |= {"a_coloured": an(coloured_thing), "a_coloured2": an(described(rng, thing2)), "animal": animal}
    words |= {"an_animal": an(animal), "place": place, "place2": place2, "town": rng.choice(towns(split))}
    words |= {"time": rng.choice(("morning", "evening", "day", "night")), "hobby": hobby, "hobby2": hobby2}
    words |= {"season": season, "season_why_we": WEATHER[season][0].replace("they", "we")}
    words |= {"hobby_is": HOBBIES[hobby][1], "a_worker": an(rng.choice(sorted(WORKERS)))}
    return words


def diary(rng: random.Random) -> list[str]:
    """Return a diary entry as sentences."""
    words = slots(rng)
    day = rng.choice(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"))
    return [f"Dear diary, it is {day}.", *(s.format(**words) for s in rng.sample(_DIARY, rng.randint(5, 7)))]


def dialogue(rng: random.Random) -> list[str]:
    """Return a dialogue as lines: `Name: "..."` in one of two layouts, or told with `said`."""
    words = slots(rng)
    names = (words["name"], words["f_name"])
    lines = [line.format(**words) for line in rng.choice(_TALKS)]
    if rng.random() < 0.6:
        return [f"{names[i % 2]}: {line}" for i, line in enumerate(lines)]
    told = []
    for i, line in enumerate(lines):
        verb = "asked" if line.endswith("?") else "said"
        told.append(f'"{line[:-1] + "," if verb == "said" and line.endswith(".") else line}" {verb} {names[i % 2]}.')
    return told


def letter(rng: random.Random) -> list[str]:
    """Return a letter as lines."""
    words = slots(rng)
    body = " ".join(s.format(**words) for s in rng.sample(_LETTER, rng.randint(4, 6)))
    return [f"Dear {words['f_name']},", body, f"Your friend {words['name']}"]


def restate(rng: random.Random, words: dict[str, str]) -> str:
    """Return a closing sentence that names the people of a story again."""
    endings = (
        "That is the story of {name} and {f_name}.",
        "And that is how {name} and {f_name} became good friends.",
        "{name} and {f_name} still talk about that day.",
        "{name} told the story to {her} mother, and {f_name} told it to {f_her} father.",
    )
    return rng.choice(endings).format(**words)


def told_story(rng: random.Random) -> list[str]:
    """Return a story followed, often, by a sentence that names its people again."""
    words = slots(rng)
    beats = [rng.choice(beat).format(**words) for beat in rng.choice(PLOTS)]
    both = words["f_name"] in " ".join(beats)
    return [*beats, restate(rng, words)] if both and rng.random() < 0.7 else beats
