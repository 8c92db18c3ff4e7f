"""`torchtitan verify` finds each planted bug, and says where it is; and it passes what is right.

Each file of `mutants/` registers a model under its own name, and has:

* `CAUGHT_BY`: names of the checks that must fail, the most telling first;
* `SAYS`: what the first one's problem and hint must match;
* `CRASHES`, if the model then raises an exception or hangs;
* `HF_CONFIG`, if it is to be compared with a Hugging Face model: its `config.json`.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

from torchtitan.authoring.verify.catalog import all_checks, choose
from torchtitan.authoring.verify.check import CheckFailedError, NotApplicableError, Outcome
from torchtitan.authoring.verify.reference import Batches
from torchtitan.authoring.verify.run import run_checks
from torchtitan.authoring.verify.subject import Subject
from torchtitan.protocols.train_spec import MODEL_REGISTRY

MUTANTS = sorted(
    path.stem
    for path in (Path(__file__).parent / "mutants").glob("*.py")
    if "CAUGHT_BY" in path.read_text()
)
QUICK = {
    "adapter_rounds",
    "adapter_exchanges_norms",
    "config_of_another_model",
    "angles_on_the_cpu",
    "buffer_on_the_cpu",
    "compile_ignored",
    "dead_parameter",
    "diffusion_noise_unseeded",
    "diffusion_without_data",
    "document_mask_ignored",
    "embedding_of_limited_norm",
    "float64_leak",
    "flops_off_by_two",
    "fsdp_in_float32",
    "half_the_tokens_in_bfloat16",
    "init_not_recursive",
    "layer_number_from_place",
    "layers_in_a_list",
    "loss_in_bfloat16",
    "loss_shifts_again",
    "matrices_in_a_list",
    "mean_of_a_small_balance_loss",
    "mask_in_evaluation_only",
    "mask_off_by_one",
    "memory_not_written",
    "multi_token_documents_ignored",
    "multi_token_one_too_far",
    "missing_causal_mask_behind_zeros",
    "norm_in_no_stage",
    "optimizer_forgets_moments",
    "optimizer_leaves_out_norms",
    "own_inputs_not_causal",
    "positions_in_the_first_stage_only",
    "positions_within_the_part",
    "router_not_normalised",
    "scaled_in_training",
    "softmax_that_overflows",
    "table_of_the_length",
    "tail_without_gradient",
    "uninitialised_buffer",
    "values_are_the_keys",
    "wrong_backward",
    "wrong_backward_of_float32",
}
"""Those that CI looks for, one or two of a kind; the others are `long`."""

ON_ONE_PROCESS = ("contract", "semantics", "numerics", "cost", "adapter", "learning")
"""Groups of checks that tests of right models run here."""

DROPOUT_CHECKS = ["semantics.causality", "semantics.documents", "semantics.batch", "learning.slope"]
"""Those that look at gradients in training."""

CHECKS = {check.name: check for check in all_checks()}


def subject_of(name: str, folder: Path, hf_path: Path | None = None) -> Subject:
    return Subject(name, "debugmodel", folder, f"mutants.{name}", hf_path)


def write_hf_model(config: dict, folder: Path) -> Path:
    """A checkpoint of random weights, far from zero, so that a difference would show."""
    import transformers

    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    hf_config = transformers.AutoConfig.from_pretrained(folder)
    hf_config.initializer_range = 0.1
    masked = config["model_type"] == "esm"
    auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    auto.from_config(hf_config).save_pretrained(folder)
    return folder


def test_there_are_mutants_for_every_kind_of_check() -> None:
    caught = {name for mutant in MUTANTS for name in module_of(mutant).CAUGHT_BY}
    assert caught <= CHECKS.keys()
    assert {name.partition(".")[0] for name in caught} == {c.group for c in CHECKS.values()}
    assert set(MUTANTS) >= QUICK


def module_of(mutant: str):
    return importlib.import_module(f"mutants.{mutant}")


def require_caught(mutant: str, folder: Path) -> None:
    module = module_of(mutant)
    hf_path = None
    if hasattr(module, "HF_CONFIG"):
        hf_path = write_hf_model(module.HF_CONFIG, folder)
    subject = subject_of(mutant, folder, hf_path)
    found = {o.check.name: o for o in run_checks(choose(module.CAUGHT_BY), subject)}
    for number, name in enumerate(module.CAUGHT_BY):
        outcome = found[name]
        assert outcome.status == "fail", f"{name}: {outcome.message}"
        crashes = getattr(module, "CRASHES", False)
        assert crashes or not outcome.details, f"{name} crashed: {outcome.details}"
        if number == 0:
            said = f"{outcome.message} {outcome.hint}"
            assert re.search(module.SAYS, said, re.S), said


@pytest.mark.parametrize("mutant", sorted(QUICK))
def test_a_planted_bug_is_found(mutant: str, tmp_path: Path) -> None:
    require_caught(mutant, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("mutant", sorted(set(MUTANTS) - QUICK))
def test_every_other_planted_bug_is_found(mutant: str, tmp_path: Path) -> None:
    require_caught(mutant, tmp_path)


def failures(subject: Subject) -> list[str]:
    """Of the checks on one process."""
    outcomes: list[Outcome] = list(run_checks(choose(ON_ONE_PROCESS), subject))
    return [f"{o.check.name}: {o.message}\n{o.details}" for o in outcomes if o.status == "fail"]


def test_the_base_of_the_mutants_is_right(tmp_path: Path) -> None:
    """So that a failure of a mutant is due to its bug."""
    config = importlib.import_module("mutants.base").hf_config()
    (tmp_path / "hf").mkdir()
    subject = subject_of("base", tmp_path, write_hf_model(config, tmp_path / "hf"))
    outcomes = list(run_checks(choose(["adapter"]), subject))
    asked = [o for o in outcomes if o.check.name not in ("adapter.flavors", "adapter.config_json")]
    assert {o.status for o in asked} == {"pass"}, outcomes


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "flavor", "custom_import"),
    [
        ("base", "debugmodel", "mutants.base"),
        ("learned_positions", "debugmodel", "learned_positions"),
        ("recurrent", "debugmodel", "recurrent"),
        ("shared_projection", "debugmodel", "shared_projection"),
        ("short_contexts", "debugmodel", "short_contexts"),
        ("starts_at_zero", "debugmodel", "starts_at_zero"),
        ("bidirectional", "debugmodel", "bidirectional"),
        ("two_halves", "debugmodel", "two_halves"),
        ("dropout_and_balance", "debugmodel", "dropout_and_balance"),
        ("ternary", "debugmodel", "ternary"),
        ("tuple_diffusion", "debugmodel", "tiny_own_batches"),
        ("tiny_codes", "debugmodel", "tiny_own_batches"),
        ("tiny_diffusion", "tiny", "tiny_diffusion"),
        ("deepseek_v3", "debugmodel", ""),
        ("deepseek_v3", "debugmodel_mtp", ""),
        ("gemma3", "debugmodel", ""),
        ("gpt_oss", "debugmodel", ""),
        ("llama3", "debugmodel", ""),
        ("llama4", "debugmodel", ""),
        ("qwen3", "debugmodel", ""),
        ("qwen3", "debugmodel_moe", ""),
        ("tiny_llama", "tiny", "tiny_llama"),
    ],
)
def test_a_right_model_passes(name: str, flavor: str, custom_import: str, tmp_path: Path) -> None:
    assert not failures(Subject(name, flavor, tmp_path, custom_import))


@pytest.mark.long
def test_checks_of_checkpoints_run_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run refuses a folder that another live process uses."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(8), raising=False)
    outcomes = run_checks(choose(["checkpoints"]), subject_of("base", tmp_path))
    assert [f"{o.check.name}: {o.message}" for o in outcomes if o.status != "pass"] == []


def test_an_adapter_that_joins_sharded_matrices_is_right(tmp_path: Path) -> None:
    """As one for files with all queries first does."""
    subject = Subject("joined", "debugmodel", tmp_path, "joined")
    outcomes = run_checks(choose(["adapter.dtensor"]), subject)
    assert [f"{o.check.name}: {o.message}" for o in outcomes if o.status != "pass"] == []


def test_a_right_model_is_compared_where_its_window_ends(tmp_path: Path) -> None:
    config = importlib.import_module("window").hf_config()
    (tmp_path / "hf").mkdir()
    hf_path = write_hf_model(config, tmp_path / "hf")
    subject = Subject("window", "debugmodel", tmp_path, "window", hf_path)
    said = CHECKS["adapter.hf_numbers"].run(subject)
    assert said.startswith("logits of 257 tokens equal to")


@pytest.mark.long
def test_a_right_model_of_convolutions_and_chunks_passes(tmp_path: Path) -> None:
    subject = Subject("recurrent", "debugmodel", tmp_path, "recurrent")
    outcomes = {o.check.name: o for o in run_checks(choose(["semantics", "cost"]), subject)}
    assert [f"{n}: {o.message}" for n, o in outcomes.items() if o.status == "fail"] == []
    assert "layers.1 without the token before" in outcomes["semantics.memory"].message
    assert "as measured (at 64 tokens and more)" in outcomes["cost.flops"].message


def test_a_right_state_space_model_passes(tmp_path: Path) -> None:
    """Its decay rates are exponentials of a matrix; its length must be a multiple of 64."""
    subject = Subject("state_space", "debugmodel", tmp_path, "state_space")
    only = ["contract.device", "contract.state_dict", "numerics.large_weights"]
    outcomes = run_checks(choose(only), subject)
    assert [f"{o.check.name}: {o.message}" for o in outcomes if o.status != "pass"] == []


@pytest.mark.long
@pytest.mark.parametrize("name", ["tuple_diffusion", "tiny_codes"])
def test_a_right_model_with_batches_of_its_own_passes(name: str, tmp_path: Path) -> None:
    """Its layouts and what can be asked of any batch; what is of texts says so."""
    subject = Subject(name, "debugmodel", tmp_path, "tiny_own_batches")
    only = ["contract.forward", "contract.args", "stages", "semantics.memory"]
    only += ["layouts.fsdp2", "layouts.tp2", "layouts.pp2", "checkpoints.resume", "numerics.bf16"]
    outcomes = {o.check.name: o for o in run_checks(choose(only), subject)}
    assert [f"{n}: {o.message}" for n, o in outcomes.items() if o.status == "fail"] == []
    skipped = [n for n, o in outcomes.items() if o.status == "skip"]
    assert skipped == ["semantics.memory"]
    assert outcomes["semantics.memory"].message.startswith("applies only to token ids [batch, seq]")


@pytest.mark.long
def test_a_right_model_whose_rows_have_weights_passes(tmp_path: Path) -> None:
    """It returns a tuple in training, and context parallelism leaves one number a row whole."""
    only = choose(["semantics.batch", "layouts.cp2", "layouts.pp2"])
    outcomes = run_checks(only, Subject("weighted_rows", "debugmodel", tmp_path, "weighted_rows"))
    assert [f"{o.check.name}: {o.message}" for o in outcomes if o.status != "pass"] == []


@pytest.mark.long
def test_a_right_model_whose_steps_are_not_equally_hard_passes(tmp_path: Path) -> None:
    """By the loss of one batch before and after; and its first modules may need each other."""
    only = choose(["learning.training", "contract.recursive"])
    outcomes = run_checks(only, Subject("uneven_noise", "tiny", tmp_path, "uneven_noise"))
    assert [f"{o.check.name}: {o.message}" for o in outcomes if o.status != "pass"] == []


def test_a_right_masked_model_is_compared_with_its_kind_of_transformers(tmp_path: Path) -> None:
    config = importlib.import_module("proteins").HF_CONFIG
    (tmp_path / "hf").mkdir()
    hf_path = write_hf_model(config, tmp_path / "hf")
    subject = Subject("proteins", "debugmodel", tmp_path, "proteins", hf_path)
    *_, outcome = run_checks(choose(["adapter.hf_numbers"]), subject)
    assert outcome.message.startswith("logits of 64 tokens equal to"), outcome


@pytest.mark.long
def test_a_right_model_of_missing_values_passes(tmp_path: Path) -> None:
    """In every layout each observed number weighs the same."""
    only = choose(["contract.loss", "contract.dataloader", "layouts.fsdp2"])
    outcomes = run_checks(only, Subject("missing_values", "tiny", tmp_path, "missing_values"))
    assert [f"{o.check.name}: {o.message}" for o in outcomes if o.status != "pass"] == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gaps_as_zeros", r"with NaN for all labels the loss is [\d.]+, not 0"),
        ("gaps_as_nan", "the loss is NaN: some labels are"),
    ],
)
def test_a_loss_of_missing_values_is_refused(name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckFailedError, match=says):
        CHECKS["contract.loss"].run(Subject(name, "tiny", tmp_path, "missing_values"))


def test_context_parallelism_divides_two_texts(tmp_path: Path) -> None:
    checks = choose(["layouts.cp2", "layouts.cp2_ulysses", "layouts.fsdp2_cp2"])
    outcomes = run_checks(checks, Subject("translation", "tiny", tmp_path, "translation"))
    assert [f"{o.check.name}: {o.message}" for o in outcomes if o.status != "pass"] == []


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("divided_weights", "pass", "off by"),
        ("weighted_tokens", "skip", "(see ModelProtocol), but build_dataloader_fn of weighted_t"),
    ],
)
def test_context_parallelism_divides_inputs_that_a_model_names(
    name: str, status: str, message: str, tmp_path: Path
) -> None:
    subject = Subject(name, "debugmodel", tmp_path, "weighted_rows")
    *_, outcome = run_checks(choose(["layouts.cp2"]), subject)
    assert (outcome.status, message in outcome.message) == (status, True), outcome.message


@pytest.mark.parametrize(
    "only",
    [
        ["layouts.tp2"],
        pytest.param(
            [
                *("layouts.fsdp2", "layouts.tp2_whole_sequence", "layouts.pp2_tp2"),
                *("layouts.cp2_ring", "layouts.fsdp2_cp2"),
            ],
            marks=pytest.mark.long,
        ),
    ],
    ids=["tp2", "others"],
)
def test_a_right_model_of_images_and_texts_passes(only: list[str], tmp_path: Path) -> None:
    """By the block of docs/own_data.md that gathers hidden states around a module."""
    outcomes = run_checks(choose(only), Subject("images", "debugmodel", tmp_path, "images"))
    assert [f"{o.check.name}: {o.message}" for o in outcomes if o.status != "pass"] == []


@pytest.mark.long
def test_a_right_model_that_does_not_predict_next_tokens_passes(tmp_path: Path) -> None:
    subject = Subject("two_halves", "debugmodel", tmp_path, "two_halves")
    only = ["learning.one_batch", "semantics.lengths", "layouts.fsdp2"]
    outcomes = {o.check.name: o for o in run_checks(choose(only), subject)}
    assert [f"{n}: {o.message}" for n, o in outcomes.items() if o.status == "fail"] == []
    assert "its own loader may give only one length" in outcomes["semantics.lengths"].message


@pytest.mark.long
def test_a_right_model_that_refuses_long_sequences_passes(tmp_path: Path) -> None:
    subject = Subject("short_contexts", "debugmodel", tmp_path, "short_contexts")
    only = ["contract.args", "numerics.bf16", "numerics.bf16_positions", "numerics.finite"]
    outcomes = {o.check.name: o for o in run_checks(choose(only), subject)}
    assert [f"{n}: {o.message}" for n, o in outcomes.items() if o.status == "fail"] == []
    assert outcomes["contract.args"].message.endswith("vocab_size 264, of 128 tokens at most")
    assert outcomes["numerics.finite"].message.startswith("128 tokens, ")
    assert outcomes["numerics.bf16_positions"].status == "skip"


@pytest.mark.parametrize(
    "name", ["two_predictions", pytest.param("two_predictions_stacked", marks=pytest.mark.long)]
)
def test_a_right_model_with_more_outputs_in_training_passes(name: str, tmp_path: Path) -> None:
    """By a loss of its own."""
    subject = Subject(name, "debugmodel", tmp_path, "two_predictions")
    only = ["cost.flops", "numerics.float64", "learning.gradients", "layouts.one_device"]
    only += ["contract.loss", "learning.slope"]
    outcomes = {o.check.name: o for o in run_checks(choose(only), subject)}
    assert [f"{n}: {o.message}" for n, o in outcomes.items() if o.status != "pass"] == []


def test_a_right_model_with_later_tokens_passes(tmp_path: Path) -> None:
    """Of torchtitan's loader, and by a loss of its own."""
    subject = Subject("deepseek_v3", "debugmodel_mtp", tmp_path)
    only = ["contract.forward", "learning.slope", "semantics", "cost", "layouts.fsdp2"]
    outcomes = {o.check.name: o for o in run_checks(choose(only), subject)}
    assert [f"{n}: {o.message}" for n, o in outcomes.items() if o.status != "pass"] == []


