"""What a machine's GPUs do, fleet or no fleet: asked, judged, and shown as Markdown, as a page, or as JSON."""
