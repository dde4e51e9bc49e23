"""The shape of the repository itself: who imports whom, how large it is, that README and CI say the same."""

import ast
import re
import subprocess

from conftest import ROOT

MODULES = ["config", "runtime", "model", "data", "render", "judges"]
SCRIPTS = ["train_ddpd", "sample", "evaluate", "bench"]
MAY_IMPORT = {
    **{m: set() for m in MODULES},
    "costs": {"model", "runtime"},
    "diffusion.processes": set(),
    "diffusion.objectives": {"diffusion.processes"},
    "diffusion.draws": set(),
    "diffusion.rollouts": {"diffusion.draws", "diffusion.processes"},
    "diffusion.samplers": {"diffusion.draws", "diffusion.processes", "diffusion.rollouts"},
}


def siblings(path):
    """Names of this repository's modules that a file imports."""
    own, found = [*MODULES, *SCRIPTS, "diffusion", "sources", "experiments", "costs"], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] in own}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in own:
            found |= {f"{node.module}.{a.name}" for a in node.names} if node.module == "diffusion" else {node.module}
    return found


def test_who_imports_whom():
    """Modules import no sibling, the method imports itself alone, nothing a script."""
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "model.py" in tracked.split()
    for path in map(ROOT.joinpath, tracked.split()):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if name.startswith((".", "tests", "experiments", "configs")):
            continue
        found = siblings(path)
        assert not found & set(SCRIPTS), name
        assert found <= MAY_IMPORT.get(name, found), name
        if name.startswith("sources."):
            assert found <= {"sources"}, name


def test_budget():
    """Model, method, training and sampling stay within an afternoon's reading."""

    def lines(*patterns):
        return sum(len(p.read_text().splitlines()) for pattern in patterns for p in ROOT.glob(pattern))

    assert lines("model.py", "diffusion/*.py", "train_ddpd.py", "sample.py") <= 2100
    assert lines("*.py", "diffusion/*.py", "sources/*.py", "configs/*.py", "experiments/*.py") <= 5200


def test_ci_runs_the_tests_of_the_readme():
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if "pytest" in line and "venv" in line]
    assert len(lines) == 1 and lines[0].strip() in (ROOT / ".ci" / "run").read_text()


def test_the_files_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r'src="([^":]+)"', text):
        assert (ROOT / name).exists(), name


def test_the_readme_is_filled_in():
    """No number is left to be measured."""
    text = (ROOT / "README.md").read_text()
    assert not re.search(r"@[A-Z]+@|TODO|TBD|XXX", text)
