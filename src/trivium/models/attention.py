"""Who sees whom, and the kernel that computes attention for it.

`choose_kernel` is the one place where the kernel is picked; the table it stands for:

| who sees whom                              | on CUDA, bf16 or fp16    | on CUDA, fp32 | elsewhere |
| ------------------------------------------ | ------------------------ | ------------- | --------- |
| everything before (also one new position)  | causal, cudnn to train   | causal        | causal    |
| packed documents, with a window or without | varlen, else flex        | flex          | mask      |
| a window, no documents                     | flex                     | flex          | mask      |
| a part of each row (`part.py`)             | flex                     | flex          | mask      |
| padded rows; several new positions after a cache; short rows; odd head sizes | mask | mask | mask |

`causal` and `mask` are torch's `scaled_dot_product_attention`, which has fast kernels of its own for the first and
reads a boolean mask of [T, T] for the second. `cudnn` is the first by cuDNN, on Hopper and later 1.4 to 1.8 times as
fast as torch's own choice (docs/performance.md); it plans anew for every shape, so it is for rows of whole blocks.
`flex` is torch's FlexAttention: blocks of 128 positions that nobody sees are never computed. `varlen` is torch's
variable-length attention: each document is a row of its own. `explicit` is two matrix products and a softmax in
float32: the definition, for tests and for where it is faster.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from trivium.models.part import Part, at

BLOCK = 128
"""FlexAttention's block in positions; a shorter row has no block to leave out."""

_forced: list[str] = []


@dataclass(frozen=True)
class Seen:
    """Who sees whom in one forward pass, in the form that `kernel` takes; made by `who_sees_whom`.

    `mask`: bool [B or 1, 1, T, past + T]. `blocks`: FlexAttention's. `starts`: int32 [documents + 1], where each
    document begins in the rows laid end to end, and the end. None where the kernel does not take it. `part`: which
    positions of each row the queries are, None for all; keys and values are of all positions in its order.
    """

    kernel: str
    window: int | None = None
    mask: Tensor | None = None
    blocks: BlockMask | None = None
    starts: Tensor | None = None
    part: Part | None = None


def choose_kernel(
    device: str,
    dtype: torch.dtype,
    length: int,
    total: int,
    *,
    documents: bool,
    padded: bool,
    window: bool,
    head_dim: int,
    varlen: bool,
    part: bool = False,
    cudnn: bool = False,
) -> str:
    """Return the kernel for `length` new positions that look at `total`, a pure function of what it is given.

    `device` is its type ("cpu", "cuda"), `dtype` that of queries and keys (as autocast lowers it), `window` whether
    there is one shorter than the row, `varlen` whether torch and the card have variable-length attention, `part`
    whether the new positions are some of a row's, not its last ones, `cudnn` whether cuDNN's is the faster one for what
    is computed.
    """
    plain = not (documents or padded or window or part)
    is_half = dtype in (torch.bfloat16, torch.float16)
    if plain and length in (1, total):
        fits = is_half and length == total and length % BLOCK == 0 and head_dim % 8 == 0 and head_dim <= 128
        return "cudnn" if cudnn and fits else "causal"
    if device != "cuda" or padded or (length != total and not part) or length < BLOCK:
        return "mask"
    if documents and varlen and not part and is_half and head_dim % 8 == 0 and head_dim <= 256:
        return "varlen"
    # Triton's tiles are powers of two of at least 16.
    return "flex" if head_dim in (16, 32, 64, 128, 256) else "mask"


@contextlib.contextmanager
def use_kernel(kernel: str) -> Iterator[None]:
    """Compute all attention in this context with one kernel: for tests and measurements.

    Where the kernel cannot say who sees whom ("causal" with documents, say) that is the caller's mistake.
    """
    _forced.append(kernel)
    try:
        yield
    finally:
        _forced.pop()


def who_sees_whom(
    length: int,
    past: int,
    device: torch.device,
    window: int | None,
    *,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    document_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    part: Part | None = None,
    steady: bool = False,
) -> Seen:
    """Return what `attend` needs to know, once for all layers with the same window.

    `past` positions stand in the cache, `length` are new. `document_ids`: int64 [B, T]; the tokens of a document
    stand together. `attention_mask`: [B, past + T], false at padding. `part`: which of the `length` positions
    are computed, where it is not all of them. `steady`: the same shapes come again and again, and nothing is compared
    with what another kernel gives. Raises ValueError for documents with a cache.
    """
    total = past + length
    window = None if window is None or window >= total else window
    if document_ids is not None and past:
        raise ValueError("Packed documents and a cache exclude each other: a cache continues one document per row.")
    documents, padded = document_ids is not None, attention_mask is not None
    kernel = (
        _forced[-1]
        if _forced
        else choose_kernel(
            device.type,
            dtype,
            length if part is None else len(part.queries),
            total if part is None else len(part.keys),
            documents=documents,
            padded=padded,
            window=window is not None,
            head_dim=head_dim,
            varlen=device.type == "cuda" and _has_varlen(device),
            part=part is not None,
            cudnn=steady and device.type == "cuda" and _has_fast_cudnn(device),
        )
    )
    if kernel in ("causal", "cudnn"):
        return Seen(kernel)
    if kernel == "flex":
        return Seen(kernel, window, blocks=_block_mask(length, device, window, document_ids, part), part=part)
    if kernel == "varlen":
        return Seen(kernel, window, starts=_document_starts(document_ids, length, device))
    seen = visibility(length, past, device, window, document_ids=document_ids, attention_mask=attention_mask, part=part)
    return Seen(kernel, window, mask=seen, part=part)


