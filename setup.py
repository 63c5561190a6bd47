"""Lists the packages, which pyproject.toml cannot where a folder bears another name: kernels/ is lcx_kernels."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["lcx", "lcx.*"])
    + ["lcx_kernels"]
    + [f"lcx_kernels.{name}" for name in find_packages("kernels")],
)
