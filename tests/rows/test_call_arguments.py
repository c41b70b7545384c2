"""Call arguments are given to a template as it takes them, objects or text, and nothing of them is lost unsaid."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_plan import plan
from tiny_target import WITH_TAGS, WITHOUT_TAGS
from tokenizers import Tokenizer

ARGUMENTS = {"lake": "north end", "deep": True, "unit": None}
QUESTION = {"role": "user", "content": "How deep is it?"}
ANSWER = {"role": "assistant", "content": "It is 12 m deep, as measured."}
CALL = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
WAYS = {
    "objects": CALL + "{{ c.function.arguments | tojson }}{% endfor %}",
    "objects, by item": CALL + "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }} {% endfor %}{% endfor %}",
    "text": CALL + "{{ c.function.arguments }}{% endfor %}",
    "text, joined": CALL + "{{ '' + c.function.arguments }}{% endfor %}",
    "text, refused": CALL
    + "{% if c.function.arguments is not string %}{{ raise_exception('no text') }}{% endif %}"
    + "{{ c.function.arguments }}{% endfor %}",
}


def row(arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "depth", "arguments": arguments}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {"messages": [QUESTION, calling, {"role": "tool", "content": "12 m"}, ANSWER]}


@pytest.mark.parametrize("template", [WITH_TAGS, WITHOUT_TAGS], ids=["tags", "none"])
@pytest.mark.parametrize("given", [ARGUMENTS, json.dumps(ARGUMENTS)], ids=["object", "text"])
@pytest.mark.parametrize("way", WAYS)
def test_arguments_are_written_as_the_template_takes_them(tmp_path: Path, way: str, given: Any, template: str) -> None:
    writes = template.replace("{{ m.content }}<|im_end|>", "{{ m.content }}" + WAYS[way] + "<|im_end|>")
    made = plan(tmp_path, [row(given)], writes)
    ids = made.samples.input_ids(0)[made.samples.loss_mask(0)].tolist()
    text = Tokenizer.from_file(str(tmp_path / "target/tokenizer.json")).decode(ids)
    written = "lake=north end deep=True unit=None " if "item" in way else json.dumps(ARGUMENTS)
    assert text == f"<call>depth {written}{ANSWER['content']}"
    converted = {"notes": {"call arguments given to the template as text": 1}} if "text" in way else {}
    assert {name: made.counts()[name] for name in made.counts() if name in ("notes", "dropped")} == converted
    said = "\n".join(text for _, text in made.facts())
    assert ("call arguments given to the template as text in 1 samples (the template cannot" in said) == bool(converted)
