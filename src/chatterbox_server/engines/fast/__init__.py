"""The same models as ``stock``, many utterances at once: one batch of T3's steps, one of S3Gen's, on one GPU."""
