"""The source names no way from a file to running code; and the guard of the fuzz tests sees one where there is one."""

from __future__ import annotations

import ast
import os
import pickle
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import steplm

PACKAGE = Path(steplm.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}  # called as they are, not as model.eval()
FORBIDDEN_CALLS = {
    "pickle.load", "pickle.loads", "torch.load", "torch.jit.load", "torch.hub.load", "marshal.loads", "shelve.open",
    "joblib.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "os.system", "os.popen", "runpy.run_path",
}  # fmt: skip
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "runpy"}
# A call that runs remote code, or a pickle, unless it says that it must not.
MUST_SAY = {"trust_remote_code": False, "allow_pickle": False}
SAYS = {"AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained", "AutoModelForCausalLM.from_pretrained"}


def complaints(source: str) -> Iterator[str]:
    """What a module's source does that it must not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"imports {name}" for name in names if name.partition(".")[0] in FORBIDDEN_MODULES)
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        if name in FORBIDDEN_NAMES | FORBIDDEN_CALLS:
            yield f"calls {name}"
        for keyword, safe in MUST_SAY.items():
            value = keywords.get(keyword)
            if value is not None and not (isinstance(value, ast.Constant) and value.value is safe):
                yield f"says {keyword}={ast.unparse(value)}"
        if name in SAYS and "trust_remote_code" not in keywords:
            yield f"{name} does not say trust_remote_code"
        if name in ("np.load", "numpy.load", "np.save") and "allow_pickle" not in keywords:
            yield f"{name} does not say allow_pickle"
        if name == "yaml.load" and ast.unparse(keywords.get("Loader", ast.Constant(None))) != "YamlLoader":
            yield "yaml.load with another loader than the safe one"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_executes_what_a_file_says(path: Path) -> None:
    assert list(complaints(path.read_text())) == []


def test_the_yaml_loader_is_a_safe_one() -> None:
    from steplm import yaml_files

    assert issubclass(yaml_files.YamlLoader, yaml.SafeLoader)
    assert "!!python" not in str(yaml_files.YamlLoader.yaml_constructors)


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')", "import pickle", "torch.load(f)", "yaml.load(t, Loader=yaml.Loader)", "np.load(f)",
        "np.load(f, allow_pickle=True)", "AutoConfig.from_pretrained(x)", "f(trust_remote_code=flag)", "os.system(x)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert list(complaints(source))
    assert list(complaints("model.eval(); np.load(f, allow_pickle=False); re.compile(x)")) == []


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("made-by-a-pickle",)


@pytest.mark.parametrize(
    "breach",
    [
        lambda folder: (folder.parent / "elsewhere").write_text("x"),
        lambda folder: os.mkdir(folder.parent / "elsewhere"),
        lambda folder: os.rename(folder / "a", folder.parent / "a"),
        lambda folder: os.system("true"),
        lambda folder: subprocess.run(["true"], check=True),
        lambda folder: pickle.loads(b"N."),
        lambda folder: torch.load(folder / "a"),
        lambda folder: yaml.load("a: 1", Loader=yaml.UnsafeLoader),
        lambda folder: np.load(folder / "pickled.npy", allow_pickle=True),
    ],
)
def test_the_guard_sees_a_breach(
    breach: Callable[[Path], object], claim: Callable[..., AbstractContextManager[None]], tmp_path: Path
) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (folder / "a").write_text("a")
    np.save(folder / "pickled.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    with pytest.raises(BaseException, match=r"open|mkdir|rename|system|Popen|pickle|load|yaml"), claim(folder):
        breach(folder)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["inside"]
