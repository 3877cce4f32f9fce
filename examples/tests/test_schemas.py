"""Every schema that a VLM is asked to follow, through the engines that hold it to a schema:
xgrammar, llguidance and lm-format-enforcer of vLLM and SGLang, and OpenAI's strict mode.

    pip install --no-deps xgrammar==0.2.8 apache-tvm-ffi    # triton is 1 GB, for a GPU
"""

import functools
import json
import random

import numpy as np
import pytest
from openai.lib._pydantic import to_strict_json_schema

import collabvr as c
from examples.baselines import METHODS

PLAN = {
    "observation": "A maze of 4 x 4 cells.\nThe \"circle\" is at C:\\1.",
    "remaining_goal": "the rest",
    "task_complete": False,
    "instruction": "Move it right.",
    "target_state": "It is there.",
    "estimated_steps_remaining": 12,
}
DONE = PLAN | {"task_complete": True, "instruction": "", "target_state": ""}
REJECT = {
    "reason": "",
    "action_executed": False,
    "progress": "none",
    "good_fraction": 0.25,
    "suggestion": "Move it left.",
    "confidence": "low",
    "verdict": "reject",
}
ACCEPT = REJECT | {
    "action_executed": True, "progress": "complete", "good_fraction": 1, "verdict": "accept"}
ROUTE = {"reason": "a slip", "action": "regen", "suggestion": "slower", "estimated_steps": 0}
PICK = {"reason": "the first", "best": 1}
TWO = {"critiques": ["good", "bad\t"], "prompt": "Move it."}
MILESTONE = {"instruction": "Move it.", "target_state": "there"}
MILESTONES = {"observation": "a maze", "milestones": [MILESTONE, MILESTONE | {"target_state": ""}]}
KEEP = {"reason": "good enough", "action": "keep"}

VALID = {
    "Plan": [PLAN, DONE],
    "FirstPlan": [PLAN],
    "Verification": [REJECT, ACCEPT],
    "Routing": [ROUTE],
    "Pick": [PICK],
    "Critique": [TWO],
    "Milestones": [MILESTONES],
    "SampleRouting": [KEEP],
}


# ------------------------------------------------------------------------------
# The schemas: whatever the methods ask for when every clip is accepted, and when none is


class Supervisor:
    """A VLM that answers from VALID and keeps the schemas."""

    def __init__(self, verdict):
        self.verdict, self.schemas = verdict, {}

    def __call__(self, instructions, parts, schema):
        self.schemas[schema.__name__, json.dumps(schema.model_json_schema())] = schema
        if schema.__name__ == "Verification":
            return json.dumps(self.verdict)
        return json.dumps(VALID[schema.__name__][0])


def painter(frame, prompt, seconds, seed):
    return c.Clip(np.repeat(frame[None], 1 + round(seconds * 2), 0), 2)


@functools.cache
def asked_for() -> dict:
    """All schemas, by name; where a name has several (as many picks as candidates), numbered."""
    found = {}
    picture = np.zeros((16, 16, 3), np.uint8)
    for verdict in (ACCEPT | {"progress": "partial"}, REJECT):
        for method in METHODS.values():
            vlm = Supervisor(verdict)
            method(c.Models(painter, vlm), c.Config(M=1)).run(picture, "Move it.")
            found |= vlm.schemas
    return found


def schemas() -> list:
    return list(asked_for().values())


def test_every_schema_has_a_valid_reply_here():
    assert {name for name, _ in asked_for()} == set(VALID)


KEYWORDS = {  # Gemini's list for response_json_schema, as google-genai 3.3.0 has it
    "$defs", "$ref", "additionalProperties", "anyOf", "description", "enum", "items", "maxItems",
    "maximum", "minItems", "minimum", "properties", "required", "title", "type",
}


def keywords(schema: dict) -> set:
    """Of a schema and all that it contains. Names of fields are none."""
    found = set(schema)
    for name in ("properties", "$defs"):
        for part in schema.get(name, {}).values():
            found |= keywords(part)
    for part in schema.get("anyOf", []):
        found |= keywords(part)
    if "items" in schema:
        found |= keywords(schema["items"])
    return found


def test_no_schema_has_a_keyword_that_some_lack():
    """const breaks lm-format-enforcer; minLength, maxLength and pattern make xgrammar forbid
    escapes and let raw control characters through."""
    for schema in schemas():
        assert keywords(schema.model_json_schema()) <= KEYWORDS, schema


def test_openais_strict_mode_has_nothing_to_change():
    for schema in schemas():
        assert to_strict_json_schema(schema) == schema.model_json_schema()


# ------------------------------------------------------------------------------
# The engines: which bytes may follow, and is the reply complete?


class XGrammar:
    """vLLM's and SGLang's first choice."""

    unchecked = ""  # keywords that it ignores

    def __init__(self, schema: dict):
        self.xgrammar = pytest.importorskip(
            "xgrammar", reason="pip install --no-deps xgrammar==0.2.8 apache-tvm-ffi")
        self.matcher = self.xgrammar.GrammarMatcher(self.compiled(json.dumps(schema)))
        self.mask = self.xgrammar.allocate_token_bitmask(1, 257)

    @staticmethod
    @functools.cache
    def compiled(schema: str):
        import xgrammar
        vocabulary = [bytes([i]) for i in range(256)] + [b"</s>"]
        info = xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[256])
        return xgrammar.GrammarCompiler(info).compile_json_schema(schema)

    def follow(self) -> set:
        self.matcher.fill_next_token_bitmask(self.mask)
        bits = np.unpackbits(self.mask.numpy().view(np.uint8), bitorder="little")
        return set(np.flatnonzero(bits[:256]).tolist())

    def feed(self, byte: int):
        assert self.matcher.accept_token(byte)

    def complete(self) -> bool:
        return self.matcher.is_completed()


