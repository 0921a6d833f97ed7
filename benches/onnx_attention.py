"""ONNX Runtime's GroupQueryAttention on the CPU, from its Python package: attention over a cache that it owns in place.

The caches are bound where they lie, as inputs and as outputs, so nothing of their size is copied. They must be
[B, Hkv, S, D] in memory. The operator takes the last tokens as new ones and appends them: it writes them once more
where they stand already. Binding the pointers is part of a call, as it is of a decoding step.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def group_query_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q [B, Sq, H, D], the last tokens, over k and v [B, Sk, Hkv, D]; raises ImportError where
    onnx or onnxruntime is missing, and what ONNX Runtime raises of a dtype that it has no kernel for."""
    (batch, queries, heads, dim), (_, keys, kv_heads, _) = q.shape, k.shape
    caches = [x.transpose(1, 2) for x in (k, v)]
    if not all(x.is_contiguous() for x in caches):
        raise ValueError("takes caches that lie as [B, Hkv, S, D]")
    session, element = _session(heads, kv_heads, q.dtype, torch.get_num_threads())
    new = [x[:, keys - queries :].reshape(batch, queries, kv_heads * dim).contiguous() for x in (k, v)]
    out = torch.empty(batch, queries, heads * dim, dtype=q.dtype)
    last = torch.full((batch,), keys - 1, dtype=torch.int32)
    total = torch.tensor([keys], dtype=torch.int32)
    binding = session.io_binding()
    rows = q.reshape(batch, queries, heads * dim).contiguous()
    names = ("query", "key", "value", "past_key", "past_value")
    for name, x in zip(names, (rows, *new, *caches), strict=True):
        binding.bind_input(name, "cpu", 0, element, list(x.shape), x.data_ptr())
    for name, x in (("seqlens_k", last), ("total_sequence_length", total)):
        binding.bind_input(name, "cpu", 0, _elements()[torch.int32], list(x.shape), x.data_ptr())
    for name, x in (("output", out), ("present_key", caches[0]), ("present_value", caches[1])):
        binding.bind_output(name, "cpu", 0, element, list(x.shape), x.data_ptr())
    session.run_with_iobinding(binding)
    return out.unflatten(2, (heads, dim))


def _elements() -> dict[torch.dtype, int]:
    from onnx import TensorProto as of

    return {torch.float32: of.FLOAT, torch.float16: of.FLOAT16, torch.bfloat16: of.BFLOAT16, torch.int32: of.INT32}


@functools.cache
def _session(heads: int, kv_heads: int, dtype: torch.dtype, threads: int) -> tuple[Any, int]:
    """A model of the one operator, and its element type."""
    import onnxruntime
    from onnx import helper

    element, whole = _elements()[dtype], _elements()[torch.int32]
    floats = ["query", "key", "value", "past_key", "past_value"]
    integers = ["seqlens_k", "total_sequence_length"]
    results = ["output", "present_key", "present_value"]
    node = helper.make_node(
        "GroupQueryAttention", floats + integers, results, domain="com.microsoft", num_heads=heads,
        kv_num_heads=kv_heads,
    )
    graph = helper.make_graph(
        [node], "attention",
        [helper.make_tensor_value_info(name, element, None) for name in floats]
        + [helper.make_tensor_value_info(name, whole, None) for name in integers],
        [helper.make_tensor_value_info(name, element, None) for name in results],
    )
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads spin during a run as ever, not on into the next implementation's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 4          # what it refuses it raises
    model = helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]), element
