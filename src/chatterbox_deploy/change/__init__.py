"""From what is on a host to what a fleet file asks for: observed, planned, carried out, remembered, or gone back on."""
