"""Training by others' loops: transformers' Trainer, LoRA through PEFT, int8 weights through torchao."""

import pytest
import torch
from small_models import HYBRIDS, OF_EACH_STATE, VOCAB, close, in_turn, small_model, tokens
from tolerances import TOLERANCE
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from lrnn_lm.model.cache import CACHE, make_cache
from lrnn_lm.model.decoding.decode import can_decode

SUMS = TOLERANCE["other order of sums"]


def examples() -> list[dict[str, torch.Tensor]]:
    """Rows with very different numbers of targets: averages of averages would be other numbers."""
    rows = []
    for i, ids in enumerate(tokens(rows=16, length=12)):
        labels = ids.clone()
        labels[: 11 - 10 * (i % 2)] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def trained(folder, model, **changes):
    """A model after four optimizer steps of eight rows, and the losses that were logged."""
    arguments = TrainingArguments(
        **{
            "output_dir": folder, "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2,
            "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "seed": 1,
            "optim": "sgd", "disable_tqdm": True, **changes,
        }
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=examples())
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", ["bd_lru", "h_lru", "hybrid"])
def test_accumulation_averages_over_targets(name, tmp_path):
    whole, losses = trained(tmp_path, small_model(name))
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parts, same = trained(tmp_path, small_model(name), **split)
    assert losses == pytest.approx(same, abs=2e-4)  # the Trainer rounds what it logs
    for (key, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=SUMS, msg=key)


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModelForTokenClassification])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_without_targets_changes_nothing(kind, size, padded, tmp_path):
    """The Trainer counts none, and tells a loss of NaN as 0: all weights were NaN after it."""
    small_model("hybrid").save_pretrained(tmp_path / "model")
    model = kind.from_pretrained(tmp_path / "model")
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    row = {"input_ids": tokens(rows=1)[0], "labels": torch.full((21,), -100)}
    if padded:
        row["attention_mask"] = (torch.arange(21) < 17).long()
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=2 // size,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_nan_inf_filter=False, optim="sgd",
        logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[row] * 2)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, before[key]), key


def test_loss_falls_with_checkpointing_and_evaluation(tmp_path):
    model, losses = trained(
        tmp_path, small_model("bd_lru"), max_steps=12, optim="adamw_torch", gradient_checkpointing=True
    )
    assert losses[-1] < 0.8 * losses[0]
    arguments = TrainingArguments(output_dir=tmp_path, report_to=[], use_cpu=True, disable_tqdm=True)
    scores = Trainer(model=model, args=arguments, eval_dataset=examples()).evaluate()
    assert scores["eval_loss"] < losses[0]


def test_label_smoothing_shifts_the_labels(tmp_path):
    """The Trainer takes the logits and does it itself, if it knows that this is a language model."""
    rows = examples()[:4]
    arguments = TrainingArguments(
        output_dir=tmp_path, label_smoothing_factor=0.1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    model = small_model("bd_lru")
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    with torch.no_grad():
        got = Trainer(model=model, args=arguments).compute_loss(model, dict(batch))
        logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    want = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.1)
    close(got, want, SUMS)


def test_label_smoothing_of_packed_rows_takes_the_targets_that_labels_mark(tmp_path):
    """The Trainer keeps labels to itself there, so the model cannot leave out what crosses documents."""
    reset = torch.zeros(4, 12, dtype=torch.bool)
    reset[:, 5] = reset[1, 9] = True
    ids, model = tokens(rows=4, length=12), small_model("hybrid")
    marked = ids.masked_fill(reset, -100)  # as DataCollatorWithFlattening has it
    arguments = TrainingArguments(
        output_dir=tmp_path, label_smoothing_factor=0.1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    with torch.no_grad():
        logits = model(ids, reset=reset).logits[:, :-1].flatten(0, 1)
        want = torch.nn.functional.cross_entropy(logits, marked[:, 1:].flatten(), label_smoothing=0.1)
        batch = {"input_ids": ids, "reset": reset, "labels": marked}
        close(Trainer(model=model, args=arguments).compute_loss(model, batch), want, SUMS)
        own = [model(ids, reset=reset, labels=labels).loss for labels in (ids, marked)]
    close(*own, SUMS)


@pytest.mark.parametrize("name", [*OF_EACH_STATE, "mamba2", "mlstm", "m2rnn"])
def test_lora_on_every_projection(name, tmp_path):
    """Every adapter is in the forward pass, cached or not, and learns; merged, it is the same model."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed (extra `dev`)")
    model, ids = small_model(name), tokens()
    reset = torch.zeros_like(ids, dtype=torch.bool)
    reset[0, 5] = True
    before, loss_before = model(ids, reset=reset).logits, model(ids, labels=ids).loss
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear")).eval()
    close(model(ids, reset=reset).logits, before, SUMS)
    loss = model(input_ids=ids, labels=ids).loss
    close(loss, loss_before, SUMS)
    loss.backward()
    adapters = {key: p for key, p in model.named_parameters() if p.requires_grad and "lora_B" in key}
    assert len(adapters) >= 4 * 3
    assert all(p.grad.abs().max() > 0 for p in adapters.values())
    with torch.no_grad():
        for p in adapters.values():
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        adapted = model(ids).logits
        assert (adapted - before).abs().max() > 1e-2
        options = {"input_ids": ids, "max_new_tokens": 4, "do_sample": False}
        cached = model.generate(**options)
        assert torch.equal(cached, model.generate(**options, use_cache=False))
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(small_model(name), tmp_path)
        close(again(ids).logits, adapted, SUMS)
        close(model.merge_and_unload()(ids).logits, adapted, 1e-4)


@pytest.mark.parametrize(
    ("name", "adapted"),
    [(name, {"modules_to_save": ["mixer"]}) for name in (*HYBRIDS, "attention-grouped", "bd_gru")]
    + [(name, {"target_parameters": ["recurrent_weight"]}) for name in ("bd_gru", "m2rnn")],
)
def test_mixers_that_peft_wraps(name, adapted):
    """Around a mixer that is trained as a whole, or whose own matrices are adapted, PEFT puts its modules."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed (extra `dev`)")
    model, ids, mask = small_model(name), tokens(), torch.ones(2, 21, dtype=torch.long)
    mask[1, :6] = 0
    before = model(ids, attention_mask=mask).logits[mask.bool()]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["down_proj"], **adapted)).eval()
    close(model(input_ids=ids, attention_mask=mask).logits[mask.bool()], before, SUMS)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1
                )
        cached = model.generate(input_ids=ids, **options)
        assert torch.equal(cached, model.generate(input_ids=ids, **options, use_cache=False))
        text = model.generate(input_ids=ids[1:, 6:], **options | {"attention_mask": mask[1:, 6:]})
        assert torch.equal(cached[1:, 21:], text[:, 15:])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(
        p.grad.abs().max() > 0 for key, p in model.named_parameters() if ".mixer." in key and p.requires_grad
    )


