"""The words of the questions: noun phrases for entities and relations, sentences for what is asked.

Where a phrase has several wordings, one is drawn at random; {} is where an entity goes.
"""

from typing import NamedTuple

# The pictured entity a question starts from, by kind.
START = {
    "country": [
        "the country whose flag is shown in the image",
        "the country with the flag in this picture",
        "the country this flag belongs to",
    ],
    "region": [
        "the region whose flag is shown in the image",
        "the region with the flag in this picture",
    ],
    "monument": ["the monument in the image", "the landmark shown in this picture"],
}
# A relation as a noun phrase around the entity it starts from.
RELATIONS = {
    "longest border": [
        "the country that shares the longest land border with {}",
        "the neighbor with the longest border with {}",
    ],
    "largest export partner": [
        "the largest export partner of {}",
        "the country that buys the most exports from {}",
    ],
    "largest import partner": [
        "the largest import partner of {}",
        "the country that supplies the most imports to {}",
    ],
    "administered by": ["the country that administers {}"],
    "country": ["the country of {}", "the country that {} is in"],
}
# What the last step of a bridge question asks.
ATTRIBUTES = {
    "capital": ["What is the capital of {}?", "Which city is the capital of {}?"],
    "currency": ["What is the currency of {}?", "Which currency is used in {}?"],
    "national anthem": ["What is the title of the national anthem of {}?"],
    "highest point": ["What is the highest point of {}?", "Which mountain is the highest in {}?"],
    "internet country code": ["What is the internet country code of {}?"],
    "nationality": ["What is a citizen of {} called?"],
    "area": ["What is the total area of {} in sq km?", "How large is {} in sq km?"],
    "population": ["What is the population of {}?", "How many people live in {}?"],
    "coastline": ["How long is the coastline of {} in km?"],
    "length of the land borders": ["What is the total length of the land borders of {} in km?"],
    "highest elevation": ["How high is the highest point of {} in m?"],
    "median age": ["What is the median age in {}?"],
    "life expectancy": ["What is the life expectancy in {}?"],
    "number of airports": [
        "How many airports are there in {}?",
        "What is the number of airports in {}?",
    ],
    "date of independence": [
        "When did {} become independent?",
        "What is the date of independence of {}?",
    ],
    "date of the national holiday": ["When is the national holiday of {}?"],
}
# More wordings of the same, for a mix whose questions are to differ in their words, too.
MORE = {
    "start": {
        "country": [
            "the country represented by the flag in the photo",
            "the state that flies the flag pictured here",
            "the nation whose banner this is",
            "the country that uses the flag seen in this photograph",
        ],
        "region": [
            "the region this flag stands for",
            "the part of a country that flies the flag pictured here",
            "the region represented by the flag in the photo",
        ],
        "monument": [
            "the place in this photograph",
            "the landmark that can be seen here",
            "the monument pictured here",
        ],
    },
    "relations": {
        "longest border": [
            "the country with which {} has its longest land border",
            "the neighbor that borders {} over the greatest distance",
        ],
        "largest export partner": [
            "the country to which {} exports the most",
            "the top destination of the exports of {}",
            "the main customer for the exports of {}",
        ],
        "largest import partner": [
            "the country from which {} imports the most",
            "the top source of the imports of {}",
            "the main supplier of the imports of {}",
        ],
        "administered by": ["the country to which {} belongs as a territory"],
        "country": ["the nation that {} belongs to", "the country where {} is located"],
    },
    "attributes": {
        "capital": ["What city serves as the capital of {}?", "What is the capital city of {}?"],
        "currency": ["What money is used in {}?", "In which currency does one pay in {}?"],
        "national anthem": ["Which song is the national anthem of {}?"],
        "highest point": ["What is the name of the highest point of {}?"],
        "internet country code": ["Which internet domain belongs to {}?"],
        "nationality": ["What is the noun for a person from {}?"],
        "area": [
            "What area, in sq km, does {} cover?",
            "How many sq km does {} measure?",
            "In sq km, how big is {}?",
        ],
        "population": [
            "How many inhabitants does {} have?",
            "What is the number of people in {}?",
            "How large is the population of {}?",
        ],
        "coastline": [
            "How many km of coast does {} have?",
            "In km, what is the length of the coast of {}?",
            "What is the length of the coastline of {}, in km?",
        ],
        "length of the land borders": [
            "How many km of land borders does {} have?",
            "In km, how long are the land borders of {} together?",
            "How long, in km, are all land borders of {}?",
        ],
        "highest elevation": [
            "What is the elevation of the highest point of {}, in m?",
            "How many m above the sea does {} rise at its highest?",
            "In m, what is the greatest elevation in {}?",
        ],
        "median age": [
            "What is the median age of the people of {}?",
            "How old is the median inhabitant of {}?",
            "In years, what is the median age in {}?",
        ],
        "life expectancy": [
            "How long do people in {} live on average?",
            "How many years is life expectancy at birth in {}?",
            "What life expectancy do people born in {} have?",
        ],
        "number of airports": [
            "How many airfields are there in {}?",
            "How many airports does {} have?",
        ],
        "date of independence": ["On which date did {} gain its independence?"],
        "date of the national holiday": ["On which day does {} celebrate its national holiday?"],
    },
    "which of two": [
        "Of the two countries with these flags, which one {}?",
        "Here are two flags. Which one's country {}?",
        "Between the two countries represented here, which {}?",
    ],
    "how far apart": {
        "difference": [
            "By how much do the two countries represented by these flags differ in {}{}?",
            "How large is the gap in {} between the countries with these two flags{}?",
            "Take the {} of the two countries pictured by their flags: what is the difference{}?",
            "How far apart in {} are the countries these two flags belong to{}?",
        ],
        "ratio": [
            "How many times larger is the {} of one of the countries pictured than the other's?",
            "What is the ratio of the larger to the smaller {} of the two countries shown?",
            "Of the two countries whose flags these are, how many times the smaller {} is the "
            "larger?",
        ],
        "years": [
            "How many years apart did the two countries represented by these flags become "
            "independent?",
            "By how many years did one of the two countries shown become independent before the "
            "other?",
        ],
    },
}


