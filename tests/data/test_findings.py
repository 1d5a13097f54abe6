"""What was found, counted and named."""

import json

from llava_jax.data.findings import Findings


def test_findings_name_the_first_few():
    findings = Findings()
    for number in range(9):
        findings.add("odd", f"e{number}")
    other = Findings()
    other.add("odd", "x")
    other.add("rare", "y")
    findings.merge(other)
    assert findings.count == {"odd": 10, "rare": 1}
    assert findings.first == {"odd": [f"e{n}" for n in range(5)], "rare": ["y"]}
    assert Findings.from_json(json.loads(json.dumps(findings.to_json()))) == findings