@pytest.mark.parametrize(
    ("name", "check", "note"),
    [
        ("dropout_and_no_tensor_parallel", "layouts.one_device", "Dropout is disabled .* in all"),
        pytest.param(
            "feed_forward_replicated",
            "layouts.tp2",
            r"60% of the layers' matrices are whole .*: layers\.N\.feed_forward\.w1\.weight, ",
            marks=pytest.mark.long,
        ),
        ("fsdp_in_float32", "layouts.fsdp2", "FSDP gathers all layers at once"),
    ],
)
def test_a_layout_passes_with_a_note(name, check, note, tmp_path) -> None:
    outcomes = {o.check.name: o for o in run_checks(choose([check]), subject_of(name, tmp_path))}
    assert outcomes[check].status == "pass"
    assert re.search(note, outcomes[check].message), outcomes[check].message


def test_a_loader_of_texts_adds_its_batches_to_random_tokens(tmp_path: Path) -> None:
    subject = Subject(
        "loader_without_shares", "debugmodel", tmp_path, "mutants.loader_without_shares"
    )
    assert subject.own_batches is not None and subject.reads_text
    batches = Batches(subject, subject.config("--training.local_batch_size=8").training, 0, 1)
    random, own = next(batches), next(batches)
    assert torch.equal(random["tokens"], subject.tokens(8, 65, seed=1)[:, :-1])
    assert torch.equal(own["tokens"], subject.own_batches.batch(2)["tokens"])
    assert subject.own_batches.batch(2)["tokens"].shape == (8, 64)


