"""The words that the demo checkpoint knows, each of them one token.

Names, places, articles, colours and objects have a meaning for the model; the others only make the sentences
read as English. No word belongs to two groups.
"""


def split_words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = split_words("""
    Ada Alice Amber Anton Arthur Astrid Boris Bruno Carla Cecil Chloe Clara Cyrus Daisy Dario David Diana
    Dora Edgar Edith Elena Elias Emma Erik Esther Eva Fabian Felix Fiona Flora Frank Freya Gemma George
    Gloria Grace Greta Gustav Hanna Harold Hazel Hector Helen Henry Hugo Ida Igor Ines Iris Isaac Ivan
    Jacob Jane Jasmin Jonas Joseph Julia Karl Kate Klara Laura Leo Liam Linda Lucas Lydia Marco Maria
    Martin Maya Milo Mona Nadia Nathan Nina Noah Nora Oliver Olga Oscar Paula Peter Petra Quentin Rachel
    Ralph Robert Rosa Ruth Samuel Sofia Stella Thomas Ursula Victor Wanda
""")

PLACES = split_words("""
    backpack bag basket box cabinet chest crate cupboard drawer locker suitcase trunk
""")

ARTICLES = ("a", "an")

COLOURS = split_words("""
    black blue brown golden green grey indigo ivory olive orange pink purple red silver white yellow
""")

OBJECTS = split_words("""
    accordion acorn anchor apron arrow ball balloon banjo bead bell belt blanket book bottle bowl bracelet
    brick broom brush bucket button camera candle canoe cap card carpet cello chain chair clarinet clock
    coat coin comb compass crayon crown cup curtain cushion dagger diary doll drum egg envelope feather
    flag flute folder fork glove goblet guitar hammer hat helmet hook horn jacket jar kettle key kite
    knife ladder lamp lantern leaf lemon lens magnet map marble mask medal mirror mitten mug napkin
    necklace needle notebook paddle pearl pebble pen pencil piano pillow pipe plate puppet purse puzzle
    racket radio ribbon ring robe rope ruler saddle sail scarf shell shield shirt shoe shovel skirt
    slipper spoon statue stone sword teapot telescope thimble ticket towel trumpet umbrella vase violin
    wallet whistle
""")

LINE_STARTS = split_words("The In Inside What Where Question Answer Please Tell")
"""They may begin a line, so each is a token with a space before it and another one without."""

PLAIN_WORDS = split_words("""
    the in inside there is of holds hold does what where and or it to on at for with has have contains
    contain keeps keep his her their which who that this please tell me
""")
