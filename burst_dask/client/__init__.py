"""What a client does for them: coroutines that submit, wait, collect, cancel and report, in requests to the store."""
