"""A4: Python and compiled code that a model, a data set or a configuration brings along is never run, and no setting
or option allows it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any, NoReturn

import pytest
from pydantic import BaseModel
from transformers import AutoConfig, dynamic_module_utils
from transformers.integrations import hub_kernels

from minillm import loading
from minillm.cards import BuildSpec, Card
from minillm.config import RunConfig
from minillm.settings import _models_in
from minillm.study.config import StudyConfig
from tests.attacks.hostile import Place, Run, change, fired, refused

EVIL = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
class EvilConfig(PreTrainedConfig): model_type = "evil"
class EvilModel(PreTrainedModel): config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast): pass
"""


def plant(folder: Path, marker: Path, *, model_type: str) -> None:
    """Code in a model folder, named by its configuration and by its tokenizer."""
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)), encoding="utf-8")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(EVIL.format(marker=str(marker)), encoding="utf-8")
    auto = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    change(folder / "config.json", model_type=model_type, auto_map=auto)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]})
    change(folder / "generation_config.json", custom_generate="custom_generate")


def test_code_of_an_unknown_architecture_is_refused(place: Place, run: Run) -> None:
    plant(place.student, place.marker, model_type="evil")
    for command in (("distill",), ("evaluate", place.student, "--out", place.top / "e")):
        outcome = run(*command, "--config", place.config)
        refused(outcome, "ModelError", "Python code of its own", "minillm runs none of it")


def test_a_known_architecture_is_read_with_the_librarys_own_classes(place: Place, run: Run) -> None:
    plant(place.student, place.marker, model_type="llama")
    assert run("evaluate", place.student, "--config", place.config, "--out", place.top / "e").code == 0


def test_control_code_that_is_allowed_does_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(place.top / "modules"))
    plant(place.student, place.marker, model_type="evil")
    AutoConfig.from_pretrained(place.student, trust_remote_code=True)
    fired(place.marker)


@pytest.mark.parametrize(
    "setting",
    [
        *("trust_remote_code=true", "engine.trust_remote_code=true", "data.trust_remote_code=true"),
        *("stages.0.trust_remote_code=true", "student={model: x, trust_remote_code: true}"),
    ],
)
def test_no_setting_allows_it(setting: str, place: Place, run: Run) -> None:
    refused(run("distill", "--config", place.config, setting), "ConfigError")


def test_no_card_and_no_option_allows_it(place: Place, run: Run) -> None:
    card = place.top / "card.yaml"
    card.write_text(f"model: {place.student}\ntrust_remote_code: true\n")
    refused(run("distill", "--config", place.config, f"student={card}"), "ConfigError", "trust_remote_code")
    outcome = run("distill", "--config", place.config, "--trust-remote-code")
    assert outcome.code == 2 and "No such option" in outcome.err


def fields(model: type[BaseModel]) -> dict[str, str]:
    """Every setting below a class of settings, by the class and its name."""
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        found[f"{model.__name__}.{name}"] = name
        for inner in _models_in(field.annotation):
            found |= fields(inner)
    return found


def allowing(names: dict[str, str]) -> list[str]:
    return [at for at, name in names.items() if any(word in name for word in ("trust", "remote", "code", "unsafe"))]


def test_no_field_of_any_configuration_sounds_like_it() -> None:
    names = {**fields(RunConfig), **fields(StudyConfig), **fields(Card)}
    assert len(names) > 100 and allowing(names) == []
    assert allowing({"Card.trust_remote_code": "trust_remote_code"}) == ["Card.trust_remote_code"]  # the control


SFT = "stages=[{kind: sft, steps: 1, batch: 2, optimiser: {lr: 1e-2}}]"
KERNELS: list[dict[str, Any]] = [
    {"attn_implementation": "evil/kernel"},
    {"_attn_implementation": "evil/kernel"},
    {"attn_implementation": {"": "evil/kernel"}},
    {"attn_implementation": "kernels-community/flash-attn"},
    {"attn_implementation": "flash_attention_3"},
    {"attn_implementation": "paged|evil/kernel"},
    {"experts_implementation": "sonicmoe"},
]


