"""A Dask scheduler backend with no scheduler process."""
