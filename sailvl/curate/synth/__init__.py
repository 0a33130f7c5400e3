"""Pictures with exact answers: they come from the data that was drawn, never from the pixels.

``words`` says things in English and Chinese, ``scene`` draws, ``families`` invents scenes and asks about them,
``source`` deals them out as training records and test questions. (Report section 3.1: SAIL-Table/Chart, Cap2QA; the
report lets an LLM write plotting code, here the generators are small programs and need no model.)
"""

from sailvl.curate.synth.families import FAMILIES
from sailvl.curate.synth.source import SynthSource, questions

__all__ = ["FAMILIES", "SynthSource", "questions"]
