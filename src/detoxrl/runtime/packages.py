"""Is an optional package installed?"""

from importlib import util


def is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    spec = util.find_spec(package)
    # A folder of that name, such as the one that wandb writes, also passes for a package, but has no origin.
    return spec is not None and spec.origin is not None
