"""The arrows between the rooms point one way, and the package keeps its hands to itself."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hessdensity"

# Which of our own rooms a room may import. Whoever adds a room adds a line, and says why in the
# commit.
MAY_IMPORT = {
    "_sums": set(),
    "_trees": {"_sums"},
    "_basis": {"_sums", "_trees"},
    "results": set(),
    "quadrature": set(),
    "deflation": {"quadrature"},
    "accuracy": {"quadrature", "deflation"},
    "_probes": {"quadrature", "results"},
    "_selection": {"_trees"},
    "_identity": {"_trees"},
    "_archive": {"quadrature"},
    "_summary": set(),
    "_agreement": set(),
    "placement": {"_trees", "_agreement"},
    "data": {"_trees", "placement"},
    "losses": {"_trees", "data", "placement"},
    "_products": {"_trees", "data", "losses"},
    "distributed": {"data"},
    "operators": {"_trees", "_identity", "_selection"},
    "hessian": {"_trees", "_identity", "_products", "_selection", "data", "losses", "placement"},
    "verify": {"_trees", "operators"},
    "_gram_schmidt": {"_trees", "_basis"},
    "lanczos": {"_trees", "_gram_schmidt"},
    "density": {"quadrature", "results", "_archive", "_probes", "_summary"},
    "eigenspaces": {"_trees", "_basis"},
    "_factorization": {"_trees", "_basis", "_gram_schmidt"},
    "_block_run": {"_trees", "_factorization", "_resume", "eigenspaces", "operators"},
    "block_lanczos": {
        "_trees",
        "_block_run",
        "_failures",
        "_identity",
        "_memory",
        "_progress",
        "_resume",
        "eigenspaces",
        "lanczos",
        "operators",
    },
    "checkpoint": set(),
    "_termination": set(),
    "_resume": {"_trees", "_failures", "_identity", "_termination", "checkpoint", "operators"},
    "_failures": set(),
    "_progress": set(),
    "_memory": {"_trees"},
    "planning": {"_trees", "_gram_schmidt", "_memory", "operators"},
    "_density_run": {
        "_trees",
        "_basis",
        "_gram_schmidt",
        "_progress",
        "_resume",
        "lanczos",
        "operators",
        "planning",
        "quadrature",
        "deflation",
        "accuracy",
        "density",
        "eigenspaces",
    },
    "slq": {
        "_density_run",
        "_memory",
        "_failures",
        "_resume",
        "density",
        "lanczos",
        "operators",
        "planning",
    },
    "_exchangeable": set(),
    "data_error": {"_trees", "_products", "data", "eigenspaces", "hessian", "results"},
    "parts": {
        "_trees",
        "_progress",
        "data_error",
        "density",
        "hessian",
        "lanczos",
        "operators",
        "quadrature",
    },
    "traces": {"_trees", "_progress", "_basis", "_exchangeable", "operators", "results"},
    "_projection": {"_trees", "eigenspaces"},
    "gradients": {
        "_progress",
        "_trees",
        "_projection",
        "_selection",
        "lanczos",
        "operators",
        "hessian",
        "losses",
        "quadrature",
        "density",
        "eigenspaces",
    },
    "gradient_noise": {
        "_trees",
        "_projection",
        "_selection",
        "data",
        "hessian",
        "losses",
        "eigenspaces",
    },
    "_track_archive": {"_archive"},
    "tracks": {"_archive", "_track_archive", "density", "eigenspaces"},
    "tracking": {
        "_progress",
        "_projection",
        "block_lanczos",
        "density",
        "eigenspaces",
        "gradients",
        "lanczos",
        "operators",
        "slq",
        "tracks",
    },
    "comparison": {"density"},
    "adapters": {"losses"},
    "plots": {"density"},
    "track_plots": {"density", "plots", "tracks"},
    "demo": {"adapters", "losses", "data", "density", "comparison"},
    "cli": {"", "demo", "plots"},
    "__init__": {
        "block_lanczos",
        "comparison",
        "data",
        "data_error",
        "density",
        "eigenspaces",
        "gradient_noise",
        "gradients",
        "hessian",
        "losses",
        "operators",
        "parts",
        "planning",
        "quadrature",
        "results",
        "slq",
        "traces",
        "tracking",
        "tracks",
        "verify",
    },
}
HEAVY = {"flax", "optax", "orbax", "etils", "psutil", "matplotlib", "scipy", "sklearn", "tqdm"}


def imports(tree):
    """(module, whether it runs when the file is imported) of every import but those for type
    checkers."""
    found = []

    def visit(node, at_import):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, at_import) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            bare = base in {".", "hessdensity"}
            found.extend(
                [
                    (f"{base.rstrip('.')}.{alias.name}" if bare else base, at_import)
                    for alias in node.names
                ]
            )
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, at_import and not inside)

    visit(tree, True)
    return found


def ours(name):
    """Our room behind a module name, or None."""
    for prefix in ("hessdensity.", "."):
        if name.startswith(prefix):
            return name.removeprefix(prefix).split(".")[0]
    return "" if name == "hessdensity" else None


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_a_room_imports_only_what_it_may(path):
    tree = ast.parse(path.read_text())
    for name, at_import in imports(tree):
        room = ours(name)
        lazy_plot = (path.stem, room) in {
            ("density", "plots"),
            ("tracks", "track_plots"),
        } and not at_import
        assert room is None or room in MAY_IMPORT[path.stem] or lazy_plot, (
            f"{path.name} imports {name}"
        )
        drawing = path.stem in {"plots", "track_plots"} and name.startswith("matplotlib")
        assert not at_import or name.split(".")[0] not in HEAVY or drawing, (
            f"{path.name} loads {name} when imported"
        )


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_a_room_neither_prints_nor_configures(path):
    text = path.read_text()
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and hasattr(node.func, "id")
    }
    assert "print" not in calls
    assert "open" not in calls or path.stem in {"_archive", "_track_archive"}
    assert "jax.config" not in text
    assert "os.environ" not in text


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_a_room_is_one_idea(path):
    assert len(path.read_text().splitlines()) <= 300


def test_no_function_bears_its_modules_name():
    for path in PACKAGE.glob("*.py"):
        defined = {getattr(node, "name", None) for node in ast.parse(path.read_text()).body}
        assert path.stem not in defined
