"""The shape of the repository: its modules and who imports whom, how legible it is, and that its
texts say what the code does."""

import ast
import functools
import graphlib
import os
import re
import statistics
import tokenize
from dataclasses import fields

import pytest
from conftest import ROOT

import bench
import config
import data
import evaluate
import export
import plot
import sample
import tokenizer
from formats import meta_file

# Modules and their imports

SCRIPTS = {"train_ddpd", "sample", "evaluate", "bench", "tokenizer", "export", "plot"}
TOP_LEVEL = {"config", "model", "data", "methods"} | SCRIPTS
DIFFUSION = {
    f"diffusion.{name}"
    for name in """
        randomness processes objectives gidd forcing likelihood decoding samplers unmasking
        particles
    """.split()
}
SUPPORT = {
    f"support.{name}"
    for name in """
        runtime logs checkpoint training meters validate attention chunked_head metrics features
        canvas pictures videos diagnostics timing text figures curves report comparison exports hub
        sampling starts judged budgets
    """.split()
}
BY_THEMSELVES = {
    "diffusion.randomness",
    "support.attention", "support.canvas", "support.chunked_head",
    "support.runtime", "support.figures", "formats.messages",
}
FORMATS = {
    f"formats.{name}" for name in "messages flags config_files meta_file token_files".split()
}


