"""What people hold: `Session`, `Run`, `Future`, and the ways to find them again."""
