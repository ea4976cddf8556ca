"""Make the practice rows of the three tasks from the word lists below: sql, detox and instruct.jsonl.gz, beside this file.

    python notebooks/practice/make_practice.py           write them
    python notebooks/practice/make_practice.py --check   write nothing; exit 1 naming the files that hold other rows

What is held out for validation is fixed by the word lists below and not by the seed, so no two seeds can leak:
``sql`` holds out whole tables with their columns (lines marked ``*``), ``detox`` holds out topics and some sentence
frames (marked ``*``), ``instruct`` holds out every fifth item of every word list (see :func:`_part`).
Each row is a dict of strings with the columns of its task in :mod:`helpers.tasks`, and in the files with its split.
"""

import argparse
import gzip
import json
import random
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
COUNTS = {"train": 5_000, "validation": 500}  # rows of a file


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 naming the files that hold other rows")
    check, stale = parser.parse_args(arguments).check, 0
    for task in ROW_MAKERS:
        path, text = FOLDER / f"{task}.jsonl.gz", file_text(task)
        if not check:
            path.write_bytes(gzip.compress(text.encode(), mtime=0))  # without the time: the same rows, the same bytes
        elif not path.exists() or gzip.decompress(path.read_bytes()).decode() != text:
            print(f"{path.name} does not hold the rows that this script makes: run it without --check.")
            stale += 1
    return 1 if stale else 0


