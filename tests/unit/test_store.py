"""What a run leaves behind opens everywhere, and is never half written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from minillm import store
from minillm.config import dump_config
from minillm.errors import CheckpointError, RunExists
from minillm.manifests import sha256_of
from minillm.model_card import CardFacts, render
from minillm.models import CausalLM
from minillm.publish import publish_student, weights_sha256
from minillm.store import RunFolder, replaced_folder, write_jsonl, write_text
from minillm.types import Decoding
from tests import tiny

REAL = len(tiny.WORDS)
EOS = tiny.WORDS.index(tiny.EOS)
MODELS = [(family, tied, rows) for family in tiny.FAMILIES for tied in (True, False) for rows in (REAL, 32)]
DECODING = Decoding(max_new_tokens=7, temperature=0.8, top_k=5, top_p=0.9)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PreTrainedModel]:
    """A model by (family, tied, rows), its padded rows and its real ones all random."""
    top, made = tmp_path_factory.mktemp("trained"), dict[tuple[Any, ...], PreTrainedModel]()

    def model(family: str, tied: bool = True, rows: int = REAL) -> PreTrainedModel:
        key = (family, tied, rows)
        if key not in made:
            folder = tiny.save_model(top / str(len(made)), family, seed=4, tied=tied, rows=rows)
            made[key] = AutoModelForCausalLM.from_pretrained(folder).eval()
        return made[key]

    return model


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """What an engine hands to ``publish_student``: whole weights by the root's names, a tied one twice."""
    return {name: p.detach().clone() for name, p in CausalLM(model).named_parameters(remove_duplicate=False)}


def publish(folder: Path, model: PreTrainedModel, *, state: Mapping[str, Tensor] | None = None, **changes: Any) -> str:
    options: dict[str, Any] = {
        "state": state_of(model) if state is None else state,
        "config": model.config,
        "tokenizer": tiny.tokenizer(),
        "real_ids": REAL,
        "decoding": DECODING,
        "eos_ids": (EOS,),
        "pad_id": 0,
        "card": "# a card\n",
        **changes,
    }
    return publish_student(folder, **options)


def logits(model: PreTrainedModel) -> Tensor:
    ids_BS = torch.tensor([[5, 9, 4, EOS, 27, 3], [2, 2, 8, 11, 20, 1]])
    with torch.no_grad():
        found: Tensor = model(ids_BS).logits
    return found


@pytest.mark.parametrize(("family", "tied", "rows"), MODELS)
def test_plain_transformers_opens_the_published_student_with_the_same_logits(
    family: str, tied: bool, rows: int, tmp_path: Path, trained: Callable[..., PreTrainedModel]
) -> None:
    model = trained(family, tied, rows)
    publish(tmp_path / "student", model)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    got = logits(opened)
    assert got.shape[-1] == REAL == opened.config.vocab_size == opened.get_input_embeddings().weight.shape[0]
    assert torch.equal(got, logits(model)[..., :REAL])
    assert (opened.get_output_embeddings().weight is opened.get_input_embeddings().weight) is tied


def test_the_rows_that_are_cut_would_have_counted(trained: Callable[..., PreTrainedModel]) -> None:
    """Negative control: the softmax over padded rows is another one."""
    found = logits(trained("llama", False, 32))
    whole, cut = found.log_softmax(-1)[..., :REAL], found[..., :REAL].log_softmax(-1)
    assert float((whole - cut).abs().max()) > 1e-3


def test_the_weights_that_are_published_are_those_of_the_state(
    tmp_path: Path, trained: Callable[..., PreTrainedModel]
) -> None:
    """Negative control of the equality above: a changed state gives a changed folder."""
    model = trained("gpt2")
    state = {name: value + 0.01 for name, value in state_of(model).items()}
    publish(tmp_path / "student", model, state=state)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    assert float((logits(opened) - logits(model)).abs().max()) > 1e-3


@pytest.mark.parametrize("rows", [REAL, 32])
def test_publishing_leaves_the_random_stream_and_the_given_tensors_alone(
    rows: int, tmp_path: Path, trained: Callable[..., PreTrainedModel]
) -> None:
    """Dropout draws from that stream: publishing more or less often must not change a training run."""
    model = trained("gpt2", True, rows)
    state = state_of(model)
    kept, before = {name: value.clone() for name, value in state.items()}, torch.get_rng_state()
    publish(tmp_path / "student", model, state=state)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(state[name], value) for name, value in kept.items())
    assert model.config.vocab_size == rows


