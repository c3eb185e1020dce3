"""What `from gist_train import ...` gives."""

import ast
import subprocess
import sys

from conftest import ROOT

import gist_train

COMMANDS = ("init", "prepare", "plan", "train", "evaluate", "select", "export", "mine", "audit", "report", "explain", "cache")
"""Each is or may become a public function."""


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_import_brings_nothing_along():
    """A notebook or a completion script that imports the package must not wait for torch."""
    ended = run_python(
        "import sys, typing, importlib; before = {*sys.modules}; import gist_train; print(sorted({*sys.modules} - before))"
    )
    assert (ended.stdout.strip(), ended.returncode) == ("['gist_train', 'gist_train.version']", 0), ended.stderr


def test_commands_load_no_models_to_begin_with():
    """What loads no model must not wait for those who do: sentence-transformers takes six seconds, scikit-learn one."""
    homes = ("planning.plan", "evaluation.measuring", "results.comparison", "results.select", "training_run")
    slow = {"sentence_transformers", "transformers", "datasets", "sklearn", "scipy", "pandas"}
    code = "; ".join(f"import gist_train.{home}" for home in homes)
    ended = run_python(f"import sys; {code}; print(sorted({slow} & {{*sys.modules}}))")
    assert (ended.stdout.strip(), ended.returncode) == ("[]", 0), ended.stderr


def test_no_module_shadows_a_public_function():
    """`gist_train.plan` would be a module once anything imported it, and no function: a user's second call fails."""
    modules = {path.name.removesuffix(".py") for path in (ROOT / "gist_train").iterdir()}
    assert modules & {*gist_train.__all__, *COMMANDS} == set()
    code = (
        "import pkgutil, importlib, gist_train\n"
        "for found in pkgutil.walk_packages(gist_train.__path__, 'gist_train.'):\n"
        "    if not found.name.endswith(('__main__', '_kernel', 'layer_kernels', 'draws', 'mteb_adapters')):\n"
        "        importlib.import_module(found.name)\n"
        "print(*[type(getattr(gist_train, name)).__name__ for name in gist_train.__all__])"
    )
    ended = run_python(code)
    assert ended.returncode == 0, ended.stderr
    assert "module" not in ended.stdout
    assert len(ended.stdout.split()) == len(gist_train.__all__)


def test_names_are_what_type_checkers_see():
    """Names are imported twice, for people and for type checkers: one that is in one list alone is public to half of them."""
    tree = ast.parse((ROOT / "gist_train" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {name.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert seen == {name: f"gist_train.{home}" for name, home in gist_train._HOMES.items()}
    assert {*seen} == {*gist_train.__all__}
    for name in gist_train.__all__:
        assert getattr(gist_train, name).__module__.startswith("gist_train."), name