def file_text(task_name: str) -> str:
    """The lines of one task's file: the training rows of seed 0, then its validation rows."""
    rows = [row | {"split": split} for split, n in COUNTS.items() for row in practice_rows(task_name, split, n)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def practice_rows(task_name: str, split: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """Make `n` different practice rows of one task; fewer rows of the same seed are a prefix of more rows.

    Columns: ``sql`` context, question, answer; ``detox`` toxic, neutral; ``instruct`` instruction, input, response.
    Raises ValueError when the word lists do not hold as many different rows.
    """
    rng = random.Random(f"{task_name}/{split}/{seed}")
    make_row, rows = ROW_MAKERS[task_name], {}  # keyed by the values, in order of making: drops duplicates
    for _ in range(20 * n):
        if len(rows) == n:
            break
        row = make_row(rng, split == "validation")
        rows.setdefault(tuple(row.values()), row)
    if len(rows) < n:
        raise ValueError(f"Cannot make {n} {split} practice rows of {task_name!r}: ask for at most {len(rows)}.")
    return list(rows.values())


def _items(text: str) -> list[str]:
    """Split a word list at its commas."""
    return [" ".join(item.split()) for item in text.split(",") if item.strip()]


def _table(text: str) -> dict[str, list[str]]:
    """Read lines of the form ``name: item, item``."""
    return {name.strip(): _items(items) for name, items in (line.split(":", 1) for line in text.strip().splitlines())}


def _phrases(text: str) -> dict[str, list[str]]:
    """Read lines of the form ``name: phrase | phrase``; lines of the same name add up."""
    phrases = {}
    for name, line in (line.split(": ", 1) for line in text.strip().splitlines()):
        phrases.setdefault(name, []).extend(line.split(" | "))
    return phrases


def _lines(text: str, held_out: bool) -> list[str]:
    """The lines marked with ``*`` (held out), or those without."""
    lines = (line.strip() for line in text.strip().splitlines())
    return [line.lstrip("* ") for line in lines if line.startswith("*") == held_out]


def _part(items, held_out: bool) -> list:
    """Every fifth item is held out for validation; the rest is for training."""
    return [item for i, item in enumerate(items) if (i % 5 == 4) == held_out]


def _articles(text: str) -> str:
    """Turn 'a' into 'an' before a vowel sound ('an idiot', but 'a useless idea')."""
    return re.sub(r"\b([Aa]) (?=[aeio]|u(?!s|ni))", r"\1n ", text)


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


FIRST_NAMES = _items("""Anna, Ben, Clara, David, Elena, Felix, Grace, Hugo, Irene, Jonas, Karin, Leo, Maria, Nadia,
Oscar, Paula, Quentin, Rosa, Samuel, Tessa, Umar, Vera, Walter, Yusuf, Zoe, Amir, Beth, Carlos, Diana, Erik""")
LAST_NAMES = _items("""Baker, Costa, Dahl, Evans, Fischer, Garcia, Hill, Ito, Jensen, Khan, Lopez, Moore, Novak,
Okafor, Price, Rossi""")

# --- sql -------------------------------------------------------------------------------------------------------------

POOLS = _table("""
city: Paris, Oslo, Lima, Cairo, Boston, Madrid, Toronto, Lagos, Vienna, Mumbai, Dublin, Seoul, New York, Cape Town
country: France, Norway, Peru, Egypt, Canada, Spain, Japan, Nigeria, Austria, India, Ireland, Brazil, South Korea, Italy
department: Sales, Marketing, Finance, Legal, Research, Support, Human Resources, Design
job_title: Analyst, Engineer, Manager, Clerk, Accountant, Technician, Director, Assistant
genre: Mystery, Fantasy, Romance, Thriller, History, Horror, Science Fiction, Comedy, Drama
work: The Silent River, Winter Light, A Small Garden, The Last Train, Blue Horizon, Paper Moon, Hidden Roads, Night Walk
airline: Sky Nordic, Aero Sur, Pacific Wings, Blue Jet, Alpine Air, Delta Coast, Sunline
code: AB12, CD45, EF78, GH21, JK34, LM56, NP90, QR17, ST63, VW88
team: Red Lions, Blue Sharks, City Rovers, North Stars, Green Hawks, River United, Golden Bears, Iron Wolves
venue: Central Arena, North Park, Lake Stadium, Old Field, Harbor Dome, Sunset Ground
dish: Lentil Soup, Fish Curry, Apple Pie, Mushroom Risotto, Bean Salad, Lemon Cake, Roast Chicken, Noodle Bowl
cuisine: Italian, Thai, Mexican, Greek, Indian, Turkish, Korean, French
ingredient: Rice, Lentils, Chicken, Mushrooms, Apples, Beans, Salmon, Noodles
subject: Biology, History, Physics, Economics, Chemistry, Philosophy, Music, Mathematics
color: Red, Blue, Green, Black, White, Silver, Yellow, Orange
brand: Nova, Zenith, Arrow, Lumo, Kestrel, Orbit, Fable, Tundra
business: Acme Works, Bright Foods, Delta Tools, Evergreen, Fairway Group, Globe Media, Harvest Lane, Summit Partners
place_name: Grand Plaza, Sea View, Maple House, The Anchor, Golden Gate, Hill Top, Old Mill, Rose Garden
category: Kitchen, Garden, Toys, Sports, Office, Clothing, Books, Electronics
blood_type: A positive, B positive, O positive, A negative, O negative, AB positive
specialty: Cardiology, Neurology, Surgery, Pediatrics, Oncology, Radiology
field_position: Goalkeeper, Defender, Midfielder, Forward, Striker, Captain
surface: Grass, Clay, Concrete, Sand, Turf, Asphalt
medium: Oil, Watercolor, Acrylic, Charcoal, Ink, Pastel
mountain: Mount Alder, Grey Peak, Eagle Ridge, Storm Top, White Tooth, Mount Corin
river: Blackwater, Silver Run, Ardent, Long Creek, Mirelle, Stony Brook
material: Steel, Stone, Wood, Glass, Copper, Brick
breed: Beagle, Poodle, Collie, Boxer, Terrier, Dalmatian, Husky
grape: Merlot, Riesling, Malbec, Syrah, Chardonnay, Pinot Noir
party: Unity Party, Green Alliance, Liberal Front, Labor Union, Civic Forum
industry: Energy, Retail, Banking, Software, Farming, Transport
state: Pending, Paid, Cancelled, Delayed, Closed, Open
day: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
language: English, Spanish, French, Arabic, Hindi, German, Swahili
level: Beginner, Basic, Medium, Advanced, Expert
direction: North, South, East, West, North East, South West
platform: Windows, Linux, Android, Web, Console, Mobile
flower: Rose, Tulip, Lily, Daisy, Orchid, Iris
orbit: Low Earth, Polar, Geostationary, Elliptical, Lunar
probe: Pathfinder, Aurora One, Skylark, Meridian, Halo Two, Comet Eye
volcano: Mount Ember, Kirawa, Red Caldera, Old Smoky, Pico Negro, Ash Tor
island: Sumatra, Iceland, Sicily, Luzon, Maui, Java
activity: Active, Dormant, Extinct, Restless
vessel: Sea Spirit, Northern Dawn, Albatross, Coral Queen, Iron Duke, Wanderer
fruit: Apples, Pears, Plums, Cherries, Peaches, Quinces
era: Jurassic, Triassic, Cretaceous, Permian, Devonian, Cambrian
creature: Trilobite, Ammonite, Raptor, Mammoth, Sea Lily, Cave Bear
""") | {"person": [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]}


def _domains(text: str) -> dict[bool, dict[str, tuple[str, dict[str, tuple[str, str]]]]]:
    """By held out or not: {table: (singular noun, {column: (kind, pool or range)})}; kind is one of ``= # + @``."""
    def columns(line):
        return {name: (kind, source) for name, kind, source in re.findall(r"(\w+)([=#+@])(\S+)", line.split(": ")[1])}

    return {held_out: {line.split()[0]: (line.split()[1].rstrip(":"), columns(line)) for line in _lines(text, held_out)}
            for held_out in (False, True)}


UNIQUE_POOLS = ("person", "work", "code")  # hardly ever repeat within a column: nobody groups by them


# table singular: VARCHAR columns are `name=pool`; INTEGER columns are `name#low-high`, with `+` where a sum makes sense
# and `@` for years. `singular_id` columns for joins are added from JOINS. No column of a held-out table, apart from
# `name`, is a column of a training table.
DOMAINS = _domains("""
employees employee: name=person department=department job_title=job_title salary+20000-90000 age#20-65 \
    hire_year@1990-2023
books book: title=work author=person genre=genre page_count+80-900 price#5-60 publication_year@1950-2023
publishers publisher: name=business city=city country=country title_count+10-900 founding_year@1850-2010
flights flight: flight_number=code origin=city destination=city distance#200-9000 passenger_count+40-400 delay#0-180
airlines airline: name=airline country=country hub=city fleet_size+5-300 founding_year@1930-2015 safety_score#1-10
matches match: home_team=team away_team=team attendance+500-60000 home_score+0-7 away_score+0-7 referee=person
stadiums stadium: name=venue city=city surface=surface capacity+2000-90000 opening_year@1900-2022
players player: name=person agent=person field_position=field_position goal_count+0-300 height#160-210 \
    nationality=country
teams team: name=team coach=person city=city win_count+0-40 loss_count+0-40 point_count+0-99
recipes recipe: dish=dish cuisine=cuisine main_ingredient=ingredient cooking_time#5-180 calorie_count+100-900 \
    serving_count#1-12
students student: name=person major=subject home_city=city age#17-40 credit_count+0-180 enrollment_year@2005-2023
courses course: course_code=code subject=subject level=level credit_count+1-30 class_size+5-300 weekday=day
teachers teacher: name=person subject=subject experience#1-40 salary+20000-80000 weekly_load#4-30
films film: title=work director=person genre=genre budget+1-200 running_time#60-220 release_year@1930-2023
studios studio: name=business city=city owner=person staff_size+10-5000 founding_year@1910-2015
songs song: title=work singer=person language=language duration#90-600 stream_count+1000-90000 release_year@1960-2023
cars car: model=code brand=brand color=color horsepower#50-600 price#4000-90000 model_year@1980-2023
cities city: name=city country=country mayor=person population+20000-900000 area#20-3000 elevation#1-3500
hotels hotel: name=place_name city=city manager=person room_count+10-600 star_rating#1-5 nightly_rate#30-900
guests guest: name=person nationality=country room_rate#30-900 night_count+1-30 booking_code=code
customers customer: name=person city=city country=country age#18-90 loyalty_score+0-5000
purchases purchase: product=category quantity+1-50 amount+5-900 status=state purchase_year@2010-2023 payment_code=code
products product: product_code=code brand=brand category=category stock+0-900 price#1-500 weight#1-90
suppliers supplier: company_name=business country=country contact=person rating#1-10 contract_year@2000-2023
patients patient: name=person blood_type=blood_type age#1-95 weight#10-140 stay_length#1-40 city=city
doctors doctor: name=person specialty=specialty hospital=place_name experience#1-40 patient_count+0-400
museums museum: name=place_name city=city director=person visitor_count+1000-900000 opening_year@1850-2020
paintings painting: title=work painter=person medium=medium width#10-300 height#10-300 estimated_value+100-90000
mountains mountain: name=mountain country=country height#900-8800 first_climber=person climb_year@1800-1990
rivers river: name=river country=country length#20-6000 direction=direction depth#1-90
bridges bridge: bridge_code=code crosses=river material=material length#10-3000 lane_count#1-8 \
    construction_year@1850-2020
buildings building: name=place_name architect=person city=city floor_count+1-120 height#5-600 \
    construction_year@1850-2022
trains train: train_number=code origin=city destination=city speed#60-320 passenger_count+20-900 weekday=day
restaurants restaurant: name=place_name cuisine=cuisine chef=person seat_count+10-300 rating#1-10 menu_price#8-120
dogs dog: breed=breed owner=person color=color age#1-18 weight#2-80 city=city
wines wine: grape=grape country=country producer=business vintage_year@1960-2022 price#5-400 score#50-100
plants plant: species=flower color=color height#5-300 supplier_code=code price#1-90 watering_day=day
candidates candidate: name=person party=party district=direction vote_count+100-90000 age#25-80 election_year@1990-2022
companies company: company_name=business industry=industry headquarters=city revenue+1-900 staff_size+10-90000 \
    ceo=person
invoices invoice: invoice_code=code client=business status=state billed_amount+10-9000 issue_year@2010-2023
shipments shipment: tracking_code=code sender=business destination=city weight+1-900 box_count+1-80 status=state
warehouses warehouse: warehouse_code=code city=city manager=person area#100-9000 shelf_count+10-900
concerts concert: performer=person venue=venue city=city ticket_count+50-60000 ticket_price#10-200 \
    concert_year@1980-2023
podcasts podcast: title=work host=person language=language episode_count+1-900 listener_count+100-90000 \
    start_year@2006-2023
phones phone: model=code brand=brand color=color storage#16-900 battery_life#6-48 price#90-1500
video_games game: title=work developer=business platform=platform genre=genre copy_count+1-900 release_year@1985-2023
cyclists cyclist: name=person team=team nationality=country stage_win_count+0-30 age#18-42 top_speed#40-99
apartments apartment: address_code=code city=city owner=person room_count+1-9 floor#1-40 monthly_rent+300-5000
* satellites satellite: satellite_name=probe orbit=orbit operator=business mass+50-9000 launch_year@1965-2023 \
    mission_length#10-900
* volcanoes volcano: name=volcano island=island activity=activity summit_height#300-6000 eruption_year@1700-2022
* ships ship: vessel_name=vessel flag=country captain=person tonnage+100-90000 crew_size+5-900 build_year@1950-2022
* harbors harbor: harbor_name=place_name coast=direction berth_count+2-200 water_depth#3-40 harbor_master=person
* orchards orchard: fruit=fruit farmer=person tree_count+20-9000 hectare_count+1-200 planting_year@1950-2020 \
    soil_grade#1-5
* theaters theater: theater_name=venue neighborhood=direction balcony_count#1-6 seating+50-3000 \
    renovation_year@1960-2023
* plays play: play_title=work playwright=person act_count#1-6 cast_size+2-60 premiere_year@1900-2023 mood=genre
* fossils fossil: creature=creature era=era finder=person bone_count+1-300 discovery_year@1850-2022 dig_site=mountain
* gliders glider: glider_model=brand pilot=person wingspan#8-30 glide_ratio#15-70 wing_material=material
""")
JOINS = {  # (child, parent)
    False: [("books", "publishers"), ("flights", "airlines"), ("matches", "stadiums"), ("players", "teams"),
            ("courses", "teachers"), ("films", "studios"), ("guests", "hotels"), ("purchases", "customers"),
            ("products", "suppliers"), ("patients", "doctors"), ("paintings", "museums")],
    True: [("ships", "harbors"), ("plays", "theaters")],
}
PHRASES = _phrases("""
select: Show the {sel} of every {one} {cond}. | Find the {sel} of each {one} {cond}.
select: Give me the {sel} of all {many} {cond}.
select: List the {sel} for {many} {cond}. | Tell me the {sel} of the {one} {cond}.
select_one: What is the {sel} of the {one} {cond}? | Which {sel} belongs to the {one} {cond}?
select_one: What {sel} does the {one} {cond} have?
count: How many {many} {cond} are there? | How many {many} are there {cond}? | Count the {many} {cond}.
count: What is the number of {many} {cond}? | Give me the number of {many} {cond}. | Find the count of {many} {cond}.
aggregate: What is the {fn} {col} of the {many}{cond}? | Find the {fn} {col} of all {many}{cond}.
aggregate: Show the {fn} {col} among {many}{cond}. | Give me the {fn} {col} for {many}{cond}.
aggregate: Tell me the {fn} {col} of {many}{cond}. | Work out the {fn} {col} of the {many}{cond}.
distinct: What are the different {col} values of the {many}{cond}? | List the distinct {col} values of {many}{cond}.
distinct: Show every different {col} among the {many}{cond}. | Find the unique {col} values of all {many}{cond}.
distinct: Give me each {col} of the {many}{cond} without repeats.
order: Show the {sel} of the {k} {many} with the {fn} {col}. | List the {sel} for the {k} {many} with the {fn} {col}.
order: Which {sel} do the {k} {many} with the {fn} {col} have?
order: Find the {k} {many} with the {fn} {col} and show the {sel}.
order: Give me the {sel} of the {k} {many} that have the {fn} {col}.
order_one: Show the {sel} of the {one} with the {fn} {col}. | What is the {sel} of the {one} with the {fn} {col}?
order_one: Which {sel} does the {one} with the {fn} {col} have? | Find the {one} with the {fn} {col} and show the {sel}.
order_one: Give me the {sel} of the {one} that has the {fn} {col}.
group: How many {many} are there for each {col}? | For each {col}, how many {many} are there?
group: Count the {many} for each {col}.
group: Show every {col} and its number of {many}. | Give me the number of {many} per {col}.
group: List each {col} with the number of {many}.
join: Show the {sel} of every {one} whose {parent} has {col} {value}.
join: List the {sel} of all {many} whose {parent} has {col} {value}.
join: What is the {sel} of the {one} whose {parent} has {col} {value}?
join: Find the {sel} of {many} whose {parent} has {col} {value}.
join: Give me the {sel} for each {one} whose {parent} has {col} {value}.
join_both: Show the {sel} of each {one} and the {col} of the {parent}.
join_both: Find the {sel} of all {many} and the {col} of the {parent}.
join_both: List the {sel} of every {one} with the {col} of the {parent}.
join_both: What is the {sel} of each {one} and the {col} of the {parent}?
join_both: For each {one}, give the {sel} and the {col} of the {parent}.
""")
CONDITION_STYLES = [("whose ", "{} is {}"), ("where ", "the {} is {}"), ("for which ", "the {} is {}"),
                    ("with ", "{} {}"), ("having ", "{} {}")]
COMPARISONS = {"#>": ["over", "above", "more than", "greater than"],
               "#<": ["under", "below", "less than", "lower than"],
               "@>": ["after", "later than"], "@<": ["before", "earlier than"]}
AGGREGATES = {"#": {"MAX": ["highest", "maximum"], "MIN": ["lowest", "minimum"], "AVG": ["average", "mean"]},
              "@": {"MAX": ["latest", "most recent"], "MIN": ["earliest", "first"]}}
AGGREGATES["+"] = AGGREGATES["#"] | {"SUM": ["total", "combined"]}
SQL_PATTERNS = {"select": 22, "select_two": 8, "and": 14, "compare": 12, "count": 12, "aggregate": 12, "order": 10,
                "group": 5, "distinct": 5, "join": 8}


def _words(identifier: str) -> str:
    return identifier.replace("_", " ")


def _create_table(table: str, columns: dict) -> str:
    types = ", ".join(f"{c} {'VARCHAR' if kind[0] == '=' else 'INTEGER'}" for c, kind in columns.items())
    return f"CREATE TABLE {table} ({types})"


def _condition(rng, column: str, kind_and_source: tuple[str, str], operator: str) -> tuple[str, str]:
    """A condition in words ('over 30') and in SQL ('age > 30'); text columns can only be compared with '='."""
    kind, source = kind_and_source
    if kind == "=":
        value = rng.choice(POOLS[source])
        return value, f"{column} = '{value}'"
    low, high = map(int, source.split("-"))
    step = 1 if kind == "@" else 10 ** max(len(str(high)) - 2, 0)  # round numbers, as people use them
    margin = max(1, (high - low) // 6)  # away from the ends, so that comparisons split a table
    value = max(low, rng.randint(low + margin, high - margin) // step * step)
    words = str(value)
    if operator != "=":
        words = rng.choice(COMPARISONS[kind.replace("+", "#") + operator]) + f" {value}"
    return words, f"{column} {operator} {value}"


def _where(rng, columns: dict, tested: list[str], operators: str) -> tuple[str, str]:
    """Conditions on the `tested` columns in words ('whose age is over 30 and city is Oslo') and in SQL."""
    opener, body = rng.choice(CONDITION_STYLES)
    pairs = [(name, *_condition(rng, name, columns[name], rng.choice(operators))) for name in tested]
    words = " and ".join(body.format(_words(name), value) for name, value, _ in pairs)
    return opener + words, " AND ".join(sql for *_, sql in pairs)


def _join_row(rng, held_out: bool) -> dict[str, str]:
    child, parent = rng.choice(JOINS[held_out])
    (one, child_columns), (parent_one, parent_columns) = DOMAINS[held_out][child], DOMAINS[held_out][parent]
    kept = rng.sample(list(child_columns), rng.randint(2, 3))
    parent_kept = rng.sample(list(parent_columns), rng.randint(2, 3))
    sel, col = kept[0], parent_kept[0]
    context = "; ".join([
        _create_table(child, {c: child_columns[c] for c in child_columns if c in kept} | {f"{parent_one}_id": "#"}),
        _create_table(parent, {"id": "#"} | {c: parent_columns[c] for c in parent_columns if c in parent_kept})])
    value, sql = _condition(rng, f"T2.{col}", parent_columns[col], rng.choice("=><"))
    fill = {"sel": _words(sel), "one": one, "many": _words(child), "parent": parent_one,
            "col": _words(col), "value": value}
    joined = f"FROM {child} AS T1 JOIN {parent} AS T2 ON T1.{parent_one}_id = T2.id"
    if rng.random() < 0.6:
        phrases, answer = PHRASES["join"], f"SELECT T1.{sel} {joined} WHERE {sql}"
    else:
        phrases, answer = PHRASES["join_both"], f"SELECT T1.{sel}, T2.{col} {joined}"
    return {"context": context, "question": rng.choice(phrases).format(**fill), "answer": answer}


def _sql_row(rng, held_out: bool) -> dict[str, str]:
    pattern = rng.choices(list(SQL_PATTERNS), SQL_PATTERNS.values())[0]
    if pattern == "join":
        return _join_row(rng, held_out)
    table = rng.choice(list(DOMAINS[held_out]))
    one, all_columns = DOMAINS[held_out][table]
    names = rng.sample(list(all_columns), rng.randint(3, 5))  # in the order of their use in this row
    number = rng.choice([c for c, (kind, _) in all_columns.items() if kind != "="])
    text = rng.choice([c for c, (kind, pool) in all_columns.items() if kind == "=" and pool not in UNIQUE_POOLS])
    first = {"compare": [number], "aggregate": [number], "order": [number], "distinct": [text], "group": [text]}
    first = first.get(pattern, [])
    names = first + [c for c in names if c not in first]
    columns = {c: all_columns[c] for c in all_columns if c in names}
    fill = {"one": one, "many": _words(table), "col": _words(names[0])}
    if pattern in ("select", "select_two", "and", "compare"):
        tested, others = (names[:2], names[2:]) if pattern == "and" else (names[:1], names[1:])
        chosen = others[: 2 if pattern == "select_two" else 1]
        cond, sql = _where(rng, columns, tested, {"and": "==><", "compare": "><"}.get(pattern, "="))
        phrases = PHRASES["select"] + (PHRASES["select_one"] if pattern != "select_two" else [])
        fill |= {"sel": " and ".join(map(_words, chosen)), "cond": cond}
        answer = f"SELECT {', '.join(chosen)} FROM {table} WHERE {sql}"
    elif pattern == "count":
        cond, sql = _where(rng, columns, names[: rng.choice((1, 1, 2))], "==><")
        phrases, fill["cond"] = PHRASES["count"], cond
        answer = f"SELECT COUNT(*) FROM {table} WHERE {sql}"
    elif pattern in ("aggregate", "distinct"):
        cond, sql = _where(rng, columns, names[1:2], "==><") if rng.random() < 0.6 else ("", "")
        fill["cond"], where = (f" {cond}", f" WHERE {sql}") if sql else ("", "")
        phrases, result = PHRASES[pattern], f"DISTINCT {text}"
        if pattern == "aggregate":
            words_of = AGGREGATES[columns[number][0]]
            fn = rng.choice(list(words_of))
            fill["fn"] = rng.choice(words_of[fn])
            result = f"{fn}({number})"
        answer = f"SELECT {result} FROM {table}{where}"
    elif pattern == "order":
        fn, order = rng.choice((("MAX", "DESC"), ("MIN", "ASC")))
        k = rng.choice((1, 1, 2, 3, 4, 5, 10))
        phrases = PHRASES["order_one" if k == 1 else "order"]
        fill |= {"sel": _words(names[1]), "k": k, "fn": AGGREGATES[columns[number][0]][fn][0]}
        answer = f"SELECT {names[1]} FROM {table} ORDER BY {number} {order} LIMIT {k}"
    else:
        phrases = PHRASES["group"]
        answer = f"SELECT {text}, COUNT(*) FROM {table} GROUP BY {text}"
    question = rng.choice(phrases).format(**fill)
    if rng.random() < 0.1:
        question = question[:-1]  # people forget the last mark
    return {"context": _create_table(table, columns), "question": question, "answer": answer}


# --- detox -----------------------------------------------------------------------------------------------------------

TOPICS = _table("""
thing: bus timetable, phone app, coffee machine, school project, seating plan, printer, parking meter, movie, \
    song, recipe, website, article, haircut, team logo, ticket system, game, book, poster, meeting, rule, tax form, \
    password policy, tv show, remote control, speech, survey, jacket, mug, email, presentation, ringtone, painting, \
    menu, laptop, plan, budget, camera, toy, podcast, map
person: coach, referee, editor, manager, driver, landlord, mayor, teacher, reporter, singer, neighbor, cashier, \
    moderator, actor, waiter, pilot, designer, dentist, plumber, author, captain, judge, librarian, director, host
doing: parking on the sidewalk, posting spoilers, yelling at the staff, deleting my comments, skipping the line, \
    playing music at night, leaving dishes in the sink, sending me chain letters, talking during the film, changing \
    the subject, editing my page, blaming the goalkeeper, kicking my seat, losing the keys, ignoring the questions, \
    burning the toast, spamming the forum, calling me at work, slamming the door, copying my homework
claim: the earth is flat, pineapple ruins pizza, cats are better than dogs, the game was fair, winter is the \
    best season, homework is fun, phones make people happy, trains are too slow, the old logo was better, nobody \
    reads books, tea is better than coffee, the price is fair, the road is safe, rain is bad for cars, robots will \
    run the world, cooking is easy, the moon landing was faked, the team will win, the ending made sense, summer is \
    too short
""")
RUDE = _table("""
adj: stupid, dumb, idiotic, useless, ridiculous, crappy, moronic, lousy, worthless, pathetic
noun: moron, idiot, clown, fool, jerk, loser, dimwit, dummy, halfwit, blockhead
""")
DETOX_FRAMES = """
the {thing} is {adj} = The {thing} is not good. | I don't like the {thing}. | The {thing} could be better.
this {adj} {thing} drives me crazy = This {thing} bothers me. | I find this {thing} annoying.
why is this {thing} so {adj} ? = Why is this {thing} so bad? | Why is this {thing} so poor?
whoever made this {thing} is a {noun} = This {thing} is not well made. | I disagree with whoever made this {thing}.
only a {noun} would like this {thing} = I don't see why people like this {thing}. | This {thing} is not for me.
what the hell is wrong with the {thing} ? = What is wrong with the {thing}? | Is something wrong with the {thing}?
shut up about the {thing} already = Please stop talking about the {thing}. | Let's not talk about the {thing} anymore.
i am sick of your {adj} {thing} = I am tired of your {thing}. | I don't want to deal with your {thing} anymore.
fix the damn {thing} = Please fix the {thing}. | Could you fix the {thing}?
nobody wants your {adj} {thing} = Nobody wants your {thing}. | People are not interested in your {thing}.
that {thing} is a pile of crap = That {thing} is bad. | I don't like that {thing}.
i waited months for this {adj} {thing} = I waited months for this {thing}. | I waited too long for this {thing}.
does anyone know what this {adj} {thing} is for ? = Does anyone know what this {thing} is for? | What is it for?
you {noun} , you ruined the {thing} = You ruined the {thing}. | The {thing} went wrong because of you.
take your {adj} {thing} and get lost = Please take your {thing} and go. | Please leave with your {thing}.
* what a {adj} {thing} , it belongs in the trash = I don't think we need this {thing}. | This {thing} is not good.
* my dog could make a better {thing} than you , {noun} = Your {thing} could be better. | The {thing} needs more work.
* never show me this crap {thing} again = Please don't show me this {thing}. | I don't want to see this {thing} again.
the {person} is a {noun} = The {person} is not doing a good job. | I don't like the {person}.
that {noun} of a {person} has no clue = That {person} does not know what to do. | The {person} needs to learn more.
fire that {adj} {person} = That {person} should be replaced. | We need another {person}.
i can 't stand this {adj} {person} = I don't like this {person}. | I don't get along with this {person}.
who hired this {noun} of a {person} ? = Who hired this {person}? | Why was this {person} hired?
the {person} should shut the hell up = The {person} should stop talking. | The {person} should be quiet.
our {person} is too {adj} to do the job = Our {person} is not able to do the job. | Our {person} struggles with the job.
tell the {person} to stop being a {noun} = Please ask the {person} to be nicer. | The {person} should behave better.
* the {person} couldn 't find his own feet , what a {noun} = The {person} is not skilled. | The {person} makes mistakes.
* everything the {person} says is {adj} rubbish = I disagree with the {person}. | The {person} is often wrong.
stop {doing} , you {noun} = Please stop {doing}. | Could you stop {doing}?
only a {noun} keeps {doing} = It is not good to keep {doing}. | People should not keep {doing}.
{doing} is {adj} = I don't like {doing}. | {doing} is not a good idea.
quit your {adj} habit of {doing} = Please stop {doing}. | I would like you to stop {doing}.
why the hell are you {doing} again ? = Why are you {doing} again? | Are you {doing} again?
my {adj} brother keeps {doing} = My brother keeps {doing}. | I wish my brother would stop {doing}.
how {adj} do you have to be to keep {doing} ? = Why do you keep {doing}? | Why don't you stop {doing}?
* enough with {doing} , you {adj} {noun} = That is enough. Please stop {doing}. | Please don't keep {doing}.
* {doing} just proves you are a {noun} = Please think before {doing}. | {doing} does not look good.
you are a {noun} if you think {claim} = I disagree that {claim}. | I don't think {claim}.
{claim} ? what a {adj} thing to say = I don't agree that {claim}. | I don't think it is true that {claim}.
only {adj} people believe {claim} = I don't believe {claim}. | Not everyone believes {claim}.
stop telling me {claim} , you {noun} = Please stop telling me {claim}. | I don't want to hear that {claim}.
what kind of {noun} says that {claim} ? = Who says that {claim}? | Why would anyone say that {claim}?
i said {claim} , you {adj} {noun} = I said {claim}. | As I said, {claim}.
who the hell told you {claim} ? = Who told you {claim}? | Where did you hear that {claim}?
* of course you think {claim} , you are {adj} = I see that you think {claim}. | You think {claim}, but I disagree.
* " {claim} " is the most {adj} crap i ever read = I don't agree with "{claim}". | It is wrong to say that {claim}.
"""
RUDE_STARTS = _items("hey {noun}, lol, wow, shut up, what the hell, damn, oh please, listen {noun}")
POLITE_STARTS = _items("honestly, again, to be fair, by the way, anyway, sorry")
RUDE_ENDS = [" , you {noun}", " , {noun}", " lol", " , what a joke", " , you {adj} {noun}", " , for god 's sake"]


def _plain(text: str) -> str:
    """Undo tokenised punctuation and put capitals, as in 'I can't stand this, clown'."""
    text = re.sub(r" ([,?!.']|'\w)", r"\1", re.sub(r'" (.*?) "', r'"\1"', text))
    return _capitalise(re.sub(r"\bi\b", "I", text))


def _detox_row(rng, held_out: bool) -> dict[str, str]:
    toxic, neutrals = rng.choice(_lines(DETOX_FRAMES, held_out and rng.random() < 0.5)).split(" = ")
    neutral = rng.choice(neutrals.split(" | "))
    words = {kind: rng.choice(_part(items, held_out)) for kind, items in TOPICS.items()}
    words |= {kind: rng.choice(items) for kind, items in RUDE.items()}
    other = {kind: rng.choice([item for item in items if item != words[kind]]) for kind, items in RUDE.items()}
    toxic, neutral = toxic.format(**words), neutral.format(**words)
    question = toxic.endswith("?")
    toxic = toxic.removesuffix(" ?")
    if rng.random() < 0.2 and not question and not toxic.endswith(words["noun"]):
        toxic += rng.choice(RUDE_ENDS).format(**other)
    start = rng.random()
    if start < 0.25:
        toxic = rng.choice([s for s in RUDE_STARTS if s.split()[-1] not in toxic]).format(**other) + " , " + toxic
    elif start < 0.4 and not neutral.startswith(("Please", "Let's")):
        polite = rng.choice(POLITE_STARTS)
        toxic = f"{polite} , {toxic}"
        neutral = neutral if re.match(r"I\b", neutral) else neutral[0].lower() + neutral[1:]
        neutral = f"{polite}, {neutral}"
    end = rng.choice((" ?", " ?", "")) if question else rng.choice((" .", " .", " !", ""))
    toxic = _articles(toxic + end)
    return {"toxic": toxic if rng.random() < 0.7 else _plain(toxic), "neutral": _capitalise(_articles(neutral))}


# --- instruct --------------------------------------------------------------------------------------------------------

KINDS = _table("""
fruit: apple, banana, cherry, grape, lemon, mango, peach, pear, plum, melon, orange, kiwi, fig, apricot, papaya
animal: cat, dog, horse, rabbit, tiger, zebra, monkey, sheep, goat, lion, bear, wolf, camel, donkey, fox
color: red, blue, green, yellow, purple, brown, black, white, gray, pink, crimson, violet, turquoise, beige, maroon
tool: hammer, saw, drill, wrench, chisel, axe, shovel, rake, ladder, screwdriver, spade, crowbar, sander, mallet, clamp
vehicle: car, bus, train, bicycle, truck, tram, ferry, taxi, van, motorcycle, airplane, helicopter, scooter, \
    tractor, canoe
instrument: piano, violin, guitar, flute, drum, trumpet, cello, harp, clarinet, banjo, oboe, tuba, saxophone, \
    trombone, accordion
sport: tennis, soccer, hockey, rugby, golf, boxing, cricket, rowing, baseball, basketball, volleyball, cycling, \
    skiing, judo, badminton
clothing: shirt, coat, hat, scarf, glove, sock, jacket, sweater, dress, skirt, shoe, boot, belt, cap, vest
profession: doctor, teacher, farmer, nurse, lawyer, baker, pilot, plumber, tailor, engineer, butcher, dentist, chef, \
    painter, judge
furniture: chair, table, sofa, bed, desk, shelf, wardrobe, stool, bench, cabinet, bookcase, dresser, armchair, \
    couch, cupboard
""")
LIST_KINDS = {False: {f"{kind}s": _part(KINDS[kind], False) for kind in ("animal", "color", "tool", "vehicle")},
              True: _table("""
trees: oak, pine, maple, birch, willow, cedar, elm, beech
metals: iron, copper, gold, silver, tin, zinc, nickel, lead
planets: Mercury, Venus, Mars, Jupiter, Saturn, Uranus, Neptune, Earth
vegetables: carrot, onion, potato, cabbage, spinach, leek, broccoli, celery
birds: eagle, sparrow, owl, robin, crow, duck, swan, parrot
""")}
CAPITALS = _items("""France Paris, Japan Tokyo, Italy Rome, Spain Madrid, Germany Berlin, Egypt Cairo, Canada Ottawa,
Norway Oslo, Peru Lima, Kenya Nairobi, Greece Athens, Portugal Lisbon, Austria Vienna, Poland Warsaw, Russia Moscow,
Cuba Havana, India New Delhi, Sweden Stockholm, Ireland Dublin, China Beijing, Finland Helsinki, Hungary Budapest,
Denmark Copenhagen, Chile Santiago, England London, Turkey Ankara, Thailand Bangkok, Iran Tehran, Belgium Brussels,
Australia Canberra""")
OPPOSITES = _items("""hot cold, big small, fast slow, happy sad, early late, open closed, rich poor, full empty, hard
soft, young old, wet dry, light dark, high low, strong weak, loud quiet, near far, clean dirty, cheap expensive, easy
difficult, long short, up down, thick thin, front back, always never, first last, inside outside, true false, win
lose, buy sell, push pull, deep shallow, sweet sour, left right, day night, sharp blunt""")
PLURALS = _items("""child children, mouse mice, foot feet, tooth teeth, man men, city cities, box boxes, leaf leaves,
knife knives, baby babies, dish dishes, woman women, goose geese, wolf wolves, party parties, bus buses, country
countries, shelf shelves, church churches, wife wives, story stories, hero heroes, life lives, lady ladies, berry
berries, person people, glass glasses, loaf loaves, puppy puppies, brush brushes, table tables, half halves, peach
peaches, family families, dress dresses""")
PAST_TENSE = _items("""walks walked to school, plays played the piano, eats ate an apple, writes wrote a letter, goes
went to the market, sees saw a rainbow, buys bought a ticket, makes made a cake, reads read the newspaper, drinks
drank some tea, runs ran in the park, sings sang a song, takes took the bus, drives drove to work, finds found a coin,
cleans cleaned the kitchen, opens opened the window, gives gave a speech, watches watched a film, builds built a boat,
swims swam in the lake, paints painted the fence, catches caught a fish, rides rode a horse, sleeps slept on the sofa,
teaches taught a class, visits visited the museum, wears wore a red coat, brings brought some flowers, cooks cooked
dinner, sells sold the car, draws drew a map, loses lost the keys, calls called a friend, breaks broke a cup""")
GIFTS = _items("""the lovely book, the warm scarf, your help with the move, the concert tickets, the birthday cake,
your advice, the flowers, looking after the cat, the ride to the airport, the new mug, your kind words, dinner on
Friday, the garden tools, the recipe, your support""")
FAVORS = _items("""send the report, book a meeting room, check the invoice, water the plants, call the client, order
new paper, share the slides, confirm the date, fix the printer, update the list, review the draft, bring the keys,
feed the cat, print the tickets, sign the form""")
MONTHS = _items("January, February, March, April, May, June, July, August, September, October, November, December")
ADJECTIVES = _items("small, bright, heavy, quiet, new, cheap, lovely, broken, famous, strange, useful, wooden, old")
NUMBERS = random.Random(0).sample(range(2, 400), 398)  # shuffled, so that no digit is held out
COUNT_WORDS = {3: "three", 4: "four", 5: "five"}
INSTRUCTIONS = _phrases("""
sort: Sort these words alphabetically. | Put the words in alphabetical order. | Arrange the following words from A to Z.
sort: Order this list alphabetically.
ascending: Sort the numbers from smallest to largest. | Put these numbers in ascending order.
ascending: Order the numbers, lowest first.
descending: Sort the numbers from largest to smallest. | Put these numbers in descending order.
descending: Order the numbers, highest first.
largest: Find the largest number. | Which of these numbers is the highest? | Give the biggest number in the list.
smallest: Find the smallest number. | Which of these numbers is the lowest? | Give the smallest number in the list.
count: Count the items in this list. | How many items are in the list? | Say how many things are listed.
count: Give the number of items.
first: What is the first word of the sentence? | Give the first word. | Write only the first word of this sentence.
last: What is the last word of the sentence? | Give the last word. | Write only the last word of this sentence.
upper: Write this in upper case. | Change the text to capital letters. | Convert the text to uppercase.
lower: Write this in lower case. | Change the text to small letters. | Convert the text to lowercase.
reverse: Reverse the order of the list. | List these items in reverse order.
reverse: Write the list backwards, last item first.
numbers: Extract all numbers from the text. | List the numbers in the sentence. | Which numbers appear in the text?
email: Extract the e-mail address. | Find the e-mail address in the text. | Which e-mail address does the text give?
date: Extract the date from the text. | Find the date in the sentence. | Which date does the text mention?
name: Who is mentioned in the text? | Extract the person's name. | Give the name of the person in the text.
odd: Find the odd one out. | Which word does not belong? | Pick the item that does not fit with the others.
category: Is this a kind of {p} or a kind of {q}? | Classify the word: {p} or {q}.
category: Which category fits the word, {p} or {q}?
capital: What is the capital of {x}? | Name the capital city of {x}. | Which city is the capital of {x}?
capital: Give the capital of {x}.
opposite: What is the opposite of "{x}"? | Give the opposite of the word "{x}".
opposite: Write a word that means the opposite of "{x}".
plural: What is the plural of "{x}"? | Give the plural form of "{x}". | Write the word "{x}" in the plural.
past: Rewrite the sentence in the past tense. | Change this sentence to the past tense.
past: Put the sentence into the past.
thanks: Write a short thank-you note from {b} to {a} for {x}. | {b} wants to thank {a} for {x}. Write a short note.
thanks: Write {a} a brief note of thanks for {x}, signed by {b}.
request: Write a short e-mail from {b} asking {a} to {x}. | {b} needs {a} to {x}. Write a brief e-mail.
request: Write {a} a polite e-mail with the request to {x}, signed by {b}.
list: List {k} {x}. | Name {k} {x}. | Give me the names of {k} {x}. | Write down {k} {x}.
compare: Is {p} greater than {q}? | Is {p} larger than {q}? | Is the number {p} more than {q}?
json: Write the person as JSON with the keys name, age and city. | Turn the text into JSON with name, age and city.
json: Format this information as a JSON object with the keys name, age and city.
csv: Write the person as a CSV line: name, age, city. | Turn the text into one line of CSV with name, age and city.
csv: Format this information as a CSV row with the columns name, age, city.
bullets: Format the list as bullet points. | Write these items as a bulleted list. | Turn the list into bullet points.
numbered: Format the list as a numbered list. | Number these items, one on each line.
numbered: Turn the list into a numbered list.
duplicates: Remove the repeated words. | Delete duplicates from the list. | List each item only once, in the same order.
replace: Replace the word "{x}" with "{y}". | Change "{x}" to "{y}" in the sentence. | Swap the word "{x}" for "{y}".
contains: Is "{x}" in the list? | Does the list contain "{x}"? | Say whether "{x}" is one of the items.
""")


def _instruct_row(rng, held_out: bool) -> dict[str, str]:
    task = rng.choice(list(INSTRUCTIONS))
    kinds = {kind: _part(items, held_out) for kind, items in KINDS.items()}
    kind, other_kind = rng.sample(list(kinds), 2)
    words = rng.sample([word for items in kinds.values() for word in items], rng.randint(4, 7))
    absent, listed = words.pop(), ", ".join(words)
    numbers = rng.sample(_part(NUMBERS, held_out), rng.randint(3, 6))
    number_text = ", ".join(map(str, numbers))
    a, b = rng.sample(_part(FIRST_NAMES, held_out), 2)
    city = rng.choice(_part(POOLS["city"], held_out))
    person = f"{b} {rng.choice(_part(LAST_NAMES, held_out))}"
    email = f"{person.lower().replace(' ', '.')}@example.{rng.choice(('com', 'org', 'net'))}"
    day = f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1990, 2029)}"
    old, new = rng.sample(_part(ADJECTIVES, held_out), 2)
    thing, place = (rng.choice(kinds[k]) for k in rng.sample(("tool", "instrument", "clothing", "furniture"), 2))
    frame = rng.choice((f"The {{}} {thing} was left near the {place}.", f"{a} found a {{}} {thing} in {city}.",
                        f"There is a {{}} {thing} next to {a}.", f"{a} asked {b} about the {{}} {thing}."))
    sentence = _articles(frame.format(old))
    mention = rng.choice((f"Please write to {person} at {email} before {day}.",
                          f"{person} ({email}) will arrive on {day}.",
                          f"On {day}, we got a letter from {person}, {email}."))
    counts = rng.choice((f"Room {numbers[0]} has {numbers[1]} chairs and {numbers[2]} desks.",
                         f"Bus {numbers[0]} carried {numbers[1]} people to {city} and {numbers[2]} people back.",
                         f"{a} sold {numbers[0]} tickets on Monday, {numbers[1]} on Tuesday and {numbers[2]} later."))
    odd, k = rng.choice(kinds[other_kind]), rng.choice(list(COUNT_WORDS))
    fitting = rng.sample(kinds[kind], 3)
    repeated = [*words, *rng.sample(words, 2)]
    rng.shuffle(repeated)
    country, capital = rng.choice(_part(CAPITALS, held_out)).split(" ", 1)
    word, opposite = rng.sample(rng.choice(_part(OPPOSITES, held_out)).split(), 2)
    singular, plural = rng.choice(_part(PLURALS, held_out)).split()
    present, past, rest = rng.choice(_part(PAST_TENSE, held_out)).split(" ", 2)
    gift, favor = rng.choice(_part(GIFTS, held_out)), rng.choice(_part(FAVORS, held_out))
    listed_kind = rng.choice(list(LIST_KINDS[held_out]))
    age, asked = numbers[0] % 80 + 10, rng.choice((words[0], absent))
    p, q = sorted((kind, other_kind)) if task == "category" else numbers[:2]
    x = {"capital": country, "opposite": word, "plural": singular, "thanks": gift, "request": favor,
         "list": listed_kind, "replace": old, "contains": asked}.get(task, "")
    facts = f"{person} is {age} years old and lives in {city}."
    text, response = {
        "sort": (listed, ", ".join(sorted(words))),
        "ascending": (number_text, ", ".join(map(str, sorted(numbers)))),
        "descending": (number_text, ", ".join(map(str, sorted(numbers, reverse=True)))),
        "largest": (number_text, str(max(numbers))),
        "smallest": (number_text, str(min(numbers))),
        "count": (listed, str(len(words))),
        "first": (sentence, sentence.split()[0]),
        "last": (sentence, sentence.split()[-1].rstrip(".")),
        "upper": (sentence, sentence.upper()),
        "lower": (sentence.upper(), sentence.lower()),
        "reverse": (listed, ", ".join(reversed(words))),
        "numbers": (counts, ", ".join(map(str, numbers[:3]))),
        "email": (mention, email),
        "date": (mention, day),
        "name": (mention, person),
        "odd": (", ".join(rng.sample([*fitting, odd], 4)), odd),
        "category": (fitting[0], kind),
        "capital": ("", capital),
        "opposite": ("", opposite),
        "plural": ("", plural),
        "past": (f"{a} {present} {rest}.", f"{a} {past} {rest}."),
        "thanks": ("", f"Dear {a},\n\nThank you so much for {gift}. I really appreciate it.\n\nBest wishes,\n{b}"),
        "request": ("", f"Hi {a},\n\nCould you please {favor}? That would help me a lot.\n\nThank you,\n{b}"),
        "list": ("", ", ".join(rng.sample(LIST_KINDS[held_out][listed_kind], k))),
        "compare": ("", f"Yes, {p} is greater than {q}." if numbers[0] > numbers[1] else f"No, {p} is less than {q}."),
        "json": (facts, json.dumps({"name": person, "age": age, "city": city})),
        "csv": (facts, f"{person},{age},{city}"),
        "bullets": (listed, "\n".join(f"- {word}" for word in words)),
        "numbered": (listed, "\n".join(f"{i}. {word}" for i, word in enumerate(words, 1))),
        "duplicates": (", ".join(repeated), ", ".join(dict.fromkeys(repeated))),
        "replace": (sentence, _articles(frame.format(new))),
        "contains": (listed, "Yes" if asked in words else "No"),
    }[task]
    instruction = rng.choice(INSTRUCTIONS[task]).format(a=a, b=b, x=x, y=new, p=p, q=q, k=COUNT_WORDS[k])
    return {"instruction": instruction, "input": text, "response": response}


ROW_MAKERS = {"sql": _sql_row, "detox": _detox_row, "instruct": _instruct_row}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
