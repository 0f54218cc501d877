from setuptools import setup

setup()  # everything is in pyproject.toml; this file lets older tools install the project