def test_lora_on_the_head_is_in_the_loss():
    peft = pytest.importorskip("peft", reason="PEFT is not installed (extra `dev`)")
    model, ids = small_model("bd_lru"), tokens()
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    loss = model.train()(input_ids=ids, labels=ids, num_items_in_batch=40).loss
    loss.backward()
    (adapter,) = [p for key, p in model.named_parameters() if "lora_B" in key]
    assert adapter.grad.abs().max() > 0
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    close(loss, torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()), SUMS)


@pytest.mark.parametrize("name", OF_EACH_STATE)
def test_int8_weights(name):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model, ids = small_model(name), tokens()
    with torch.no_grad():
        want, loss = model(ids).logits, model(ids, labels=ids).loss
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        got = model(ids).logits
        assert 0 < (got - want).norm() < 0.05 * want.norm()
        close(model(ids, labels=ids).loss, loss, 0.05)
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
    assert got.shape[-1] == VOCAB


@pytest.mark.parametrize(
    ("name", "kind"), in_turn(["PromptTuningConfig", "PromptEncoderConfig"], [*OF_EACH_STATE, "mlstm"])
)
def test_prompts_of_peft(name, kind):
    """Vectors in front of the text are trained alone, and are there in every way of decoding."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed (extra `dev`)")
    model, ids = small_model(name), tokens(length=7)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    plain = model(ids, attention_mask=mask).logits
    options = {"encoder_hidden_size": 8} if kind == "PromptEncoderConfig" else {}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3, **options)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.mul_(5)
    output = model(input_ids=ids, attention_mask=mask, labels=ids)
    least = 0.05 if name == "mlstm" else 0.1  # it divides what it reads by how much it has written
    assert (output.logits[1, 3] - plain[1, 0]).abs().max() > least
    output.loss.backward()
    assert all("prompt_encoder" in key for key, p in model.named_parameters() if p.grad is not None)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    got, again = (model.generate(input_ids=ids, use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(got, again)
    cache = make_cache(model.config)  # the caller's own holds the prompt and all that was read
    assert torch.equal(model.generate(input_ids=ids, **{CACHE: cache}, **options), got)
    assert cache.get_seq_length() == 3 + 7 + 5
    base = model.get_base_model()  # PEFT leaves the model's own method on it, which changes nothing
    assert "prepare_inputs_for_generation" in vars(base)
    assert can_decode(base) == ("sliding_attention" not in base.config.layer_types)


@pytest.mark.parametrize("name", ["bd_lru", "attention", "attention-window", *HYBRIDS])
def test_prefixes_of_peft_are_for_attention(name):
    """A prefix is keys and values: a plain refusal where a layer takes none."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed (extra `dev`)")
    ids = tokens(length=7)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(small_model(name), config).eval()
    kinds = {*model.config.layer_types}
    if kinds != {"full_attention"}:
        recurrent = "linear_attention" in kinds
        words = (
            "take no keys and values, as prefix tuning makes them"
            if recurrent
            else "fit this model's 3 layers"
        )
        with pytest.raises(ValueError, match=words):
            model(input_ids=ids)
        return
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.abs().max() > 0
    options = {"max_new_tokens": 6, "do_sample": False}
    got, again = (model.generate(input_ids=ids, use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(got, again)
