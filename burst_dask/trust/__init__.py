"""Signed sessions: where their keys are kept, and stores as these keys vouch for them."""
