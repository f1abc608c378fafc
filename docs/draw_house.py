"""Draws the house: the modules of jaxce, and which of them import which, as their sources say.

An arrow goes from a module to one that it imports, unless other arrows lead there too. networkx leaves those out, and
grandalf says what stands where.

    python docs/draw_house.py  # draws docs/pictures/house.svg; it needs the extra `docs`
"""

import ast
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import networkx as nx
from grandalf.graphs import Edge, Graph, Vertex
from grandalf.layouts import SugiyamaLayout
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch
from matplotlib.path import Path as Line

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "pictures" / "house.svg"
GROUPS = {  # what a module is for, which no import says
    "public": ("#ffffff", "__init__ imbalance torch"),
    "losses": ("#5fb39a", "_formula _losses _linear _custom _distillation _scores _elementwise _torch"),
    "mathematics": ("#a9d8f5", "_rule _head _summary _divergence _jensen_shannon _forward_gradient"),
    "door": ("#f5c04a", "_arguments _inputs _checks _rows _reduction"),
    "ground": ("#d0d0d0", "_types _mesh _autodiff _eager _conventions _xla _blocks _logits _targets _split _slice"),
}


class Box:
    """What the layout asks of a module, and then says of it: the place of its middle."""

    w, h = 1.7, 0.5
    xy: tuple[float, float]


class Way:
    """What the layout says of an arrow: where it goes through."""

    points: list[tuple[float, float]]

    def setpath(self, points: list[tuple[float, float]]) -> None:
        """What grandalf calls."""
        self.points = points


def read_imports() -> nx.DiGraph:
    """What stands in the sources of jaxce."""
    trees = {path.stem: ast.parse(path.read_text()) for path in sorted((ROOT / "jaxce").glob("*.py"))}
    imports = nx.DiGraph()
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name.name}.".split(".")[:2] for name in node.names]
                imports.add_edges_from(
                    (module, name) for package, name in names if package == "jaxce" and name in trees
                )
    return imports


def place(imports: nx.DiGraph) -> tuple[dict[str, Box], dict[tuple[str, str], Way]]:
    """Boxes and arrows, each module above all that it imports."""
    vertices, edges = {module: Vertex(module) for module in sorted(imports)}, {}
    for vertex in vertices.values():
        vertex.view = Box()
    for module, to in sorted(imports.edges):
        edges[module, to] = Edge(vertices[module], vertices[to])
        edges[module, to].view = Way()
    layout = SugiyamaLayout(Graph(list(vertices.values()), list(edges.values())).C[0])
    layout.xspace, layout.yspace = 0.1, 0.5
    layout.init_all()
    layout.draw(20)  # passes to and fro
    layout.draw_edges()
    return {name: vertex.view for name, vertex in vertices.items()}, {name: edge.view for name, edge in edges.items()}


def draw(imports: nx.DiGraph) -> Figure:
    """The picture, with names for boxes and arrows, by which a test compares it with the sources."""
    boxes, ways = place(nx.transitive_reduction(imports))
    across, down = zip(*(point for way in ways.values() for point in way.points), strict=True)
    figure = Figure(figsize=(12, 9))
    axes = figure.add_axes((0, 0.04, 1, 0.96), xlim=(min(across) - 0.8, max(across) + 0.8))
    axes.set_ylim(max(down) + 0.4, min(down) - 0.4)
    axes.axis("off")
    for (module, to), way in ways.items():
        (start, top), *middle, (end, bottom) = way.points
        points = [(start, top + Box.h / 2), *middle, (end, bottom - Box.h / 2)]
        line, codes = [points[0]], [Line.MOVETO]
        for (x, y), (next_x, next_y) in pairwise(points):
            line += [(x, (y + next_y) / 2), (next_x, (y + next_y) / 2), (next_x, next_y)]
            codes += [Line.CURVE4] * 3
        style = {"arrowstyle": "-|>,head_length=5,head_width=2.5", "color": "#555555", "lw": 1.2}
        axes.add_patch(FancyArrowPatch(path=Line(line, codes), gid=f"import-{module}-{to}", **style))
    colors = {module: color for color, modules in GROUPS.values() for module in modules.split()}
    for module, box in boxes.items():
        x, y = box.xy
        look = {"boxstyle": "round,pad=0,rounding_size=0.08", "fc": colors[module], "ec": "black"}
        axes.add_patch(FancyBboxPatch((x - Box.w / 2, y - Box.h / 2), Box.w, Box.h, gid=f"room-{module}", **look))
        name = "jaxce" if module == "__init__" else module[0] + module[1:].replace("_", "_\n")
        axes.text(x, y, name, ha="center", va="center_baseline", linespacing=0.95)
    keys = [Patch(fc=color, ec="black", label=name) for name, (color, _) in GROUPS.items()]
    figure.legend(handles=keys, loc="lower center", ncols=len(keys), frameon=False)
    return figure


if __name__ == "__main__":
    mpl.rcParams.update({"svg.hashsalt": "house", "font.size": 9.5})
    draw(read_imports()).savefig(PICTURE, metadata={"Date": None, "Title": "The modules of jaxce"})
