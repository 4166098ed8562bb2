"""What comments, the register of deviations and the README promise, read from their text."""
import ast
import io
import re
import shlex
import tokenize
from pathlib import Path

import pytest

import data
import evaluate
import model as m
import train

ROOT = Path(__file__).parent.parent
MODULES = ("losses", "adapters", "hilora", "data", "model", "evaluate", "train")
PARSERS = {"train.py": train.build_parser, "evaluate.py": evaluate.build_parser,
           "data.py": data.build_parser}
README = (ROOT / "README.md").read_text()
REGISTER = (ROOT / "assets/deviations.md").read_text()


def source(path):
    return (ROOT / path).read_text()


# --- Equations: each is named on the line of code that computes it --------------------------------


def comments_on_code(text):
    """The comments of a source that are on a line of code or directly above one."""
    lines = [*text.splitlines(), ""]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start    # rows count from 1
            below = lines[row].strip()
            if lines[row - 1][:column].strip() or (below and not below.startswith("#")):
                yield token.string


def equations(comment):
    """The equations that a comment names, as {(paper, number), ...}: "HiVG Eq. (6)",
    "M²IST Eqs. (2), (3)", "HiVG Eqs. (9)-(11)"."""
    named = set()
    one = r"\(\d+\)"
    pattern = rf"(M²IST|HiVG) Eqs?\. ({one}(?:(?:, | and |-){one})*)"
    for paper, numbers in re.findall(pattern, comment):
        for first, last in re.findall(r"\((\d+)\)(?:-\((\d+)\))?", numbers):
            named.update((paper, number) for number in range(int(first), int(last or first) + 1))
    return named


def test_every_equation_is_named_on_its_line():
    """M²IST (1)-(6) and HiVG (1)-(15), and none that the papers do not have; docstrings do not
    count."""
    named = set()
    for module in MODULES:
        for comment in comments_on_code(source(f"{module}.py")):
            named |= equations(comment)
    assert named == ({("M²IST", number) for number in range(1, 7)}
                     | {("HiVG", number) for number in range(1, 16)})


# --- Deviations: assets/deviations.md and the tags in the code ------------------------------------

ENTRIES = re.findall(r"^### (D\d+) .+ \(`(\w+)\.py`\)$", REGISTER, re.M)


def tags(module):
    """The ids of the tags in a module: "[D4]", "[released code, D6]". The sentence that says what a
    tag is has one as an example."""
    text = re.sub(r"such\s+as\s+\[D\d+\]", "", source(f"{module}.py"))
    return {number for brackets in re.findall(r"\[([^\[\]]*)\]", text)
            for number in re.findall(r"\bD\d+\b", brackets)}


def test_tags_and_register_agree_in_both_directions():
    """Every tag has an entry, and the module that an entry names has its tag."""
    numbers = {number for number, _ in ENTRIES}
    assert [(module, tag) for module in MODULES for tag in tags(module) - numbers] == []
    assert [(number, module) for number, module in ENTRIES if number not in tags(module)] == []


def test_the_register_is_complete():
    """D1, D2, ... without a gap, each with its four parts, and each once in the list at the top."""
    numbers = [number for number, _ in ENTRIES]
    assert numbers == [f"D{number}" for number in range(1, len(numbers) + 1)]
    head, *entries = re.split(r"^### ", REGISTER, flags=re.M)
    assert sorted(re.findall(r"\bD\d+\b", head.partition("- **")[2])) == sorted(numbers)
    assert len(entries) == len(numbers)
    for entry in entries:
        parts = re.findall(r"^- \*\*(.+?)\*\*: \S", entry, re.M)
        assert parts == ["Paper", "Released code", "Here", "Why"], entry


# --- The tree -------------------------------------------------------------------------------------


@pytest.mark.parametrize("module, may_import", [
    ("losses", {"math", "torch"}),
    ("adapters", {"math", "torch"}),
    ("hilora", {"math", "torch"}),
    ("data", set()),
    ("model", {"losses", "adapters", "hilora"}),
    ("evaluate", {"losses", "adapters", "hilora", "data", "model"}),
    ("train", {"losses", "adapters", "hilora", "data", "model", "evaluate"})])
