"""The pages: the site builds with every link checked, and the figures are those that the code draws."""

import subprocess
import sys

import numpy as np
from matplotlib.image import imread

from docs import figures
from tests.helpers import ROOT


def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GB" in (tmp_path / "memory_128k.html").read_text()


def test_the_figures_are_those_that_the_code_draws(tmp_path):
    figures.write(tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert len(drawn) >= 5
    for name in drawn:
        ours, theirs = imread(tmp_path / name), imread(ROOT / "docs" / "pictures" / name)
        # Fonts and antialiasing may differ between versions of matplotlib.
        assert ours.shape == theirs.shape and np.abs(ours - theirs).mean() < 0.02, f"run python docs/figures.py: {name}"
