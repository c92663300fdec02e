"""Questions about the atlas with the passages that answer them: they measure the text search."""

import random

CHECK_QUERIES = {
    "capital": "What is the capital of {}?",
    "currency": "Which currency is used in {}?",
    "national anthem": "What is the title of the national anthem of {}?",
    "highest point": "What is the highest point in {}?",
    "internet country code": "What is the internet country code of {}?",
    "nationality": "What do you call a person from {}?",
    "area": "What is the total area of {}?",
    "population": "How many people live in {}?",
    "coastline": "How long is the coastline of {}?",
    "length of the land borders": "How long are the land borders of {} in total?",
    "highest elevation": "How high is the highest point of {}?",
    "median age": "What is the median age in {}?",
    "life expectancy": "What is the life expectancy at birth in {}?",
    "number of airports": "How many airports does {} have?",
    "date of independence": "When did {} become independent?",
    "date of the national holiday": "When is the national holiday of {}?",
    "time zone of the capital": "Which time zone is the capital of {} in?",
    "largest export partner": "Which country buys the most exports from {}?",
    "largest import partner": "From which country does {} import the most?",
    "longest border": "With which country does {} share its longest land border?",
    "country": "In which country is {}?",
    "administered by": "Which country administers {}?",
}


def text_checks(
    entities: list[dict], rows: dict[str, dict], count: int = 600, seed: int = 0
) -> list[dict]:
    """About `count` records {"query", "rows"}, drawn evenly over what can be asked.

    rows: entity id → field → the rows of its passages.
    """
    # 1) Every question that can be asked, by the attribute or relation it asks about.
    pools = {}
    for entity in entities:
        for name, entry in (entity["attributes"] | entity["relations"]).items():
            field_rows = rows[entity["id"]].get(entry["field"])
            if name in CHECK_QUERIES and field_rows:
                query = CHECK_QUERIES[name].format(entity["title"])
                # The answer stands at the beginning of the field, so in its first passage.
                pools.setdefault(name, []).append({"query": query, "rows": field_rows[:1]})

    # 2) Equally many of each, as far as there are.
    rng = random.Random(seed)
    checks = []
    for pool in pools.values():
        share = -(-count // len(pools))  # rounded up
        checks += rng.sample(pool, min(len(pool), share))
    return checks