def test_imports_point_one_way(module, may_import):
    """Four modules can be copied alone, three of them beside torch, and no arrow turns round."""
    names = set()
    for node in ast.walk(ast.parse(source(f"{module}.py"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    if "torch" in may_import:
        assert names <= may_import
    assert names & set(MODULES) <= may_import


@pytest.mark.parametrize("script", PARSERS)
def test_every_flag_has_its_help(script):
    """No flag without words about it, and none of it breaks --help."""
    parser = PARSERS[script]()
    for action in parser._actions:
        assert action.help and len(action.help.split()) >= 3, action.option_strings
    assert "usage" in parser.format_help()


# --- The README -----------------------------------------------------------------------------------


def commands():
    """The commands of the README, in blocks and within sentences: [(script, arguments), ...]."""
    text = README.replace("\\\n", " ")
    code = re.findall(r"^```\w*\n(.+?)^```", text, re.M | re.S)
    lines = [line for block in code for line in block.splitlines()]
    rest = re.sub(r"^```.+?^```", "", text, flags=re.M | re.S)
    lines += [" ".join(line.split()) for line in re.findall(r"`([^`]+)`", rest)]
    found = []
    for line in lines:
        for command in line.split("&&"):
            match = re.match(r"\s*(?:python|torchrun\b.*?) ([\w./]+\.py)\b(.*)", command)
            if match:
                arguments = shlex.split(match[2], comments=True)
                found.append((match[1], [word for word in arguments if word != "..."]))
    return found


def test_the_commands_of_the_readme_are_accepted():
    """Each names a script that is there, and flags and values that the script takes."""
    assert ("train.py", []) in commands()
    for script, arguments in commands():
        assert (ROOT / script).is_file(), script
        if "--help" in arguments:
            continue
        if script in PARSERS:
            PARSERS[script]().parse_args(arguments)
        else:
            for flag in re.findall(r"(?:^| )(--[\w-]+)", " ".join(arguments)):
                assert f'"{flag}"' in source(script), (script, flag)


def test_what_the_readme_names_exists():
    """Flags in its sentences, files, methods and numbers of deviations."""
    flags = {flag for parser in PARSERS.values() for action in parser()._actions
             for flag in action.option_strings}
    assert set(re.findall(r"`(--[a-z][\w-]*)", README)) <= flags
    names = re.findall(r"\]\((?!http)([^)#]+)\)", README)    # links and images
    names += re.findall(r"`((?:assets|tests)/[\w./-]+|\w+\.py)`", README)
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
    for method in re.findall(r"--method ([\w+-]+)", README):
        assert method in m.METHODS, method
    for row in re.findall(r"--row ([\w/]+)", README):
        assert row in train.ROWS or row == "list", row
    assert set(re.findall(r"\bD\d+\b", README)) <= {number for number, _ in ENTRIES}


def test_the_readme_has_the_commands_that_ci_runs():
    """The installation and the tests, as a newcomer types them."""
    test_command, = re.findall(r"^python -m pytest.*$", source(".ci/run"), re.M)
    assert test_command in README
    assert "pip install -r requirements.txt" in README


def test_the_readmes_exercises_name_tests_and_functions_that_there_are():
    """Each row of the reading table leads to a function and to a test."""
    tests = re.findall(r"(test_\w+\.py)::(test_\w+)", README)
    assert len(tests) >= 5
    for file, test in tests:
        assert f"def {test}(" in source(f"tests/{file}"), test
    for module, name, method in re.findall(r"`(\w+)\.py` `(\w+)(?:\.(\w+))?`", README):
        text = source(f"{module}.py")
        assert re.search(rf"^(?:(?:def|class) {name}\b|{name} = )", text, re.M), name
        assert f"    def {method}(" in text or method == "", method


def test_the_python_of_the_readme_uses_what_there_is():
    """What a block takes from a module of ours is there. An example that begins as one of a
    docstring is that one: test_adapters.py and test_hilora.py execute them."""
    ours = {"data": data, "evaluate": evaluate, "model": m, "train": train}
    blocks = re.findall(r"^```python\n(.+?)^```", README, re.M | re.S)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module in MODULES:
                for alias in node.names:
                    assert re.search(rf"\b{alias.name}\b", source(f"{node.module}.py")), alias.name
        for module in MODULES:
            docstring = ast.get_docstring(ast.parse(source(f"{module}.py")))
            if block.splitlines()[0] in docstring:
                assert block.replace("\n", "\n    ").strip() in docstring
    for module, name in re.findall(r"\b(data|evaluate|train|model)\.([a-z]\w+)\(", README):
        model_s = module == "model" and hasattr(m.DetrBert, name)    # a variable has this name, too
        assert hasattr(ours[module], name) or model_s, name