def python_files():
    """All Python files of the working tree but those of tests, runs, data and environments."""
    for folder, folders, names in os.walk(ROOT):
        is_top = folder == str(ROOT)
        skipped = {"tests", "out", "data", "wandb"} if is_top else set()
        folders[:] = [
            name for name in sorted(folders)
            if name not in skipped and not name.startswith((".", "__"))
            and not os.path.exists(os.path.join(folder, name, "pyvenv.cfg"))
        ]
        yield from (ROOT / os.path.relpath(folder, ROOT) / name for name in sorted(names)
                    if name.endswith(".py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@functools.cache
def modules():
    """{name: path} of this repository, without configs, which are not imported."""
    named = {module_name(path): path for path in python_files()}
    return {name: path for name, path in named.items() if not name.startswith("configs.")}


def imports_of(name):
    """The modules of this repository that one of them imports, anywhere in its file."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            imported = [module_or_member(node.module, alias.name) for alias in node.names]
        else:
            continue
        found.update(module for module in imported if module in modules())
    return found - {name}


def module_or_member(module, member):
    """What `from module import member` imports: a module of a package, or the module itself."""
    inner = f"{module}.{member}"
    return inner if inner in modules() else module


def in_package(names, *packages):
    return {name for name in names if name.split(".")[0] in packages}


def test_the_modules_are_where_the_readme_says():
    """The top level holds what a user runs and edits, support/ what a run needs."""
    names = set(modules())
    assert {path.stem for path in modules().values() if path.parent == ROOT} == TOP_LEVEL
    assert in_package(names, "diffusion") - {"diffusion"} == DIFFUSION
    assert in_package(names, "support") - {"support"} == SUPPORT
    assert in_package(names, "formats") - {"formats"} == FORMATS
    assert in_package(names, "sources") > {"sources"}
    assert in_package(names, "experiments")


def test_imports_are_seen():
    """The reader of imports itself, on modules whose imports are known."""
    assert imports_of("methods") >= {"model", "diffusion.samplers"}
    assert "sources.mnist" in imports_of("sources.fashion_mnist")
    assert "diffusion.processes" in imports_of("diffusion.objectives")


def test_the_foundations_import_nothing_of_ours():
    for name in sorted(BY_THEMSELVES):
        assert not imports_of(name), name


def test_config_and_data_import_formats_alone():
    """Neither imports the other, nor what a run needs."""
    for name in sorted({"config", "data"} | FORMATS):
        assert imports_of(name) <= FORMATS, name


def test_the_mathematics_imports_itself_alone():
    """diffusion/ knows no network, no config and no file; nothing in it reads samplers.py."""
    for name in sorted(DIFFUSION):
        assert imports_of(name) <= DIFFUSION - {"diffusion.samplers"}, name


def test_the_network_imports_attention_alone():
    assert imports_of("model") == {"support.attention"}


def test_methods_imports_networks_and_mathematics():
    assert imports_of("methods") <= DIFFUSION | {"model"}


def test_support_imports_no_script():
    """Text is made of tokens by the tokenizer that sources/ made the tokens with."""
    edited = {"config", "data", "model", "methods"}
    allowed = DIFFUSION | SUPPORT | FORMATS | edited | {"sources._tokenizer"}
    for name in sorted(SUPPORT):
        assert imports_of(name) <= allowed, name


def test_metrics_import_features_alone():
    assert imports_of("support.metrics") == {"support.features"}
    assert imports_of("support.features") == {"support.runtime"}


def test_sources_import_sources_alone():
    for name in sorted(in_package(modules(), "sources")):
        assert imports_of(name) == in_package(imports_of(name), "sources"), name


def test_nothing_imports_a_script():
    """Experiments may, and no module imports an experiment."""
    for name in sorted(modules()):
        if not name.startswith("experiments."):
            assert not imports_of(name) & SCRIPTS, name
            assert not in_package(imports_of(name), "experiments"), name


def test_imports_have_no_cycle():
    """prepare() raises CycleError, which names the cycle."""
    graphlib.TopologicalSorter({name: imports_of(name) for name in modules()}).prepare()


# Legibility: one idea in a statement, a function on one screen

CODE = {tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING}


def tokens_per_code_line(path):
    """Number of tokens on each line that has any."""
    counts = {}
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in CODE:
                line = token.start[0]
                counts[line] = counts.get(line, 0) + 1
    return list(counts.values())


def function_lengths():
    """-> [(lines, name)], longest first"""
    lengths = []
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                n_lines = node.end_lineno - node.lineno + 1
                lengths.append((n_lines, f"{module_name(path)}.{node.name}"))
    return sorted(lengths, reverse=True)


def test_a_line_holds_one_idea():
    """At most 11 tokens in a line of code, on average over all files."""
    counts = {path: tokens_per_code_line(path) for path in python_files()}
    every_line = [n for of_file in counts.values() for n in of_file]
    assert len(every_line) > 1000
    means = {path: statistics.mean(of_file) for path, of_file in counts.items() if of_file}
    densest = max(means, key=means.get)
    assert statistics.mean(every_line) <= 11, f"the densest is {densest}"


def test_lines_fit_on_a_screen():
    """At most 3 % of all lines are longer than 100 columns."""
    lines = [line for path in python_files() for line in path.read_text().splitlines()]
    n_long = sum(len(line) > 100 for line in lines)
    assert n_long <= 0.03 * len(lines)


def test_functions_fit_on_a_screen():
    """None is longer than 70 lines, and at most five are longer than 50."""
    lengths = function_lengths()
    assert lengths[0][0] <= 70, lengths[0]
    long = [length for length in lengths if length[0] > 50]
    assert len(long) <= 5, long


# Texts

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
doc_files = pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)


def without_code(text):
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors_of(path):
    """The names by which a link can reach the headings of a Markdown file, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_of(path):
    """-> (file or "", anchor or "") of all links that stay in the repository"""
    text = without_code(path.read_text())
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if ":" not in target:
            file, _, anchor = target.partition("#")
            yield file, anchor


def test_ci_runs_the_tests_of_the_readme():
    readme = (ROOT / "README.md").read_text().splitlines()
    lines = [line.strip() for line in readme if "pytest" in line and "venv" in line]
    assert len(lines) == 1
    assert lines[0] in (ROOT / ".ci" / "run").read_text()


@doc_files
def test_links_lead_somewhere(path):
    """The file, relative to the one that the link stands in, and the heading exist."""
    links = list(links_of(path))
    assert links
    for file, anchor in links:
        target = path.parent / file if file else path
        assert target.exists(), file
        if anchor:
            assert anchor in anchors_of(target), f"{file}#{anchor}"


@doc_files
def test_texts_are_filled_in(path):
    """No number is left to be measured."""
    assert not re.search(r"@[A-Z]+@|TODO|TBD|XXX", path.read_text())


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1500


# Commands in texts

FLAG_CLASSES = {
    "train_ddpd.py": config.Config,
    "sample.py": sample.Flags,
    "evaluate.py": evaluate.Flags,
    "data.py": data.Make,
    "bench.py": bench.Flags,
    "tokenizer.py": tokenizer.Flags,
    "plot.py": plot.Flags,
    "export.py": export.Flags,
}
TORCHRUN_FLAGS = {"--max-restarts"}
FIDELITY_FLAGS = {"--fid", "--kid", "--prc", "--gpu", "--input1", "--input2"}
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def flags_of(script):
    """All flags of a script, as they are typed."""
    flags = {"--help"} | ({"--list"} if script in ("train_ddpd.py", "data.py") else set())
    for field in fields(FLAG_CLASSES[script]):
        name = field.name.replace("_", "-")
        flags.add(f"--{name}")
        if field.type in (bool, "bool"):
            flags.add(f"--no-{name}")
    return flags


def texts():
    """{where: text} in which commands stand: documents, headers of configs and scripts."""
    found = {str(path.relative_to(ROOT)): path.read_text() for path in DOCS}
    headers = [*(ROOT / "configs").glob("*.py"), *(ROOT / name for name in FLAG_CLASSES)]
    for path in sorted(headers):
        found[str(path.relative_to(ROOT))] = ast.get_docstring(ast.parse(path.read_text()))
    return found


def commands_in(text):
    """`python X.py ...` and `torchrun ... X.py ...`.  -> [(script, [word, ...])]"""
    text = re.sub(r"\\\n\s*", " ", text)
    commands = []
    for part in re.split(r"&&|;|`|\n|\s#|   ", text):     # headers go on after three spaces
        match = re.search(r"\b(?:python3?|torchrun)(?:\s+-\S+)*\s+([\w/]+\.py)\b(.*)", part)
        if match:
            commands.append((match[1], match[2].split()))
    return commands


def names_of(words):
    """The words before the first flag that are no placeholders, as NAME, CONFIG or RUN."""
    names = []
    for word in words:
        if word.startswith(("-", "[")) or not re.fullmatch(r"[\w./-]+", word):
            break
        if not word.isupper():
            names.append(word.rstrip("."))
    return names


@pytest.mark.parametrize(
    "text, commands",
    [
        ("`python sample.py out/digits --labels 0 1`.", [("sample.py", "out/digits --labels 0 1")]),
        (
            "python data.py mnist && torchrun --nproc_per_node=N train_ddpd.py mnist\nelse",
            [("data.py", "mnist"), ("train_ddpd.py", "mnist")],
        ),
        ("python train_ddpd.py digits \\\n  --seed 1", [("train_ddpd.py", "digits --seed 1")]),
        ("python -m pytest", []),
    ],
)
def test_commands_are_seen(text, commands):
    """The reader of commands itself."""
    assert commands_in(text) == [(script, rest.split()) for script, rest in commands]


def test_texts_have_commands():
    scripts = [script for text in texts().values() for script, _ in commands_in(text)]
    assert len(scripts) > 40
    assert set(FLAG_CLASSES) <= set(scripts)


@pytest.mark.parametrize("where", texts())
def test_commands_in_texts_exist(where):
    """Scripts, their flags, and the configs and sources that they are given."""
    text = texts()[where]
    for script, words in commands_in(text):
        command = " ".join([script, *words])
        assert (ROOT / script).exists(), command
        if script not in FLAG_CLASSES:
            continue
        for flag in FLAG.findall(" ".join(words)):
            assert flag in flags_of(script), f"{flag} in {command}"
        for name in names_of(words):
            if script == "train_ddpd.py":
                is_file = name.startswith("configs/") and (ROOT / name).exists()
                assert is_file or (ROOT / "configs" / f"{name}.py").exists(), command
            if script == "data.py":
                is_explained = f"sources/{name}.py" in text         # as an example to follow
                assert name in meta_file.source_names() or is_explained, command


@doc_files
def test_flags_in_texts_exist(path):
    """Flags in `code` that stand without a command belong to one of the scripts."""
    known = set.union(*map(flags_of, FLAG_CLASSES)) | TORCHRUN_FLAGS | FIDELITY_FLAGS
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", text):
        if not commands_in(code):
            for flag in FLAG.findall(code):
                assert flag in known, f"{flag} in `{code}`"
