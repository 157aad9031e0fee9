"""Words of the generated shop that do not depend on a kind of product.

Attributes, option axes, brands, and the sentences that titles, descriptions, features, reviews and
instructions are made of. The lists are short on purpose: a model with a vocabulary of some hundred
words can learn this shop. Two attributes of one kind must never pass for each other in the
reward's fuzzy comparison, nor two values of one axis; the tests hold that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Role = Literal["is", "with", "for"]


@dataclass(frozen=True, slots=True)
class Attribute:
    """Something that a product is, has or serves."""

    phrase: str
    """As it stands in titles and instructions, in lower case."""
    role: Role
    """How an instruction says it: `a non stick pan`, `with cast iron`, `for small kitchens`."""
    benefit: str
    """The rest of the line on the Features page."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A choice that a customer makes for a product."""

    name: str
    values: tuple[str, ...]
    """All values that products may offer, in the order in which they are listed."""
    fewest: int = 2
    most: int = 6
    """How many of the values one product offers."""


_IS: Final = """
dishwasher safe: put it in the machine after the meal
oven safe: takes the heat of a full roast
non stick: food slides off at once
heat resistant: keeps its shape next to a flame
bpa free: nothing bad gets into your food
leak proof: keeps every drop inside
easy clean: a wet cloth is enough
space saving: fits into a narrow place
heavy duty: made for hard work
rust proof: stays bright in the rain
weather resistant: stays out all year
winter proof: does not crack in winter
easy assemble: ready in five minutes
light weight: you forget that you carry it
machine washable: comes out of the wash like new
quick dry: ready again in an hour
slim fit: cut close to the body
loose fit: leaves room to move
water repellent: drops roll off
slip resistant: holds on a wet floor
wide toe: gives your toes their room
hand made: each piece is a little different
noise cancelling: shuts out the street
fast charging: half full in twenty minutes
long lasting: made to stay with you
water resistant: a splash does no harm
hands free: do something else at the same time
high speed: no waiting any more
cruelty free: never tested on animals
paraben free: kind to you and to the river
sulfate free: cleans in a mild way
fast absorbing: leaves no film behind
dermatologist tested: doctors have looked at it
non toxic: safe even when it is chewed
battery free: it runs without power
screen free: fun without a display
eye catching: people will ask you about it
gluten free: made without wheat
sugar free: sweet without the sweet stuff
dairy free: contains no milk
low sodium: only a little salt
high protein: keeps you going for hours
certified organic: grown by the strict rules
fair trade: farmers get their share
"""
_WITH: Final = """
stainless steel: it does not stain or bend
cast iron: it holds warmth for a long time
tempered glass: clear and strong
bamboo wood: it grows back fast
ceramic coating: smooth and hard
soft grip: rests well in the hand
double wall: hot stays hot and cold stays cold
solid brass: the old way and still the best
recycled plastic: it was a bottle before
natural rubber: it bends and never breaks
quick release: one click and it is off
drain holes: no wet roots
motion sensor: wakes up when you come near
organic cotton: soft from the first day
soft fleece: like a warm blanket
merino wool: warm but never too warm
linen blend: cool on hot days
deep pockets: room for keys and phone
elastic waist: it gives when you sit
full zip: open or closed in a second
adjustable hood: pull the cord when it storms
real suede: gets better with age
vegan leather: looks real but harms nobody
breathable mesh: air comes in
memory foam: it learns the form of your foot
rubber sole: grips the ground
arch support: your back will thank you
braided cord: no knots and no breaks
aluminum shell: light and cool to touch
silicone cover: survives a fall
voice control: just say what you want
carrying case: packed in no time
led display: shows all at a glance
aloe vera: calms after a day of sun
coconut oil: rich and smooth
shea butter: helps where it is rough
vitamin e: a little help every day
tea tree: fresh and clear
beech wood: smooth and without paint
soft plush: made to be hugged
thick cardboard: does not tear
storage bag: all parts stay together
picture guide: shows every step
sound effects: press and listen
rounded edges: nothing to get hurt on
whole grain: all of the corn
sea salt: a pinch on top
real fruit: you can see the pieces
natural flavors: nothing from the lab
"""
_FOR: Final = """
small kitchens: does not ask for much room
camping trips: packs well and weighs little
office lunches: neat on any desk
raised beds: reaches every corner
small balconies: you need no big garden
patio parties: guests will notice
daily wear: good for every day of the week
gym workout: moves with you
cold days: wind stays outside
long walks: mile after mile
wet trails: mud is no problem
office days: neat from nine to five
home office: makes work a bit easier
road trips: good company in the car
video calls: be heard and be seen
sensitive skin: no itch and no burn
dry hair: brings back the shine
daily use: morning and night
rainy days: hours of fun indoors
family nights: old and young play together
small hands: easy to hold for little ones
school lunches: one fits into every box
"""


def _attributes(role: Role, lines: str) -> dict[str, Attribute]:
    pairs = (line.split(": ") for line in lines.strip().splitlines())
    return {phrase: Attribute(phrase, role, benefit) for phrase, benefit in pairs}


ATTRIBUTES: Final = {
    **_attributes("is", _IS),
    **_attributes("with", _WITH),
    **_attributes("for", _FOR),
}
"""Phrase -> attribute."""

