"""The package as a stranger gets it: a wheel, a clean environment, another folder."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import minflash
from minflash import errors, resources

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "minflash").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
WRITTEN = sorted(  # by hand, in whatever language
    path
    for folder in ("minflash", "cuda", "tests", "tools")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h", ".sh")
)
DECLARED = {
    *("numpy", "safetensors", "tokenizers", "huggingface_hub", "tqdm", "cupy", "cupy_backends"),
    *("jinja2", "gguf", "llguidance", "llm", "starlette", "uvicorn"),  # extras
    "typing_extensions",  # only for type checkers, which bring it
}
HEAVY = ("cupy", "tokenizers", "torch", "huggingface_hub", "jinja2", "gguf")


def run(*command: str | Path, cwd: Path) -> str:
    """The standard output of a command that must succeed, without the surroundings' PYTHONPATH."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass
class Built:
    """The two archives of the package."""

    wheel: Path
    sdist: Path

    def wheel_files(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())

    def sdist_files(self) -> set[str]:
        """Paths below the folder minflash-X.Y.Z."""
        with tarfile.open(self.sdist) as archive:
            return {name.split("/", 1)[1] for name in archive.getnames()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist of the checkout, and a wheel made from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return Built(next(out.glob("*.whl")), next(out.glob("*.tar.gz")))


@pytest.fixture(scope="module")
def environment(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; what it depends on is borrowed from the running one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", built.wheel, cwd=folder)
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    Path(site.strip(), "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return folder


def tracked(folder: str) -> set[str]:
    """The files of a folder of the checkout, except what Python leaves there."""
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}


def test_wheel_holds_package_kernel_source_and_manifest(built: Built) -> None:
    names = built.wheel_files()
    cuda = {f"minflash/{name}" for name in tracked("cuda")}
    weights = {f"minflash/{name}" for name in tracked("weights/tiny")}
    assert cuda, "the checkout has no kernel source"
    assert names >= tracked("minflash") | cuda | weights | {"minflash/weights/default.json"}
    assert "minflash/py.typed" in names


def test_wheel_holds_nothing_else(built: Built) -> None:
    tops = {name.split("/", 1)[0] for name in built.wheel_files()}
    assert tops == {"minflash", f"minflash-{minflash.__version__}.dist-info"}
    assert built.wheel.stat().st_size < 1_000_000, "a converted model slipped into the wheel"


def test_sdist_is_complete(built: Built) -> None:
    expected = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".ci/run"}
    for folder in ("minflash", "cuda", "tests", "tools", "docs"):
        expected |= tracked(folder)
    assert built.sdist_files() >= expected


def test_installed_wheel_finds_its_files_from_another_folder(
    environment: Path, tmp_path: Path
) -> None:
    code = (
        "import minflash; from minflash.resources import resource_dir; "
        "print(minflash.__file__, resource_dir('cuda'), resource_dir('weights'), sep='\\n')"
    )
    output = run(environment / "bin" / "python", "-c", code, cwd=tmp_path)
    module, cuda, weights = (Path(line) for line in output.splitlines())
    for path in (module, cuda, weights):
        assert path.is_relative_to(environment), path
    assert {f"cuda/{path.relative_to(cuda)}" for path in files(cuda)} == tracked("cuda")
    assert json.loads((weights / "default.json").read_text(encoding="utf-8"))["wheel_sha256"]


def files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def test_installed_command(environment: Path, tmp_path: Path) -> None:
    command = environment / "bin" / "minflash"
    assert run(command, "--version", cwd=tmp_path).split()[-1] == minflash.__version__
    assert "run" in run(command, "--help", cwd=tmp_path)


def test_resource_dir_names_what_is_missing() -> None:
    with pytest.raises(errors.MinflashError, match=r"no_such_folder.*install minflash again"):
        resources.resource_dir("no_such_folder")


def test_import_is_quick_and_light(environment: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; begin = time.perf_counter(); import minflash; "
        "print(time.perf_counter() - begin, *sys.modules)"
    )
    runs = [run(environment / "bin" / "python", "-c", code, cwd=tmp_path).split() for _ in range(7)]
    assert not set(HEAVY) & set(runs[0][1:])
    assert min(float(words[0]) for words in runs) < 0.1


def test_help_and_version_load_nothing_heavy(environment: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom minflash.cli import main\n"
        "try:\n    main(['--version'])\nexcept SystemExit:\n    pass\nprint(*sys.modules)"
    )
    output = run(environment / "bin" / "python", "-c", code, cwd=tmp_path)
    assert not set(HEAVY) & set(output.split())


def test_version_is_written_once() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not re.search(r"^version\s*=\s*[\"']", pyproject, re.MULTILINE)
    version = re.compile(rf"[\"']{re.escape(minflash.__version__)}[\"']")
    holders = [path.name for path in SOURCES if version.search(path.read_text(encoding="utf-8"))]
    assert holders == ["__init__.py"]


def imported_modules(path: Path) -> set[str]:
    """Top-level names of the modules a file imports, also by a function that takes the name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rsplit(".", 1)[-1]
            if called in ("import_module", "importorskip", "__import__"):
                names.add(str(node.args[0].value))
    return {name.split(".", 1)[0] for name in names}


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda path: path.name)
def test_nothing_imports_torch(path: Path) -> None:
    assert not imported_modules(path) & {"torch", "transformers", "tensorflow", "jax"}


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_what_tests_share_is_in_no_test_file(path: Path) -> None:
    assert not [name for name in imported_modules(path) if name.startswith("test_")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_package_imports_only_what_it_declares(path: Path) -> None:
    foreign = imported_modules(path) - set(sys.stdlib_module_names) - {"minflash", ""}
    assert foreign <= DECLARED


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"
