"""``minillm judge``: responses of evaluations scored, or compared two by two, by a model behind a chat endpoint.

``samples`` reads what evaluations left, ``prompts`` makes the questions and reads the verdicts, ``client`` sends one
request, ``cost`` counts and holds the limit, ``cache`` keeps answers, ``ask`` puts these together for one question,
``figures`` makes shares and intervals of the verdicts, ``run`` judges whole folders, ``command`` prints.
``likelihood`` compares the same folders, to a record of the same form, by what a frozen model finds likelier.
"""

from __future__ import annotations

from minillm.judge.run import judge
from minillm.judge.settings import JudgeSettings

__all__ = ["JudgeSettings", "judge"]
