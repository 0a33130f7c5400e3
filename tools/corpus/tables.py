# ruff: noqa: E501 (literal tables: Chinese characters count twice)
"""Small tables with known values, for charts and look-ups, from collections whose licences are stated table by table.

The collections are BSD-3, single tables in them are not: the licence is read from the collection's own record
(``datapackage.json``, ``datasets.json``) and must be public domain, US government, CC0, MIT or BSD. Long tables are
grouped (mean, sum or count) to what fits on a chart.

All tables of one data set share its split. With two dozen data sets a 5 % bucket is mostly empty, so they are ranked
by hash instead: the first three are test, the next three validation.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from corpus.packages import members

Row = dict[str, Any]
_ALLOWED = re.compile(
    r"U\.S\. Government Dataset|(U\.S\. )?Public domain( \(.*\))?|Census public domain data|CC0-1\.0|CC0 1\.0 Universal|"
    r"Creative Commons Zero 1\.0 Universal|MIT|BSD-3-Clause( \(.*\))?|BSD License \(via Protovis\)",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One table to take. ``columns`` maps a source column to its (English, Chinese) title, in order.

    ``how`` groups rows by the first column; ``spread`` first turns the values of a column into columns of their own
    (column of names, column of numbers); ``every`` keeps each n-th row, ``where`` the rows with these values.
    """

    name: str
    source: Literal["vega", "bokeh"]
    file: str
    title: tuple[str, str]
    columns: dict[str, tuple[str, str]]
    how: Literal["mean", "sum", "count"] | None = None
    spread: tuple[str, str] | None = None
    month_of: str | None = None
    year_of: str | None = None
    where: tuple[str, str] | None = None
    every: int = 1
    top: str | None = None
    max_rows: int = 24


_STATE, _YEAR, _MONTH = ("State", "州"), ("Year", "年份"), ("Month", "月份")
_HIGH, _LOW = ("Highest temperature", "最高气温"), ("Lowest temperature", "最低气温")
_JOBS = {
    "construction": ("Construction", "建筑业"), "manufacturing": ("Manufacturing", "制造业"),
    "retail_trade": ("Retail", "零售业"), "information": ("Information", "信息业"), "government": ("Government", "政府"),
}  # fmt: skip