def visibility(
    length: int,
    past: int,
    device: torch.device,
    window: int | None,
    *,
    document_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    part: Part | None = None,
) -> Tensor:
    """Return who sees whom, bool [B or 1, 1, length, past + length], or [.., Tq, keys] of a `part`.

    Worked example, two packed documents a b | c d e: row d is `0 0 1 1 0`. A padded position sees itself, for a
    softmax over nothing is not a number; what it computes is never used.
    """
    total = past + length
    if length == 1 and window is None and attention_mask is not None:
        return attention_mask.bool()[:, None, None, :]
    queries, keys = torch.arange(past, total, device=device), torch.arange(total, device=device)
    if part is not None:
        queries, keys = part.queries, part.keys
    distance = queries[:, None] - keys
    mask = (distance >= 0)[None]
    if window is not None:
        mask = mask & (distance < window)
    if document_ids is not None:
        mask = mask & (at(document_ids, queries)[:, :, None] == at(document_ids, keys)[:, None, :])
    if attention_mask is not None:
        mask = (mask & attention_mask.bool()[:, None, :]) | (distance == 0)
    return mask[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    """Return what each query gathered from the values it sees, [B, heads, T, head_dim].

    `softmax(q k^T / sqrt(head_dim)) v`; q [B, heads, T, head_dim], k and v [B, kv_heads, past + T, head_dim], or, for
    `seen.part`, q [B, heads, Tq, head_dim] and keys and values as its `gather` lines them up.
    """
    return _KERNELS[seen.kernel](q, k, v, seen)


def _causal(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    # A single new position sees everything before it, so it needs no causal mask.
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1])


def _cudnn(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    # The others for what torch knows that cuDNN does not take.
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        return _causal(q, k, v, seen)


def _mask(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen.mask, enable_gqa=q.shape[1] != k.shape[1])


def _explicit(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    mask = seen.mask
    if mask is None:
        mask = visibility(q.shape[2], k.shape[2] - q.shape[2], q.device, seen.window)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _flex(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    # Only compiled does it leave out blocks; on CPU it runs as written, which is what the tests compare.
    compiled = q.device.type == "cuda" and not torch.compiler.is_compiling()
    call: Any = _compiled(flex_attention) if compiled else flex_attention
    out: Tensor = call(q, k, v, block_mask=seen.blocks, enable_gqa=q.shape[1] != k.shape[1])
    return out


def _varlen(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    """Lay the rows end to end, [B * T, heads, head_dim], and let each document be a row of its own."""
    rows, heads, length, size = q.shape
    call = varlen_attention()
    if call is None:
        raise ValueError("The kernel 'varlen' needs a torch with torch.nn.attention.varlen.")
    more: dict[str, Any] = {"enable_gqa": True} if heads != k.shape[1] else {}
    if more and "enable_gqa" not in inspect.signature(call).parameters:  # torch before 2.12
        more, group = {}, heads // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    flat = (x.transpose(1, 2).reshape(rows * length, x.shape[1], size) for x in (q, k, v))
    # (left, right): how many positions before and after are seen; -1 is all of them.
    sides = (-1 if seen.window is None else seen.window - 1, 0)
    out: Tensor = call(*flat, seen.starts, seen.starts, length, length, window_size=sides, **more)
    return out.view(rows, length, heads, size).transpose(1, 2)


_KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, Seen], Tensor]] = {
    "causal": _causal,
    "cudnn": _cudnn,
    "mask": _mask,
    "explicit": _explicit,
    "flex": _flex,
    "varlen": _varlen,
}


def _block_mask(
    length: int, device: torch.device, window: int | None, document_ids: Tensor | None, part: Part | None
) -> BlockMask:
    sizes = (length, length)
    places_q, places_k, documents_q, documents_k = None, None, document_ids, document_ids
    if part is not None:
        sizes = len(part.queries), len(part.keys)
        places_q, places_k = part.queries, part.keys
        if document_ids is not None:
            documents_q, documents_k = at(document_ids, places_q), at(document_ids, places_k)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query - key if places_q is None or places_k is None else places_q[query] - places_k[key]
        seen = distance >= 0
        if window is not None:
            seen = seen & (distance < window)
        if documents_q is not None and documents_k is not None:
            seen = seen & (documents_q[row, query] == documents_k[row, key])
        return seen

    # As written it fills a [B, T, T] table first; compiled it looks at one block at a time.
    make: Callable[..., Any] = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    rows = None if document_ids is None else document_ids.shape[0]
    blocks: BlockMask = make(sees, rows, None, *sizes, device=device, BLOCK_SIZE=BLOCK)
    return blocks


def _document_starts(document_ids: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Return where documents begin in the rows laid end to end, and their end, int32; a row begins one too."""
    if document_ids is None:
        raise ValueError("The kernel 'varlen' is for packed documents; there are no document_ids.")
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    return torch.cat((starts, starts.new_tensor([document_ids.numel()]))).to(torch.int32)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


@functools.cache
def varlen_attention() -> Callable[..., Any] | None:
    """Return torch's variable-length attention, or None where this torch has none that knows windows."""
    try:
        function: Callable[..., Any] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    return function if "window_size" in inspect.signature(function).parameters else None


@functools.cache
def _has_varlen(device: torch.device) -> bool:
    # The flash kernels behind it begin with the Ampere generation.
    return varlen_attention() is not None and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _has_fast_cudnn(device: torch.device) -> bool:
    # Measured on an H100: before that generation it is torch's own kernels that are faster.
    # torch leaves the first call unannotated.
    allowed: bool = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    return allowed and torch.cuda.get_device_capability(device) >= (9, 0)