@pytest.mark.parametrize("wanted", KERNELS, ids=[json.dumps(each) for each in KERNELS])
def test_compiled_code_that_a_configuration_names_is_refused(wanted: dict[str, Any], place: Place, run: Run) -> None:
    """The package ``kernels`` fetches and runs it, where that is installed."""
    change(place.student / "config.json", **wanted)
    outcome = run("distill", "--config", place.config)
    refused(outcome, "ModelError", "may be code from elsewhere", "minillm runs none of it")


def test_compiled_code_that_a_card_names_is_refused(place: Place, run: Run) -> None:
    card = place.top / "card.yaml"
    for name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        card.write_text(f"build: {{architecture: llama, tokenizer: world, config: {{{name}: evil/kernel}}}}\n")
        refused(run("distill", "--config", place.config, f"student={card}", SFT), "ModelError")


def test_control_without_the_guard_the_kernel_is_fetched(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object, **__: object) -> NoReturn:
        place.marker.touch()
        raise ValueError("a kernel would run now")

    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", fetch)
    monkeypatch.setattr(loading, "_require_known_code", lambda name, config: None)
    change(place.student / "config.json", attn_implementation="evil/kernel")
    card = Card(name="it", model=str(place.student))
    facts = loading.inspect(card)
    with pytest.raises(loading.ModelError, match="a kernel would run now"):
        loading.load(card, facts, seed=0)
    fired(place.marker)


def test_plain_attention_may_be_named(place: Place) -> None:
    """The control of the refusals: they are of what is fetched, not of the setting."""
    for name in ("eager", "sdpa"):
        change(place.student / "config.json", attn_implementation=name)
        loading.inspect(Card(name="it", model=str(place.student)))
    loading.inspect(Card(name="it", build=BuildSpec(architecture="llama", tokenizer="world")))


def test_an_adapter_that_names_another_model_is_refused(place: Place, run: Run) -> None:
    change(place.student / "adapter_config.json", base_model_name_or_path=str(place.outside), peft_type="LORA")
    refused(run("distill", "--config", place.config), "ModelError", "holds an adapter", "merge it")


def test_a_script_beside_a_data_set_is_not_run(place: Place, run: Run) -> None:
    folder = place.top / "rows"
    folder.mkdir()
    script = folder / "rows.py"
    script.write_text(f"from pathlib import Path\nPath({str(place.marker)!r}).touch()\n")
    outcome = run("distill", "--config", place.config, f"data.train=hub:{folder}@train")
    refused(outcome, "DataError", "could not be loaded")
    runpy.run_path(str(script))
    fired(place.marker)


HOSTILE_TEMPLATES = {
    "reaches for the system": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "runs a command": "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "imports": "{{ self.__init__.__globals__.__builtins__.__import__('pathlib').Path('MARKER').touch() }}",
    "divides by zero": "{{ 1 / 0 }}",
    "counts for ever": "{% for i in range(10 ** 12) %}x{% endfor %}",
    "includes a file": "{% include '/etc/passwd' %}",
    "does not parse": "{% if %}",
    "is no text": "{{ messages + 1 }}",
}


@pytest.mark.parametrize("what", HOSTILE_TEMPLATES)
def test_a_chat_template_is_a_program_in_a_box(what: str, place: Place, run: Run) -> None:
    """It comes with the model folder and is run by transformers in jinja's sandbox; whatever ends it is told."""
    text = HOSTILE_TEMPLATES[what].replace("MARKER", str(place.marker))
    (place.student / "chat_template.jinja").write_text(text)
    (place.top / "teacher" / "chat_template.jinja").write_text(text)
    outcome = run("distill", "--config", place.config, "data.template=chat")
    refused(outcome, "DataError", "chat template refuses the messages")


def test_control_the_same_template_outside_the_box_does_run(place: Place) -> None:
    import jinja2

    text = HOSTILE_TEMPLATES["runs a command"].replace("MARKER", str(place.marker))
    jinja2.Environment().from_string(text).render()
    fired(place.marker)
