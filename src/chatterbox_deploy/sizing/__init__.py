"""How many instances a GPU holds, and what they give, by what was measured. Decides; asks nobody."""
