"""The version of this package."""

from importlib import metadata


def installed_version(package: str) -> str:
    """Version of an installed package, or 'unknown' where it runs from a folder uninstalled.

    Examples:
      >>> installed_version("no_such_package")
      'unknown'
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


__version__ = installed_version("meta_jax")