SPECS = (
    Spec(name="wheat", source="vega", file="wheat.json", title=("Price of wheat and wages", "小麦价格与工资"), every=2,
         columns={"year": _YEAR, "wheat": ("Wheat price", "小麦价格"), "wages": ("Weekly wages", "周工资")}),
    Spec(name="global temperature", source="vega", file="global-temp.csv", title=("Global temperature anomaly", "全球气温距平"),
         every=6, columns={"year": _YEAR, "temp": ("Temperature anomaly", "气温距平")}),
    Spec(name="iowa electricity", source="vega", file="iowa-electricity.csv", title=("Electricity generation in Iowa", "艾奥瓦州发电量"),
         year_of="year", spread=("source", "net_generation"), how="sum", columns={"year": _YEAR, "Fossil Fuels": ("Fossil fuels", "化石燃料"),
         "Nuclear Energy": ("Nuclear energy", "核能"), "Renewables": ("Renewables", "可再生能源")}),
    Spec(name="obesity", source="vega", file="obesity.json", title=("Obesity rate by state", "各州肥胖率"), every=3,
         columns={"state": _STATE, "rate": ("Rate", "比率")}),
    Spec(name="states", source="vega", file="population_engineers_hurricanes.csv", title=("Population and hurricanes by state", "各州人口与飓风次数"),
         top="hurricanes", columns={"state": _STATE, "population": ("Population", "人口"), "hurricanes": ("Hurricanes", "飓风次数")}, max_rows=16),
    Spec(name="seattle weather", source="vega", file="weather.csv", title=("Weather in Seattle by month", "西雅图各月天气"), where=("location", "Seattle"),
         month_of="date", how="mean", columns={"month": _MONTH, "temp_max": _HIGH, "temp_min": _LOW, "wind": ("Wind", "风速")}),
    Spec(name="new york weather", source="vega", file="weather.csv", title=("Weather in New York by month", "纽约各月天气"), where=("location", "New York"),
         month_of="date", how="mean", columns={"month": _MONTH, "temp_max": _HIGH, "temp_min": _LOW, "precipitation": ("Precipitation", "降水量")}),
    Spec(name="kinds of weather", source="vega", file="weather.csv", title=("Days by kind of weather", "各类天气的天数"), how="count",
         columns={"weather": ("Weather", "天气"), "count": ("Days", "天数")}),
    Spec(name="us employment", source="vega", file="us-employment.csv", title=("Employment in the United States", "美国就业人数"), year_of="month",
         how="mean", columns={"year": _YEAR, **_JOBS}),
    Spec(name="unemployment by industry", source="vega", file="unemployment-across-industries.json", title=("Unemployed people by industry", "各行业失业人数"),
         how="mean", columns={"series": ("Industry", "行业"), "count": ("Unemployed", "失业人数"), "rate": ("Rate", "失业率")}),
    Spec(name="antibiotics", source="vega", file="burtin.json", title=("Antibiotics needed against bacteria", "抑制细菌所需的抗生素"), every=1,
         columns={"Bacteria": ("Bacteria", "细菌"), "Penicillin": ("Penicillin", "青霉素"), "Streptomycin": ("Streptomycin", "链霉素"), "Neomycin": ("Neomycin", "新霉素")}),
    Spec(name="bird strikes by phase", source="vega", file="birdstrikes.csv", title=("Bird strikes by phase of flight", "各飞行阶段的鸟击次数"),
         how="count", columns={"Phase of flight": ("Phase of flight", "飞行阶段"), "count": ("Strikes", "次数")}),
    Spec(name="bird strikes by time", source="vega", file="birdstrikes.csv", title=("Bird strikes by time of day", "各时段的鸟击次数"),
         how="count", columns={"Time of day": ("Time of day", "时段"), "count": ("Strikes", "次数")}),
    Spec(name="flights by airport", source="vega", file="flights-airport.csv", title=("Flights by airport of departure", "各机场出发航班数"), how="sum",
         top="count", columns={"origin": ("Airport", "机场"), "count": ("Flights", "航班数")}, max_rows=14),
    Spec(name="state capitals", source="vega", file="us-state-capitals.json", title=("Capitals of the states", "各州首府"), every=2,
         columns={"state": _STATE, "city": ("Capital", "首府")}),
    Spec(name="hourly weather", source="vega", file="seattle-weather-hourly-normals.csv", title=("A winter day in Seattle", "西雅图的一个冬日"),
         columns={"date": ("Hour", "小时"), "temperature": ("Temperature", "气温"), "wind": ("Wind", "风速"), "pressure": ("Pressure", "气压")}, max_rows=23),
    Spec(name="penguins", source="bokeh", file="penguins.csv", title=("Penguins by species", "各种企鹅"), how="mean",
         columns={"species": ("Species", "物种"), "bill_length_mm": ("Bill length (mm)", "喙长（毫米）"), "bill_depth_mm": ("Bill depth (mm)", "喙深（毫米）"),
         "flipper_length_mm": ("Flipper length (mm)", "鳍长（毫米）"), "body_mass_g": ("Body mass (g)", "体重（克）")}),
    Spec(name="penguins by island", source="bokeh", file="penguins.csv", title=("Penguins by island", "各岛企鹅数量"), how="count",
         columns={"island": ("Island", "岛屿"), "count": ("Penguins", "数量")}),
    Spec(name="iris", source="bokeh", file="iris.csv", title=("Iris flowers", "鸢尾花"), how="mean", columns={"species": ("Species", "物种"),
         "sepal_length": ("Sepal length", "萼片长度"), "sepal_width": ("Sepal width", "萼片宽度"), "petal_length": ("Petal length", "花瓣长度"), "petal_width": ("Petal width", "花瓣宽度")}),
    Spec(name="cows", source="bokeh", file="cows.csv", title=("Butterfat by breed of cow", "各品种奶牛的乳脂率"), how="mean",
         columns={"breed": ("Breed", "品种"), "butterfat": ("Butterfat", "乳脂率")}),
    Spec(name="elements", source="bokeh", file="elements.csv", title=("Chemical elements", "化学元素"), columns={"name": ("Name", "名称"), "symbol": ("Symbol", "符号"),
         "atomic number": ("Atomic number", "原子序数"), "atomic mass": ("Atomic mass", "原子量"), "period": ("Period", "周期")}, max_rows=36),
    Spec(name="lincoln weather", source="bokeh", file="lincoln_weather.csv", title=("Weather in Lincoln by month", "林肯市各月气温"), month_of="DATE", how="mean",
         columns={"month": _MONTH, "TMAX": _HIGH, "TMIN": _LOW}),
    Spec(name="degrees", source="bokeh", file="percent-bachelors-degrees-women-usa.csv", title=("Share of degrees earned by women", "女性获得学位的比例"), every=4,
         columns={"Year": _YEAR, "Biology": ("Biology", "生物学"), "Business": ("Business", "商科"), "Computer Science": ("Computer science", "计算机科学"),
         "Education": ("Education", "教育学"), "Engineering": ("Engineering", "工程学")}),
    Spec(name="unemployment", source="bokeh", file="unemployment1948.csv", title=("Unemployment rate", "失业率"), every=5,
         columns={"Year": _YEAR, "Jan": ("January", "一月"), "Apr": ("April", "四月"), "Jul": ("July", "七月"), "Oct": ("October", "十月"), "Annual": ("Annual", "全年")}),
    Spec(name="marriages", source="bokeh", file="us_marriages_divorces.csv", title=("Marriages and divorces per 1000 people", "每千人结婚与离婚数"), every=10,
         columns={"Year": _YEAR, "Marriages_per_1000": ("Marriages", "结婚"), "Divorces_per_1000": ("Divorces", "离婚")}),
    Spec(name="sprint", source="bokeh", file="sprint.csv", title=("Olympic 100 metre sprint", "奥运会百米赛跑"), columns={"Name": ("Name", "姓名"),
         "Country": ("Country", "国家"), "Medal": ("Medal", "奖牌"), "Time": ("Time", "成绩"), "Year": _YEAR}, max_rows=30),
    Spec(name="olympics", source="bokeh", file="olympics2014.json", title=("Medals of the 2014 winter games", "2014年冬奥会奖牌"), top="total",
         columns={"name": ("Country", "国家"), "gold": ("Gold", "金牌"), "silver": ("Silver", "银牌"), "bronze": ("Bronze", "铜牌"), "total": ("Total", "总数")}, max_rows=20),
    Spec(name="cars", source="bokeh", file="auto-mpg.csv", title=("Cars by number of cylinders", "各气缸数的汽车"), how="mean", columns={"cyl": ("Cylinders", "气缸数"),
         "mpg": ("Miles per gallon", "每加仑英里数"), "hp": ("Horsepower", "马力"), "weight": ("Weight", "重量")}),
    Spec(name="sales by category", source="bokeh", file="SampleSuperstore.csv.gz", title=("Sales by category", "各类别销售额"), how="sum", columns={"Sub-Category": ("Category", "类别"),
         "Sales": ("Sales", "销售额"), "Quantity": ("Quantity", "数量"), "Profit": ("Profit", "利润")}),
    Spec(name="sales by region", source="bokeh", file="SampleSuperstore.csv.gz", title=("Sales by region", "各地区销售额"), how="sum", columns={"Region": ("Region", "地区"),
         "Sales": ("Sales", "销售额"), "Quantity": ("Quantity", "数量"), "Profit": ("Profit", "利润")}),
)  # fmt: skip

