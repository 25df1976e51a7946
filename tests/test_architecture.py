"""Every file belongs to a wing, imports point down, and no file or function holds two ideas.

The rules are functions from a folder to a list of violations. They are checked on the package, and
each is seen to fail: a violation is planted in a copy, and must be found there.
"""

import ast
import shutil
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hessdensity"

# From the ground up. A wing is a folder of files or a single file; it may import itself and those
# before it. Whoever adds a wing adds a line here, and says why in the commit.
WINGS = [
    "errors",
    "text",
    "coordinate",
    "plots",
    "vectors",
    "data",
    "krylov",
    "spectra",
    "losses",
    "operators",
    "adapters",
    "runs",
    "estimators",
    "training",
    "layers",
    "distributed",
    "demo",
    "__init__",
    "cli",
]
SINGLE_FILES = {"errors", "text", "coordinate", "distributed", "demo", "__init__", "cli"}
HEAVY = {"flax", "optax", "orbax", "etils", "psutil", "matplotlib", "scipy", "sklearn", "tqdm"}
OPENS_FILES = {"spectra/archive.py"}
MOST_LINES, MOST_CODE_LINES, MOST_COLUMNS = 400, 60, 100


def files(package):
    return sorted(package.rglob("*.py"))


def name_of(path, package):
    """``spectra.density``; a package's own file bears the package's name."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def wing_of(name):
    return name.partition(".")[0]


def imports(path, package):
    """(our module or the other's package, whether it is loaded at import) of every import.

    Imports for type checkers alone are left out.
    """
    found, own = [], path.relative_to(package).parts[:-1]

    def visit(node, at_import):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, at_import) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = own[: len(own) - node.level + 1]
                base = ".".join(["hessdensity", *above, *([base] if base else [])])
            found.extend((f"{base}.{alias.name}", at_import) for alias in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, at_import and not inside)

    visit(ast.parse(path.read_text()), True)
    return found


def ours(imported, package):
    """The module of our own behind an import, or None."""
    first, _, rest = imported.partition(".")
    if first != package.name:
        return None
    parts = rest.split(".") if rest else []
    while parts:
        place = package.joinpath(*parts)
        if place.with_suffix(".py").exists() or place.is_dir():
            return ".".join(parts)
        parts.pop()
    return "__init__"


def unowned(package):
    """Files that no wing owns, wings inside of wings, and wings without files."""
    found = []
    for path in files(package):
        relative = path.relative_to(package)
        wing = wing_of(name_of(path, package))
        if wing not in WINGS or (len(relative.parts) == 1) != (wing in SINGLE_FILES):
            found.append(f"{relative} belongs to no wing")
        elif len(relative.parts) > 2:
            found.append(f"{relative} lies in a wing inside of a wing")
    there = {wing_of(name_of(path, package)) for path in files(package)}
    return found + [f"the wing {wing} has no file" for wing in WINGS if wing not in there]


def upward(package):
    """Imports of a wing further up, lazy ones included."""
    found = []
    for path in files(package):
        name = name_of(path, package)
        for imported, _ in imports(path, package):
            target = ours(imported, package)
            if target is None or wing_of(name) not in WINGS or wing_of(target) not in WINGS:
                continue
            if WINGS.index(wing_of(target)) > WINGS.index(wing_of(name)):
                found.append(f"{name} imports {target}, which is further up")
    return found


def circles(package):
    """Modules that import each other, directly or through others."""
    graph = {}
    for path in files(package):
        targets = {ours(imported, package) for imported, _ in imports(path, package)}
        graph[name_of(path, package)] = targets - {None, name_of(path, package)}
    found, state = [], {}

    def visit(node, trail):
        state[node] = "open"
        for target in sorted(graph.get(node, ())):
            if state.get(target) == "open":
                found.append(" -> ".join([*trail[trail.index(target) :], target]))
            elif target not in state:
                visit(target, [*trail, target])
        state[node] = "done"

    for node in sorted(graph):
        if node not in state:
            visit(node, [node])
    return found


def heavy(package):
    """Libraries that are slow to load, loaded when our own file is imported."""
    return [
        f"{path.relative_to(package)} loads {imported} when it is imported"
        for path in files(package)
        for imported, at_import in imports(path, package)
        if at_import
        and imported.partition(".")[0] in HEAVY
        and not (path.parent.name == "plots" and imported.startswith("matplotlib"))
    ]


def drawing(package):
    """Imports of matplotlib outside of the wing that draws."""
    return [
        f"{path.relative_to(package)} imports {imported}"
        for path in files(package)
        for imported, _ in imports(path, package)
        if imported.startswith("matplotlib") and path.parent.name != "plots"
    ]


def side_effects(package):
    """Files that print, configure JAX, read the environment, open files or end the process."""
    found = []
    for path in files(package):
        text, relative = path.read_text(), path.relative_to(package).as_posix()
        nodes = list(ast.walk(ast.parse(text)))
        calls = {
            node.func.id
            for node in nodes
            if isinstance(node, ast.Call) and hasattr(node.func, "id")
        }
        found += [f"{relative} prints"] * ("print" in calls)
        found += [f"{relative} opens files"] * ("open" in calls and relative not in OPENS_FILES)
        forbidden = ("jax.config", "os.environ", "os._exit")
        found += [f"{relative} uses {word}" for word in forbidden if word in text]
    return found


def too_long(package):
    """Files, functions and lines past the limits."""
    found = []
    for path in files(package):
        lines, relative = path.read_text().splitlines(), path.relative_to(package).as_posix()
        if len(lines) > MOST_LINES:
            found.append(f"{relative} has {len(lines)} lines")
        found += [
            f"{relative}:{number} has {len(line)} columns"
            for number, line in enumerate(lines, 1)
            if len(line) > MOST_COLUMNS
        ]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and code_lines(node, lines) > MOST_CODE_LINES:
                found.append(f"{relative}: {node.name} has {code_lines(node, lines)} code lines")
    return found


def code_lines(function, lines):
    """Lines of a function that hold code: neither its docstring nor comments nor blank ones."""
    first = function.lineno - 1
    if ast.get_docstring(function) is not None:
        first = function.body[0].end_lineno
        signature = function.body[0].lineno - function.lineno
    else:
        signature = 0
    code = [line.strip() for line in lines[first : function.end_lineno]]
    return signature + sum(bool(line) and not line.startswith("#") for line in code)


def hidden(package):
    """Names by which a package's own file hides one of the package's modules."""
    found = []
    for path in files(package):
        if path.name == "__init__.py":
            modules = {module.stem for module in path.parent.glob("*.py")}
            modules |= {wing.name for wing in path.parent.iterdir() if wing.is_dir()}
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    names = {alias.asname or alias.name for alias in node.names}
                    found += [f"{path.parent.name} hides {name}" for name in names & modules]
    return found


RULES = [unowned, upward, circles, heavy, drawing, side_effects, too_long, hidden]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    assert rule(PACKAGE) == []


# Each rule is seen to fail. -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "file", "text", "said"),
    [
        (unowned, "stray.py", "", "stray.py belongs to no wing"),
        (unowned, "extras/tools.py", "", "extras/tools.py belongs to no wing"),
        (unowned, "vectors.py", "", "vectors.py belongs to no wing"),
        (unowned, "vectors/deep/sums.py", "", "lies in a wing inside of a wing"),
        (upward, "vectors/up.py", "from hessdensity.operators import hessian", "further up"),
        (upward, "vectors/up.py", "from ..runs.run import Run", "further up"),
        (upward, "text.py", "def f():\n    from hessdensity import Hessian", "further up"),
        (circles, "text.py", "import hessdensity.errors", None),
        (circles, "errors.py", "import hessdensity.text", "errors -> text -> errors"),
        (heavy, "vectors/slow.py", "from scipy import linalg", "loads scipy.linalg"),
        (drawing, "spectra/draw.py", "def f():\n    import matplotlib", "imports matplotlib"),
        (side_effects, "vectors/loud.py", "print(1)", "prints"),
        (side_effects, "vectors/loud.py", "import jax\njax.config.x = 1", "uses jax.config"),
        (side_effects, "runs/end.py", "import os\nos._exit(1)", "uses os._exit"),
        (side_effects, "runs/file.py", "open('x')", "opens files"),
        (too_long, "vectors/long.py", "x = 1\n" * 401, "has 401 lines"),
        (too_long, "vectors/wide.py", f"x = '{'a' * 95}'", "has 101 columns"),
        (too_long, "vectors/long.py", "def f():\n" + "    x = 1\n" * 61, "f has 62 code lines"),
        (hidden, "vectors/__init__.py", "from .trees import size as trees", "hides trees"),
        (hidden, "__init__.py", "from .text import table as spectra", "hides spectra"),
    ],
)
def test_a_planted_violation_is_found(rule, file, text, said, tmp_path):
    copy = shutil.copytree(PACKAGE, tmp_path / "hessdensity")
    if rule is circles and said:
        (copy / "text.py").write_text("import hessdensity.errors\n")
    (copy / file).parent.mkdir(exist_ok=True)
    (copy / file).write_text(text.rstrip("\n") + "\n")
    found = rule(copy)
    assert any(said in each for each in found) if said else found == []