class LLGuidance:
    """vLLM's second choice, where xgrammar cannot do a schema."""

    unchecked = ""

    def __init__(self, schema: dict):
        llguidance = pytest.importorskip("llguidance", reason="in examples/requirements.txt")
        grammar = llguidance.LLMatcher.grammar_from_json_schema(
            schema, defaults={"whitespace_flexible": True})
        self.matcher = llguidance.LLMatcher(self.tokenizer(), grammar, log_level=0)
        assert not self.matcher.is_error(), self.matcher.get_error()

    @staticmethod
    @functools.cache
    def tokenizer():
        import llguidance
        return llguidance.LLTokenizer("byte")

    def follow(self) -> set:
        allowed = self.matcher.compute_logit_bias()  # a byte each, 0 where it may not follow
        return set(np.flatnonzero(np.frombuffer(allowed, np.uint8)[:256]).tolist())

    def feed(self, byte: int):
        assert self.matcher.consume_token(byte)

    def complete(self) -> bool:
        return self.matcher.is_accepting()


class FormatEnforcer:
    """lm-format-enforcer, which vLLM offers too. It knows ASCII only, and no numbers' limits."""

    unchecked = "minimum maximum"

    def __init__(self, schema: dict):
        enforcer = pytest.importorskip("lmformatenforcer", reason="in examples/requirements.txt")
        self.parser = enforcer.JsonSchemaParser(schema)

    def follow(self) -> set:
        return {ord(x) for x in self.parser.get_allowed_characters() if ord(x) < 128}

    def feed(self, byte: int):
        self.parser = self.parser.add_character(chr(byte))

    def complete(self) -> bool:
        return self.parser.can_end()


def takes(engine, schema, text: str) -> bool:
    state = engine(schema.model_json_schema())
    for byte in text.encode():
        if byte not in state.follow():
            return False
        state.feed(byte)
    return state.complete()


def drawn(engine, schema, seed: int) -> str:
    """What a model that understands nothing writes: bytes at random, those that end a string, a
    number or an object more often."""
    rng, state, text = random.Random(seed), engine(schema.model_json_schema()), bytearray()
    while not (state.complete() and rng.random() < 0.5):
        follow = sorted(x for x in state.follow() if x < 128)
        ends = [x for x in follow if chr(x) in '",]}']
        if not follow:
            break
        text.append(rng.choice(ends if ends and rng.random() < 0.2 else follow))
        state.feed(text[-1])
    assert state.complete()
    return text.decode()


engines = pytest.mark.parametrize("engine", [XGrammar, LLGuidance, FormatEnforcer])


@engines
def test_valid_replies_pass_on_one_line_and_on_many(engine):
    for schema in schemas():
        for reply in VALID[schema.__name__]:
            for layout in ({}, {"separators": (",", ":")}, {"indent": 2}):
                assert takes(engine, schema, json.dumps(reply, **layout)), reply


def test_letters_of_all_languages_pass():
    for engine in (XGrammar, LLGuidance):
        reply = PLAN | {"observation": "\u00e4\u65e5\U0001f642"}
        assert takes(engine, c.Plan, json.dumps(reply, ensure_ascii=False))


def wrong(schema: dict, reply: dict, unchecked: str):
    """Replies in which one thing is wrong."""
    for name, value in reply.items():
        field = schema["properties"][name]
        yield {k: v for k, v in reply.items() if k != name}
        yield reply | {name: None}
        yield reply | {name: 7 if isinstance(value, str) else "7"}
        if "enum" in field:
            yield reply | {name: "maybe"}
            yield reply | {name: value.upper()}
        if "minimum" in field and "minimum" not in unchecked:
            yield reply | {name: field["minimum"] - 1}
        if "maximum" in field and "maximum" not in unchecked:
            yield reply | {name: field["maximum"] + 1}
        if "minItems" in field:
            yield reply | {name: value[:field["minItems"] - 1]}
        if "maxItems" in field:
            yield reply | {name: value[:1] * (field["maxItems"] + 1)}
    yield reply | {"more": "than asked for"}


@engines
def test_invalid_replies_are_refused(engine):
    for schema in schemas():
        reply = VALID[schema.__name__][0]
        text = json.dumps(reply)
        texts = [json.dumps(x) for x in wrong(schema.model_json_schema(), reply, engine.unchecked)]
        texts += [text[:-1], f"{text}.", f"[{text}]", f"{text[:-1]},}}", "", "{}", "no"]
        for bad in ("\0", "\x1f", "\\x"):  # between fields, and in them
            texts.append(text.replace(" ", bad))
        for text in texts:
            assert not takes(engine, schema, text), text


@engines
@pytest.mark.parametrize("seed", range(4))
def test_what_an_engine_lets_through_is_json(engine, seed):
    """And only our own rules may refuse it."""
    limits = {"minimum": "greater_than_equal", "maximum": "less_than_equal"}
    ours = {"value_error", "finite_number"} | {limits[x] for x in engine.unchecked.split()}
    for schema in schemas():
        text = drawn(engine, schema, seed)
        reply = json.loads(text)
        try:
            schema.model_validate(reply)
        except c.ValidationError as error:
            assert {x["type"] for x in error.errors()} <= ours, text
