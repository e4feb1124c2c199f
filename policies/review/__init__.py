"""What a policy will do, before it does it: how long, what in it can never happen, and in sentences."""
