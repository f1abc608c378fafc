"""Draws the house: the modules of jaxce, and which of them import which, as their sources say.

A module stands one floor above the highest that it imports, and what is public stands on top. An arrow goes from a
module to one that it imports, unless other arrows lead there too. Arrows to the same module run together. The order on
a floor is that of the fewest crossings in many tries, and the places are those of the shortest ways sideways.

    python docs/draw_house.py  # draws docs/pictures/house.svg; it needs matplotlib, and what jaxce needs
"""

import ast
import random
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch
from matplotlib.path import Path as Line
from scipy.optimize import linprog

Imports = dict[str, set[str]]  # of a module: the modules that it imports
Node = tuple[str, int]  # a module and its floor; on a floor in between, the arrows to that module
Link = tuple[Node, Node]  # from a floor to the one below

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "pictures" / "house.svg"
TOP = "__init__"
GROUPS = {  # what a module is for, which no import says
    "public": ("#ffffff", "__init__ imbalance torch"),
    "losses": ("#5fb39a", "_formula _losses _linear _custom _distillation _scores _elementwise _torch"),
    "mathematics": ("#a9d8f5", "_rule _head _summary _divergence _jensen_shannon _forward_gradient"),
    "door": ("#f5c04a", "_arguments _inputs _checks _rows _reduction"),
    "ground": ("#d0d0d0", "_types _mesh _autodiff _eager _conventions _xla _blocks _logits _targets _split _slice"),
}
WIDTH, HEIGHT, GAP, LINE = 1.0, 0.5, 0.08, 0.12  # of a box, between neighbours, of a line; floors are 1 apart


def read_imports() -> Imports:
    """What stands in the sources of jaxce."""
    trees = {path.stem: ast.parse(path.read_text()) for path in sorted((ROOT / "jaxce").glob("*.py"))}
    imports: Imports = {module: set() for module in trees}
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name.name}.".split(".")[:2] for name in node.names]
                imports[module] |= {name for package, name in names if package == "jaxce" and name in trees}
    return imports


def without_shortcuts(imports: Imports) -> Imports:
    """Leaves out what is imported by another import too."""

    @cache
    def below(module: str) -> set[str]:
        return imports[module].union(*map(below, imports[module]))

    return {module: {to for to in of if not any(to in below(via) for via in of)} for module, of in imports.items()}


def floors(imports: Imports) -> dict[str, int]:
    """How high each module stands."""

    @cache
    def floor(module: str) -> int:
        return 1 + max(map(floor, imports[module]), default=-1)

    top = max(floor(module) for module in imports if module != TOP)
    return {module: floor(module) if module.startswith("_") else top for module in imports}


def arrange(nodes: list[list[Node]], links: list[Link]) -> list[list[Node]]:
    """Every floor from left to right: from many beginnings, each node goes to the mean of those it is linked to."""
    linked: dict[Node, list[Node]] = {node: [] for floor in nodes for node in floor}
    for upper, lower in links:
        linked[upper].append(lower)
        linked[lower].append(upper)
    place: dict[Node, float] = {}

    def crossings() -> int:
        pairs = combinations(links, 2)
        return sum(a[1] == c[1] and (place[a] - place[c]) * (place[b] - place[d]) < 0 for (a, b), (c, d) in pairs)

    rng, tries = random.Random(0), []
    for _ in range(100):
        order = [rng.sample(floor, len(floor)) for floor in nodes]
        place |= {node: (i + 0.5) / len(floor) for floor in order for i, node in enumerate(floor)}
        for _ in range(8):
            for floor in [*order, *reversed(order)]:
                floor.sort(key=lambda node: np.mean([place[other] for other in linked[node]]))
                place |= {node: (i + 0.5) / len(floor) for i, node in enumerate(floor)}
        tries.append((crossings(), [list(floor) for floor in order]))
    return min(tries)[1]


