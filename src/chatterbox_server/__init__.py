"""An OpenAI-compatible speech server around one Chatterbox model. Has never heard of a fleet."""
