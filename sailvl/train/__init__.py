"""Training: read ``loop.py`` first, then ``step.py``, ``loss.py`` and ``adalrs.py``."""
