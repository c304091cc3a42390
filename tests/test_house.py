"""The house: what README, Makefile and the lists of packages say is true of this repository."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("withanyone", "train", "space")
SOURCES = sorted([*(path for name in FOLDERS for path in (ROOT / name).rglob("*.py")), ROOT / "app.py"])


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def packages(name: str) -> list[str]:
    """Names on the lines of a requirements or constraints file."""
    lines = (line.split("#")[0].strip() for line in read(name).splitlines())
    return [normal(re.split(r"[\[=<>!~; ]", line)[0]) for line in lines if line and not line.startswith("-")]


def requirements(*lists: str) -> list[Requirement]:
    """What these lists of pyproject.toml ask for (Python 3.10 has no TOML reader)."""
    bodies = re.findall(rf"^(?:{'|'.join(lists)}) = \[(.*?)\]$", read("pyproject.toml"), flags=re.S | re.M)
    return [Requirement(text) for body in bodies for text in re.findall(r'"([^"]+)"', body)]


def names(wanted: list[Requirement]) -> set[str]:
    return {normal(requirement.name) for requirement in wanted}


def every_dependency() -> list[Requirement]:
    """Those of every extra too."""
    wanted = requirements("dependencies", "app", "train", "dev")
    assert len(wanted) > 20
    return wanted


def test_every_dependency_is_pinned() -> None:
    needed = {
        *names(every_dependency()),
        *packages("requirements.txt"),
        *packages("pre-requirements.txt"),
    }
    assert needed - set(packages("constraints.txt")) == set()


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_pins_lie_within_the_declared_ranges(python: str) -> None:
    """Else a fresh `make` finds no solution; the pins of one Python are not those of another."""
    pins = {}
    for line in read("constraints.txt").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                (pins[normal(pin.name)],) = (specifier.version for specifier in pin.specifier)
    outside = [
        f"{r}, pinned to {pins[normal(r.name)]}"
        for r in every_dependency()
        if pins[normal(r.name)] not in r.specifier
    ]
    assert outside == []


def test_the_gpu_build_of_onnxruntime_comes_last_and_alone() -> None:
    """insightface brings the CPU build; named anywhere else it could be installed after the GPU one."""
    assert packages("pre-requirements.txt") == ["insightface"]
    assert packages("requirements.txt")[-1] == "onnxruntime-gpu"
    assert "onnxruntime" not in {*packages("requirements.txt"), *names(every_dependency())}


def test_a_space_installs_what_the_app_needs() -> None:
    assert names(requirements("dependencies", "app")) - set(packages("requirements.txt")) == set()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "hub_card/README.md"])
def test_documents_name_files_and_targets_that_exist(document: str) -> None:
    text = read(document)
    links = re.findall(r"\]\(([^)#]+)\)", text)
    local = [link for link in links if not link.startswith("http")]
    missing = [link for link in local if not (ROOT / document).parent.joinpath(link).exists()]
    quoted = re.findall(r"`((?:withanyone|train|tests|examples|benchmarks|hub_card)/[\w./-]+)`", text)
    missing += [path for path in quoted if not (ROOT / path).exists()]
    assert missing == []
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), flags=re.M))
    assert set(re.findall(r"(?<![\w-])make ([a-z]+)\b(?= *(?:[`\n#,]|$))", text)) <= targets


def test_ci_runs_the_test_command_of_the_readme() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", read("README.md"), flags=re.S)
    assert re.search(r"^make test\b", "\n".join(blocks), flags=re.M)
    steps = re.findall(r"\bstep (make \w+)$", read(".ci/run"), flags=re.M)
    assert steps.index("make test") < steps.index("make slow")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_python_in_the_documents_is_python_and_names_what_exists() -> None:
    import withanyone

    for document in ("README.md", "hub_card/README.md"):
        blocks = re.findall(r"```python\n(.*?)```", read(document), flags=re.S)
        assert blocks
        for block in blocks:
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module == "withanyone":
                    assert {alias.name for alias in node.names} <= set(withanyone.__all__)


def test_the_wheel_holds_every_file_of_the_package() -> None:
    """Weights, tables and pages lie beside the code that reads them; each package names its own."""
    data = re.findall(r'^"(withanyone[\w.]*)" = \[(.*)\]', read("pyproject.toml"), flags=re.M)
    patterns = [
        f"{package.replace('.', '/')}/{pattern.replace('**/', '')}"
        for package, listed in data
        for pattern in re.findall(r'"([^"]+)"', listed)
    ]
    files = [path for path in (ROOT / "withanyone").rglob("*") if path.is_file()]
    names = [path.relative_to(ROOT).as_posix() for path in files if path.suffix not in (".py", ".pyc")]
    assert any(name.endswith("transformer/diffusion_pytorch_model.safetensors") for name in names)
    assert [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)] == []


def test_the_bundled_weights_stay_small() -> None:
    files = [path for path in (ROOT / "withanyone" / "mini" / "pretrained").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 60e6


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_pickle_is_loaded_and_no_error_swallowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "pickle.load", "pickle.loads"), (
                f"line {node.lineno}: {called}"
            )
            pickled = [
                word
                for word in node.keywords
                if word.arg == "allow_pickle" and ast.unparse(word.value) != "False"
            ]
            assert not pickled, f"line {node.lineno}: allow_pickle"
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            assert not broad, f"line {node.lineno}: a broad except"


def test_the_card_is_filled_between_its_marks() -> None:
    from withanyone.mini.card import BEGIN, END, fill_card

    figures = {
        "faces": {"command": "measure", "recall": {"24 px": 0.9951}, "names": ["a"], "interval": [0.1, 0.25],
                  "found": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}}
    }  # fmt: skip
    filled = fill_card(read("hub_card/README.md"), figures)
    rows = ("| recall: 24 px | 0.9951 |", "| interval | [0.1, 0.25] |", "| found | 0.5 [0.4, 0.6] |")
    assert "`measure`" in filled and all(row in filled for row in rows)
    assert fill_card(filled, figures) == filled  # again: nothing is added twice
    outside = filled.split(BEGIN)[0] + filled.split(END)[1]
    assert outside == read("hub_card/README.md").split(BEGIN)[0] + read("hub_card/README.md").split(END)[1]
    with pytest.raises(ValueError, match="`text`"):
        fill_card("no marks", figures)
