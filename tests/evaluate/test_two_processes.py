"""`accelerate launch -m lrnn_lm.evaluate`: two processes, as it starts them, score as one does."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from forks import run_code
from rank_runs import free_port

from lrnn_lm.cli import main
from lrnn_lm.evaluate.team import Team

TASKS = "state_s3,offline_blimp,offline_lambada,offline_wikitext"


def test_shares_are_alike_and_keep_groups_together():
    groups = ["a", "a", "b", "c", "d", "b"]
    owners = Team(0, 2).owners(groups, [9, 1, 7, 5, 3, 8])
    assert owners == [0, 0, 1, 0, 1, 1]
    assert owners == Team(1, 2).owners(groups, [9, 1, 7, 5, 3, 8])
    assert Team(2, 4).owners(["a"], [1]) == [0]  # fewer requests than processes


def test_two_processes_are_one(checkpoint, tmp_path, capsys):
    """Rolling texts, pairs, last words and an accuracy by length, of which some processes meet some only."""
    data = tmp_path / "data"
    (data / "blimp").mkdir(parents=True)
    articles = [f" = Article {i} = \n the road has {i} strangers\n" * 3 for i in range(3)]
    (data / "wikitext2_test.txt").write_text("".join(articles))
    lambada = [
        {"text": f"the story has {i} strangers on the road and the road has strangers"} for i in range(5)
    ]
    (data / "lambada_openai.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lambada))
    for paradigm, count in (("one", 3), ("two", 4)):
        rows = [{"sentence_good": f"the road {i}", "sentence_bad": f"road the {i}"} for i in range(count)]
        (data / "blimp" / f"{paradigm}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [str(checkpoint), "--device", "cpu", "--limit", "5", "--data", str(data), "--tasks", TASKS,
             "--lengths", "4,6", "--output"]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(["eval", *words, str(tmp_path / "1")])
    assert not ended.value.code
    assert capsys.readouterr().out.count("written to") == 1
    there = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    code = "import runpy; runpy.run_module('lrnn_lm.evaluate', run_name='__main__')"

    def process(rank):
        env = os.environ | there | {"RANK": rank, "LOCAL_RANK": rank}
        return run_code(code, *words, tmp_path / "2", env=env)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(process, "01"))
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    assert [process.stdout.count("written to") for process in done] == [1, 0]
    written = [list((tmp_path / processes).glob("*.json")) for processes in ("1", "2")]
    results = [json.loads(file.read_text()) for (file,) in written]
    one, two = results
    assert [found["settings"]["processes"] for found in results] == [1, 2]
    assert one["results"].keys() == two["results"].keys()
    for task, scores in one["results"].items():
        assert scores.keys() == two["results"][task].keys()
        for metric, value in scores.items():
            if isinstance(value, float):
                assert abs(value - two["results"][task][metric]) <= 1e-5 * max(1.0, abs(value)), (
                    task,
                    metric,
                )
