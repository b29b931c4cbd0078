"""Packaging: each top-level folder is one package, imported as ``ultrarec.<folder>``. The rest is in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = ("data", "embeddings", "kernels", "launch", "model", "trainer")

setup(
    packages=["ultrarec." + name for name in find_packages() if name.split(".")[0] in FOLDERS],
    package_dir={"ultrarec." + folder: folder for folder in FOLDERS},
    package_data={
        "ultrarec.data": ["sample/*"],
        "ultrarec.launch": ["studies/*.toml"],
        "ultrarec.trainer": ["recipes/*.toml"],
    },
)
