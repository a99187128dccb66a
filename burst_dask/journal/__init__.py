"""Reading and appending the logs: the protocol's pure rules applied to a store.

`log` appends one entry; `view` is what a process knows of a run and how it learns more.
"""