_MONTHS = "January February March April May June July August September October November December".split()


def _licences(files: dict[str, bytes], bokeh: dict[str, bytes]) -> dict[tuple[str, str], tuple[str, str]]:
    """(source, file) -> (licence as recorded by the collection, whom it credits)."""
    found = {}
    for entry in json.loads(files["package/datapackage.json"])["resources"]:
        names = {licence.get("name") or licence.get("title") or "" for licence in entry.get("licenses", [])}
        credit = "; ".join(source.get("title", "") for source in entry.get("sources", []))
        found["vega", entry["path"]] = (" AND ".join(sorted(names)), credit)
    record = next(data for path, data in bokeh.items() if path.endswith("datasets.json"))
    for entry in json.loads(record)["datasets"]:
        for file in entry["files"]:
            found["bokeh", file] = (entry["license_expression"] or entry["recorded_license"], entry["attribution"])
    return found


def _splits() -> dict[tuple[str, str], str]:
    """(source, file) -> split."""
    ranked = sorted(
        {(spec.source, spec.file) for spec in SPECS}, key=lambda at: hashlib.sha256("/".join(at).encode()).digest()
    )
    return {at: "test" if rank < 3 else "validation" if rank < 6 else "train" for rank, at in enumerate(ranked)}


def build(folder: Path) -> list[dict[str, Any]]:
    """Every table as a JSON-able row. ValueError on a licence that is not allowed or a table too small to ask about."""
    files = members(folder, "vega", lambda path: path.startswith("package/data"))
    bokeh = members(
        folder, "bokeh", lambda path: path.startswith("bokeh_sampledata/_data/") or path.endswith("datasets.json")
    )
    licences, splits = _licences(files, bokeh), _splits()
    found = []
    for spec in SPECS:
        licence, credit = licences[spec.source, spec.file]
        if not all(_ALLOWED.fullmatch(part) for part in licence.split(" AND ")):
            raise ValueError(f"table {spec.name} ({spec.file}): licence {licence!r} is not allowed")
        path = ("package/data/" if spec.source == "vega" else "bokeh_sampledata/_data/") + spec.file
        rows = _shape(spec, _read(path, (files if spec.source == "vega" else bokeh)[path]))
        if len(rows) < 3:
            raise ValueError(f"table {spec.name}: only {len(rows)} rows")
        found.append(
            {
                "name": spec.name,
                "split": splits[spec.source, spec.file],
                "title_en": spec.title[0],
                "title_zh": spec.title[1],
                "columns": [pair[0] for pair in spec.columns.values()],
                "columns_zh": [pair[1] for pair in spec.columns.values()],
                "rows": rows,
                "source": spec.source,
                "path": path,
                "licence": licence,
                "credit": credit,
            }
        )
    return found