def test_a_right_model_with_dropout_and_a_balance_loss_passes(tmp_path: Path) -> None:
    """Its gradients in training are not of paths alone."""
    subject = Subject("dropout_and_balance", "debugmodel", tmp_path, "dropout_and_balance")
    outcomes = list(run_checks(choose(DROPOUT_CHECKS), subject))
    assert [f"{o.check.name}: {o.message}" for o in outcomes if o.status != "pass"] == []


def test_gradients_may_be_meant_to_be_no_slopes(tmp_path: Path) -> None:
    """As those of weights that are rounded to -1, 0 and 1; others say so."""
    for name, reason in (
        ("ternary", "forward() rounds what depends on weights"),
        ("scaled_gradients", "Model.estimates_gradients is True"),
    ):
        with pytest.raises(NotApplicableError, match=re.escape(reason)):
            CHECKS["learning.slope"].run(Subject(name, "debugmodel", tmp_path, "ternary"))


@pytest.mark.parametrize(
    "only",
    [
        ["learning.slope", "numerics.bf16_gradients", "layouts.tp2"],
        pytest.param(
            ["layouts.compile_inductor", "layouts.pp2_fsdp2_tp2", "layouts.ac_selective_op"],
            marks=pytest.mark.long,
        ),
    ],
    ids=["tp2", "others"],
)
def test_a_right_model_with_a_kernel_of_its_own_passes(only: list[str], tmp_path: Path) -> None:
    outcomes = run_checks(choose(only), Subject("own_kernel", "debugmodel", tmp_path, "own_kernel"))
    assert [f"{o.check.name}: {o.message}" for o in outcomes if o.status != "pass"] == []