def test_the_folder_holds_safetensors_a_tokenizer_a_card_and_no_pickle(
    tmp_path: Path, trained: Callable[..., PreTrainedModel]
) -> None:
    publish(tmp_path / "student", trained("llama"), card="# the card\n")
    names = {file.name for file in (tmp_path / "student").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".tmp"))]
    assert (tmp_path / "student" / "README.md").read_text(encoding="utf-8") == "# the card\n"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert tokenizer("a b z")["input_ids"] == [2, 3, 27] and len(tokenizer) == REAL
    assert [path.name for path in tmp_path.iterdir()] == ["student"], "no staging folder is left beside it"


@pytest.mark.parametrize(("mask", "rights"), [(0o022, 0o644), (0o077, 0o600)])
def test_whoever_may_read_the_owners_files_may_read_the_weights(
    mask: int, rights: int, tmp_path: Path, trained: Callable[..., PreTrainedModel]
) -> None:
    """Without a change of rights safetensors' file is the owner's alone, whatever the mask says."""
    before = os.umask(mask)
    try:
        publish(tmp_path / "student", trained("llama"))
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "student").iterdir()} == {rights}


@pytest.mark.parametrize(("eos", "want"), [((EOS,), EOS), ((EOS, 5), [EOS, 5])])
def test_the_generation_settings_are_those_of_the_run(
    eos: tuple[int, ...], want: Any, tmp_path: Path, trained: Callable[..., PreTrainedModel]
) -> None:
    publish(tmp_path / "student", trained("opt"), eos_ids=eos)
    settings = AutoModelForCausalLM.from_pretrained(tmp_path / "student").generation_config
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.top_p) == (True, 0.8, 5, 0.9)
    assert (settings.max_new_tokens, settings.eos_token_id, settings.pad_token_id) == (7, want, 0)


def test_a_ban_is_handed_on_and_none_is_not_written(tmp_path: Path, trained: Callable[..., PreTrainedModel]) -> None:
    for name, size, want in (("banned", 3, 3), ("free", 0, None)):
        publish(
            tmp_path / name, trained("opt"), decoding=Decoding(max_new_tokens=7, no_repeat_ngram_size=size)
        )  # fmt: skip
        assert AutoModelForCausalLM.from_pretrained(tmp_path / name).generation_config.no_repeat_ngram_size == want


def test_plain_transformers_never_samples_a_cut_row(tmp_path: Path, trained: Callable[..., PreTrainedModel]) -> None:
    model = trained("qwen2", True, 32)
    publish(tmp_path / "student", model, decoding=Decoding(max_new_tokens=30, temperature=5.0))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    torch.manual_seed(0)
    ids_BL = opened.generate(torch.full((16, 2), 5), attention_mask=torch.ones(16, 2, dtype=torch.long))
    assert int(ids_BL.max()) < REAL and ids_BL.unique().numel() > REAL // 2


def test_a_student_of_bfloat16_is_published_as_it_is(tmp_path: Path, trained: Callable[..., PreTrainedModel]) -> None:
    model = trained("llama")
    state = {name: value.bfloat16() for name, value in state_of(model).items()}
    publish(tmp_path / "student", model, state=state)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype="auto").dtype == torch.bfloat16


def test_a_missing_weight_is_our_fault_and_touches_nothing(
    tmp_path: Path, trained: Callable[..., PreTrainedModel]
) -> None:
    model = trained("llama")
    publish(tmp_path / "student", model)
    state = state_of(model)
    del state["head.weight"]
    with pytest.raises(AssertionError, match="head"):
        publish(tmp_path / "student", model, state=state, card="# another\n")
    assert (tmp_path / "student" / "README.md").read_text(encoding="utf-8") == "# a card\n"


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} if folder.exists() else {}


def write_new(staging: Path) -> None:
    write_text(staging / "new.txt", "new")


