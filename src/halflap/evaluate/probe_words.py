"""The plain words of the text probes. No word stands in two lists, so that what is asked for stands in one place."""

# ruff: noqa: SIM905 - words are easier to read and to add to without quotes

from __future__ import annotations

FIRST_NAMES = tuple(
    """
    Ada Adam Agnes Albert Alice Amos Anna Arthur Bella Bruno Carla Cecil Clara Colin Daisy Daniel Dora Edgar Edith
    Ellen Emil Esther Felix Flora Frank Freda George Gina Greta Harold Hazel Helen Henry Hilda Hugo Ida Irene Isaac
    Ivan Jacob Janet Jonas Joyce Julia Karl Kate Laura Leon Lewis Lily Louis Lucy Mabel Martin Mary Max Mona Nancy
    Nina Nora Oliver Olga Oscar Paul Pearl Peter Philip Rachel Ralph Rita Robert Rosa Ruth Samuel Sarah Simon Stella
    Susan Theo Thomas Ursula Vera Victor Walter Wendy
    """.split()
)
LAST_NAMES = tuple(
    """
    Abbott Allen Archer Bailey Barker Baxter Bennett Bishop Blake Bolton Bradley Brooks Burton Carter Chapman Clarke
    Coleman Cooper Curtis Dalton Davis Dixon Dunn Eaton Edwards Elliott Evans Fisher Fleming Foster Fowler Gardner
    Gibson Gordon Graham Grant Griffin Hammond Harper Harris Hayes Henderson Howard Hughes Hunter Jenkins Jensen
    Johnson Keller Kennedy Lambert Larson Lawson Mason Mercer Miller Mitchell Morgan Morris Murphy Nelson Newman
    Norton Osborne Palmer Parker Pearson Perkins Porter Quinn Ramsey Reed Reynolds Roberts Rogers Russell Sanders
    Shaw Spencer Stevens Sutton Taylor Turner Wallace Watson Webster Wheeler Wilson
    """.split()
)
PLACES = tuple(
    """
    Ardell Bexford Calder Corby Dunmore Eastleigh Farnham Glenroy Hartwell Ashby Kelso Langford Marlow Netherby
    Oakham Penrith Redhill Selby Tarrant Ulverton Wexham Yarrow Ashdown Barton Cresswell Denholm Elmsworth Fairlie
    Greystone Haverhill Kirkby Linton Melrose Norwood Ormsby Pickering Rothbury Stanton Thornbury Whitby
    """.split()
)
ADJECTIVES = tuple(
    """
    grey green golden broken narrow heavy hollow silent crooked painted rusty yellow purple wooden tiny round square
    ancient modern folded polished striped frozen dusty woven faded gentle sharp smooth rough plain curved marble
    silver crimson orange shallow slender double spotted
    """.split()
)
OBJECTS = tuple(
    """
    lamp table chair bridge ladder bottle mirror basket hammer kettle candle carpet wagon barrel drum flute violin
    anchor compass lantern pillow blanket bucket saddle helmet shield arrow needle button ribbon pocket ticket letter
    parcel stamp pencil ruler hinge handle wheel engine piston valve whistle trumpet puppet statue fountain column
    tower cabin cellar fence garden bench cradle wallet necklace bracelet goblet platter teapot ladle anvil chisel
    plough scythe hatchet rudder paddle sail kite balloon telescope
    """.split()
)
VALUES = tuple(
    """
    copper cotton velvet leather rubber amber coral ivory bamboo cedar maple walnut willow cherry lemon apple mango
    pepper ginger garlic onion carrot pumpkin almond barley butter cheese honey sugar coffee cocoa vanilla tiger
    zebra camel rabbit badger otter beaver falcon eagle raven parrot pigeon turtle lizard salmon oyster spider beetle
    """.split()
)
ACTIONS = ("built", "bought", "found", "hidden", "repaired", "lost", "drawn", "sold")

# the prose between
QUALITIES = tuple("old long quiet cold bright early late soft low wide deep dry warm slow light".split())
THINGS = tuple(
    """
    road river wind rain train market morning evening field forest hill valley shore island street village
    winter summer cloud storm crowd harbour window door wall path stream meadow
    """.split()
)
DEEDS = tuple("passed followed crossed reached met left touched covered joined faced".split())
MANNERS = ("again", "at noon", "in silence", "before dawn", "for an hour", "as usual", "without a word", "all day")