def test_bfloat16_may_change_a_sample_that_cancels_out(tmp_path: Path) -> None:
    subject = Subject("cancelling_row", "tiny", tmp_path, "cancelling_row")
    assert CHECKS["numerics.bf16"].run(subject).endswith("at 1 tokens")


def test_gradients_of_a_model_without_float64_are_measured_in_float32(tmp_path: Path) -> None:
    said = CHECKS["learning.slope"].run(Subject("no_float64", "debugmodel", tmp_path, "no_float64"))
    assert re.match(r"\d+ parameters, each within 1e-02, \d+ others could not be measured", said)
    assert "in float32, since it does not run in float64: TypeError" in said


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_float64", "TypeError: float64 is not supported"),
        ("narrow_kernel", "aten.lift_fresh.default in .*feed_forward makes a torch.float32 tensor"),
    ],
)
def test_layouts_of_a_model_without_float64_are_compared_in_float32(
    name: str, reason: str, tmp_path: Path
) -> None:
    subject = Subject(name, "debugmodel", tmp_path, "no_float64")
    outcomes = {o.check.name: o for o in run_checks(choose(["layouts.accumulation"]), subject)}
    said = outcomes["layouts.precision"].message
    assert re.fullmatch(f"it cannot, so layouts are compared in float32: {reason}", said), said
    assert re.match("off by .e-0[678] of the loss", outcomes["layouts.accumulation"].message)


