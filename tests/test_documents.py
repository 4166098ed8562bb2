"""What the comments, the docstrings and the README promise: equations, deviations, imports."""
import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
import torch

import adapters
import model as m
import train

ROOT = Path(__file__).parent.parent
MODULES = ["losses", "adapters", "hilora", "data", "model", "train", "evaluate"]
README = (ROOT / "README.md").read_text()


def source(module):
    return (ROOT / f"{module}.py").read_text()


# --- Equations: each is named on the line of code that computes it --------------------------------


def comments_on_code(text):
    """The comments of a source that are on a line of code or directly above one."""
    lines = text.splitlines()
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        row, column = token.start    # rows count from 1
        before = lines[row - 1][:column].strip()
        below = lines[row].strip() if row < len(lines) else ""
        above_code = below != "" and not below.startswith("#")
        if before != "" or above_code:
            found.append(token.string)
    return found


def equations(comment):
    """The equations that a comment names, as {(paper, number), ...}: "HiVG Eq. (6)",
    "M²IST Eqs. (2), (3)", "HiVG Eqs. (9)-(11)"."""
    named = set()
    one = r"\(\d+\)"
    pattern = rf"(M²IST|HiVG) Eqs?\. ({one}(?:(?:, | and |-){one})*)"
    for paper, numbers in re.findall(pattern, comment):
        for first, last in re.findall(r"\((\d+)\)(?:-\((\d+)\))?", numbers):
            for number in range(int(first), int(last or first) + 1):
                named.add((paper, number))
    return named


def test_equations_of_a_comment():
    """How this file reads a comment."""
    assert equations("# HiVG Eq. (6), the case l > j L / G") == {("HiVG", 6)}
    assert equations("# M²IST Eqs. (2), (3)") == {("M²IST", 2), ("M²IST", 3)}
    assert equations("# HiVG Eqs. (9)-(11)") == {("HiVG", 9), ("HiVG", 10), ("HiVG", 11)}
    assert equations("# HiVG Eq. (5), HiVG Eq. (8)") == {("HiVG", 5), ("HiVG", 8)}
    assert equations("# Eq. (1)") == set()    # of which paper?
    text = "x = 1    # a\n# b\ny = 2\n# c\n\n# d\n# e\nz = 3\n'''# f'''\n"
    assert comments_on_code(text) == ["# a", "# b", "# e"]


@pytest.mark.parametrize("paper, count", [("M²IST", 6), ("HiVG", 15)])
def test_every_equation_is_named_on_its_line(paper, count):
    """M²IST (1)-(6) and HiVG (1)-(15); docstrings do not count."""
    named = set()
    for module in ("losses", "adapters", "hilora", "model", "train"):
        for comment in comments_on_code(source(module)):
            named |= equations(comment)
    missing = [number for number in range(1, count + 1) if (paper, number) not in named]
    assert missing == []
    for other, number in named:
        if other == paper:
            assert 1 <= number <= count    # the paper has no other


# --- Deviations: each has an entry and a tag in the same module -----------------------------------


def docstring_and_code(module):
    """The docstring of a module, and all that follows the docstring."""
    text = source(module)
    tree = ast.parse(text)
    lines = text.splitlines()
    end = tree.body[0].end_lineno
    return "\n".join(lines[:end]), "\n".join(lines[end:])


def entries(module):
    """{id: the lines of its entry} of the deviations that a module's docstring explains."""
    docstring, _ = docstring_and_code(module)
    found = {}
    entry = []
    for line in docstring.splitlines():
        start = re.match(r"\[(D\d+)\] \S", line)
        if start:
            entry = [line]
            assert start[1] not in found, f"{start[1]} has two entries"
            found[start[1]] = entry
        elif line.startswith("    "):
            entry.append(line)
        else:
            entry = []    # a blank line, or the end of the docstring, ends an entry
    return found


def tags(module):
    """The ids of the tags in the code and comments of a module."""
    _, code = docstring_and_code(module)
    return set(re.findall(r"\[(D\d+)\]", code))


@pytest.mark.parametrize("module", MODULES)
def test_deviations_are_registered_both_ways(module):
    """Every tag in the code has an entry in the docstring of its module, and every entry a tag."""
    assert tags(module) == set(entries(module))


@pytest.mark.parametrize("module", MODULES)
def test_an_entry_has_four_parts(module):
    """What the paper says, what the released code does, what we do, and why."""
    for number, lines in entries(module).items():
        starts = []
        for line in lines[1:]:
            start = re.match(r"    (\w+)\s+\S", line)
            if start and not line.startswith("     "):
                starts.append(start[1])
            else:
                assert line.startswith("            "), f"{number}: {line!r}"
        assert starts == ["paper", "code", "here", "why"], number


