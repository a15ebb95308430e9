"""Optional packages: which extra installs them, and what an input needs to be read.

A command checks what it will need when it starts, so that none fails at its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from nextscale.common.errors import UserError
from nextscale.common.reading import is_hub_name, read_json

_INSTALL = {
    "matplotlib": "'nextscale[quickstart]'",
    "gradio": "'nextscale[demo]'",
    "sklearn": "'nextscale[quickstart]'",
    "pyarrow": "'nextscale[data]'",
    "transformers": "'nextscale[features]'",
    "sentencepiece": "'nextscale[features]'",
    "tensorboard": "'nextscale[track]'",
    "textual_image": "'nextscale[terminal]'",
    "wandb": "wandb",
}
"""What pip installs, by the package that is imported."""
_PROJECTS = {"sklearn": "scikit-learn", "textual_image": "textual-image"}
"""Names of projects that differ from the name of their package."""
_FOLDERS_SEARCHED = 20
"""Sub-folders in which tables are looked for before a data set is opened; a folder of many classes has none."""


def import_extra(module: str, purpose: str) -> Any:
    """An optional module such as "matplotlib.figure". UserError when it cannot be imported; `purpose` begins it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        reason = "" if is_absent(error, package) else f" ({error})"
        raise UserError(f"{purpose} needs {get_project(package)}: {install_command(package)}{reason}") from None


def is_absent(error: ImportError, package: str) -> bool:
    """Whether this error of importing a package means that it is not installed, rather than that it is broken."""
    return isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package


def get_project(package: str) -> str:
    """The name under which pip knows a package that is imported by this name."""
    return _PROJECTS.get(package, package)


def install_command(package: str) -> str:
    """The command that installs an optional package."""
    return f"pip install {_INSTALL[package]}"


def check_extras(needs: Mapping[str, str]) -> None:
    """Import all of these packages, {package: purpose}; UserError names the first that is missing and its extra."""
    for package, purpose in needs.items():
        import_extra(package, purpose)


def list_data_needs(data: str | Path) -> dict[str, str]:
    """The optional packages that reading a data set needs, {package: purpose}. Nothing is opened."""
    path = Path(data)
    if str(data) == "digits":
        return {"sklearn": "reading the bundled digits"}
    if path.is_dir():
        folders = [path, *(p for p in sorted(path.iterdir())[:_FOLDERS_SEARCHED] if p.is_dir())]
        is_table = any(any(folder.glob("*.parquet")) for folder in folders)
    else:
        is_table = path.suffix == ".parquet" or (not path.suffix and is_hub_name(str(data)))
    return {"pyarrow": f"reading {data}"} if is_table else {}


def list_network_needs(network: str | Path) -> dict[str, str]:
    """The optional packages that loading a feature network or an encoder needs, {package: purpose}."""
    path = Path(network)
    config = path / "config.json"
    if config.is_file():
        record = read_json(config, finite=False)
        foreign = isinstance(record, dict) and "model_type" in record  # as transformers writes it
    else:
        foreign = not path.exists() and not path.suffix and is_hub_name(str(network))
    return {"transformers": f"loading {network}"} if foreign else {}
