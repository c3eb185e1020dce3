"""What we use of other packages that they do not promise: each has one place here, which says what to do once it is gone.

A new release of one of them is tried by raising its line in constraints.txt and running these tests first.
"""

import inspect
import logging

import pytest
import torch
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from support.families import transformer_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertModel, MPNetModel, PreTrainedTokenizerFast

from gist_train.training.loop import dropout_seed


def arguments_of(operator):
    return {argument.name for argument in operator.default._schema.arguments}


def test_torchs_variable_length_flash_attention():
    """model/attention.py, `_flash`: the public `varlen_attn` has no dropout. If this went, see whether that has it now."""
    asked = {"cum_seq_q", "max_q", "dropout_p", "is_causal", "scale", "window_size_left", "window_size_right"}
    assert asked <= arguments_of(torch.ops.aten._flash_attention_forward)


def test_torchs_backward_of_softmax():
    """model/bert.py, `_Attention.backward`: if the operator went, write (g - (g * w).sum(-1, keepdim=True)) * w."""
    w, g = torch.softmax(torch.randn(3, 5), dim=-1), torch.randn(3, 5)
    found = torch.ops.aten._softmax_backward_data(g, w, -1, torch.float32)
    torch.testing.assert_close(found, (g - (g * w).sum(-1, keepdim=True)) * w)


def test_torchs_mark_of_a_dynamic_size():
    """model/compiled.py, `_of_any_size`: if it went, torch.compile(dynamic=True) makes symbols too, of more than is wanted."""
    assert callable(torch._dynamo.mark_dynamic)


def test_fused_adamw_is_told_by_attributes():
    """training/update.py, `update`: torch's GradScaler sets them. If AdamW reads them no more, clip and skip before it."""
    weight = nn.Parameter(torch.ones(3))
    adamw = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.0, fused=True)
    weight.grad = torch.ones(3)
    adamw.grad_scale, adamw.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    adamw.step()
    assert torch.equal(weight, torch.ones(3)), "a step that was to be left out was taken"
    adamw.found_inf = torch.tensor(0.0)
    adamw.step()
    assert not torch.equal(weight, torch.ones(3))


def test_a_cuda_graph_is_recorded_in_a_mode_and_a_pool():
    """training/graphs.py, `CudaRecorder`: if these went, torch.cuda.graph has them, and collects garbage each time."""
    documented = torch.cuda.CUDAGraph.capture_begin.__doc__ or ""
    assert {"pool", "capture_error_mode"} <= inspect.signature(torch.cuda.CUDAGraph.capture_begin).parameters.keys() or (
        "pool" in documented and "capture_error_mode" in documented
    )


def test_transformers_berts_have_these_parts():
    """model/bert.py runs BERT's layers itself. If a part has another name, its forward in transformers says which."""
    model: BertModel = transformer_of("bert")
    layer = model.encoder.layer[0]
    own, after, inner, output = layer.attention.self, layer.attention.output, layer.intermediate, layer.output
    assert all(isinstance(part, nn.Linear) for part in (own.query, own.key, own.value, after.dense, inner.dense, output.dense))
    assert all(isinstance(part, nn.LayerNorm) for part in (after.LayerNorm, output.LayerNorm))
    assert all(isinstance(part, nn.Dropout) for part in (own.dropout, after.dropout, output.dropout))
    assert own.num_attention_heads == 4
    assert layer.gradient_checkpointing is False
    assert model.config.hidden_act == "gelu"
    embedded = model.embeddings(input_ids=torch.ones(1, 3, dtype=torch.long), position_ids=torch.arange(3)[None])
    assert embedded.shape == (1, 3, 16)


def test_transformers_mpnet_has_these_parts():
    """model/mpnet.py runs its layers itself, with a bias for each length."""
    model: MPNetModel = transformer_of("mpnet")
    layer = model.encoder.layer[0]
    own = layer.attention.attn
    assert all(isinstance(part, nn.Linear) for part in (own.q, own.k, own.v, own.o))
    assert isinstance(layer.attention.LayerNorm, nn.LayerNorm)
    assert isinstance(own.dropout, nn.Dropout)
    assert own.num_attention_heads == 4
    assert model.encoder.compute_position_bias(torch.ones(1, 5, dtype=torch.long)).shape == (1, 4, 5, 5)