class Words(NamedTuple):
    """The wordings that questions are drawn from."""

    start: dict[str, list[str]]
    relations: dict[str, list[str]]
    attributes: dict[str, list[str]]
    which_of_two: list[str]
    how_far_apart: dict[str, list[str]]


def joined(one: dict[str, list[str]], other: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: wordings + other[name] for name, wordings in one.items()}


# What to search for; a relation or attribute not named here is searched for as "NAME of ENTITY".
QUERIES = {
    "longest border": "longest border of {}",
    "administered by": "{} administered by",
    "area": "total area of {}",
    "capital": "name of the capital of {}",
    "national anthem": "national anthem title of {}",
    "nationality": "nationality noun of {}",
    "length of the land borders": "total length of land borders of {}",
    "date of the national holiday": "national holiday of {}",
}
# What the one with the larger value of a quantity (of a date, the earlier) has.
COMPARISONS = {
    "area": "has the larger area",
    "population": "has the larger population",
    "coastline": "has the longer coastline",
    "length of the land borders": "has the longer land borders",
    "highest elevation": "has the higher highest point",
    "median age": "has the higher median age",
    "life expectancy": "has the higher life expectancy",
    "number of airports": "has more airports",
    "date of independence": "has been independent for longer",
}
# How a difference says its unit; a quantity not named here has none.
UNITS = {
    "area": " in sq km",
    "coastline": " in km",
    "length of the land borders": " in km",
    "highest elevation": " in m",
}
# Comparisons that ask how far apart two values are.
HOW_FAR_APART = {
    "difference": "What is the difference in {} between the two countries whose flags are shown{}?",
    "ratio": "By what factor do the two countries whose flags are shown differ in {}?",
    "years": (
        "How many years lie between the dates on which the two countries whose flags are shown "
        "became independent?"
    ),
}
# Comparisons that ask which of two entities that is.
WHICH_OF_TWO = [
    "Which of the two countries whose flags are shown {}?",
    "Two flags are shown. Which of their countries {}?",
]


_APART = {ask: [sentence] for ask, sentence in HOW_FAR_APART.items()}
FEW = Words(START, RELATIONS, ATTRIBUTES, WHICH_OF_TWO, _APART)
MANY = Words(
    joined(START, MORE["start"]),
    joined(RELATIONS, MORE["relations"]),
    joined(ATTRIBUTES, MORE["attributes"]),
    WHICH_OF_TWO + MORE["which of two"],
    joined(_APART, MORE["how far apart"]),
)


def query(name: str, title: str) -> str:
    """A query that finds a relation or attribute of an entity.

    >>> query("area", "Chad"), query("population", "Chad")
    ('total area of Chad', 'population of Chad')
    """
    return QUERIES.get(name, name + " of {}").format(title)


def single_hop_questions(name: str) -> list[str]:
    """Questions for one relation or attribute of an entity.

    >>> single_hop_questions("capital")[0], single_hop_questions("country")[0]
    ('What is the capital of {}?', 'What is the country of {}?')
    """
    if name in RELATIONS:
        return [f"What is {description}?" for description in RELATIONS[name]]
    return ATTRIBUTES[name]
