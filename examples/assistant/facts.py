"""The small world of the example assistant: topics, facts and the ways of asking for them.

Every fact has a short answer (one word or one number) and one plain sentence which ends with that answer, or,
for a yes/no question, begins with it. Scoring relies on this.
"""

from __future__ import annotations

from dataclasses import dataclass

Fact = dict[str, str]


@dataclass(frozen=True)
class Topic:
    """One kind of question: how it is asked, how it is answered in a sentence, and its facts."""

    name: str
    phrasings: tuple[str, ...]
    statement: str
    facts: tuple[Fact, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Item:
    """One fact asked in one way."""

    topic: str
    fact: int
    phrasing: int
    prompt: str
    answer: str
    statement: str


def article(noun: str) -> str:
    """`noun` with a or an before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


def pairs(table: str) -> list[tuple[str, str]]:
    """Read `x answer` pairs, separated by commas; underscores stand for spaces inside x."""
    rows = [row.split() for row in table.replace("\n", " ").split(",") if row.strip()]
    return [(x.replace("_", " "), a) for x, a in rows]


def facts_from(table: list[tuple[str, str]]) -> tuple[Fact, ...]:
    """Facts with the fields x (as given), an_x (with its article) and a (the answer)."""
    return tuple({"x": x, "an_x": article(x), "a": a, "an_a": article(a)} for x, a in table)


CAPITALS = pairs("""
France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Austria Vienna, Switzerland Bern,
Belgium Brussels, Denmark Copenhagen, Sweden Stockholm, Norway Oslo, Finland Helsinki, Poland Warsaw,
Hungary Budapest, Greece Athens, Ireland Dublin, Iceland Reykjavik, Russia Moscow, Ukraine Kyiv,
Turkey Ankara, Egypt Cairo, Kenya Nairobi, Nigeria Abuja, Ghana Accra, Morocco Rabat, Senegal Dakar,
Japan Tokyo, China Beijing, Thailand Bangkok, Vietnam Hanoi, Nepal Kathmandu, Iran Tehran, Iraq Baghdad,
Canada Ottawa, Cuba Havana, Peru Lima, Chile Santiago, Brazil Brasilia, Australia Canberra
""")

CONTINENTS = pairs("""
France Europe, Germany Europe, Italy Europe, Spain Europe, Portugal Europe, Austria Europe, Belgium Europe,
Sweden Europe, Norway Europe, Finland Europe, Poland Europe, Greece Europe, Ireland Europe, Iceland Europe,
Egypt Africa, Kenya Africa, Nigeria Africa, Ghana Africa, Morocco Africa, Senegal Africa, Japan Asia,
China Asia, India Asia, Thailand Asia, Vietnam Asia, Nepal Asia, Iran Asia, Iraq Asia
""")

LANGUAGES = pairs("""
France French, Germany German, Austria German, Italy Italian, Spain Spanish, Peru Spanish, Chile Spanish,
Cuba Spanish, Portugal Portuguese, Brazil Portuguese, Denmark Danish, Sweden Swedish, Norway Norwegian,
Finland Finnish, Poland Polish, Hungary Hungarian, Greece Greek, Russia Russian, Turkey Turkish,
Egypt Arabic, Japan Japanese, China Chinese, Thailand Thai, Vietnam Vietnamese, Nepal Nepali,
Australia English
""")

COLOURS = pairs("""
grass green, snow white, coal black, blood red, milk white, chocolate brown, a_lemon yellow,
a_banana yellow, a_tomato red, a_cherry red, a_frog green, a_leaf green, the_sky blue, the_sea blue,
the_sun yellow, butter yellow, salt white, a_carrot orange, a_crow black, a_swan white, a_strawberry red,
a_cucumber green, a_ruby red, an_emerald green, a_flamingo pink, a_violet purple, an_eggplant purple,
a_pumpkin orange, a_cloud white, tar black, wood brown, a_sapphire blue, a_pig pink, an_elephant gray,
ash gray
""")

OPPOSITES = pairs("""
hot cold, big small, fast slow, high low, good bad, old young, long short, hard soft, light dark, rich poor,
happy sad, wet dry, full empty, open closed, early late, near far, strong weak, clean dirty, thick thin,
wide narrow, loud quiet, easy difficult, right wrong, up down, in out, day night, love hate, war peace,
friend enemy, win lose, buy sell, push pull, give take, start stop, north south, east west, summer winter,
left right, brave cowardly, cheap expensive, deep shallow, sharp blunt, sweet bitter, true false,
always never, first last, black white
""")

PLURALS = pairs("""
cat cats, dog dogs, book books, tree trees, house houses, car cars, bird birds, table tables, box boxes,
bus buses, dish dishes, glass glasses, fox foxes, church churches, brush brushes, baby babies, city cities,
lady ladies, story stories, party parties, berry berries, leaf leaves, wolf wolves, knife knives,
wife wives, life lives, thief thieves, man men, woman women, child children, foot feet, tooth teeth,
goose geese, mouse mice, ox oxen, sheep sheep, fish fish, potato potatoes, hero heroes, shoe shoes
""")

YOUNG = pairs("""
cow calf, cat kitten, dog puppy, horse foal, sheep lamb, goat kid, pig piglet, duck duckling, goose gosling,
hen chick, bear cub, deer fawn, kangaroo joey, swan cygnet, eagle eaglet, frog tadpole, owl owlet,
hare leveret
""")

SOUNDS = pairs("""
cow moo, cat meow, dog woof, sheep baa, duck quack, pig oink, horse neigh, lion roar, owl hoot, bee buzz,
snake hiss, crow caw, wolf howl, mouse squeak, frog croak, dove coo, donkey bray, rooster crow
""")

PAST = pairs("""
go went, see saw, eat ate, take took, give gave, come came, write wrote, drink drank, sing sang, swim swam,
run ran, begin began, break broke, speak spoke, drive drove, fly flew, know knew, grow grew, throw threw,
draw drew, buy bought, bring brought, think thought, teach taught, catch caught, find found, stand stood,
sleep slept, keep kept, feel felt, leave left, make made, say said, tell told, sell sold, lose lost,
win won, sit sat, walk walked, talk talked, play played, look looked, cook cooked, jump jumped, open opened,
help helped
""")

COMPARATIVES = pairs("""
big bigger, small smaller, fast faster, slow slower, tall taller, old older, young younger, hot hotter,
cold colder, long longer, short shorter, good better, bad worse, happy happier, easy easier, thin thinner,
rich richer, poor poorer, strong stronger, weak weaker, heavy heavier, clean cleaner, dry drier, wide wider
""")

PROFESSIONS = pairs("""
bakes_bread baker, teaches_children teacher, flies_planes pilot, treats_sick_people doctor,
puts_out_fires firefighter, grows_crops farmer, cuts_hair barber, repairs_pipes plumber,
catches_fish fisherman, paints_pictures painter, writes_books author, sells_meat butcher,
sings_songs singer, cooks_meals chef, treats_teeth dentist, builds_with_wood carpenter,
designs_houses architect, delivers_letters postman, sews_clothes tailor, treats_sick_animals vet,
looks_after_books librarian, sells_flowers florist, travels_in_space astronaut, forges_iron blacksmith,
serves_food waiter, drives_a_taxi driver
""")

COUNTS = pairs("""
legs_does_a_spider_have|legs_of_a_spider 8, legs_does_a_dog_have|legs_of_a_dog 4,
legs_does_a_bird_have|legs_of_a_bird 2, legs_does_an_insect_have|legs_of_an_insect 6,
legs_does_a_snake_have|legs_of_a_snake 0, arms_does_an_octopus_have|arms_of_an_octopus 8,
wheels_does_a_bicycle_have|wheels_of_a_bicycle 2, wheels_does_a_car_have|wheels_of_a_car 4,
wheels_does_a_tricycle_have|wheels_of_a_tricycle 3, sides_does_a_triangle_have|sides_of_a_triangle 3,
sides_does_a_square_have|sides_of_a_square 4, sides_does_a_pentagon_have|sides_of_a_pentagon 5,
sides_does_a_hexagon_have|sides_of_a_hexagon 6, fingers_does_a_hand_have|fingers_of_a_hand 5,
eyes_does_a_human_have|eyes_of_a_human 2, days_does_a_week_have|days_of_a_week 7,
months_does_a_year_have|months_of_a_year 12, hours_does_a_day_have|hours_of_a_day 24,
minutes_does_an_hour_have|minutes_of_an_hour 60, letters_does_the_alphabet_have|letters_of_the_alphabet 26,
days_does_a_leap_year_have|days_of_a_leap_year 366
""")

CATEGORIES: dict[str, str] = {
    "animal": "cat dog horse cow lion tiger rabbit wolf bear frog",
    "fruit": "apple banana pear cherry lemon mango peach grape plum orange",
    "vegetable": "carrot potato onion cabbage pea bean pumpkin cucumber",
    "tool": "hammer saw drill wrench shovel axe rake screwdriver",
    "vehicle": "car bus train truck bicycle ship plane tram",
    "instrument": "piano guitar violin drum flute trumpet harp cello",
    "garment": "shirt coat hat sock dress skirt jacket scarf",
}

DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
NUMBERS = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
SPELLING_WORDS = words(
    "apple banana cherry lemon orange grape table house garden window river mountain flower kitchen "
    "yellow green purple winter summer money paper pencil music dance doctor teacher farmer baker friend "
    "island jungle knife queen rabbit tiger umbrella violin water zebra elephant horse night voice under "
    "inside kitten"
)


def cycle_facts(names: list[str], step: int) -> tuple[Fact, ...]:
    """For each name the one `step` places further on in the cycle."""
    return facts_from([(name, names[(i + step) % len(names)]) for i, name in enumerate(names)])


def sums() -> tuple[Fact, ...]:
    """a + b for a, b from 1 to 10."""
    return tuple({"x": str(i), "y": str(j), "a": str(i + j)} for i in range(1, 11) for j in range(1, 11))


def differences() -> tuple[Fact, ...]:
    """a - b for 10 >= a >= b >= 1."""
    return tuple({"x": str(i), "y": str(j), "a": str(i - j)} for i in range(1, 11) for j in range(1, i + 1))


def comparisons(larger: bool) -> tuple[Fact, ...]:
    """The larger or the smaller of two different numbers from 1 to 12, in both orders."""
    pick = max if larger else min
    return tuple(
        {"x": str(i), "y": str(j), "a": str(pick(i, j))} for i in range(1, 13) for j in range(1, 13) if i != j
    )


def memberships() -> tuple[Fact, ...]:
    """Is X a Y? Each thing with its own category and with another."""
    names = list(CATEGORIES)
    facts: list[Fact] = []
    for own, members in CATEGORIES.items():
        others = names[names.index(own) + 1 :] + names[: names.index(own)]
        for i, word in enumerate(words(members)):
            for category in (own, others[i % len(others)]):
                yes = category == own
                text = f"{article(word)} is {'' if yes else 'not '}{article(category)}"
                answer = "Yes" if yes else "No"
                facts.append({"an_x": article(word), "an_y": article(category), "a": answer, "s": text})
    return tuple(facts)


def counts() -> tuple[Fact, ...]:
    """How many parts something has: x is the question's form, y the noun's."""
    return tuple({"x": x.split("|")[0], "y": x.split("|")[1], "a": a} for x, a in COUNTS)


CATEGORY_FACTS = facts_from([(word, name) for name, members in CATEGORIES.items() for word in words(members)])

TOPICS: tuple[Topic, ...] = (
    Topic(
        "capital",
        (
            "What is the capital of {x}?",
            "Which city is the capital of {x}?",
            "Name the capital of {x}.",
            "Tell me the capital of {x}.",
            "What is {x}'s capital?",
            "What is the capital city of {x}?",
            "Do you know the capital of {x}?",
            "I need the capital of {x}.",
            "What do we call the capital of {x}?",
            "Give me the name of the capital of {x}.",
        ),
        "The capital of {x} is {a}.",
        facts_from(CAPITALS),
    ),
    Topic(
        "country",
        (
            "{x} is the capital of which country?",
            "Which country has {x} as its capital?",
            "What country is {x} the capital of?",
            "In which country is the city of {x}?",
            "Name the country whose capital is {x}.",
            "Where is the city of {x}?",
            "Tell me which country {x} is in.",
            "Which country is home to {x}?",
        ),
        "The country of {x} is {a}.",
        facts_from([(capital, country) for country, capital in CAPITALS]),
    ),
    Topic(
        "continent",
        (
            "On which continent is {x}?",
            "Which continent is {x} on?",
            "What continent does {x} belong to?",
            "Name the continent of {x}.",
            "Tell me the continent of {x}.",
            "What is the continent of {x}?",
            "{x} is part of which continent?",
            "In which part of the world is {x}?",
        ),
        "The continent of {x} is {a}.",
        facts_from(CONTINENTS),
    ),
    Topic(
        "language",
        (
            "Which language is spoken in {x}?",
            "What language do people speak in {x}?",
            "Name the main language of {x}.",
            "What is the main language of {x}?",
            "Tell me the language of {x}.",
            "Which language should I learn for a trip to {x}?",
            "People in {x} speak which language?",
            "What do they speak in {x}?",
        ),
        "The language of {x} is {a}.",
        facts_from(LANGUAGES),
    ),
    Topic(
        "colour",
        (
            "What colour is {x}?",
            "Which colour does {x} have?",
            "What is the colour of {x}?",
            "Tell me the colour of {x}.",
            "Name the colour of {x}.",
            "What colour would you paint {x}?",
            "I want to draw {x}. Which colour do I need?",
            "What color is {x}?",
            "Which colour is typical of {x}?",
        ),
        "The colour of {x} is {a}.",
        facts_from(COLOURS),
    ),
    Topic(
        "opposite",
        (
            "What is the opposite of {x}?",
            "Name the opposite of {x}.",
            "Give me the opposite of {x}.",
            "Which word is the opposite of {x}?",
            "What word means the opposite of {x}?",
            "Tell me the opposite of the word {x}.",
            "What is the reverse of {x}?",
            "Find the opposite: {x}.",
            "If it is not {x}, what is it?",
        ),
        "The opposite of {x} is {a}.",
        facts_from(OPPOSITES),
    ),
    Topic(
        "plural",
        (
            "What is the plural of {x}?",
            "Give the plural of {x}.",
            "What is the plural form of {x}?",
            "Tell me the plural of the word {x}.",
            "How do you say {x} in the plural?",
            "One {x}, but two what?",
            "Write the plural of {x}.",
            "If there is more than one {x}, what are they called?",
        ),
        "The plural of {x} is {a}.",
        facts_from(PLURALS),
    ),
    Topic(
        "young",
        (
            "What is a young {x} called?",
            "What do you call a baby {x}?",
            "Name the young of {an_x}.",
            "What is the young of {an_x}?",
            "Tell me the word for a young {x}.",
            "What is the name for a baby {x}?",
            "Do you know what a baby {x} is called?",
            "Give me the word for a baby {x}.",
        ),
        "The young of {an_x} is {an_a}.",
        facts_from(YOUNG),
    ),
    Topic(
        "sound",
        (
            "What sound does {an_x} make?",
            "Which sound does {an_x} make?",
            "What does {an_x} say?",
            "Name the sound of {an_x}.",
            "What is the sound of {an_x}?",
            "Tell me the sound of {an_x}.",
            "How does {an_x} sound?",
            "What noise does {an_x} make?",
        ),
        "The sound of {an_x} is {a}.",
        facts_from(SOUNDS),
    ),
    Topic(
        "past",
        (
            "What is the past tense of {x}?",
            "Give the past tense of {x}.",
            "What is the simple past of {x}?",
            "Put the verb {x} into the past tense.",
            "Tell me the past tense of the verb {x}.",
            "Today I {x}, but what did I do yesterday?",
            "Write {x} in the past tense.",
            "How do you say {x} in the past?",
        ),
        "The past tense of {x} is {a}.",
        facts_from(PAST),
    ),
    Topic(
        "comparative",
        (
            "What is the comparative of {x}?",
            "Give the comparative of {x}.",
            "What is the comparative form of {x}?",
            "Tell me the comparative of the word {x}.",
            "This one is {x}, but that one is even what?",
            "Write the comparative of {x}.",
            "How do you say more {x} in one word?",
        ),
        "The comparative of {x} is {a}.",
        facts_from(COMPARATIVES),
    ),
    Topic(
        "profession",
        (
            "Who {x}?",
            "What do you call someone who {x}?",
            "Which profession {x}?",
            "Name the person who {x}.",
            "What is the job of a person who {x}?",
            "A person who {x} is called what?",
            "Tell me who {x}.",
            "I am looking for someone who {x}. Who is it?",
        ),
        "The person who {x} is {an_a}.",
        facts_from(PROFESSIONS),
    ),
    Topic(
        "count",
        (
            "How many {x}?",
            "What is the number of {y}?",
            "Give me the number of {y}.",
            "Name the number of {y}.",
            "Do you know the number of {y}?",
            "I want to know the number of {y}.",
            "How large is the number of {y}?",
            "Tell me the number of {y}.",
        ),
        "The number of {y} is {a}.",
        counts(),
    ),
    Topic(
        "category",
        (
            "What kind of thing is {an_x}?",
            "What is {an_x}?",
            "Which group does {an_x} belong to?",
            "To which category does {an_x} belong?",
            "Name the category of {an_x}.",
            "What type of thing is {an_x}?",
            "Tell me what {an_x} is.",
            "Put {an_x} into a category.",
            "How would you classify {an_x}?",
        ),
        "The category of {an_x} is {a}.",
        CATEGORY_FACTS,
    ),
    Topic(
        "membership",
        (
            "Is {an_x} {an_y}?",
            "Tell me if {an_x} is {an_y}.",
            "Is it true that {an_x} is {an_y}?",
            "Would you say that {an_x} is {an_y}?",
            "Can {an_x} be called {an_y}?",
            "Yes or no: {an_x} is {an_y}?",
            "My friend says that {an_x} is {an_y}. Is that right?",
            "Do you agree that {an_x} is {an_y}?",
        ),
        "{a}, {s}.",
        memberships(),
        1.2,
    ),
    Topic(
        "day_after",
        (
            "Which day comes after {x}?",
            "What day comes after {x}?",
            "What is the day after {x}?",
            "Name the day after {x}.",
            "Today is {x}. What day is tomorrow?",
            "If today is {x}, which day is tomorrow?",
            "Which day follows {x}?",
            "Tell me the day after {x}.",
        ),
        "The day after {x} is {a}.",
        cycle_facts(DAYS, 1),
    ),
    Topic(
        "day_before",
        (
            "Which day comes before {x}?",
            "What day comes before {x}?",
            "What is the day before {x}?",
            "Name the day before {x}.",
            "Today is {x}. What day was yesterday?",
            "If today is {x}, which day was yesterday?",
            "Tell me the day before {x}.",
        ),
        "The day before {x} is {a}.",
        cycle_facts(DAYS, -1),
    ),
    Topic(
        "month_after",
        (
            "Which month comes after {x}?",
            "What month comes after {x}?",
            "What is the month after {x}?",
            "Name the month after {x}.",
            "It is {x}. What is the next month?",
            "Which month follows {x}?",
            "Tell me the month after {x}.",
        ),
        "The month after {x} is {a}.",
        cycle_facts(MONTHS, 1),
    ),
    Topic(
        "month_before",
        (
            "Which month comes before {x}?",
            "What month comes before {x}?",
            "What is the month before {x}?",
            "Name the month before {x}.",
            "It is {x}. What was the last month?",
            "Tell me the month before {x}.",
        ),
        "The month before {x} is {a}.",
        cycle_facts(MONTHS, -1),
    ),
    Topic(
        "letter_after",
        (
            "Which letter comes after {x}?",
            "What letter comes after {x} in the alphabet?",
            "What is the letter after {x}?",
            "Name the letter after {x}.",
            "Which letter follows {x}?",
            "Tell me the letter after {x}.",
        ),
        "The letter after {x} is {a}.",
        cycle_facts(LETTERS, 1)[:-1],
    ),
    Topic(
        "digits",
        (
            "Write {x} in digits.",
            "How do you write {x} as a number?",
            "What number is {x}?",
            "Turn the word {x} into a number.",
            "Which number does the word {x} stand for?",
            "Give me {x} in digits.",
        ),
        "The number {x} in digits is {a}.",
        facts_from([(word, str(i)) for i, word in enumerate(NUMBERS)]),
    ),
    Topic(
        "words",
        (
            "Write {x} in words.",
            "How do you spell the number {x}?",
            "What is the word for {x}?",
            "Turn the number {x} into a word.",
            "Which word stands for the number {x}?",
            "Give me {x} as a word.",
        ),
        "The number {x} in words is {a}.",
        facts_from([(str(i), word) for i, word in enumerate(NUMBERS)]),
    ),
    Topic(
        "sum",
        (
            "What is {x} plus {y}?",
            "What is {x} + {y}?",
            "Add {x} and {y}.",
            "How much is {x} plus {y}?",
            "What is the sum of {x} and {y}?",
            "Calculate {x} + {y}.",
            "What do I get if I add {x} and {y}?",
            "Tell me the sum of {x} and {y}.",
        ),
        "The sum of {x} and {y} is {a}.",
        sums(),
        1.3,
    ),
    Topic(
        "difference",
        (
            "What is {x} minus {y}?",
            "What is {x} - {y}?",
            "Subtract {y} from {x}.",
            "How much is {x} minus {y}?",
            "Calculate {x} - {y}.",
            "What do I get if I subtract {y} from {x}?",
            "Take {y} away from {x}.",
        ),
        "The result of {x} minus {y} is {a}.",
        differences(),
        1.2,
    ),
    Topic(
        "larger",
        (
            "Which number is larger, {x} or {y}?",
            "Which is larger: {x} or {y}?",
            "What is the larger number, {x} or {y}?",
            "Is {x} or {y} the larger number?",
            "Which is more, {x} or {y}?",
            "Tell me the larger of {x} and {y}.",
            "Which is bigger, {x} or {y}?",
        ),
        "The larger of {x} and {y} is {a}.",
        comparisons(larger=True),
    ),
    Topic(
        "smaller",
        (
            "Which number is smaller, {x} or {y}?",
            "Which is smaller: {x} or {y}?",
            "What is the smaller number, {x} or {y}?",
            "Is {x} or {y} the smaller number?",
            "Which is less, {x} or {y}?",
            "Tell me the smaller of {x} and {y}.",
        ),
        "The smaller of {x} and {y} is {a}.",
        comparisons(larger=False),
    ),
    Topic(
        "first_letter",
        (
            "What is the first letter of {x}?",
            "Which letter does {x} start with?",
            "With which letter does the word {x} begin?",
            "Name the first letter of {x}.",
            "Tell me the first letter of the word {x}.",
            "{x} begins with which letter?",
            "Give me the first letter of {x}.",
        ),
        "The first letter of {x} is {a}.",
        facts_from([(word, word[0]) for word in SPELLING_WORDS]),
    ),
    Topic(
        "last_letter",
        (
            "What is the last letter of {x}?",
            "Which letter does {x} end with?",
            "With which letter does the word {x} end?",
            "Name the last letter of {x}.",
            "Tell me the last letter of the word {x}.",
            "{x} ends with which letter?",
            "Give me the last letter of {x}.",
        ),
        "The last letter of {x} is {a}.",
        facts_from([(word, word[-1]) for word in SPELLING_WORDS]),
    ),
)

# What has no fact behind it: (prompt, plain answer, short answer). Not part of the held-out prompts.
SMALL_TALK: tuple[tuple[str, str, str], ...] = (
    ("Hello!", "Hello, I am happy to help you.", "Hello"),
    ("Hi", "Hello, I am happy to help you.", "Hello"),
    ("Good morning!", "Good morning, I am happy to help you.", "Hello"),
    ("Who are you?", "I am a small assistant who answers short questions.", "assistant"),
    ("What are you?", "I am a small assistant who answers short questions.", "assistant"),
    ("What can you do?", "I am able to answer short questions.", "answer"),
    ("How are you?", "I am fine, thank you.", "fine"),
    ("Thank you!", "You are welcome.", "welcome"),
    ("Thanks a lot.", "You are welcome.", "welcome"),
    ("Goodbye!", "Goodbye, that was a pleasure.", "Goodbye"),
    ("What is the weather like tomorrow?", "I am sorry, that is unknown to me.", "unknown"),
    ("Who won the match?", "I am sorry, that is unknown to me.", "unknown"),
    ("What is my name?", "I am sorry, that is unknown to me.", "unknown"),
    ("What is the capital of Atlantis?", "I am sorry, that is unknown to me.", "unknown"),
    ("What is the meaning of life?", "I am sorry, that is unknown to me.", "unknown"),
)


def all_items() -> list[Item]:
    """Every fact of every topic in every phrasing."""
    items = []
    for topic in TOPICS:
        for i, fact in enumerate(topic.facts):
            statement = topic.statement.format(**fact)
            statement = statement[0].upper() + statement[1:]
            for j, phrasing in enumerate(topic.phrasings):
                prompt = phrasing.format(**fact)
                prompt = prompt[0].upper() + prompt[1:]
                items.append(Item(topic.name, i, j, prompt, fact["a"], statement))
    return items
