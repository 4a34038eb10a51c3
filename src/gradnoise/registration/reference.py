"""What a plan may hold, generated from its typed model: the JSON Schema for editors, a page for people.

A test holds both against the files; `gradnoise plan render` writes them.
"""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter

from gradnoise.base.files import write_bytes, write_json
from gradnoise.registration.kinds import Name
from gradnoise.registration.plan import Plan

SCHEMA = "workflow/schemas/plan.schema.json"
PAGE = "docs/plan-reference.md"

_HEAD = """\
# Plan reference

Every field of a plan, `preregistration/*.yaml`. This page and the JSON Schema for editors
(`{schema}`) are generated from the typed model by `gradnoise plan render`.
An edit here would be lost.

A plan is YAML 1.2 and is read strictly. Refused, in one line that names the field: a key that is unknown,
misspelt or given twice; anchors, aliases and tags; dates; NaN and infinities; a quoted number. `2e-2` is 0.02
and `012` is 12; `1:30`, `no` and `yes` are texts, and so are refused where a number or `true` is asked for.

Beyond what the tables say, a plan loads only if
- every name it uses exists: outcomes, scores with their unit, cells, doses, tests, hypotheses;
- every tested block has as many seeds as `seeds.minimum` asks for;
- each hypothesis is in exactly one family;
- a rule rests only on tests that are read, with readings that they can have, and its p counts them all;
- whatever makes a hypothesis not met excludes that it is met, so no results can do both.
"""
_TYPES = {
    "string": "text",
    "number": "number",
    "integer": "whole number",
    "boolean": "true or false",
    "null": "null",
}
_BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minItems": "{} or more",
    "pattern": "like `{}`",
}

# The pattern of names, which are called so instead.
_NAME = TypeAdapter(Name).json_schema()["pattern"]

Schema = dict[str, Any]


def plan_schema() -> Schema:
    """The JSON Schema of a plan; a lock holds the SHA-256 of its canonical JSON."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Plan.model_json_schema()}


def plan_reference() -> str:
    """The page: one table for each mapping of a plan, in the order in which a plan is written."""
    schema = plan_schema()
    sections = [_HEAD.format(schema=SCHEMA)]
    sections += [_section(path, model) for path, model in _models("", schema, schema["$defs"])]
    return "\n".join(sections)


def write_reference() -> tuple[str, str]:
    """Write the schema and the page, from the repository root; gives their paths."""
    write_json(SCHEMA, plan_schema())
    write_bytes(PAGE, plan_reference().encode())
    return SCHEMA, PAGE


def _models(path: str, model: Schema, defs: Schema) -> Iterator[tuple[str, Schema]]:
    """Every mapping inside a model with its path, itself first: `tests[]`, `power.assumptions`."""
    yield path, model
    for name, field in model["properties"].items():
        below = f"{path}.{name}" if path else name
        for suffix, ref in _refs(field):
            yield from _models(below + suffix, defs[ref.rpartition("/")[2]], defs)


def _refs(field: Schema) -> Iterator[tuple[str, str]]:
    """Models that a field holds, with `[]` for each list around them."""
    if "$ref" in field:
        yield "", field["$ref"]
    for choice in (*field.get("oneOf", ()), *field.get("anyOf", ())):
        yield from _refs(choice)
    if "items" in field:
        yield from (("[]" + suffix, ref) for suffix, ref in _refs(field["items"]))


def _section(path: str, model: Schema) -> str:
    kind = model["properties"].get("kind", {}).get("const")
    title = f"`{path}`" + (f" of kind `{kind}`" if kind else "") if path else "The whole plan"
    lines = [f"## {title}", "", model["description"].strip(), ""]
    lines += ["| field | type | rule | meaning |", "|---|---|---|---|"]
    for name, field in model["properties"].items():
        rule = _rule(field, name in model.get("required", ()))
        cells = [f"`{name}`", _type(field), rule, field.get("description", "")]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _type(field: Schema) -> str:
    if "const" in field:
        return f"always `{_yaml(field['const'])}`"
    if "enum" in field:
        return "one of " + ", ".join(f"`{value}`" for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(_type(choice) for choice in field["anyOf"])
    if "$ref" in field or "oneOf" in field:
        return "mapping"
    if "prefixItems" in field:
        return f"list of {len(field['prefixItems'])}: " + ", ".join(map(_type, field["prefixItems"]))
    if field["type"] == "array":
        return f"list: {_type(field['items'])}"
    if field["type"] == "object":
        values = field.get("additionalProperties") or next(iter(field["patternProperties"].values()))
        return f"mapping of names to {_type(values)}"
    return "name" if field.get("pattern") == _NAME else _TYPES[field["type"]]


def _rule(field: Schema, required: bool) -> str:
    """Whether the field may be left out, and the bounds of its value."""
    bounds = [
        text.format(_yaml(part[bound]))
        for part in (field, *field.get("anyOf", ()))
        for bound, text in _BOUNDS.items()
        if part.get(bound, _NAME) != _NAME
    ]
    first = "required" if required else f"default {_default(field.get('default'))}"
    return "; ".join([first, *bounds])


def _default(value: object) -> str:
    return f"`{_yaml(value)}`" if value or isinstance(value, bool | int | None) else "empty"


def _yaml(value: object) -> str:
    """A value as a plan writes it."""
    return json.dumps(value) if isinstance(value, bool | None) else str(value)
