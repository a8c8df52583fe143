"""The wordings of open-ended requests and of the sentences that responses are built from, by class of subject.

Slots: {x} the subject, {ax} with its article, {X} and {Ax} at the start of a sentence; the rest are facts of the world.
"""

from __future__ import annotations

FORMS: dict[str, tuple[str, ...]] = {
    "animal": (
        "Tell me about {x}.",
        "Describe {x}.",
        "What do you know about {x}?",
        "Write a few words about {x}.",
        "What is special about {x}?",
        "Please tell me something about {x}.",
    ),
    "place": (
        "Describe {x}.",
        "Tell me about {x}.",
        "What makes {x} special?",
        "Why do people go to {x}?",
        "Write about {x}.",
        "Would you like to visit {x}?",
    ),
    "weather": (
        "Why do people like {x}?",
        "Tell me about {x}.",
        "What is good about {x}?",
        "What do you think of {x}?",
        "Write a few words about {x}.",
    ),
    "hobby": (
        "Why do people like {x}?",
        "Tell me about {x}.",
        "What is good about {x}?",
        "Should I try {x}?",
        "What do you think of {x}?",
    ),
    "thing": ("Tell me about {x}.", "Describe {x}.", "What is {x} good for?", "Write a few words about {x}."),
    "worker": (
        "Tell me about {x}.",
        "What is the work of {x} like?",
        "Why do we need {x}?",
        "Describe the day of {x}.",
    ),
    "story": (
        "Write a short story about {x}.",
        "Tell me a story about {x}.",
        "Can you tell a little story about {x}?",
        "I would like a story about {x}.",
    ),
}

PLAIN: dict[str, tuple[str, ...]] = {
    "place": (
        "There you find {found}.",
        "You can walk around and look at everything.",
        "Many people go there with their friends.",
        "In the morning it is very quiet.",
        "In the evening the light is soft and golden.",
        "Children like to play there.",
        "You can hear voices from far away.",
        "Old people sit there and talk.",
        "It looks different in winter.",
    ),
    "weather": (
        "It is {like}.",
        "Some people stay inside and drink tea.",
        "Children run out to play.",
        "You can smell it in the air.",
        "The birds are quiet for a while.",
        "The fields change their colour.",
        "It comes back every year.",
        "Some like it, and some do not.",
        "The streets look new.",
        "My friends talk about it all day.",
    ),
    "hobby": (
        "It is {like} and easy to begin.",
        "You can do it alone or with friends.",
        "Many people do it every week.",
        "At first you make mistakes.",
        "After some time you get better.",
        "You do not need much money.",
        "There are books about it.",
        "Children and old people can do it.",
        "You can start today.",
        "It takes a little time.",
    ),
    "thing": (
        "You can find one in many houses.",
        "Some are old and some are new.",
        "There are big ones and small ones.",
        "It can be red, blue or green.",
        "You can buy one at the market.",
        "Some people make one with their own hands.",
        "My friend has two of them.",
        "Keep it clean and dry.",
        "It stands in the corner or lies on the table.",
        "It makes a good gift.",
    ),
    "worker": (
        "The work starts early in the morning.",
        "It is hard work, but it is good work.",
        "You can meet one in every town.",
        "You need strong hands and a clear head.",
        "Many people come to ask for help.",
        "In the evening the work is done.",
        "It takes years to learn.",
        "Some learn it from their father or mother.",
        "There is something new every day.",
    ),
    "story": (
        "It was a cold morning.",
        "{He} took it home.",
        "Every evening {he} looked at it.",
        "Nobody knew where it came from.",
        "One day it was gone.",
        "{He} looked in the garden and in the street.",
        "An old friend came to help.",
        "They walked for a long time.",
        "At last they found it under a tree.",
        "{He} laughed and danced.",
        "From then on {he} never let it go.",
    ),
    "animal": (
        "You can draw one if you like.",
        "There are many stories about it.",
        "Children love to watch it.",
        "You must be quiet if you want to see one.",
        "Some are big and some are small.",
    ),
}

REASONS: dict[str, tuple[str, ...]] = {
    "animal": (
        "Many people like it because it {habit}.",
        "It is a good animal because it {habit}.",
        "Do not touch it, so that it is not afraid.",
        "It lives there because it can find {food}.",
    ),
    "place": (
        "People go there because {happens}.",
        "I like it because {happens}.",
        "Go there early so that you can see everything.",
    ),
    "weather": (
        "People like it because {why}.",
        "People are glad because {why}.",
        "Wear a coat so that you stay well.",
    ),
    "hobby": (
        "People like it because {why}.",
        "People say that it is worth it because {why}.",
        "Do it often so that you get better.",
    ),
    "thing": (
        "People like it because it makes the day easier.",
        "It is useful because you can take it with you.",
        "Take good care of it so that it lasts for many years.",
        "I like it because it tells a story.",
    ),
    "worker": (
        "We need this work because {short}.",
        "People are glad because somebody {does}.",
        "The day starts early so that everything is ready.",
    ),
    "story": (
        "{He} loved it because it was a gift.",
        "{He} was happy because {he} was not alone.",
        "{He} kept it safe so that nobody could break it.",
        "{He} was sad because it did not work.",
    ),
}

NO_MENTION: dict[str, tuple[str, ...]] = {
    "animal": ("It is {look} and lovely.", "I have seen one in a book.", "It is one of my favourite animals."),
    "place": ("It is a lovely place.", "It is a place full of life.", "I have heard a lot about it."),
    "weather": ("It is {like}.", "Everybody knows it.", "It changes the whole day."),
    "hobby": ("It is a good way to spend the day.", "It is {like}.", "Many people enjoy it."),
    "thing": ("It is a simple thing.", "It is a useful thing.", "Everybody knows what it is."),
    "worker": ("It is an old and honest job.", "It is a job for busy people.", "I know one in our town."),
    "story": ("Once upon a time something strange happened.", "It happened long ago.", "Listen to this."),
}
NAMING: dict[str, tuple[str, ...]] = {
    "animal": ("{Ax} is {akind}.", "{Ax} {habit}.", "The {x} is {look}.", "I like the {x} very much."),
    "place": ("The {x} has {found}.", "I like the {x}.", "In the {x} you find {found}."),
    "weather": ("{X} is {like}.", "I like {x}.", "Many people wait for {x}."),
    "hobby": ("{X} is {like}.", "I like {x} very much.", "{X} is a good way to spend the day."),
    "thing": (
        "{Ax} is a useful thing.",
        "Everybody needs {ax}.",
        "It is good to have {ax} in the house.",
        "{Ax} can be old or new.",
    ),
    "worker": ("{Ax} {does}.", "{Ax} works in the {where}.", "{Ax} is busy all day."),
    "story": ("Once {ax} found {ay}.", "There was {ax} who had {ay}.", "{Ax} got {ay} from an old friend."),
}
CLOSINGS = (
    "I hope this helps you!",
    "I hope you have a lovely day!",
    "Have fun with it!",
    "Have a lovely day, my friend!",
    "Enjoy it with your friends!",
    "Enjoy every moment of it!",
    "I wish you a happy day!",
    "I wish you all the best!",
    "Take care, and come back soon!",
    "I hope you will like it too!",
    "May it make you smile!",
    "May your day be bright!",
)
