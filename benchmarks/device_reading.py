"""What the report of a device says: its tables, read back, and the answers to what is open in sentences."""

from benchmarks.report import number, read

WAYS = {"class blocks": True, "row blocks": False}  # whether the logits are recomputed
HEAD = [
    *["head", "contender", "block", "value and gradient", "÷ three matmuls", "TFLOP/s", "temporaries", "loss error"],
    *["gradient error", "forward", "÷ one matmul", "forward temporaries"],
]
PARTS = ["way", "block", "classes or rows in a block", "head", "its matmuls", "its arithmetic", "rest"]
DENSE = [
    *["logits", "contender", "forward", "forward passes", "forward of a copy", "value and gradient", "passes"],
    *["of a copy", "temporaries", "loss error", "gradient error"],
]
OTHERS = ["contender", "value and gradient", "÷ three matmuls", "temporaries", "loss error", "gradient error"]

Tables = dict[str, list[dict[str, str]]]


def _heads(tables: Tables) -> list[str]:
    """Of every head the best block of either way and the default, and logits that are held; the fastest first."""
    rows = tables["A head"] + tables["Other heads"]
    sentences: list[str] = []
    for head in dict.fromkeys(row["head"] for row in rows):
        timed: list[tuple[float, str, str]] = []
        for row in rows:
            ratio = number(row["÷ three matmuls"])
            if row["head"] == head and ratio is not None:
                timed.append((ratio, f"{row['contender']}, {row['block']}".removesuffix(", –"), row["temporaries"]))
        kinds = [*WAYS, *(f"{way}, default" for way in WAYS), "held logits", "optax"]
        best = {min(of) for kind in kinds if (of := [entry for entry in timed if kind in entry[1]])}
        texts = [f"{name}: {ratio:.2f}, {held}" for ratio, name, held in sorted(best)]
        if texts:
            sentences.append(f"{head}, in three matmuls, and temporaries: {'; '.join(texts)}.")
    return sentences


def _parts(tables: Tables) -> list[str]:
    sentences: list[str] = []
    for way in WAYS:
        rows = [row for row in tables["Where its time goes"] if way in row["way"] and number(row["rest"]) is not None]
        if rows:
            row = min(rows, key=lambda row: number(row["head"]) or 0)
            times = ", ".join(f"{name} {row[name]}" for name in PARTS[4:])
            sentences.append(f"{row['way']}, {row['block']}: {row['head']} of three matmuls ({times}).")
    return sentences


def _dense(tables: Tables) -> list[str]:
    sentences: list[str] = []
    for logits in dict.fromkeys(row["logits"] for row in tables["Logits that are held"]):
        rows = {row["contender"]: row for row in tables["Logits that are held"] if row["logits"] == logits}
        for what in ("forward passes", "passes"):
            ours, one = (number(rows[name][what]) for name in ("jaxce", "one read"))
            if ours is not None and one is not None:
                by = f"faster by {1 - one / ours:.0%}" if one < ours else f"slower by {one / ours - 1:.0%}"
                label = "forward" if what == "forward passes" else "value and gradient"
                sentences.append(f"{logits}, {label}: jaxce takes {ours:.2f} passes, one read {one:.2f}: {by}.")
    return sentences


def answers(text: str) -> list[str]:
    """What the tables of a report say, as sentences; none where there is no number."""
    tables = read(text)
    return [*_heads(tables), *_parts(tables), *_dense(tables)]


def passed(text: str) -> bool:
    """Whether every check of a report is right, and nothing of jaxce fails in its tables."""
    tables = read(text)
    ours = [row for rows in tables.values() for row in rows if row.get("contender", "").startswith("jaxce")]
    return all(row["result"] == "right" for row in tables["Checks"]) and not any("fails" in str(row) for row in ours)
