"""The World Factbook's articles: their fields as plain text, and the attributes read off them.

A field is one line, e.g. ("Total area", "652,230 sq km"). An attribute names the field whose value
*begins* with it, so a reader who finds the right passage finds the answer in it.
"""

import html
import re
import unicodedata

# Titles of articles that name themselves in another way, by Factbook code.
TITLES = {
    "cf": "Republic of the Congo",
    "cg": "Democratic Republic of the Congo",
    "bm": "Burma",
    "ae": "United Arab Emirates",
    "ck": "Cocos (Keeling) Islands",
    "ct": "Central African Republic",
    "fk": "Falkland Islands",
    "fm": "Federated States of Micronesia",
    "gz": "Gaza Strip",
    "io": "British Indian Ocean Territory",
    "sh": "Saint Helena",
    "sv": "Svalbard",
    "um": "US Pacific Island Wildlife Refuges",
    "vt": "Holy See",
    "ks": "South Korea",
    "kn": "North Korea",
    "us": "United States",
    "uk": "United Kingdom",
    "bf": "Bahamas",
    "ga": "Gambia",
    "dr": "Dominican Republic",
}
# Other names under which a country is mentioned, as `key` makes them.
ALIASES = {
    "usa": "united states",
    "us": "united states",
    "uk": "united kingdom",
    "uae": "united arab emirates",
    "s korea": "south korea",
    "korea south": "south korea",
    "n korea": "north korea",
    "korea north": "north korea",
    "drc": "democratic republic of the congo",
    "democratic republic of congo": "democratic republic of the congo",
    "dem rep of the congo": "democratic republic of the congo",
    "rep of the congo": "republic of the congo",
    "congo": "republic of the congo",
    "congo brazzaville": "republic of the congo",
    "czech republic": "czechia",
    "ivory coast": "cote divoire",
    "macedonia": "north macedonia",
    "turkiye": "turkey",
    "myanmar": "burma",
    "vatican city": "holy see",
    "swaziland": "eswatini",
    "cape verde": "cabo verde",
    "micronesia": "federated states of micronesia",
    "st lucia": "saint lucia",
    "st vincent and the grenadines": "saint vincent and the grenadines",
    "st kitts and nevis": "saint kitts and nevis",
    "nz": "new zealand",
    "dominican rep": "dominican republic",
}

# The chapters and fields of an article that are read. The rest (energy, military; social and
# fiscal statistics, offices and treaties) would treble the time it takes to index and answers
# nothing that is asked.
SECTIONS = (
    "Introduction",
    "Geography",
    "People and Society",
    "Government",
    "Economy",
    "Transportation",
    "Communications",
)
RENAMED = {
    "Area, total": "Total area",
    "Land boundaries, total": "Total length of land borders",
    "Airports": "Number of airports",
}
SKIPPED = re.compile(
    "rate|ratio|density|distribution|composition|Age structure|Mother|Child|married|Youth|"
    "Sanitation|Drinking|Obesity|Alcohol|Tobacco|School|Literacy|"
    "[Dd]iplomatic|branch|parties|participation|references|claims|"
    "Citizenship|Suffrage|Legal system|Constitution|"
    "GDP|Purchasing|Gini|Labor|poverty|Household|expenditure|"
    "Budget|Taxes|debt|Debt|account|Remittances|Reserves|"
    "Telephones|Broadband|aircraft|Heliports|Merchant|Pipelines|"
    "Irrigated|Land use|hazards"
)


# ------------------------------------------------------------------------------------------- text


def clean(text: str) -> str:
    """Factbook HTML to one line of plain text.

    >>> clean("<p>arid &amp; semiarid;<br />cold winters</p>")
    'arid & semiarid; cold winters'
    """
    text = html.unescape(text or "")
    text = re.sub(r"<br\s*/?>|</p>", " ", text)
    text = re.sub(r"<[^>]*>", "", text)
    return re.sub(r"\s+", " ", text).strip()


def key(name: str) -> str:
    """A name as it is looked up: lower-case ASCII letters, without "the" and what is in brackets.

    >>> key("The Bahamas"), key("Côte d'Ivoire"), key("Guinea-Bissau"), key("UK")
    ('bahamas', 'cote divoire', 'guinea bissau', 'united kingdom')
    """
    name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    name = name.replace("&", "and").replace(".", "")
    filler = " " if "-" in name else ""
    name = re.sub(r"\(.*?\)", "", name)
    name = re.sub(r"[^a-z ]", filler, name)
    name = re.sub(r"^the ", "", name.strip())
    name = re.sub(r"\s+", " ", name).strip()
    return ALIASES.get(name, name)


def number(text: str):
    """First number of a text as a float, or None.

    >>> number("about 1.2 million (2020)"), number("none")
    (1200000.0, None)
    """
    found = re.search(r"-?\d[\d,]*\.?\d*", text)
    if not found:
        return None
    value = float(found.group().replace(",", ""))
    scale = re.match(r"\s*(million|billion|trillion)", text[found.end() :])
    if scale:
        value *= {"million": 1e6, "billion": 1e9, "trillion": 1e12}[scale.group(1)]
    return value


# ----------------------------------------------------------------------------------------- fields