def _read(path: str, data: bytes) -> list[Row]:
    text = (gzip.decompress(data) if path.endswith(".gz") else data).decode("utf-8")
    if ".json" in path:
        loaded = json.loads(text)
        return [{**row, **row.get("medals", {})} for row in (loaded["data"] if isinstance(loaded, dict) else loaded)]
    return list(csv.DictReader(io.StringIO(text), skipinitialspace=True))


def _number(value: Any) -> Any:
    """Numbers as int or as float with at most 3 decimals, other text stripped, empty as None."""
    text = str(value).strip() if value is not None else ""
    if not re.fullmatch(r"-?\d+(\.\d+)?([eE]-?\d+)?", text):
        return text or None
    number = float(text)
    return int(number) if number == int(number) else round(number, 3)


def _shape(spec: Spec, rows: Sequence[Row]) -> list[list[Any]]:
    rows = [row for row in rows if spec.where is None or row[spec.where[0]] == spec.where[1]]
    prepared = []
    for row in rows:
        row = dict(row)
        if spec.month_of:
            row["month"] = _MONTHS[int(row[spec.month_of][5:7]) - 1]
        if spec.year_of:
            row["year"] = row[spec.year_of][:4]
        if spec.spread:
            row[row[spec.spread[0]]] = row[spec.spread[1]]
        if spec.name == "hourly weather":
            row["date"] = int(row["date"][11:13])
        prepared.append(row)
    keys = list(spec.columns)
    table = (
        _group(prepared, keys, spec.how) if spec.how else [[_number(row.get(key)) for key in keys] for row in prepared]
    )
    table = [row for row in table if None not in row]
    if spec.top:
        at = keys.index(spec.top)
        table.sort(key=lambda row: -row[at])
    return table[:: spec.every][: spec.max_rows]


def _group(rows: Sequence[Row], keys: Sequence[str], how: str) -> list[list[Any]]:
    """Rows that share the first column become one, in order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row[keys[0]]:
            groups.setdefault(str(row[keys[0]]), []).append(row)
    if how == "count":
        return [[_number(name), len(group)] for name, group in groups.items()]
    table = []
    for name, group in groups.items():
        out = [_number(name)]
        for key in keys[1:]:
            numbers = [n for n in (_number(row.get(key)) for row in group) if isinstance(n, int | float)]
            value = (fmean(numbers) if how == "mean" else sum(numbers)) if numbers else None
            out.append(None if value is None else _number(f"{value:.1f}" if abs(value) >= 1 else f"{value:.3f}"))
        table.append(out)
    return table
