"""A part of each row's positions: what its queries see is what they see in the whole row, in any order."""

import pytest
import torch

from trivium.models.attention import attend, choose_kernel, use_kernel, visibility, who_sees_whom
from trivium.models.part import Part
from trivium.models.transformer import KVCache

CPU = torch.device("cpu")
LENGTH, PARTS = 300, 2
"""300 positions are 4 chunks of 75: padded by none; the blocks of FlexAttention begin elsewhere."""
DOCUMENTS = torch.tensor([[0] * 70 + [1] * 30 + [2] + [3] * 199, [0] * 160 + [1] * 140])


def part_of(rank: int, length: int = LENGTH, device: torch.device = CPU) -> Part:
    """Return the first and the last quarter of a row, or those in the middle; nothing is sent."""
    chunks = torch.arange(-(-length // 4) * 4, device=device).chunk(4)
    places = [torch.cat((chunks[0], chunks[3])), torch.cat((chunks[1], chunks[2]))]
    return Part(queries=places[rank], keys=torch.cat(places), gather=lambda dim, *xs: xs)


def heads(length: int, size: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, count, length, size, generator=generator) for count in (4, 2, 2)]


def padded(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return what stands at places of [B, heads, T, D]; what pads the row's end is not a number that anyone may see."""
    missing = int(places.max()) + 1 - x.shape[2]
    return torch.nn.functional.pad(x, (0, 0, 0, max(missing, 0)), value=3e3)[:, :, places]


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("rank", range(PARTS))
@pytest.mark.parametrize("length", [300, 298])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "documents"])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("kernel", ["mask", "explicit", "flex"])
def test_queries_of_a_part_see_what_they_see_in_the_whole_row(kernel, window, documents, length, rank):
    """Outputs, and gradients of q, k and v (FlexAttention has none on a CPU); 298 positions are padded to 300."""
    documents = None if documents is None else documents[:, :length]
    part = part_of(rank, length)
    real = part.queries < length
    trained = kernel != "flex"
    q, k, v = (x.requires_grad_(trained) for x in heads(length))
    with use_kernel("explicit"):
        whole = attend(q, k, v, who_sees_whom(length, 0, CPU, window, document_ids=documents))
    expected = [whole[:, :, part.queries[real]]]
    if trained:
        expected += torch.autograd.grad(expected[0].square().sum(), (q, k, v))
    with use_kernel(kernel):
        seen = who_sees_whom(length, 0, CPU, window, document_ids=documents, part=part)
    out = attend(padded(q, part.queries), padded(k, part.keys), padded(v, part.keys), seen)[:, :, real]
    found = [out]
    if trained:
        found += torch.autograd.grad(out.square().sum(), (q, k, v))
    for one, other in zip(expected, found, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()


def test_visibility_of_a_part_by_hand():
    """Two documents a b | c d e and a window of 2; queries a e and padding, keys a e . b c d: places 0 4 5 1 2 3."""
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    part = Part(queries=torch.tensor([0, 4, 5]), keys=torch.tensor([0, 4, 5, 1, 2, 3]), gather=lambda dim, *xs: xs)
    assert visibility(5, 0, CPU, None, document_ids=documents, part=part)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 1, 1],
        [0, 1, 1, 0, 1, 1],  # padding is one more position of the last document, whom nobody before it sees
    ]
    assert visibility(5, 0, CPU, 2, document_ids=documents, part=part)[0, 0, 1].int().tolist() == [0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("device", "facts", "kernel"),
    [
        ("cpu", {}, "mask"),
        ("cuda", {}, "flex"),
        ("cuda", {"documents": True, "window": True}, "flex"),
        ("cuda", {"length": 100}, "mask"),
        ("cuda", {"head_dim": 80}, "mask"),
    ],
)
def test_the_choice_for_a_part(device, facts, kernel):
    """Neither a plain causal kernel nor one for whole documents knows of queries from two places."""
    facts = {"length": 256, "total": 1024, "documents": False, "window": False, "head_dim": 64} | facts
    assert choose_kernel(device, torch.bfloat16, padded=False, varlen=True, part=True, **facts) == kernel


def test_rows_are_taken_apart_and_joined():
    row = torch.arange(14.0).view(1, 7, 2)
    part = Part(
        queries=torch.tensor([0, 1, 6, 7]), keys=torch.tensor([0, 1, 6, 7, 2, 3, 4, 5]), gather=lambda dim, *xs: xs
    )
    assert part.take(row)[0, :, 0].tolist() == [0, 2, 12, 12]
    other = Part(queries=torch.tensor([2, 3, 4, 5]), keys=part.keys, gather=part.gather)
    both = torch.cat((part.take(row), other.take(row)), 1)
    assert torch.equal(part.join(both, 7), row)


def all_of_it(length: int, device: torch.device) -> Part:
    """Return a part that is the whole row, from its end to its beginning, three places of padding with it."""
    places = torch.arange(length + 3, device=device).flip(0)
    return Part(queries=places, keys=places, gather=lambda dim, *xs: xs)


def test_a_network_computes_the_same_of_a_part_that_is_all(family, tokens):
    """Hidden states and gradients of every family; positions that restart with documents."""
    ids = tokens(2, 16)
    places = {
        "positions": torch.tensor([[*range(7), *range(9)]] * 2),
        "document_ids": torch.tensor([[0] * 7 + [1] * 9, [0] * 16]),
    }
    found = []
    for part_of in (None, all_of_it):
        family.model.part_of = part_of
        hidden = family(ids, **places)
        family.zero_grad()
        hidden.square().sum().backward()
        found.append((hidden.detach(), torch.cat([p.grad.flatten() for p in family.model.parameters()])))
    for whole, part in zip(*found, strict=True):
        assert whole.shape == part.shape
        assert (whole - part).abs().max() <= 2e-5 * whole.abs().max()


def test_a_part_goes_with_no_cache_and_no_padding(tiny, tokens):
    model = tiny()
    model.model.part_of = all_of_it
    for more in (
        {"cache": KVCache(model.config, batch_size=1, capacity=8)},
        {"attention_mask": torch.ones(1, 4, dtype=torch.bool)},
    ):
        with pytest.raises(ValueError, match="neither a cache nor an attention_mask"):
            model(tokens(1, 4), **more)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
def test_the_kernel_of_a_gpu_gives_the_answer_of_the_definition(dtype, bar, window):
    """Outputs and gradients of the kernel that is chosen there, against fp32."""
    device = torch.device("cuda")
    part, documents = part_of(0, 1024, device), torch.arange(1024, device=device)[None].expand(2, -1) // 300
    q, k, v = (x.to(device) for x in heads(1024, 64))
    q, k, v = q[:, :, part.queries], k[:, :, part.keys], v[:, :, part.keys]
    outcomes = []
    for kernel, precision in (("explicit", torch.float32), ("flex", dtype)):
        leaves = [x.detach().to(precision).requires_grad_() for x in (q, k, v)]
        with use_kernel(kernel):
            seen = who_sees_whom(1024, 0, device, window, document_ids=documents, part=part)
        out = attend(*leaves, seen)
        out.float().square().sum().backward()
        outcomes.append((out.detach(), *(leaf.grad for leaf in leaves)))
    for expected, found in zip(*outcomes, strict=True):
        assert (found.float() - expected).abs().max() <= bar * expected.abs().max()
