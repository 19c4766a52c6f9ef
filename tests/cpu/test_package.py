"""What is installed: one package, which works without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile

from tests.helpers import ROOT


def test_a_wheel_holds_lrsa_ds_alone_and_works_where_it_is_unpacked(tmp_path):
    for folder in ("lrsa_ds", "launch", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / "source" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=tmp_path / "source", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {n.split("/")[0] for n in archive.namelist() if ".dist-info/" not in n} == {"lrsa_ds"}
        assert "lrsa_ds/py.typed" in archive.namelist()
        archive.extractall(tmp_path / "site")
    use = (
        "import lrsa_ds, lrsa_ds.train.run, lrsa_ds.evaluate.run, lrsa_ds.train.selftest, lrsa_ds.sweep, sys;"
        "print(lrsa_ds.__file__, lrsa_ds.LRSAConfig().num_kept, {'recipes', 'launch', 'mlflow'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", use], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == [str(tmp_path / "site" / "lrsa_ds" / "__init__.py"), "128", "set()"]
