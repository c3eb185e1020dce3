"""What a message tells a user to do can be done: options and fields that it names exist."""

import ast
import re

import typer
from conftest import ROOT

from gist_train.cli import app
from gist_train.config.faults import ELSEWHERE, models_in
from gist_train.config.schema import Config

FIELD = re.compile(rf"\b(?:{'|'.join(Config.model_fields)})(?:\.[a-z_]+)+(?!\w|/|\.(?:json|yaml|py|csv))")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
OTHERS = {"--force-reinstall", "--no-deps", "--main", "--master-port", "--query-gpu"}


def messages():
    """Every text of the package that is no docstring, with its place."""
    for path in sorted((ROOT / "gist_train").rglob("*.py")):
        if path.name == "__init__.py":  # names of modules
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                yield f"{path.name}:{node.lineno}", node.value


def exists(path):
    """Whether the schema has a field of this dotted path, in any of its unions' models."""
    models = [Config]
    for name in path.split("."):
        found = [model.model_fields[name] for model in models if name in model.model_fields]
        if not found:
            return False
        models = []
        for field in found:
            hints = [field.annotation]
            while hints:
                hint = hints.pop()
                arguments = getattr(hint, "__args__", ())
                hints += arguments
                models += [] if arguments else models_in(hint)
    return True


def test_fields_that_messages_name_exist():
    """A fix that names a field which is not there costs a user an hour, and their trust in all other messages."""
    # Endings of files, and methods of transformers and sentence-transformers.
    methods = ("resize_token_embeddings", "similarity", "encode_query", "encode_document")
    files = ("onnx", "safetensors", "yaml", *methods)
    named = [(place, match[0]) for place, text in messages() for match in FIELD.finditer(text)]
    named = [(place, name) for place, name in named if not name.endswith(files)]
    assert len(named) > 60
    assert [(place, name) for place, name in named if not exists(name)] == []


def test_options_that_messages_name_exist():
    """`lower --model.max_length` was one that does not."""
    commands = typer.main.get_command(app).commands.values()
    options = {
        option for command in commands for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    options |= {"--version", "--verbose", "--help"}
    named = [(place, match[0]) for place, text in messages() for match in OPTION.finditer(text)]
    assert len(named) > 30
    assert [(place, name) for place, name in named if name not in options | OTHERS] == []


def test_names_of_other_packages_are_told_ours():
    """People type what they know; the hint must lead them to a field."""
    for key, place in ELSEWHERE.items():
        first = re.match(r"[a-z_.]+", place)[0].rstrip(".")
        assert exists(first.removesuffix(":")) or first == "prompts", (key, place)
