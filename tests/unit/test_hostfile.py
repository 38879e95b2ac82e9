"""Which nodes a launch runs on: hostfiles, options and variables, and what is wrong with them in two lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from minillm.cli.places import PORT, Asked, Everywhere, placed
from minillm.errors import ConfigError
from minillm.hostfile import Host, read_hostfile
from minillm.hosts import host_launches, passed_in_words, passed_on
from minillm.supervisor import Place


def hostfile(folder: Path, text: str) -> Path:
    file = folder / "hosts"
    file.write_text(text, encoding="utf-8")
    return file


def place_of(**asked: object) -> Place | Everywhere:
    return placed(Asked(**asked), ranks_here=lambda: 3)  # type: ignore[arg-type]


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    text = "# the cluster\n\ngpu-1 slots=8   # the head\n  me@10.0.0.2\tslots=8\nfe80::1%eth0 slots = 8\n"
    hosts = read_hostfile(hostfile(tmp_path, text))
    assert hosts == (Host("gpu-1", 8), Host("me@10.0.0.2", 8), Host("fe80::1%eth0", 8))
    assert [host.address for host in hosts] == ["gpu-1", "10.0.0.2", "fe80::1%eth0"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "names no host"),
        ("# gpu-1 slots=8\n", "names no host"),
        ("gpu-1 slots=8\ngpu-2\n", "line 2: got 'gpu-2'"),
        ("gpu-1 8\n", "line 1: got 'gpu-1 8'"),
        ("gpu-1 slots=0\n", "line 1: got 'gpu-1 slots=0'"),
        ("gpu-1 slots=-1\n", "line 1: got"),
        ("gpu-1 slots=two\n", "line 1: got"),
        ("gpu-1 slots=8 max=9\n", "line 1: got"),
        ("\n\n-oProxyCommand=x slots=8\n", "line 3: '-oProxyCommand=x' is no name of a host"),
        ("$(reboot) slots=8\n", "line 1: '$(reboot)' is no name of a host"),
        ("gpu-1 slots=8\ngpu-2 slots=8\ngpu-1 slots=8\n", "line 3: gpu-1 stands in line 1 already"),
        ("gpu-1 slots=8\nme@gpu-1 slots=8\n", "line 2: gpu-1 stands in line 1 already"),
        ("me@gpu-1 slots=8\nyou@gpu-1 slots=8\n", "line 2: gpu-1 stands in line 1 already"),
        ("gpu-1 slots=8\ngpu-2 slots=4\n", "line 2: gpu-2 has slots=4 and gpu-1 slots=8"),
    ],
)
def test_a_broken_hostfile_is_told_in_two_lines_with_the_number(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_hostfile(hostfile(tmp_path, text))
    assert told in str(caught.value) and len(str(caught.value).splitlines()) == 2


def test_a_hostfile_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    for file, why in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=why):
            read_hostfile(file)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="no text in UTF-8"):
        read_hostfile(tmp_path / "bytes")


@pytest.mark.parametrize(
    "asked",
    [{}, {"nodes": 1}, {"node_rank": 0, "nodes": 1, "master": "gpu-1"}, {"master": "127.0.0.1"}, {"node_rank": 0}],
)
def test_one_node_is_what_is_meant_where_nothing_says_otherwise(asked: dict[str, object]) -> None:
    place = place_of(**asked)
    assert isinstance(place, Place) and (place.nodes, place.ranks, place.master) == (1, 3, "127.0.0.1") and place.port


def test_each_of_several_nodes_is_told_where_it_stands() -> None:
    asked = {"nodes": 2, "node_rank": 1, "master": "gpu-1"}
    assert place_of(**asked) == Place(ranks=3, nodes=2, node=1, master="gpu-1", port=PORT)
    assert place_of(**asked, ranks=8, port=4000) == Place(ranks=8, nodes=2, node=1, master="gpu-1", port=4000)


@pytest.mark.parametrize(
    ("asked", "missing"),
    [
        ({"nodes": 2}, ["--node-rank (NODE_RANK)", "--master (MASTER_ADDR)"]),
        ({"nodes": 2, "node_rank": 1}, ["--master (MASTER_ADDR)"]),
        ({"node_rank": 1}, ["--nodes (NNODES)", "--master (MASTER_ADDR)"]),
        ({"node_rank": 0, "master": "gpu-1"}, ["--nodes (NNODES)"]),
        ({"master": "gpu-1"}, ["--nodes (NNODES)", "--node-rank (NODE_RANK)"]),
        ({"nodes": 2, "master": "gpu-1"}, ["--node-rank (NODE_RANK)"]),
    ],
)
def test_only_some_of_what_several_nodes_need_is_an_error(asked: dict[str, object], missing: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        place_of(**asked)
    assert f" without {' and '.join(missing)}\n" in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"nodes": 2, "node_rank": 2, "master": "gpu-1"}, "2 of 2 nodes\n  wanted 0 to 1"),
        ({"nodes": 1, "node_rank": 3, "master": "gpu-1"}, "3 of 1 nodes"),
        ({"text": "a slots=2\nb slots=2", "ranks": 3}, "3 ranks a node beside a hostfile with slots=2"),
        ({"text": "a slots=2\nb slots=2", "nodes": 3}, "3 beside"),
        ({"text": "a slots=2\nb slots=2", "node_rank": 2}, "2 of 2 nodes"),
        ({"text": "localhost slots=2\nb slots=2"}, "its first host is localhost, which means another machine"),
    ],
)
def test_what_contradicts_itself_is_refused(asked: dict[str, object], told: str, tmp_path: Path) -> None:
    if "text" in asked:
        asked = {**asked, "hostfile": hostfile(tmp_path, str(asked["text"]))}
        del asked["text"]
    with pytest.raises(ConfigError) as caught:
        place_of(**asked)
    assert told in str(caught.value)


def test_a_hostfile_means_all_hosts_or_this_one_where_its_number_is_given(tmp_path: Path) -> None:
    file = hostfile(tmp_path, "me@a slots=2\nb slots=2\n")
    found = place_of(hostfile=file)
    assert found == Everywhere(hosts=(Host("me@a", 2), Host("b", 2)), master="a", port=PORT)
    assert place_of(hostfile=file, node_rank=1) == Place(ranks=2, nodes=2, node=1, master="a", port=PORT)
    one = hostfile(tmp_path, "localhost slots=2\n")
    assert isinstance(place_of(hostfile=one), Everywhere), "alone it is no other machine"


def test_secrets_are_not_passed_unasked() -> None:
    there = {"HF_HOME": "h", "HF_TOKEN": "t", "NCCL_DEBUG": "INFO", "PATH": "p", "CUDA_VISIBLE_DEVICES": "0"}
    assert passed_on(there) == {"HF_HOME": "h", "NCCL_DEBUG": "INFO"}
    assert passed_on(there, ["HF_TOKEN"]) == {"HF_HOME": "h", "HF_TOKEN": "t", "NCCL_DEBUG": "INFO"}


def test_what_tunes_a_run_reaches_the_hosts_and_no_credential_does() -> None:
    tuned = [
        "PYTORCH_CUDA_ALLOC_CONF",
        "TOKENIZERS_PARALLELISM",
        "WANDB_MODE",
        "TRACKIO_DIR",
        "OMP_NUM_THREADS",
        "PYTHONPATH",
    ]
    secret = ["HF_HUB_CREDENTIALS", "OMP_PASS", "HF_AUTH", "WANDB_API_KEY", "DS_SECRET", "NCCL_X_password", "HF_TOKEN"]
    there = dict.fromkeys([*tuned, *secret, "PATH", "CUDA_VISIBLE_DEVICES"], "x")
    assert set(passed_on(there)) == set(tuned)
    assert set(passed_on(there, iter(["OMP_PASS", "CUDA_VISIBLE_DEVICES"]))) == {
        *tuned,
        "OMP_PASS",
        "CUDA_VISIBLE_DEVICES",
    }
    login = {"HF_ENDPOINT": "https://me:word@hub", "WANDB_BASE_URL": "https://hub/a@b"}
    assert set(passed_on(login)) == {"WANDB_BASE_URL"} and set(passed_on(login, ["HF_ENDPOINT"])) == set(login)


def test_names_that_hosts_get_are_told_and_those_that_they_do_not() -> None:
    there = {"NCCL_DEBUG": "INFO", "HF_TOKEN": "word", "CUDA_VISIBLE_DEVICES": "0", "PATH": "p"}
    told = passed_in_words(there, passed_on(there))
    assert told == (
        "hosts get of this environment: NCCL_DEBUG; not CUDA_VISIBLE_DEVICES, HF_TOKEN (--env NAME passes it)"
    )
    assert passed_in_words({"PATH": "p"}, {}) == "hosts get of this environment: nothing"


def test_words_reach_a_host_as_they_were_given() -> None:
    words = ["distill", "--config", "a b.yaml", "data.test={x: 'y'}", "$HOME; rm"]
    (launch,) = host_launches(
        [Host("a", 2)], words, ssh="ssh -p '2 2'", master="", port=1, limit_s=20.0, environment={"GLOO_X": "1 2"}
    )
    assert launch.words[:-1] == ("ssh", "-p", "2 2", "a")
    script = launch.words[-1]
    assert script.endswith("""distill --config 'a b.yaml' 'data.test={x: '"'"'y'"'"'}' '$HOME; rm'""")
    assert "exec env 'GLOO_X=1 2' " in script and " --master a --master-port 1 --limit 15 " in script
