"""The package asks for what it imports: the core for the main job, an extra for every other one."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
CITATION = (ROOT / "CITATION.cff").read_text()

# What can be imported once a distribution is installed. Whoever adds a dependency adds a line.
PROVIDES = {
    "click": {"click"},
    "dm-haiku": {"haiku"},
    "equinox": {"equinox"},
    "flax": {"flax"},
    "grain": {"grain"},
    "ipykernel": {"ipykernel", "IPython"},
    "jax": {"jax", "jaxlib"},
    "matfree": {"matfree"},
    "matplotlib": {"matplotlib"},
    "mypy": {"mypy"},
    "nbclient": {"nbclient"},
    "nbformat": {"nbformat"},
    "numpy": {"numpy"},
    "optax": {"optax"},
    "orbax-checkpoint": {"orbax", "etils"},
    "pillow": {"PIL"},
    "pre-commit": {"pre_commit"},
    "psutil": {"psutil"},
    "pyarrow": {"pyarrow"},
    "pytest": {"pytest"},
    "ruff": {"ruff"},
    "safetensors": {"safetensors"},
    "scikit-learn": {"sklearn"},
    "scipy": {"scipy"},
    "tqdm": {"tqdm"},
}
# The extra whose third-party modules a part of the package may import when it is itself imported.
LOADS = {"cli.py": "cli", "plots": "plot"}
NOT_IN_THE_WHEEL = {"benchmarks"}  # extras for code that users of the installed package do not have
BROUGHT_BY_THE_READER = {"torch"}  # a large package, which some benchmarks compare with


def parts(requirement):
    """The normalized name of a requirement, and its extras."""
    name, extras = re.match(r"([\w.-]+)\s*(?:\[([^]]*)\])?", requirement).groups()
    return re.sub(r"[-_.]+", "-", name).lower(), re.findall(r"[\w-]+", extras or "")


def distributions(requirements):
    """The distributions that requirements name, through the extras of this package too."""
    found = set()
    for name, extras in map(parts, requirements):
        if name == "hessdensity":
            found = found.union(*(distributions(EXTRAS[extra]) for extra in extras))
        else:
            found.add(name)
    return found


CORE = distributions(PROJECT["project"]["dependencies"])
DEVELOPMENT = distributions(PROJECT["dependency-groups"]["dev"])


def modules(names):
    """Top-level modules of distributions."""
    return set().union(*(PROVIDES[name] for name in names))


def imports(tree):
    """(top-level module, whether it loads when the file is imported) of every absolute import.

    What stands under TYPE_CHECKING never loads."""
    found = set()

    def visit(node, loads):
        if isinstance(node, ast.Import):
            found.update((alias.name.split(".")[0], loads) for alias in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module.split(".")[0], loads))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, False)
            for child in node.orelse:
                visit(child, loads)
            return
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, loads and not inside)

    visit(tree, True)
    return found


def third_party(folder):
    """(file, top-level module, whether it loads when the file is imported) below a folder."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    own = {"hessdensity", "benchmarks"} | {path.stem for path in (ROOT / "tests").glob("*.py")}
    known = own | set(sys.stdlib_module_names)
    return [
        (path.relative_to(ROOT / folder), module, loads)
        for path in files
        for module, loads in sorted(imports(ast.parse(path.read_text())))
        if module not in known
    ]


def test_every_third_party_import_is_a_core_dependency_or_an_extra():
    offered = modules(CORE | distributions(f"hessdensity[{extra}]" for extra in EXTRAS))
    strangers = {(str(path), module) for path, module, _ in third_party("hessdensity")}
    assert {(path, module) for path, module in strangers if module not in offered} == set()


def test_every_module_level_import_is_a_core_dependency_or_the_extra_of_its_part():
    for path, module, loads in third_party("hessdensity"):
        extra = LOADS.get(path.parts[0])
        may_load = CORE | (distributions(EXTRAS[extra]) if extra else set())
        assert not loads or module in modules(may_load), f"{path} loads {module} when imported"


def test_every_core_dependency_and_every_user_extra_is_imported():
    used = {module for _, module, _ in third_party("hessdensity")}
    for name in CORE | distributions(EXTRAS["all"]):
        assert PROVIDES[name] & used, f"nothing in hessdensity/ imports {name}"


@pytest.mark.parametrize(
    ("folder", "installed"),
    [
        ("benchmarks", CORE | distributions(EXTRAS["benchmarks"])),
        ("tests", CORE | distributions(EXTRAS["benchmarks"]) | DEVELOPMENT),
    ],
)
def test_every_third_party_import_beside_the_package_is_installed_for_it(folder, installed):
    for path, module, _ in third_party(folder):
        assert module in modules(installed) | BROUGHT_BY_THE_READER, f"{path} imports {module}"


def test_development_tools_are_in_no_extra_and_not_in_the_core():
    assert {"mypy", "pytest", "ruff"} <= DEVELOPMENT
    for name, requirements in EXTRAS.items():
        assert not DEVELOPMENT & distributions(requirements), f"[{name}] brings development tools"
    assert not DEVELOPMENT & CORE


def test_all_is_every_other_extra_of_the_wheel():
    (requirement,) = EXTRAS["all"]
    name, extras = parts(requirement)
    assert name == "hessdensity"
    assert set(extras) == set(EXTRAS) - {"all"} - NOT_IN_THE_WHEEL


def test_an_extra_adds_to_the_core():
    for extra, requirements in EXTRAS.items():
        assert distributions(requirements), f"[{extra}] is empty"
        assert not distributions(requirements) & CORE, f"[{extra}] repeats the core"


def test_the_version_is_one():
    changes = (ROOT / "CHANGELOG.md").read_text()
    versions = {
        "pyproject.toml": PROJECT["project"]["version"],
        "installed": version("hessdensity"),
        "CITATION.cff": re.search(r"^version: (\S+)$", CITATION, re.MULTILINE)[1],
        "CHANGELOG.md": re.search(r"^## (\S+)", changes, re.MULTILINE)[1],  # the newest is first
    }
    assert len(set(versions.values())) == 1, versions


def test_the_citation_and_the_metadata_name_the_same_authors_license_and_address():
    project = PROJECT["project"]
    authors = [author["name"] for author in project["authors"]]
    assert re.findall(r"^  - name: (.+)$", CITATION, re.MULTILINE) == authors
    assert f"\nlicense: {project['license']}\n" in CITATION
    assert f"\nrepository-code: {project['urls']['Repository']}\n" in CITATION


@pytest.mark.parametrize(
    ("package", "extra", "code"),
    [
        (
            "orbax",
            "checkpoint",
            "hd.trace(hd.Matrix(np.eye(3)), jax.random.key(0), 4, checkpoint='run')",
        ),
        ("matplotlib", "plot", "import hessdensity.plots"),
        ("flax", "flax", "from hessdensity.adapters import from_nnx; from_nnx(None, None)"),
        ("flax", "demo", "from hessdensity.demo import problem; problem()"),
        ("sklearn", "demo", "from hessdensity.demo import problem; problem()"),
        ("click", "cli", "import hessdensity.cli"),
    ],
)
def test_a_missing_package_is_answered_with_the_pip_install_line(package, extra, code):
    start = "import sys, jax, numpy as np, hessdensity as hd"
    program = f"{start}\nsys.modules[{package!r}] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert f"pip install 'hessdensity[{extra}]'" in last, done.stderr
    assert ("Traceback" in done.stderr) == (package != "click")
