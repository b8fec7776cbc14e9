"""`accelerate launch -m lrnn_lm.evaluate`: two processes score as one does."""

import json
import subprocess
import sys

import pytest
from tiny_run import ROOT, environment

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
        main(["eval", *words, str(tmp_path / "1.json")])
    assert not ended.value.code
    assert capsys.readouterr().out.count("written to") == 1
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines",
               "1", "--multi_gpu", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend",
               "no", "-m", "lrnn_lm.evaluate", *words, str(tmp_path / "2.json")]  # fmt: skip
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    results = [json.loads((tmp_path / f"{processes}.json").read_text()) for processes in (1, 2)]
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
