"""What tests the product without being a test: the rules as checks of a store, and a simulator of whole worlds."""
