"""Every kernel gives the same answer, and the choice between them is the table in the module's docstring."""

import pytest
import torch
import torch.nn.functional as F

from trivium.models import attention
from trivium.models.attention import attend, choose_kernel, use_kernel, visibility, who_sees_whom
from trivium.models.transformer import KVCache

CPU = torch.device("cpu")


def heads(rows: int, queries: int, keys: int, length: int, size: int = 16, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, count, length, size, generator=generator) for count in (queries, keys, keys)]


def test_visibility_by_hand():
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    assert visibility(5, 0, CPU, None, document_ids=documents)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert visibility(5, 0, CPU, 2, document_ids=documents)[0, 0].int().tolist()[4] == [0, 0, 0, 1, 1]
    padding = torch.tensor([[0, 1, 1]])
    assert visibility(3, 0, CPU, None, attention_mask=padding)[0, 0].int().tolist() == [
        [1, 0, 0],  # a pad sees itself
        [0, 1, 0],
        [0, 1, 1],
    ]
    assert visibility(2, 2, CPU, 3)[0, 0].int().tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]


def test_masks_are_made_only_where_needed():
    assert who_sees_whom(8, 0, CPU, None).mask is None
    assert who_sees_whom(1, 5, CPU, None).mask is None
    assert who_sees_whom(8, 0, CPU, 8).mask is None
    assert who_sees_whom(8, 0, CPU, 7).mask is not None
    assert who_sees_whom(1, 7, CPU, 7).mask is not None


BF16, FP32 = torch.bfloat16, torch.float32
LONG = {"length": 2048, "total": 2048}


@pytest.mark.parametrize(
    ("device", "dtype", "facts", "kernel"),
    [
        ("cpu", FP32, LONG, "causal"),
        ("cpu", BF16, LONG, "causal"),
        ("cuda", BF16, LONG, "causal"),
        ("cuda", BF16, {"length": 1, "total": 300}, "causal"),
        ("cuda", BF16, {**LONG, "cudnn": True}, "cudnn"),
        ("cuda", BF16, {"length": 2047, "total": 2047, "cudnn": True}, "causal"),
        ("cuda", BF16, {"length": 1, "total": 128, "cudnn": True}, "causal"),
        ("cuda", FP32, {**LONG, "cudnn": True}, "causal"),
        ("cuda", BF16, {**LONG, "cudnn": True, "head_dim": 192}, "causal"),
        ("cuda", BF16, {"length": 5, "total": 300}, "mask"),
        ("cuda", BF16, {"length": 1, "total": 300, "padded": True}, "mask"),
        ("cpu", FP32, {**LONG, "documents": True}, "mask"),
        ("cpu", BF16, {**LONG, "window": True}, "mask"),
        ("mps", FP32, {**LONG, "documents": True}, "mask"),
        ("cuda", BF16, {**LONG, "documents": True}, "varlen"),
        ("cuda", BF16, {**LONG, "documents": True, "window": True}, "varlen"),
        ("cuda", BF16, {**LONG, "documents": True, "varlen": False}, "flex"),
        ("cuda", FP32, {**LONG, "documents": True}, "flex"),
        ("cuda", BF16, {**LONG, "window": True}, "flex"),
        ("cuda", BF16, {**LONG, "documents": True, "padded": True}, "mask"),
        ("cuda", BF16, {**LONG, "documents": True, "head_dim": 80}, "varlen"),
        ("cuda", FP32, {**LONG, "documents": True, "head_dim": 80}, "mask"),
        ("cuda", BF16, {**LONG, "documents": True, "head_dim": 36}, "mask"),
        ("cuda", BF16, {"length": 64, "total": 64, "documents": True}, "mask"),
    ],
)
def test_the_choice_is_a_table(device, dtype, facts, kernel):
    facts = {"documents": False, "padded": False, "window": False, "head_dim": 64, "varlen": True, **facts}
    assert choose_kernel(device, dtype, **facts) == kernel


def reference_varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, *, window_size, enable_gqa=False):
    """The contract of torch.nn.attention.varlen, one document at a time: [tokens, heads, size], left and right."""
    assert torch.equal(starts_q, starts_k)
    assert starts_q.dtype == torch.int32
    left, right = window_size
    assert right == 0
    pieces = []
    for start, end in zip(starts_q[:-1].tolist(), starts_q[1:].tolist(), strict=True):
        assert end - start <= longest_q == longest_k
        q1, k1, v1 = (x[None, start:end].transpose(1, 2) for x in (q, k, v))
        mask = visibility(end - start, 0, q.device, None if left < 0 else left + 1)
        out = F.scaled_dot_product_attention(q1, k1, v1, attn_mask=mask, enable_gqa=enable_gqa)
        pieces.append(out[0].transpose(0, 1))
    return torch.cat(pieces)


def older_varlen(*args, window_size):
    """The contract before torch 2.12: as many heads of keys as of queries."""
    assert args[0].shape == args[1].shape
    return reference_varlen(*args, window_size=window_size)


