"""The adapter to lm_eval, run on tasks over a local file."""

import importlib.util
import json

import numpy as np
import pytest

from conftest import TINY

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed"
)

ROWS = [
    {"question": "The capital of France is", "choices": ["Paris", "Rome", "a city"], "answer": 0},
    {"question": "Two plus two is", "choices": ["four", "five"], "answer": 0},
    {"question": "Water is", "choices": ["wet", "dry"], "answer": 0},
]
TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[0]}}"
metric_list: [{metric: bits_per_byte}]
""",
    "local_until": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 12, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    lm_eval = pytest.importorskip("lm_eval")
    import deltafox.lm_eval

    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\n"
            f"test_split: test\n{text}"
        )
    return lm_eval.simple_evaluate(
        model="deltafox",
        model_args=f"pretrained={TINY}",
        tasks=list(TASKS),
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=4,
        log_samples=True,
        bootstrap_iters=0,
    )


def losses(model, tokenizer, text, add_special_tokens):
    """Of each token of a text behind BOS."""
    ids = np.array([tokenizer.encode(text, add_special_tokens=add_special_tokens)])
    if ids[0, 0] != tokenizer.bos_token_id:
        ids = np.concatenate([[[tokenizer.bos_token_id]], ids], 1)
    return model(ids[:, :-1], labels=ids[:, 1:]).loss[0]


def test_choices_are_scored_as_by_the_loss(results, tiny, tokenizer):
    for sample in results["samples"]["local_choice"]:
        question = sample["doc"]["question"]
        read = len(losses(tiny, tokenizer, question, True))
        for choice, (score, _) in zip(sample["doc"]["choices"], sample["filtered_resps"]):
            loss = losses(tiny, tokenizer, f"{question} {choice}", True)[read:]
            assert float(score) == pytest.approx(-loss.sum(), abs=1e-3)


def test_rolling_is_the_loss_of_the_text(results, tiny, tokenizer):
    for sample in results["samples"]["local_rolling"]:
        expected = -losses(tiny, tokenizer, sample["target"], False).sum()
        assert float(sample["filtered_resps"][0]) == pytest.approx(expected, abs=1e-3)


def test_generation_ends_before_the_stop_string(results, tiny, tokenizer):
    for sample in results["samples"]["local_until"]:
        pieces = tiny.stream(sample["doc"]["question"], tokenizer=tokenizer, max_new_tokens=12)
        text = "".join(pieces).split("\n")[0].split(".")[0]
        assert sample["filtered_resps"][0] == text
