"""What an operator does with a store: upgrade it, check it, copy it, prune it."""