@pytest.mark.long
def test_a_right_model_whose_layers_share_a_module_passes(tmp_path: Path) -> None:
    subject = Subject("shared_projection", "debugmodel", tmp_path, "shared_projection")
    only = ["contract.recursive", "cost.nparams", "layouts.fsdp2", "checkpoints.resume_fsdp2"]
    outcomes = {o.check.name: o for o in run_checks(choose(only), subject)}
    assert [f"{n}: {o.message}" for n, o in outcomes.items() if o.status == "fail"] == []
    assert outcomes["layouts.fsdp2"].status == "pass"
    assert "layers share layers.0.wo.weight" in outcomes["contract.recursive"].message


@pytest.mark.long
def test_a_right_model_whose_teacher_follows_it_passes(tmp_path: Path) -> None:
    """Without its layers, there is nothing that the teacher could begin as."""
    subject = Subject("following", "debugmodel", tmp_path, "following")
    only = ["contract.recursive", "learning.slope", "layouts.fsdp2", "checkpoints.resume_fsdp2"]
    outcomes = run_checks(choose(only), subject)
    failed = [f"{o.check.name}: {o.message}" for o in outcomes if o.status == "fail"]
    assert failed == []


def test_a_right_model_that_freezes_parameters_passes(tmp_path: Path) -> None:
    subject = Subject("frozen_block", "debugmodel", tmp_path, "frozen_block")
    only = choose(["learning.gradients", "learning.slope", "layouts.updates", "layouts.tp2"])
    outcomes = {o.check.name: o for o in run_checks(only, subject)}
    assert [f"{n}: {o.message}" for n, o in outcomes.items() if o.status != "pass"] == []
    assert outcomes["learning.gradients"].message == "29 parameters, and 10 that the model freezes"


