"""The one thing that pyproject.toml cannot say: the wheel carries configs/ as bigbatch/configs/."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["bigbatch*"]), "bigbatch.configs"],
    package_dir={"bigbatch.configs": "configs"},
)
