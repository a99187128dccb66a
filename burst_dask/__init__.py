"""A Dask scheduler backend with no scheduler process."""

__version__ = "0.1.0"
