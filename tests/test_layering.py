"""Who imports whom, read from the sources: CONTRIBUTING.md has the same rules in words."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = [
    *(path for part in ("withanyone", "train", "space") for path in sorted((ROOT / part).rglob("*.py"))),
    ROOT / "app.py",
]

FACES = {"withanyone.photos", "withanyone.faces"}
ADAPTER = {"withanyone.layout", "withanyone.bases", "withanyone.conditioning", "withanyone.checkpoint"}
ADAPTER |= {"withanyone.adapter"}
CORE = FACES | ADAPTER | {"withanyone", "withanyone.flow", "withanyone.arcface", "withanyone.pipeline"}
CORE |= {"withanyone.settings", "withanyone.loading", "withanyone.precision"}
CORE |= {"withanyone.arrangements", "withanyone.readout", "withanyone.candidates", "withanyone.tars"}
# The longest name that begins a module's own decides what of this repository it may import.
MAY_IMPORT = {
    "withanyone.flow": set(),
    "withanyone.settings": set(),
    "withanyone.tars": set(),
    "withanyone.precision": set(),
    "withanyone.layout": set(),
    "withanyone.arrangements": {"withanyone.layout"},
    "withanyone.readout": FACES | {"withanyone.bench.metrics"},
    "withanyone.bases": set(),
    "withanyone.photos": set(),
    "withanyone.faces": FACES,
    "withanyone.arcface": FACES,
    "withanyone.conditioning": set(),
    "withanyone.candidates": {"withanyone.flow", "withanyone.bench.metrics"},
    "withanyone.checkpoint": set(),
    "withanyone.adapter": ADAPTER - {"withanyone.adapter"},
    "withanyone.pipeline": CORE - {"withanyone", "withanyone.pipeline"},
    "withanyone": CORE - {"withanyone"},
    "withanyone.bench": CORE | {"withanyone.bench"},
    "withanyone.mini": CORE | {"withanyone.mini", "withanyone.bench.metrics"},
    "withanyone.mini.benching": CORE | {"withanyone.mini", "withanyone.bench"},
    "withanyone.cli": CORE | {"withanyone.mini"},
    "train": CORE | {"train", "withanyone.bench"},
    "space": CORE | {"space", "withanyone.cli", "withanyone.mini"},
    "app": {"space"},
}
OWNERS = {  # heavy packages, each behind one door
    "insightface": {"withanyone.faces"},
    "onnxruntime": {"withanyone.faces", "withanyone.bench.judges"},
    "gradio": {"space.page", "space.parts", "space.programs"},
    "accelerate": {"train.trainer"},
    "datasets": {"train.stream", "withanyone.bench.cases"},
    "torchvision": set(),
}


def name_of(path: Path) -> str:
    """withanyone/mini/__init__.py -> withanyone.mini"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


OURS = {name_of(path) for path in PARTS} | {"tests", "examples", "benchmarks"}


def imports_of(path: Path) -> set[str]:
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    return imports(path.read_text(encoding="utf-8"), package, OURS)


def imports(source: str, package: str, modules: set[str]) -> set[str]:
    """Absolute names of every module the source imports, also inside functions, from a file in `package`.

    `from package import name` imports package.name where that is one of `modules`, else the package.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            submodules = {f"{module}.{alias.name}" for alias in node.names} & modules
            found |= submodules or {module}
    return found


def begins(name: str, prefixes: set[str]) -> bool:
    """Is `name` one of the prefixes, or inside a package of that name (the root names only itself)?"""
    return any(
        name == prefix or (prefix != "withanyone" and name.startswith(prefix + ".")) for prefix in prefixes
    )


@pytest.mark.parametrize("path", PARTS, ids=lambda path: name_of(path))
def test_imports_follow_the_layers(path: Path) -> None:
    module = name_of(path)
    rule = max((name for name in MAY_IMPORT if module == name or module.startswith(name + ".")), key=len)
    ours = {name for name in imports_of(path) if name.split(".")[0] in {part.split(".")[0] for part in OURS}}
    wrong = sorted(name for name in ours if not begins(name, MAY_IMPORT[rule] | {module}))
    assert not wrong, f"{module} imports {wrong}; it may import {sorted(MAY_IMPORT[rule])}"


@pytest.mark.parametrize("package", OWNERS)
def test_heavy_packages_have_one_owner(package: str) -> None:
    users = {name_of(path) for path in PARTS if package in {name.split(".")[0] for name in imports_of(path)}}
    strangers = sorted(name for name in users if not begins(name, OWNERS[package]))
    assert not strangers, (
        f"{strangers} import {package}, which belongs to {sorted(OWNERS[package]) or 'nobody'}"
    )


def test_the_reader_sees_every_form_of_import() -> None:
    """A rule is only as good as its eyes: relative, nested and `from package import module` forms."""
    source = """
        from ..faces import Face
        from . import world, PRETRAINED
        import gradio.blocks as blocks
        def late():
            from withanyone import pipeline
    """
    modules = {"withanyone.mini", "withanyone.mini.world", "withanyone.faces", "withanyone.pipeline"}
    assert imports(textwrap.dedent(source), "withanyone.mini", modules) == {
        "withanyone.faces",
        "withanyone.mini.world",
        "gradio.blocks",
        "withanyone.pipeline",
    }