def places(order: list[list[Node]], links: list[Link], rooms: set[Node]) -> dict[Node, float]:
    """How far to the right each node is, so that the ways sideways are short, those of long arrows first of all."""
    index = {node: i for i, node in enumerate(node for floor in order for node in floor)}
    width = {node: WIDTH if node in rooms else LINE for node in index}
    rows, bounds = [], []  # of inequalities, in what is in `index` and then a length for each link

    def at_most(bound: float, signs: dict[int, int]) -> None:
        rows.append(np.zeros(len(index) + len(links)))
        rows[-1][list(signs)] = list(signs.values())
        bounds.append(bound)

    for length, (upper, lower) in enumerate(links, start=len(index)):
        for sign in (1, -1):
            at_most(0, {index[upper]: sign, index[lower]: -sign, length: -1})
    for floor in order:
        for left, right in pairwise(floor):
            at_most(-GAP - (width[left] + width[right]) / 2, {index[left]: 1, index[right]: -1})
    widest = max(sum(width[node] + GAP for node in floor) for floor in order)
    costs = [0] * len(index) + [1 if upper in rooms and lower in rooms else 4 for upper, lower in links]
    solved = linprog(costs, np.array(rows), np.array(bounds), bounds=(0, widest - WIDTH - GAP)).x
    return {node: float(solved[i]) for node, i in index.items()}


def draw(imports: Imports) -> Figure:
    """The picture, with names for boxes and arrows, by which a test compares it with the sources."""
    arrows, floor = without_shortcuts(imports), floors(imports)
    ways = {
        (module, to): [(module, floor[module]), *((to, at) for at in range(floor[module] - 1, floor[to] - 1, -1))]
        for module in arrows
        for to in sorted(arrows[module])
    }
    links = sorted({link for way in ways.values() for link in pairwise(way)})
    rooms = set(floor.items())
    nodes = sorted(rooms | {node for link in links for node in link})
    order = arrange([[node for node in nodes if node[1] == at] for at in range(floor[TOP] + 1)], links)
    right = places(order, links, rooms)

    figure = Figure(figsize=(8, 9.5))
    sides = max(right.values()) + WIDTH / 2 + GAP
    axes = figure.add_axes((0, 0.04, 1, 0.96), xlim=(-WIDTH / 2 - GAP, sides), ylim=(-0.4, floor[TOP] + 0.4))
    axes.axis("off")
    for (module, to), way in ways.items():
        points, codes = [(right[way[0]], way[0][1] - HEIGHT / 2)], [Line.MOVETO]
        for upper, lower in pairwise(way):
            middle = upper[1] - 0.5
            points += [(right[upper], middle), (right[lower], middle), (right[lower], lower[1] + HEIGHT / 2)]
            codes += [Line.CURVE4] * 3
            if lower not in rooms:
                points.append((right[lower], lower[1] - HEIGHT / 2))
                codes.append(Line.LINETO)
        style = {"arrowstyle": "-|>,head_length=5,head_width=2.5", "color": "#555555", "lw": 1.2}
        axes.add_patch(FancyArrowPatch(path=Line(points, codes), gid=f"import-{module}-{to}", **style))
    colors = {module: color for color, modules in GROUPS.values() for module in modules.split()}
    for module, at in floor.items():
        corner = right[module, at] - WIDTH / 2, at - HEIGHT / 2
        box = {"boxstyle": "round,pad=0,rounding_size=0.08", "fc": colors[module], "ec": "black"}
        axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, gid=f"room-{module}", **box))
        name = "jaxce" if module == TOP else module[0] + module[1:].replace("_", "_\n")
        axes.text(right[module, at], at, name, ha="center", va="center_baseline", linespacing=0.95)
    keys = [Patch(fc=color, ec="black", label=name) for name, (color, _) in GROUPS.items()]
    figure.legend(handles=keys, loc="lower center", ncols=len(keys), frameon=False)
    return figure


if __name__ == "__main__":
    mpl.rcParams.update({"svg.hashsalt": "house", "font.size": 12})
    draw(read_imports()).savefig(PICTURE, metadata={"Date": None, "Title": "The modules of jaxce"})
