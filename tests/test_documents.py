"""What the comments, the docstrings and the README promise: equations, deviations, imports."""
import ast
import io
import os
import re
import subprocess
import sys
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


def shift_in_the_readme():
    """The class to paste, with its row of ADAPTERS, and the lines that it needs in another file."""
    block, below = re.search(r"```python\n(class Shift.+?)```\n(.+?)\n## ", README, re.S).groups()
    return block, re.findall(r"`((?:import|from) [^`]+)`", below)


@pytest.fixture
def tables_put_back():
    """The README's adapter adds a row to ADAPTERS. It goes after the test."""
    before = dict(adapters.ADAPTERS)
    yield
    adapters.ADAPTERS.clear()
    adapters.ADAPTERS.update(before)


def test_the_readmes_adapter_can_be_pasted_at_the_end_of_adapters_py(tmp_path):
    """As printed, in a copy of adapters.py: the README's command accepts it and trains it."""
    block, _ = shift_in_the_readme()
    assert "`python train.py --attention-port shift`" in README
    (tmp_path / "adapters.py").write_text(source("adapters") + "\n\n" + block)
    command = f"""
import adapters, sys
assert adapters.__file__.startswith({str(tmp_path)!r})
import train
train.main(["--attention-port", "shift", "--ffn-port", "none", "--device", "cpu", "--limit", "32",
            "--epochs", "1", "--out", "run"])
"""
    # Of two files adapters.py, Python takes the one in the folder where the command runs.
    run = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, capture_output=True,
                         text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    # A vector for vision (C_v = 64) and a vector for text (C_l = 96), in two pairs of layers.
    assert f"'encoder_tunable': {2 * (64 + 96)}" in run.stdout
    assert (tmp_path / "run/best.safetensors").exists()


def test_the_readmes_adapter_works_in_a_file_of_its_own(tables_put_back):
    """With the imports that the README names above it, the class and its row are a new adapter."""
    block, imports = shift_in_the_readme()
    assert "from adapters import ADAPTERS, PairAdapter" in imports
    exec("\n".join([*imports, block]), {})
    with torch.device("meta"):
        net = m.build_model("m2ist", "base", "random", attention_port="shift", ffn_port="none")
    # A vector for vision (C_v = 256) and a vector for text (C_l = 768), in six pairs of layers.
    assert m.count_parameters(net)["encoder_tunable"] == 6 * (256 + 768)

    args = train.parse_args(["--attention-port", "shift", "--ffn-port", "none",
                             "--weights", "random", "--device", "cpu"])
    torch.manual_seed(0)
    model = m.build_model(**train.model_arguments(args))
    before = {name: p.detach().clone() for name, p in model.adapters.named_parameters()}
    assert len(before) == 2 * 2    # two pairs of layers at tiny size

    images = torch.randn(2, 3, 64, 64)
    image_padding = torch.zeros(2, 64, 64, dtype=torch.bool)
    tokens = torch.randint(5, 100, (2, 7))
    token_padding = torch.zeros(2, 7, dtype=torch.bool)
    grounding = model(images, image_padding, tokens, token_padding, attention=True)
    sum(train.weighted_losses(grounding, torch.full((2, 4), 0.4), args).values()).backward()
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