@pytest.mark.parametrize("old", [{}, {"old.txt": "old"}])
def test_a_replaced_folder_holds_the_new_and_nothing_of_the_old(old: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "it"
    for name, text in old.items():
        folder.mkdir()
        write_text(folder / name, text)
    with replaced_folder(folder) as staging:
        assert content(folder) == old
        write_new(staging)
    assert content(folder) == {"new.txt": "new"} and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_while_writing_leaves_the_old_folder(error: type[BaseException], tmp_path: Path) -> None:
    folder = tmp_path / "it"
    folder.mkdir()
    write_text(folder / "old.txt", "old")
    with pytest.raises(error), replaced_folder(folder) as staging:
        write_new(staging)
        raise error
    assert content(folder) == {"old.txt": "old"} and list(tmp_path.iterdir()) == [folder]


def test_an_exception_between_the_two_renames_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "it", Path.rename
    folder.mkdir()
    write_text(folder / "old.txt", "old")

    def broken(self: Path, target: Path) -> Path:
        if self.name.startswith(".staging"):
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="no space"), replaced_folder(folder) as staging:
        write_new(staging)
    assert content(folder) == {"old.txt": "old"}


def test_a_process_that_died_between_the_two_renames_lost_nothing(tmp_path: Path) -> None:
    """What it left is the old folder under another name; a later write that fails must still end with it."""
    folder, aside = tmp_path / "it", tmp_path / ".old-it"
    aside.mkdir()
    write_text(aside / "old.txt", "old")
    with pytest.raises(RuntimeError), replaced_folder(folder) as staging:
        write_new(staging)
        raise RuntimeError
    assert content(folder) == {"old.txt": "old"}


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    write_text(file, "old")

    def die(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(store.os, "fsync", die)
    with pytest.raises(OSError, match="no space"):
        write_text(file, "new" * 10_000)
    assert file.read_text(encoding="utf-8") == "old"


def test_lines_of_json_keep_their_characters(tmp_path: Path) -> None:
    records = [{"a": "ü\n漢"}, {"b": 1.5}]
    write_jsonl(tmp_path / "x.jsonl", records)
    text = (tmp_path / "x.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == records and "漢" in text


FILES = ("config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "results.json", "report.html")


def a_run(path: Path, *, config_text: str = "a: 1\n", state: str = "done") -> RunFolder:
    """A run with every file that one leaves, a published student, and a user's own note."""
    folder = RunFolder(path, writes=True)
    assert opened(folder, config_text, fresh=False) is False
    folder.set_status(state=state)
    for name in FILES[2:]:
        write_text(path / name, "{}\n")
    folder.student.mkdir()
    write_text(folder.student / "README.md", "a student")
    write_text(path / "notes.txt", "mine")
    (path / "another-run").mkdir()
    return folder


def opened(folder: RunFolder, config_text: str, *, fresh: bool) -> bool:
    """Whether the run is done; else its folder is made ready."""
    if not fresh and folder.standing(config_text) == "done":
        return True
    folder.begin(config_text)
    return False


def test_a_run_that_is_done_is_left_as_it_is(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    before = content(folder.student), {name: (folder.path / name).stat().st_mtime_ns for name in FILES}
    assert opened(folder, "a: 1\n", fresh=False) is True
    assert (content(folder.student), {name: (folder.path / name).stat().st_mtime_ns for name in FILES}) == before


def test_another_configuration_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    with pytest.raises(RunExists, match="another configuration; nothing was touched"):
        opened(folder, "a: 2\n", fresh=False)
    assert all((folder.path / name).exists() for name in FILES) and folder.student.exists()


def test_a_run_that_is_done_stays_done_when_settings_are_added(tmp_path: Path) -> None:
    """A setting that its config.yaml does not name counts as its default of today; one that it names, as it is."""
    nowhere = tmp_path / "nowhere"
    text = dump_config(
        tiny.minillm_config(tmp_path, teacher=nowhere, student=nowhere, prompts=nowhere.with_suffix(".jsonl"))
    )
    settings = yaml.safe_load(text)
    stage = settings["stages"][0]
    for inside, name, other in (
        (settings["evaluation"], "batch_tokens", 1234), (settings["data"], "train_limit", 3),
        (settings, "trackers", ["wandb"]), (stage, "repetition_weight", 0.5),
        (stage["optimiser"], "weight_decay", 0.125),
    ):  # fmt: skip
        default = inside.pop(name)
        before = yaml.safe_dump(settings)
        folder = a_run(tmp_path / f"without {name}", config_text=before)
        assert opened(folder, text, fresh=False) is True, name
        assert (folder.path / "config.yaml").read_text(encoding="utf-8") == before
        inside[name] = other
        folder = a_run(tmp_path / f"with {name}", config_text=yaml.safe_dump(settings))
        with pytest.raises(RunExists, match="another configuration"):
            opened(folder, text, fresh=False)
        inside[name] = default
    for broken in ("", "[]", "a: [", "a: 1", text + "\nunknown: 1\n", text.replace("seed", "seeds", 1)):
        folder = a_run(tmp_path / "broken", config_text=broken)
        with pytest.raises(RunExists, match="another configuration"):
            opened(folder, text, fresh=False)
        shutil.rmtree(folder.path)


def test_a_folder_of_other_work_is_refused_and_touched_by_nothing_but_fresh(tmp_path: Path) -> None:
    """A user's own student/ or an evaluation, without a configuration of a run beside it."""
    work = tmp_path / "work"
    (work / "student").mkdir(parents=True)
    (work / "results.json").write_text("{}", encoding="utf-8")
    folder = RunFolder(work, writes=True)
    with pytest.raises(RunExists, match="not this run's; nothing was touched"):
        opened(folder, "a: 1\n", fresh=False)
    assert (work / "student").is_dir() and (work / "results.json").exists() and not (work / "config.yaml").exists()
    assert opened(folder, "a: 1\n", fresh=True) is False
    assert not (work / "student").exists()


@pytest.mark.parametrize(
    ("config_text", "fresh", "state"),
    [("a: 1\n", False, "running"), ("a: 1\n", True, "done"), ("a: 2\n", True, "done")],
)
def test_an_unfinished_or_fresh_run_starts_over_and_spares_what_is_not_its_own(
    config_text: str, fresh: bool, state: str, tmp_path: Path
) -> None:
    folder = a_run(tmp_path / "run", state=state)
    assert opened(folder, config_text, fresh=fresh) is False
    left = sorted(path.name for path in folder.path.iterdir())
    assert left == ["another-run", "config.yaml", "notes.txt"]
    assert (folder.path / "config.yaml").read_text(encoding="utf-8") == config_text
    assert folder.status() == {}


def test_a_rank_that_does_not_write_changes_nothing(tmp_path: Path) -> None:
    a_run(tmp_path / "run", state="running")
    other = RunFolder(tmp_path / "run", writes=False)
    assert opened(other, "a: 1\n", fresh=True) is False
    other.set_status(state="done")
    other.log({"loss": 1.0})
    assert other.status() == {"state": "running"} and other.student.exists()
    assert (other.path / "metrics.jsonl").read_text(encoding="utf-8") == "{}\n"


def test_a_log_is_cut_back_to_a_length_that_it_had(tmp_path: Path) -> None:
    folder, file = RunFolder(tmp_path, writes=True), tmp_path / "metrics.jsonl"
    assert folder.log_length() == 0
    folder.cut_log(0)
    assert not file.exists()
    lengths = [0]
    for step in range(3):
        folder.log({"step": step, "text": "é"})
        lengths.append(folder.log_length())
    whole = file.read_bytes()
    assert lengths[-1] == len(whole) and len(set(lengths)) == 4
    for length in reversed(lengths):
        file.write_bytes(whole + b'{"step": 3, "te')  # a process was killed while it wrote
        folder.cut_log(length)
        assert file.read_bytes() == whole[:length]
    other = RunFolder(tmp_path, writes=False)
    file.write_bytes(whole)
    other.cut_log(lengths[1])
    assert other.log_length() == 0 and file.read_bytes() == whole, "only one rank writes"


def test_a_log_that_is_not_the_checkpoints_is_refused_untouched(tmp_path: Path) -> None:
    folder, file = RunFolder(tmp_path, writes=True), tmp_path / "metrics.jsonl"
    with pytest.raises(CheckpointError, match=r"0 bytes, wanted the 9 of the checkpoint\n.*--fresh"):
        folder.cut_log(9)
    folder.log({"step": 1})
    folder.log({"step": 2})
    whole = file.read_bytes()
    for length, reason in ((len(whole) + 1, "24 bytes, wanted the 25"), (len(whole) - 1, "no line ends at byte 23")):
        with pytest.raises(CheckpointError, match=reason):
            folder.cut_log(length)
        assert file.read_bytes() == whole


def test_the_length_of_a_log_is_told_once_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, synced = RunFolder(tmp_path, writes=True), []
    folder.log({"step": 1})
    monkeypatch.setattr(store.os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    assert folder.log_length() == 12 and synced == [str(tmp_path / "metrics.jsonl"), str(tmp_path)]
    synced.clear()
    folder.cut_log(0)
    assert synced == [str(tmp_path / "metrics.jsonl")]


def test_published_weights_are_known_by_their_hash(tmp_path: Path, trained: Callable[..., PreTrainedModel]) -> None:
    assert weights_sha256(tmp_path / "student") == ""
    told = [publish(tmp_path / "student", trained(family)) for family in ("gpt2", "opt", "gpt2")]
    assert told[0] == told[2] != told[1]
    assert told[2] == weights_sha256(tmp_path / "student") == sha256_of(tmp_path / "student" / "model.safetensors")
    # In two files, as very large ones are.
    for place, name in enumerate(("model-00002-of-00002", "model-00001-of-00002")):
        (tmp_path / f"{name}.safetensors").write_bytes(b"xy"[place : place + 1])
    assert weights_sha256(tmp_path) == hashlib.sha256(b"yx").hexdigest()


def test_a_status_is_merged(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run", state="running")
    folder.set_status(seconds={"sft": 1.0})
    assert folder.status() == {"state": "running", "seconds": {"sft": 1.0}}


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def test_figures_that_are_not_finite_become_null(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", writes=True)
    opened(folder, "", fresh=False)
    folder.log({"kind": "train", "loss": math.nan, "kl": math.inf, "low": -math.inf, "lr": 0.5, "step": 3})
    line = (folder.path / "metrics.jsonl").read_text(encoding="utf-8")
    found = json.loads(line, parse_constant=refuse)
    assert found == {"kind": "train", "loss": None, "kl": None, "low": None, "lr": 0.5, "step": 3}
    with pytest.raises(ValueError, match="NaN"):  # the control: Python would have written it
        json.loads(json.dumps(math.nan), parse_constant=refuse)


FACTS = CardFacts(
    name="small",
    stage="minillm",
    start="students/gpt2",
    teacher="teachers/gpt2-xl",
    teacher_parameters=1_557_611_200,
    parameters=124_439_808,
    data_source="rows.jsonl",
    data_rows=1234,
    data_sha256="ab" * 32,
    unbiased="no (inner updates)",
    config_text="name: small\nseed: 10\n",
    versions={"torch": "2.13.0", "minillm": "0.1.0"},
    licence_notes="gpt2: MIT",
)


def test_a_card_says_what_a_reader_must_know() -> None:
    text = render(FACTS, {"reverse_kl": 1.23456, "rouge_l": 0.5}, step=800)
    assert text.startswith("---\nlibrary_name: transformers\n") and "\n# small\n" in text
    for words in (
        "124,439,808 parameters", "stage `minillm`", "`teachers/gpt2-xl` (1,557,611,200 parameters)",
        "| started from | `students/gpt2` |", f"`rows.jsonl`, 1,234 rows used, sha256 `{'ab' * 32}`",
        "| weights of step | 800 |", "| gradient unbiased | no (inner updates) |", "| licence notes | gpt2: MIT |",
        "torch 2.13.0, minillm 0.1.0", "| reverse_kl | 1.235 |", "| rouge_l | 0.5 |",
        "```yaml\nname: small\nseed: 10\n```",
    ):  # fmt: skip
        assert words in text, words


def test_a_card_leaves_out_what_there_is_not() -> None:
    """A fine-tuned student without teacher, validation or licence notes."""
    changes = {"teacher": None, "teacher_parameters": None, "unbiased": "", "licence_notes": "", "stage": "sft"}
    fields = {name: getattr(FACTS, name) for name in CardFacts.__dataclass_fields__}
    text = render(CardFacts(**{**fields, **changes}), {}, step=5)
    for word in ("teacher", "unbiased", "licence", "Scores", "None"):
        assert not re.search(word, text), word