DOCUMENTS = torch.tensor([[0] * 70 + [1] * 30 + [2] * 1 + [3] * 59, [0] * 160])


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("keys", [4, 2])
@pytest.mark.parametrize("kernel", ["explicit", "flex", "varlen", "older varlen"])
def test_every_kernel_gives_the_same_answer(kernel, keys, window, monkeypatch):
    """Outputs and gradients in fp32, but FlexAttention's, which has no backward pass on CPU.

    varlen's own kernel runs on CUDA only, so here it is a reference of its contract that is called.
    160 positions: more than one of FlexAttention's blocks and no whole number of them.
    """
    monkeypatch.setattr(attention, "varlen_attention", lambda: older_varlen if "old" in kernel else reference_varlen)
    kernel = kernel.removeprefix("older ")
    outcomes = []
    trained = kernel != "flex"
    for name in ("mask", kernel):
        q, k, v = (x.requires_grad_(trained) for x in heads(2, 4, keys, 160))
        with use_kernel(name):
            seen = who_sees_whom(160, 0, CPU, window, document_ids=DOCUMENTS)
        assert seen.kernel == name
        out = attend(q, k, v, seen)
        if trained:
            out.square().sum().backward()
        outcomes.append((out.detach(), q.grad, k.grad, v.grad) if trained else (out,))
    for expected, found in zip(*outcomes, strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", ["mask", "explicit", "flex"])
@pytest.mark.parametrize("window", [None, 9])
def test_without_documents_too(kernel, window):
    q, k, v = heads(1, 4, 2, 150)
    with use_kernel("mask" if window else "causal"):
        expected = attend(q, k, v, who_sees_whom(150, 0, CPU, window))
    with use_kernel(kernel):
        found = attend(q, k, v, who_sees_whom(150, 0, CPU, window))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_explicit_also_continues_a_cache():
    q, k, v = heads(1, 4, 2, 20)
    for past, window in [(19, None), (15, None), (15, 6)]:
        with use_kernel("explicit"):
            found = attend(q[:, :, past:], k, v, who_sees_whom(20 - past, past, CPU, window))
        whole = attend(q, k, v, who_sees_whom(20, 0, CPU, window))
        assert torch.allclose(found, whole[:, :, past:], atol=1e-6)


def test_explicit_takes_the_softmax_in_float32():
    """Scores of thousands of positions in bfloat16 would add up to anything between 0.9 and 1.1."""
    q, k, v = (x.bfloat16() for x in heads(1, 1, 1, 512))
    exact = [x.float() for x in (q, k, v)]
    with use_kernel("explicit"):
        seen = who_sees_whom(512, 0, CPU, None)
        error = (attend(q, k, torch.ones_like(v), seen).float() - 1).abs().max()
        assert attend(q, k, v, seen).dtype == torch.bfloat16
        assert (attend(q, k, v, seen).float() - attend(*exact, seen)).abs().max() < 2e-2
    assert error <= 2**-7  # the rounding of the weights themselves, mostly cancelling; not of their sum


def test_documents_begin_where_rows_and_documents_begin():
    documents = torch.tensor([[0, 0, 1, -1], [-1, 2, 2, 2]])
    assert attention._document_starts(documents, 4, CPU).tolist() == [0, 2, 3, 4, 5, 8]


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", ["explicit", "flex"])
def test_a_model_computes_the_same_with_any_kernel(tiny, tokens, kernel):
    model = tiny(qk_norm=True, sliding_window=5, layer_types=("full_attention", "sliding_attention", "full_attention"))
    ids = tokens(2, 40)
    documents = torch.tensor([[0] * 25 + [1] * 15] * 2)
    with torch.no_grad():
        expected = model(ids, document_ids=documents)
    with use_kernel(kernel), torch.no_grad():
        assert (model(ids, document_ids=documents) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_packing_does_not_go_with_a_cache(tiny, tokens):
    model = tiny()
    cache = KVCache(model.config, batch_size=1, capacity=8)
    model(tokens(1, 4), cache=cache)
    with pytest.raises(ValueError, match="cache"):
        model(tokens(1, 2), cache=cache, document_ids=torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["causal", "cudnn"])
def test_a_gpu_s_causal_kernels_give_the_answer_of_the_definition(kernel):
    device = torch.device("cuda")
    outcomes = []
    for name, precision in (("explicit", torch.float32), (kernel, BF16)):
        leaves = [x.to(device, precision).requires_grad_() for x in heads(2, 4, 2, 256, size=64)]
        with use_kernel(name):
            out = attend(*leaves, who_sees_whom(256, 0, device, None))
        out.float().square().sum().backward()
        outcomes.append((out.detach(), *(leaf.grad for leaf in leaves)))
    for expected, found in zip(*outcomes, strict=True):
        assert (found.float() - expected).abs().max() <= 2e-2 * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(
    ("kernel", "dtype", "bar"), [("flex", FP32, 2e-3), ("flex", BF16, 2e-2), ("varlen", BF16, 2e-2)]
)
def test_the_kernels_of_a_gpu_give_the_answer_of_the_definition(kernel, dtype, bar, window):
    """Outputs and gradients, against fp32; TF32 products of FlexAttention keep three digits, bf16 two."""
    device = torch.device("cuda")
    q, k, v = (x.to(device) for x in heads(2, 4, 2, 160, size=64))
    documents = DOCUMENTS.to(device)
    outcomes = []
    for name, precision in (("explicit", torch.float32), (kernel, dtype)):
        leaves = [x.detach().to(precision).requires_grad_() for x in (q, k, v)]
        with use_kernel(name):
            out = attend(*leaves, who_sees_whom(160, 0, device, window, document_ids=documents))
        out.float().square().sum().backward()
        outcomes.append((out.detach(), *(leaf.grad for leaf in leaves)))
    for expected, found in zip(*outcomes, strict=True):
        assert (found.float() - expected).abs().max() <= bar * expected.abs().max()
