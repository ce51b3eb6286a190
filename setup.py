"""What pyproject.toml cannot say: the wheel takes in two folders that stay at the top of the repository."""

from setuptools import find_packages, setup

SHIPPED = {f"calib_guidance.{folder}": folder for folder in ("lightning_configs", "checkpoints")}

setup(packages=[*find_packages(include=["calib_guidance*"]), *SHIPPED], package_dir=SHIPPED)