def test_the_ids_of_deviations_have_no_gap():
    """D1, D2, ... each stand in the docstring of one module."""
    numbers = []
    for module in MODULES:
        for number in entries(module):
            numbers.append(int(number[1:]))
    assert sorted(numbers) == list(range(1, len(numbers) + 1))


# --- The tree -------------------------------------------------------------------------------------


def imported_modules(module):
    """The modules of ours that a module imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names.add(alias.name.partition(".")[0])
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names & set(MODULES)


@pytest.mark.parametrize("module, may_import", [
    ("losses", set()),
    ("adapters", set()),
    ("hilora", set()),
    ("data", set()),
    ("model", {"losses", "adapters", "hilora", "data"}),
    ("train", {"losses", "adapters", "hilora", "data", "model"}),
    ("evaluate", {"losses", "adapters", "hilora", "data", "model", "train"}),
])
def test_imports_point_one_way(module, may_import):
    """Four modules can be copied alone, and no arrow turns around."""
    assert imported_modules(module) <= may_import


# --- The README -----------------------------------------------------------------------------------


@pytest.fixture
def tables_put_back():
    """The README adds rows to ADAPTERS and METHODS. They go after the test."""
    adapters_before = dict(adapters.ADAPTERS)
    methods_before = dict(m.METHODS)
    yield
    for table, before in ((adapters.ADAPTERS, adapters_before), (m.METHODS, methods_before)):
        table.clear()
        table.update(before)


def test_the_readmes_adapter_trains_under_its_name(capsys, tables_put_back):
    """A subclass of PairAdapter and a row are a new adapter; the README prints its count."""
    block = re.search(r"```python\n(import (?:torch, )?adapters\b.+?)```", README, re.S)
    assert block is not None
    assert "(adapters.PairAdapter)" in block[1]
    names = set(adapters.ADAPTERS)
    with torch.device("meta"):
        exec(block[1], {})
    name, = set(adapters.ADAPTERS) - names

    # A vector for vision (C_v = 256) and a vector for text (C_l = 768), in six pairs of layers.
    assert f"'encoder_tunable': {6 * (256 + 768)}" in capsys.readouterr().out

    args = train.parse_args(["--attention-port", name, "--ffn-port", "none",
                             "--weights", "random", "--device", "cpu"])
    torch.manual_seed(0)
    model = m.build_model(**train.model_arguments(args))
    before = {name: p.detach().clone() for name, p in model.adapters.named_parameters()}
    assert len(before) == 2 * 2    # two pairs of layers at tiny size

    images = torch.randn(2, 3, 64, 64)
    image_padding = torch.zeros(2, 64, 64, dtype=torch.bool)
    tokens = torch.randint(5, 100, (2, 7))
    token_padding = torch.zeros(2, 7, dtype=torch.bool)
    grounding = model(images, image_padding, tokens, token_padding)
    train.weighted_loss(grounding, torch.full((2, 4), 0.4), args).backward()
    train.make_optimizer(model, args, train.plan(args)[0]).step()
    for name, p in model.adapters.named_parameters():
        assert not torch.equal(p, before[name]), name


def test_the_readme_has_the_commands_that_ci_runs():
    """The first run and the tests, as a newcomer types them."""
    ci = (ROOT / ".ci/run").read_text()
    test_command = "python -m pytest -q tests"
    assert test_command in README
    assert test_command in ci
    assert "python -m pytest" not in ci.replace(test_command, "")
    assert "pip install -r requirements.txt && python train.py\n" in README


@pytest.mark.parametrize("module", ["adapters", "hilora"])
def test_the_readme_has_the_example_of_the_docstring(module):
    """The examples to copy are those that test_adapters.py and test_hilora.py execute."""
    docstring = ast.get_docstring(ast.parse(source(module)))
    blocks = re.findall(r"```python\n(.+?)```", README, re.S)
    indented = [block.replace("\n", "\n    ").strip() for block in blocks]
    examples = [block for block in indented if block in docstring]
    assert len(examples) == 1
    assert len(examples[0].splitlines()) <= 10


def test_the_readmes_exercises_name_tests_and_functions_that_there_are():
    """Each row of the reading table leads to a function and to a test."""
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", README)
    assert len(named) >= 10
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), test
    places = re.findall(r"`(\w+)\.py` `(\w+)(?:\.(\w+))?`", README)
    assert len(places) >= 10
    for module, name, method in places:
        assert re.search(rf"^(def|class) {name}\b", source(module), re.M), name
        assert f"    def {method}(" in source(module) or method == "", method


def test_the_readmes_counts_are_those_of_the_models():
    """The table of costs has the exact numbers of tuned parameters."""
    for method in ("full", "frozen", "lora", "m2ist"):
        with torch.device("meta"):
            counts = m.count_parameters(m.build_model(method, "base", "random"))
        row = re.search(rf"^\| `{method}` \| ([\d,]+) \| .*(?:MiB)", README, re.M)
        assert int(row[1].replace(",", "")) == counts["encoder_tunable"], method
