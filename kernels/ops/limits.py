"""Numbers that several backends keep to."""

# Calls with at most this many query rows are decode steps: without a compiler they go to `gather`.
DECODE_ROWS_MAX = 16
# The native programs hold keys in panels of 8 to 32, by processor; this block size fits all of them.
NATIVE_BLOCK_STEP = 32