AXES: Final = {
    "color": Axis(
        "Color",
        ("Black", "White", "Red", "Blue", "Green", "Yellow", "Pink", "Purple", "Grey", "Brown"),
        most=5,
    ),
    "bright color": Axis("Color", ("Red", "Coral", "Pink", "Plum", "Gold", "Peach"), most=5),
    "size": Axis("Size", ("XS", "Small", "Medium", "Large", "XL", "XXL"), fewest=3),
    "shoe size": Axis("Size", ("5", "6", "7", "8", "9", "10", "11", "12"), fewest=3, most=8),
    "width": Axis("Width", ("Narrow", "Normal", "Wide")),
    "ounces": Axis("Size", ("4 Ounce", "8 Ounce", "12 Ounce", "16 Ounce", "32 Ounce")),
    "inches": Axis("Size", ("6 Inch", "8 Inch", "10 Inch", "12 Inch")),
    "feet": Axis("Length", ("3 Feet", "6 Feet", "10 Feet", "25 Feet", "50 Feet"), most=4),
    "pack": Axis("Quantity", ("Single", "2 Pack", "4 Pack", "6 Pack", "12 Pack"), most=4),
    "pieces": Axis("Count", ("50 Pieces", "100 Pieces", "300 Pieces", "500 Pieces")),
    "flavor": Axis(
        "Flavor",
        ("Vanilla", "Chocolate", "Lemon", "Peach", "Honey", "Ginger", "Berry", "Original"),
    ),
    "scent": Axis("Scent", ("Lavender", "Rose", "Citrus", "Vanilla", "Ocean", "Jasmine")),
    "plug": Axis("Plug", ("USB A", "USB C", "Micro USB")),
    "style": Axis("Style", ("Classic", "Modern", "Country", "Sport"), most=4),
    "animal": Axis("Animal", ("Bear", "Rabbit", "Fox", "Owl", "Whale", "Dragon")),
}
"""Option axes; several may share a name, but never within one kind of product. A name is no word of
its values: wanted names and values are compared as one row of words."""

BRANDS: Final = {
    "kitchen": ("Tavolo", "Hearthby", "Pannolo", "Cookmoor", "Brenda Lane", "Mirvia"),
    "garden": ("Greenholt", "Fernley", "Mossip", "Oldspade", "Terravo", "Bloomeck"),
    "clothing": ("Wearlund", "Nordby", "Calluna", "Striva", "Piquet", "Lomali"),
    "shoes": ("Stridon", "Fellgo", "Walkara", "Pedivo", "Trailmo", "Solenne"),
    "electronics": ("Voltari", "Zentik", "Auvio", "Bytemo", "Kelvix", "Lumora"),
    "beauty": ("Belisa", "Purelle Bay", "Ondine", "Velmy", "Sorella", "Mayfen"),
    "toys": ("Playnoo", "Giggleton", "Tumbo", "Kiddara", "Rolloby", "Funwick"),
    "snacks": ("Nutfield", "Grainly", "Sweetmoor", "Bitewell", "Harvo", "Leafton"),
}
LINES: Final = ("Nova", "Prime", "Basic", "Duo", "Plus", "Zen", "Aero", "Terra", "Mini", "Royal")

TITLES: Final = (
    "{brand} {line} {kind}",
    "{brand} {kind}, {list}",
    "{brand} {line} {kind} - {list}",
    "{brand} {line} {first} {kind}",
    "{first} {kind} by {brand}, {line} Series, {rest}",
    "{brand} {first} {kind}, {rest}",
    "{brand} {line} {kind} ({list})",
    "{kind} {line} from {brand} | {list}",
)
"""`list` needs one attribute or more, `first` one, `rest` one more."""

OPENINGS: Final = (
    "The {line} {kind} from {brand} {be} the result of many tries.",
    "{brand} knows what matters in {query}.",
    "Meet the {line} {kind}, one of our most loved {query}.",
    "We at {brand} think that good {query} need not cost a lot.",
    "If you look for {query}, here {be} the {line} {kind}.",
)
CLAIMS: Final = (
    "In a few words: {said}.",
    "We made sure of this: {said}.",
    "Why people like it: {said}.",
)
CLOSINGS: Final = (
    "A nice present for friends.",
    "Send it back within thirty days if it is not for you.",
    "{brand} answers every letter.",
    "Shipped in a plain box.",
)
PLAIN_BULLETS: Final = (
    "Box content: what the picture shows and a short note",
    "Promise: {brand} sends a new one if yours breaks",
    "Family business: {brand} is run by two sisters",
    "Gift ready: comes in a pretty box",
    "Service: write to us and we answer the same day",
)

AUTHORS: Final = ("Ann", "Ben", "Cleo", "Dev", "Emma", "Fritz", "Gina", "Hugo", "Ivy", "Jo")
REVIEWS: Final = {
    5: (
        ("Love it", "Just what I wanted. I would buy it again."),
        ("Very good", "Came fast and looks like the picture."),
        ("My favorite", "I use it every day and it still looks new."),
    ),
    4: (
        ("Good", "Does what it says. The box was a bit bent."),
        ("Nice", "Good for the price, my sister wants one too."),
    ),
    3: (
        ("It is fine", "Not bad and not great."),
        ("So so", "I had hoped for a bit more, but it works."),
    ),
    2: (("Not for me", "It looked better in the picture."),),
    1: (("Sent it back", "It broke after a week. The shop paid me back at once."),),
}
"""Stars -> (title, text)."""

REQUESTS: Final = (
    "find me {thing}",
    "i need {thing}",
    "i am looking for {thing}",
    "i want to buy {thing}",
    "please get me {thing}",
    "show me {thing}",
    "i would like to order {thing}",
    "my friend asked me for {thing}",
)
"""How instructions begin; the shop adds options and the price limit at their end."""
