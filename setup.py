"""Which packages a wheel has; all else about it is in pyproject.toml.

`launch`, `recipes`, `conf` and `benchmarks` are folders of the checkout. A wheel has them in `lrsa_ds/_checkout`, where
`python -m lrsa_ds` finds them, and so installs a single top-level package.
"""

from setuptools import find_namespace_packages, setup

BESIDE = ("benchmarks", "conf", "launch", "recipes")
INSIDE = "lrsa_ds._checkout"

beside = find_namespace_packages(
    include=[pattern for name in BESIDE for pattern in (name, f"{name}.*")], exclude=["benchmarks.results*"]
)
setup(
    packages=[*find_namespace_packages(include=["lrsa_ds", "lrsa_ds.*"]), *(f"{INSIDE}.{name}" for name in beside)],
    package_dir={f"{INSIDE}.{name}": name for name in BESIDE},
)