def test_features_that_no_input_activates_are_no_mistake(tmp_path: Path) -> None:
    subject = Subject("squared_relu", "debugmodel", tmp_path, "squared_relu")
    assert CHECKS["learning.gradients"].run(subject) == "39 parameters"
    assert CHECKS["learning.slope"].run(subject)


@pytest.mark.parametrize(
    ("name", "check", "says"),
    [
        ("detached", "learning.gradients", "4 of 39 parameters get no gradient"),
        ("unused", "learning.gradients", r"w1.weight: 64 of 128 rows get no gradient: 64, 65, "),
        pytest.param(
            *("wrong_sign", "learning.slope", r"the last in .* layers.3.feed_forward.w1.weight"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_few_inputs_hide_no_mistake(name: str, check: str, says: str, tmp_path: Path) -> None:
    subject = Subject(f"squared_relu_{name}", "debugmodel", tmp_path, "squared_relu")
    with pytest.raises(CheckFailedError, match=says):
        CHECKS[check].run(subject)


def test_tensor_parallelism_splits_what_layers_share_once(tmp_path: Path) -> None:
    subject = Subject("shared_feed_forward", "debugmodel", tmp_path, "shared_projection")
    outcomes = {o.check.name: o for o in run_checks(choose(["layouts.tp2"]), subject)}
    assert outcomes["layouts.tp2"].status == "pass", outcomes["layouts.tp2"].message


@pytest.mark.parametrize(
    ("name", "status"), [("bidirectional", "skip"), ("bidirectional_silent", "fail")]
)
def test_a_model_may_say_that_tokens_see_later_ones(name: str, status: str, tmp_path: Path) -> None:
    subject = Subject(name, "debugmodel", tmp_path, "bidirectional")
    outcomes = {o.check.name: o.status for o in run_checks(choose(["semantics"]), subject)}
    assert outcomes["semantics.causality"] == status
    assert outcomes["semantics.lengths"] == ("pass" if status == "skip" else "fail")
    assert outcomes["semantics.batch"] == outcomes["semantics.memory"] == "pass"


def test_the_guides_model_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of `docs/adding_models.md`, as it is tested there."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "e2e"))
    from test_guide import write_model

    write_model(tmp_path / "guides_package" / "your_model")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(MODEL_REGISTRY, "your_model", None)  # so that it is no more afterwards
    del MODEL_REGISTRY["your_model"]
    subject = Subject("your_model", "debugmodel", tmp_path, "guides_package.your_model")
    assert not failures(subject)
