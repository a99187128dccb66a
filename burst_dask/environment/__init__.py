"""What tasks find around them on a worker: versions that fit, the session's own code, and packages.

::

    client                       store                           worker
    versions ──▶ packing ──▶ manifest, code/<digest> ──▶ preparing ──┬─▶ archive:    unpack the code
                    │                                                ├─▶ installing: pip
                    └─ archive: zip the code                         └─▶ versions:   refuse, or tell differences

Archives, digests, tables of differences and what pip is told are pure; `preparing` and
`installing` act.
"""