def leaves(section: dict, prefix: str = ""):
    """Every (field, value) of a Factbook section; of a series by year only the newest stays.

    >>> list(leaves({"Area": {"total": {"text": "10 sq km"}, "note": {"text": "small"}}}))
    [('Area, total', '10 sq km'), ('Area', 'small')]
    >>> list(leaves({"Exports": {"Exports 2021": {"text": "$2"}, "Exports 2020": {"text": "$1"}}}))
    [('Exports', '$2')]
    """
    seen = set()
    for name, body in section.items():
        name = clean(name)
        series = re.sub(r"\s+(19|20)\d\d$", "", name)
        if series != name:  # "Exports 2021": the newest year comes first
            if series in seen:
                continue
            seen.add(series)
        if series in ("text", "note") or series == prefix:
            field = prefix
        elif prefix:
            field = f"{prefix}, {series}"
        else:
            field = series
        if isinstance(body, dict):
            yield from leaves(body, field)
        elif "sample" not in field and series != "note" and clean(body):
            yield field, clean(body)


def article_fields(article: dict) -> dict[str, str]:
    """{field: value} of a Factbook article.

    A field that questions ask about has each of its sub-values on its own ("Median age, total"); of
    any other they are joined ("Waterways": "navigable: 60 km; length: 1,200 km").
    """
    asked = {field.split(",")[0] for field, _, _ in ATTRIBUTES.values()}
    asked |= {"Area", "Land boundaries", "Country name"}
    fields = {}
    for section in SECTIONS:
        for name, body in article.get(section, {}).items():
            if SKIPPED.search(name) and name != "Exchange rates":
                continue
            found = list(leaves({name: body}))
            if len(found) > 1 and clean(name) not in asked:
                found = [(clean(name), "; ".join(labelled(*leaf) for leaf in found))]
            for field, value in found:
                fields.setdefault(RENAMED.get(field, field), value)
    return fields


def labelled(field: str, value: str) -> str:
    """
    >>> labelled("Age structure, 0-14 years", "40%"), labelled("Climate", "arid")
    ('0-14 years: 40%', 'arid')
    """
    _, comma, label = field.partition(", ")
    return f"{label}: {value}" if comma else value


# ------------------------------------------------------------------------------------- attributes

# name → (field, pattern, type). The first group of the pattern, found in the value, is the answer.
NUMBER = r"(-?\d[\d,]*\.?\d*)"
ATTRIBUTES = {
    "capital": ("Capital, name", r"([^;(,]+)", "String"),
    "currency": ("Exchange rates, Currency", r"([^;(]+?)\s*(?:\(| per |$)", "String"),
    "national anthem": ("National anthem(s), title", r"([^;(/]+?)\s*(?:[;(/]|$)", "String"),
    "highest point": ("Elevation, highest point", r"([^\d;]+?),? \d", "String"),
    "internet country code": ("Internet country code", r"(\.[a-z]{2})", "String"),
    "time zone of the capital": ("Capital, time difference", r"(UTC ?[+-]?\d*\.?\d*)", "String"),
    "nationality": ("Nationality, noun", r"([^;(,]+)", "String"),
    "area": ("Total area", NUMBER, "Numerical"),
    "population": ("Population, total", NUMBER, "Numerical"),
    "coastline": ("Coastline", NUMBER, "Numerical"),
    "length of the land borders": ("Total length of land borders", NUMBER, "Numerical"),
    "highest elevation": ("Elevation, highest point", NUMBER + r" m\b", "Numerical"),
    "median age": ("Median age, total", NUMBER, "Numerical"),
    "life expectancy": ("Life expectancy at birth, total population", NUMBER, "Numerical"),
    "number of airports": ("Number of airports", NUMBER, "Numerical"),
    "date of independence": (
        "Independence",
        r"((?:\d{1,2} [A-Z][a-z]+ )?1[5-9]\d\d|20\d\d)\b",
        "Time",
    ),
    "date of the national holiday": (
        "National holiday",
        r"[^,(]*, (\d{1,2} [A-Z][a-z]+)\b",
        "Time",
    ),
}
# The rest stand at the start of the value.
ANYWHERE = {"highest elevation", "date of the national holiday"}
NO_ANSWER = ("none", "na ", "n/a", "unnamed", "note", "uninhabited", "in transition")
MAX_CHARACTERS = 60  # of an answer


def attributes(fields: dict) -> dict:
    """The typed attributes that an article's fields support, each with the field it is read from.

    >>> attributes({"Total area": "652,230 sq km"})
    {'area': {'text': '652,230', 'type': 'Numerical', 'field': 'Total area', 'value': 652230.0}}
    """
    found = {}
    for name, (field, pattern, kind) in ATTRIBUTES.items():
        value = fields.get(field, "")
        look = re.search if name in ANYWHERE else re.match
        match = look(pattern, value)
        text = match.group(1).strip(" ,") if match else ""
        if not text or len(text) > MAX_CHARACTERS or text.lower().startswith(NO_ANSWER):
            continue
        attribute = {"text": text, "type": kind, "field": field}
        if kind == "Numerical":
            attribute["value"] = number(value[match.start(1) :])
            if attribute["value"] == 0:
                continue
        found[name] = attribute
    return found
