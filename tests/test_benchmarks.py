"""The benchmarks run, and who is compared in them computes the same."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cases, contenders, device, device_reading, report, timing

ROOT = Path(__file__).parent.parent
DETAILS = "time ÷ floor"  # a column of the table that has the errors


def _rows(text, column):
    """The table with a column of that name, as dictionaries."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if column in line and line.startswith("|"))
    header = [cell.strip() for cell in lines[start].strip("|").split("|")]
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return
        yield dict(zip(header, [cell.strip() for cell in line.strip("|").split("|")], strict=True))


@pytest.mark.thorough
def test_smoke_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--smoke", "--contenders", "jaxce", "optax", "--output", tmp_path]
    printed = subprocess.run([*command, "--name", "here"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert {file.name for file in tmp_path.iterdir()} == {"here.md", "here-dense.png", "here-linear.png"}
    assert (tmp_path / "here.md").read_text() + "\n" == printed
    assert printed.startswith("Machine: ")
    rows = list(_rows(printed, DETAILS))
    assert [row["contender"] for row in rows] == ["jaxce", "optax"] * len(cases.SMOKE)
    for row, case in zip(rows, [case for case in cases.SMOKE for _ in range(2)], strict=True):
        loss_tolerance, gradient_tolerance = timing.TOLERANCES[case.dtype]
        assert float(row["loss error"]) <= loss_tolerance
        assert float(row["gradient error"]) <= gradient_tolerance
        assert float(row["time ÷ jaxce"]) > 0
    worst = {row["rows"]: row for row in _rows(printed, "jaxce, loss")}
    assert float(worst["target ahead by 40 nats"]["jaxce, loss"]) < 50
    assert float(worst["target ahead by 40 nats"]["optax, loss"]) > 1e6


@pytest.mark.thorough
def test_smoke_run_of_costs(tmp_path):
    options = ["costs", "--smoke", "--output", tmp_path, "--name", "here"]
    printed = subprocess.run([sys.executable, "-m", "benchmarks", *options], cwd=ROOT, check=True, capture_output=True)
    page, *pictures = (tmp_path / f"here-costs{ending}" for ending in (".md", "-head.png", "-summary.png"))
    assert set(tmp_path.iterdir()) == {page, *pictures}
    assert page.read_text() + "\n" == printed.stdout.decode()
    assert {name: len(rows) for name, rows in report.read(page.read_text()).items()} == {
        "A linear head": 4,
        "Entropy and argmax": 14,
    }
    drawn = [picture.read_bytes() for picture in pictures]
    for picture in pictures:
        picture.unlink()
    subprocess.run([sys.executable, "-m", "benchmarks.costs", page], cwd=ROOT, check=True)
    assert [picture.read_bytes() for picture in pictures] == drawn


def _megabytes(row):
    number, unit = row["temporaries"].split()
    return float(number) * {"kB": 1e-3, "MB": 1}[unit]


def test_what_the_pages_say_of_costs_is_measured():
    """That a linear head holds less than a sixth of held logits, and who holds a second array of logits."""
    tables = report.read((ROOT / "benchmarks" / "results" / "amd-epyc-2-cores-costs.md").read_text())
    held = {row["classes"]: _megabytes(row) for row in tables["A linear head"] if row["loss"] == "held logits, jaxce"}
    heads = [row for row in tables["A linear head"] if "linear" in row["loss"] and int(row["classes"]) >= 8192]
    assert len(heads) == 10
    assert all(6 * _megabytes(row) < held[row["classes"]] for row in heads)
    logits = 4 * 1024 * 32768 / 1e6
    for row in tables["Entropy and argmax"]:
        holds = row["by"] == "plain JAX" and (row["logits"] == "LinearLogits" or "entropy" in row["beside the loss"])
        assert (_megabytes(row) > 0.99 * logits) == holds, row


SHOWN = {  # the cases of the rows of a page, by the heading over them
    ("README.md", "Measured"): [
        "ImageNet-1k, 8192 × 1000, float32, labels",
        "ImageNet-1k, 8192 × 1000, bfloat16, labels",
        "ImageNet-1k, 8192 × 1000, float32, labels, every option",
        "ImageNet-1k, 8192 × 1000, float32, distributions",
        "token tags, 64 × 1024 × 9, float32, labels, ignore_index -100",
        "Cityscapes, 2 × 19 × 512 × 1024, float32, labels, class weights, ignore_index 255",
        "GPT-2, 512 × 50257, float32, labels",
        "GPT-2, 512 × 50257, bfloat16, labels",
        "GPT-2 head, 512 × 768 × 50257, float32, labels",
        "GPT-2 head, 512 × 768 × 50257, bfloat16, labels",
    ],
    ("docs/linear_head.md", "Time on a CPU"): [
        "GPT-2 head, 512 × 768 × 50257, float32, labels",
        "GPT-2 head, 512 × 768 × 50257, bfloat16, labels",
        "Llama-3 head, 256 × 512 × 128256, float32, labels",
        "Llama-3 head, 256 × 512 × 128256, bfloat16, labels",
        "Gemma-2 head, 128 × 512 × 256000, float32, labels, softcap 30.0",
    ],
}


@pytest.mark.parametrize(("page", "heading"), SHOWN)
def test_pages_have_the_ratios_of_the_committed_table(page, heading):
    results = (ROOT / "benchmarks" / "results" / "amd-epyc-2-cores.md").read_text()
    ratios, case = {}, ""
    for row in report.read(results)["Loss and gradient"]:
        case = row["case"] or case
        ratios[case, row["contender"]] = row["time ÷ jaxce"]
    rows = report.read((ROOT / page).read_text())[heading]
    for shown, case in zip(rows, SHOWN[page, heading], strict=True):
        name, *columns = shown
        for column in columns:
            expected, _, _ = ratios.get((case, column.replace(", ", " ")), "–").partition(":")  # of what is wrong
            assert shown[column] == expected, (shown[name], column)


def test_a_wrong_contender_is_named_and_not_timed(monkeypatch):
    def twice(case):
        loss = contenders.JAX_LOSSES["jaxce"](case)
        return lambda logits, targets: 2 * loss(logits, targets)

    monkeypatch.setitem(contenders.CONTENDERS, "twice", contenders.on_jax("twice", twice))
    monkeypatch.setitem(contenders.CONTENDERS, "none", lambda case: None)
    plan = timing.Plan(["jaxce", "twice", "none"], rounds=2, seconds=1)
    results, seconds = timing.measure(cases.SMOKE[0], plan)
    assert set(seconds) == {"jaxce", "floor"}
    assert [result.note.partition(":")[0] for result in results] == ["", "wrong", "–"]
    assert results[1].loss_error == pytest.approx(1, rel=1e-5)


SAMPLE = (ROOT / "tests" / "golden" / "device_report.md").read_text()  # in which no number was measured
COLUMNS = {
    "A head": device_reading.HEAD,
    "Other heads": device_reading.HEAD,
    "Where its time goes": device_reading.PARTS,
    "Logits that are held": device_reading.DENSE,
    "Others": device_reading.OTHERS,
}


def test_the_report_of_a_device_is_answered():
    tables = report.read(SAMPLE)
    assert {name: list(rows[0]) for name, rows in tables.items() if name != "Checks"} == COLUMNS
    assert device_reading.answers(SAMPLE) == [
        "8192 × 4096 × 131072, bfloat16, in three matmuls, and temporaries: jaxce held logits: 1.40, 4295.0 MB; "
        "jaxce row blocks, default: 1.50, 2558.6 MB; jaxce class blocks, 256 MiB: 1.60, 738.2 MB; "
        "jaxce class blocks, default: 1.80, 184.9 MB.",
        "jaxce class blocks, 256 MiB: 1.60 of three matmuls (its matmuls 1.35, its arithmetic 0.20, rest 0.05).",
        "jaxce row blocks, default: 1.50 of three matmuls (its matmuls 1.20, its arithmetic 0.20, rest 0.10).",
        "8192 × 32768, bfloat16, forward: jaxce takes 2.00 passes, one read 1.20: faster by 40%.",
        "8192 × 32768, bfloat16, value and gradient: jaxce takes 4.00 passes, one read 3.20: faster by 20%.",
        "8192 × 32768, float32, forward: jaxce takes 2.00 passes, one read 2.50: slower by 25%.",
    ]


def test_a_device_passes_unless_a_check_or_jaxce_fails():
    assert device_reading.passed(SAMPLE)
    for right, instead in {"| right |": "| WRONG |", "| 72 ms |": "| fails: XlaRuntimeError |"}.items():
        assert not device_reading.passed(SAMPLE.replace(right, instead, 1))


@pytest.mark.thorough
def test_smoke_run_of_a_device(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "device", "--smoke", "--output", tmp_path, "--name", "here"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert (tmp_path / "here.md").read_text() + "\n" == printed
    tables = report.read(printed)
    assert {name: list(rows[0]) for name, rows in tables.items() if name not in ("Checks", "Answers")} == COLUMNS
    for row in tables["A head"] + tables["Other heads"]:
        assert report.number(row["÷ three matmuls"]) is not None
        assert row["contender"] == "bare matmuls" or float(row["gradient error"]) < 2e-2
    for row in tables["Logits that are held"]:
        assert row["contender"] == "copy" or float(row["gradient error"]) < 1e-2
    assert len(device_reading.answers(printed)) == 3 + 2 + 4


def test_what_does_not_fit_or_fails_is_named(capsys):
    def raising(error):
        def make():
            raise error

        return make

    bench = device.Bench(60.0)
    bench.add("large", raising(RuntimeError("RESOURCE_EXHAUSTED: out of memory")))
    bench.add("broken", raising(TypeError("no such thing")))
    bench.add("absent", raising(ImportError("peer")))
    bench.add("doubled", lambda: device.Program(lambda: 2, None))
    bench.compiling = 0.0
    bench.add("late", lambda: device.Program(lambda: 2, None))
    bench.time(3)
    notes = {name: measured.note for name, measured in bench.measured.items()}
    assert notes == {"large": "too large", "broken": "fails: TypeError", "doubled": "", "late": "not reached"}
    assert bench.seconds("doubled") > 0
    assert "no such thing" in capsys.readouterr().err
