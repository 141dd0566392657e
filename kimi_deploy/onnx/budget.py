"""How much of a model an export holds in memory at a time."""

PART_BYTES = 32 << 20
"""Size that parts of a parameter are cut to, in the stored dtype; an expert is never cut."""
IN_FLIGHT_BYTES = 512 << 20
"""What the pieces being worked on may hold together, or one piece that is larger."""