def test_transformers_tokenizers_are_asked_past_their_own_call(make_model):
    """model/pretrained.py, `Pretrained.tokens`: if these went, the tokenizer's own call gives the same ids, half as fast."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(make_model())
    asked = ["padding_strategy", "truncation_strategy", "max_length", "stride", "pad_to_multiple_of", "padding_side"]
    assert list(inspect.signature(tokenizer.set_truncation_and_padding).parameters) == asked
    (found,) = tokenizer.backend_tokenizer.encode_batch_fast(["how are you"])
    assert found.ids == tokenizer("how are you")["input_ids"]


def test_transformers_report_weights_that_are_missing(make_model, tmp_path):
    """model/pretrained.py, `_missing_weights` reads the table that transformers logs: random weights would train all the same."""
    import shutil

    from safetensors.torch import load_file, save_file

    from gist_train.model.opening import _load_reports, _missing_weights

    folder = tmp_path / "model"
    shutil.copytree(make_model(), folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("attention.output.dense.weight"))
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors", {"format": "pt"})
    with _load_reports() as reports:
        BertModel.from_pretrained(folder)
    assert _missing_weights(reports) == [name], "transformers tells of missing weights in another way now"
    assert logging.getLogger("transformers.modeling_utils").handlers == []


def test_the_retrieval_evaluator_takes_new_relevant_documents():
    """evaluation/retrieval.py: if it keeps what it was made with, make an evaluator for each query."""
    evaluator = InformationRetrievalEvaluator(
        {"q": ""}, {}, {"q": {"d"}}, mrr_at_k=[10], precision_recall_at_k=[10], ndcg_at_k=[], accuracy_at_k=[], map_at_k=[]
    )
    evaluator.relevant_docs = {"q": {"a", "b"}}
    found = evaluator.compute_metrics([[{"corpus_id": "x", "score": 2.0}, {"corpus_id": "a", "score": 1.0}]])
    assert (found["recall@k"][10], found["mrr@k"][10]) == (0.5, 0.5)


def test_mteb_lists_all_its_tasks():
    """evaluation/mteb_tasks.py: `mteb.get_tasks` leaves some out. If the list went, ask it with every filter off."""
    tasks = pytest.importorskip("mteb.get_tasks")
    assert "STSBenchmark" in {task.metadata.name for task in tasks.TASK_LIST}


def test_accelerate_can_be_asked_for_another_device():
    """Tests and benchmarks alone: one process trains on two devices, or under two trainers, in turn."""
    from accelerate.state import AcceleratorState

    assert list(inspect.signature(AcceleratorState._reset_state).parameters)[-1] == "reset_partial_state"


def test_numpy_draws_the_same_seeds():
    """training/loop.py, `dropout_seed`: numpy promises its SeedSequence, and published runs hang on these bits."""
    assert dropout_seed(42, 1, 0, 0) == 7829184764001561178


def test_distributed_data_parallel_tells_its_times():
    """training/traffic.py, `Traffic.row`: if it went, leave gradient_seconds out of the rows."""
    assert callable(DistributedDataParallel._get_ddp_logging_data)


def test_their_gradient_cache_takes_a_loss():
    """inside/trainer_loss.py is a `CachedLossMixin`: if it went, training/gradient_cache.py says what it did."""
    from sentence_transformers.base.losses.gradcache import CachedLossMixin, has_static_embedding_input

    assert list(inspect.signature(CachedLossMixin.calculate_loss).parameters) == ["self", "reps", "labels", "with_backward"]
    assert list(inspect.signature(CachedLossMixin.forward_cached).parameters) == ["self", "sentence_features", "labels"]
    assert CachedLossMixin.uses_gradient_cache is True  # MatryoshkaLoss reads it
    assert callable(has_static_embedding_input)


def test_their_columns_are_embedded_together():
    """inside/trainer_loss.py, `forward`: if `embed_columns` went, call the model once a column, in their order."""
    from sentence_transformers.base.losses.merged_forward import embed_columns

    assert list(inspect.signature(embed_columns).parameters) == ["model", "features_list", "separate_first"]


def test_their_transformer_module_has_these_parts(make_model):
    """inside/packing.py puts a forward in place of this one's, and gives back the attention that a config names."""
    from sentence_transformers import SentenceTransformer

    module = SentenceTransformer(str(make_model()), device="cpu")[0]
    assert (module.backend, module.module_output_name, module.can_flatten_inputs) == ("torch", "token_embeddings", False)
    assert module.auto_model.config._attn_implementation in ("sdpa", "eager")
    module.auto_model.set_attn_implementation("eager")
    assert module.auto_model.config._attn_implementation == "eager"


def test_trackio_is_asked_for_the_rows_of_a_run():
    """training/tracker_stores.py, `Trackio`: `trackio.Api` names runs and has no rows. If these went, see whether it has them."""
    from trackio import SQLiteStorage
    from trackio.fragments import import_inbox_dir

    assert {"project", "run", "run_id"} <= inspect.signature(SQLiteStorage.get_logs).parameters.keys()
    assert list(inspect.signature(SQLiteStorage.get_run_records).parameters) == ["project"]
    assert import_inbox_dir() == 0


def test_tensorboard_reads_event_files(tmp_path):
    """training/tracker_stores.py, `TensorBoard`: if it went, EventFileLoader reads one file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    events.Reload()
    assert events.Tags()["scalars"] == []
