"""Tokens to sound: whose is next (``sounding``), who speaks with whom (``sound``), and what they go through.

That is ``encoder``, ``flow``, ``vocoder`` and ``watermark``, over the package's weights, of ``layers`` with masks;
``tiles`` are those in Triton, ``recorded`` the CUDA graphs of all.
"""
