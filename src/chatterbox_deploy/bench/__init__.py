"""How much a fleet speaks under load, and how sure that is: many requests timed, and what they come down to."""
