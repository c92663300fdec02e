"""The words of the questions: noun phrases for entities and relations, sentences for what is asked.

Where a phrase has several wordings, one is drawn at random; {} is where an entity goes.
"""

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
