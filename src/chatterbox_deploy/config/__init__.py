"""``fleet.toml`` as the operator wrote it: strict at the door, defaults documented. Decides nothing.

``reading.load`` turns text into a ``FleetConfig`` or one ``FleetFileError`` that names every problem;
``fleet.resolve`` then decides what the file leaves open.
"""
