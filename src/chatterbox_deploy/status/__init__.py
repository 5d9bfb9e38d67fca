"""How a fleet is now, a row an instance: asked, compared with what the fleet file says, and in columns."""
