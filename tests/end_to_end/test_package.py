"""The wheel: all that is needed travels in it."""

from __future__ import annotations

import importlib.util
import re
import zipfile
from pathlib import Path

import pytest
from commands import ARITHMETIC, OFFLINE, REPOSITORY, TINY, TRAIN, contents, report_in, run_process

HAVE_BACKEND = importlib.util.find_spec("hatchling") is not None
# Without the build backend at hand, pip downloads it.
pytestmark = [] if HAVE_BACKEND else [pytest.mark.slow]


@pytest.fixture(scope="module")
def unzipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of a wheel built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if HAVE_BACKEND else []
    pip = ["-m", "pip", "wheel", "--quiet", "--no-deps", *isolation, "--wheel-dir", str(folder), str(REPOSITORY)]
    run_process(*pip, folder=folder).ok()
    (wheel,) = folder.glob("simcot_latent-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unzipped")
    return folder / "unzipped"


def test_the_wheel_holds_what_is_not_python_too(unzipped: Path) -> None:
    files = set(contents(unzipped))
    configs = {f"simcot_latent/{path.relative_to(REPOSITORY)}" for path in REPOSITORY.glob("configs/**/*.yaml")}
    assert len(configs) >= 12
    assert configs <= files
    assert {"simcot_latent/py.typed", "simcot_latent/data/ranks/default.tiktoken"} <= files
    assert {f"simcot_latent/{path.relative_to(REPOSITORY)}" for path in REPOSITORY.glob("evals/*.py")} <= files
    assert not [name for name in files if name.startswith("evals/")], "a name that other packages have"
    modules = {str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("simcot_latent/**/*.py")}
    assert modules <= files
    assert not [name for name in files if name.startswith(("tests", "configs", ".ci")) or "__pycache__" in name]
    (metadata,) = [name for name in files if name.endswith(".dist-info/METADATA")]
    text = (unzipped / metadata).read_text(encoding="utf-8")
    for line in ("Name: simcot-latent", "License-Expression: MIT", "Requires-Python: >=3.10", "Provides-Extra: dev"):
        assert line in text
    assert [name for name in files if name.endswith("licenses/LICENSE")]


def test_the_wheel_trains_and_evaluates_from_an_empty_folder(unzipped: Path, tmp_path: Path) -> None:
    env = {**OFFLINE, "PYTHONPATH": str(unzipped)}
    where = "import simcot_latent.evals.gsm8k as e, simcot_latent.config as c; "
    where += "print(e.__file__, c.__file__, c.config_dir(), sep='\\n')"
    for line in run_process("-c", where, folder=tmp_path, env=env).ok().out.splitlines():
        assert line.startswith(str(unzipped)), "this checkout was tested, not the wheel"
    assert list(tmp_path.iterdir()) == []
    arguments = ("mode=latent", "num_iterations=2", *TINY, *ARITHMETIC)
    trained = run_process("-m", TRAIN, *arguments, folder=tmp_path, env=env).ok()
    assert "next: python -m simcot_latent.evals.arithmetic ckpt=runs/latent" in trained.out
    assert (tmp_path / "runs/latent/latest/step_decoder.safetensors").is_file()
    checkpoint = "ckpt=runs/latent/latest"
    evaluate = ("-m", "simcot_latent.evals.arithmetic", checkpoint, "limit=3", "device=cpu")
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals/__init__.py").write_text("raise ImportError('somebody else's')")
    run_process(*evaluate, folder=tmp_path, env=env).ok()
    assert report_in(tmp_path / "runs/latent/evals", "arithmetic.test").is_file()


def test_the_wheel_knows_its_version_and_its_commands(unzipped: Path, tmp_path: Path) -> None:
    env = {**OFFLINE, "PYTHONPATH": str(unzipped)}
    [declared] = re.findall(r'^version = "(.+)"$', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    printed = run_process("-c", "import simcot_latent as sl; print(sl.__version__)", folder=tmp_path, env=env).ok()
    assert printed.out.strip() == declared
    (file,) = unzipped.glob("*.dist-info/entry_points.txt")
    names = re.findall(r"^(simcot-\w+) = simcot_latent.commands:\w+$", file.read_text(), re.MULTILINE)
    assert sorted(names) == ["simcot-eval", "simcot-export", "simcot-import", "simcot-probe", "simcot-train"]
