import math

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from trivium.batches import IGNORE
from trivium.losses import cross_entropy as module
from trivium.losses.cross_entropy import cross_entropy, head_cross_entropy, head_logprobs, head_logprobs_and_entropy
from trivium.losses.logprobs import entropy, token_logprobs


def test_hand_worked_with_a_known_answer():
    # one-token answer: only its predecessor is trained; probabilities 1/2, 1/4, 1/4
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25]] * 3]))
    targets = torch.tensor([[IGNORE, 1, IGNORE]])
    assert cross_entropy(logits, targets).tolist()[0] == pytest.approx([0.0, math.log(4), 0.0])


@pytest.mark.parametrize("chunk", [None, 3])
def test_row_28_logits_in_bf16_are_worked_in_fp32(chunk):
    """The loss of the very numbers that bf16 logits are, by fp64; a softmax in bf16 would be off by up to 1%.

    In chunks the products themselves are bf16's; the loss is then that of their rounded results.
    """
    generator = torch.Generator().manual_seed(9)
    hidden, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((2, 7, 6), (50, 6)))
    targets = torch.randint(0, 50, (2, 7), generator=generator)
    logits = functional.linear(hidden, weight)
    assert logits.dtype == torch.bfloat16
    exact = -logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    found = (
        cross_entropy(logits, targets) if chunk is None else head_cross_entropy(hidden, weight, targets, chunk=chunk)
    )
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), exact, rtol=2e-6, atol=2e-6)


def test_z_loss_by_hand():
    logits = torch.zeros(1, 1, 4)  # normaliser ln 4
    loss = cross_entropy(logits, torch.zeros(1, 1, dtype=torch.long), z_loss=0.1)
    assert loss.item() == pytest.approx(math.log(4) + 0.1 * math.log(4) ** 2)


def test_same_sum_and_gradient_as_transformers_and_torch():
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 13, generator=generator)
    labels = torch.randint(0, 13, (3, 6), generator=generator)
    labels[0, :3], labels[2, 4:] = IGNORE, IGNORE
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORE)  # the one shift, done in the collator
    count = int((targets != IGNORE).sum())
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    mine = cross_entropy(ours, targets).sum() / count
    reference = loss_utils.ForCausalLMLoss(theirs, labels, vocab_size=13, num_items_in_batch=count)
    mine.backward()
    reference.backward()
    assert mine.item() == pytest.approx(reference.item(), abs=2e-6)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_a_row_with_nothing_to_train_has_no_loss_and_no_gradient():
    logits = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = cross_entropy(logits, torch.full((1, 4), IGNORE))
    loss.sum().backward()
    assert (loss == 0).all() and (logits.grad == 0).all()


def test_garbage_at_masked_positions_never_shows():
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, 2, IGNORE, IGNORE], [3, 4, 0, IGNORE]])
    dirty = torch.where((targets == IGNORE).unsqueeze(-1), torch.tensor(1e6), logits)
    assert torch.equal(cross_entropy(logits, targets, 1e-4), cross_entropy(dirty, targets, 1e-4))


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
def test_a_batch_split_into_micro_batches_gives_the_same_gradient(splits):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(11, 6, generator=generator)
    hidden = torch.randn(8, 7, 6, generator=generator)
    targets = torch.randint(0, 11, (8, 7), generator=generator)
    for row in range(8):
        targets[row, row:] = IGNORE  # very unequal lengths: a mean of means would be far off
    count = (targets != IGNORE).sum()

    def gradient(pieces: int) -> torch.Tensor:
        leaf = weight.clone().requires_grad_()
        for h, t in zip(hidden.chunk(pieces), targets.chunk(pieces), strict=True):
            (cross_entropy(h @ leaf.T, t).sum() / count).backward()
        return leaf.grad

    whole = gradient(1)
    assert (gradient(splits) - whole).norm() / whole.norm() < 1e-5


def head_case(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(2, 7, 6, generator=generator), torch.randn(11, 6, generator=generator)
    targets = torch.randint(0, 11, (2, 7), generator=generator)
    targets[1, 4:] = IGNORE
    return hidden, weight, targets


def outcome(loss_of, hidden, weight, factors=None):
    """Losses and the gradients of their sum, or of their sum with factors."""
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = loss_of(h, w)
    (loss if factors is None else loss * factors).sum().backward()
    return loss.detach(), h.grad, w.grad


@pytest.mark.parametrize("same_factor", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 6, 7, 10, 11, 100])
def test_chunked_head_equals_full_in_value_and_gradient(chunk, same_factor):
    """Also where the losses are weighted, for which the gradients cannot be known in the forward pass."""
    hidden, weight, targets = head_case(5)
    factors = None if same_factor else torch.rand(2, 7, generator=torch.Generator().manual_seed(6))
    full = outcome(lambda h, w: cross_entropy(h @ w.T, targets, 1e-3), hidden, weight, factors)
    chunked = outcome(lambda h, w: head_cross_entropy(h, w, targets, 1e-3, chunk=chunk), hidden, weight, factors)
    for expected, found in zip(full, chunked, strict=True):
        assert torch.allclose(expected, found, atol=5e-6)


def test_chunks_under_autocast_are_as_near_to_fp32_as_the_whole():
    """bf16 products with fp32 sums: the error is the rounding of the inputs, not of the number of chunks."""
    generator = torch.Generator().manual_seed(7)
    hidden, weight = torch.randn(1, 512, 16, generator=generator), torch.randn(32, 16, generator=generator) / 4
    targets = torch.randint(0, 32, (1, 512), generator=generator)
    exact = outcome(lambda h, w: cross_entropy(h @ w.T, targets), hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked = outcome(lambda h, w: head_cross_entropy(h, w, targets, chunk=2), hidden, weight)
    assert chunked[0].dtype == torch.float32
    for expected, found in zip(exact, chunked, strict=True):
        assert (found - expected).norm() / expected.norm() < 1e-2  # bf16 has 8 bits: 0.4% a number


def test_small_logits_take_the_plain_path_and_large_ones_never_exist(monkeypatch):
    hidden, weight, targets = head_case(8)
    plain = cross_entropy(functional.linear(hidden, weight), targets)
    assert torch.equal(head_cross_entropy(hidden, weight, targets), plain)
    monkeypatch.setattr(module, "PLAIN_BYTES", 0)
    monkeypatch.setattr(module, "CHUNK_BYTES_CPU", 3 * 4 * 11)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max(largest, result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    with Watch():
        chunked = outcome(lambda h, w: head_cross_entropy(h, w, targets), hidden, weight)
    assert (
        largest == 2 * 7 * 6
    )  # the hidden states themselves: more than three positions' 33 logits, or the weight's 66
    assert torch.allclose(chunked[0], plain, atol=1e-6)


def test_a_batch_with_nothing_to_train_has_no_loss_and_no_gradient_in_chunks_either():
    hidden, weight, targets = head_case(9)
    found = outcome(lambda h, w: head_cross_entropy(h, w, torch.full_like(targets, IGNORE), chunk=2), hidden, weight)
    assert all((tensor == 0).all() for tensor in found)


@pytest.mark.skipif(not hasattr(functional, "linear_cross_entropy"), reason="torch before 2.13")
def test_chunks_agree_with_torchs_own():
    generator = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(2, 7, 6, generator=generator), torch.randn(11, 6, generator=generator)
    targets = torch.randint(0, 11, (2, 7), generator=generator)
    targets[1, 4:] = IGNORE
    outcomes = []
    for own in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if own:
            loss = head_cross_entropy(h, w, targets, chunk=5).sum()
        else:
            loss = functional.linear_cross_entropy(h.flatten(0, 1), w, targets.flatten(), reduction="sum")
        (0.37 * loss).backward()
        outcomes.append((loss.detach(), h.grad, w.grad))
    for found, expected in zip(*outcomes, strict=True):
        assert (found - expected).norm() <= 2e-6 * expected.norm()


class Products(TorchDispatchMode):
    """Counts the matrix products made inside."""

    count = 0
    names = ("aten::mm", "aten::addmm", "aten::addmm_")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name().split(".")[0] in self.names
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("training", "learns", "products"), [(True, True, 3), (True, False, 2), (False, True, 1)])
def test_an_evaluation_makes_no_gradients_and_a_frozen_weight_none_of_its_own(training, learns, products):
    """Three chunks: one product each, and one more for each of the two gradients where it is wanted."""
    hidden, weight = torch.ones(1, 6, 4, requires_grad=True), torch.eye(8, 4).requires_grad_(learns)
    with Products() as seen, torch.set_grad_enabled(training):
        loss = head_cross_entropy(hidden, weight, torch.zeros(1, 6, dtype=torch.long), chunk=2)
    assert seen.count == 3 * products
    if training:
        # Unequal factors have everything computed again, the weight's gradient where it is wanted.
        (loss * torch.arange(6)).sum().backward()
        assert hidden.grad is not None and (weight.grad is not None) is learns
        expected = torch.autograd.grad(
            (cross_entropy(hidden @ weight.T, torch.zeros(1, 6, dtype=torch.long)) * torch.arange(6)).sum(), hidden
        )
        assert torch.allclose(hidden.grad, expected[0], atol=1e-6)


def test_a_chunk_of_zero_is_refused():
    with pytest.raises(ValueError, match="chunk 0"):
        head_cross_entropy(torch.zeros(1, 1, 2), torch.zeros(3, 2), torch.zeros(1, 1, dtype=torch.long), chunk=0)


class TestHeadLogprobs:
    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    @pytest.mark.parametrize("chunk", [1, 4, 100])
    def test_in_chunks_they_are_the_logprobs_of_the_whole_in_value_and_gradient(self, chunk, temperature):
        """Each token's gradient has a factor of its own, as advantages are."""
        hidden, weight, targets = head_case(5)
        factors = torch.randn(2, 7, generator=torch.Generator().manual_seed(6))
        whole = outcome(lambda h, w: token_logprobs(h @ w.T, targets, temperature), hidden, weight, factors)
        pieces = outcome(lambda h, w: head_logprobs(h, w, targets, temperature, chunk=chunk), hidden, weight, factors)
        for expected, found in zip(whole, pieces, strict=True):
            assert torch.allclose(expected, found, atol=5e-6)

    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    @pytest.mark.parametrize("chunk", [None, 1, 4, 100])
    def test_the_entropy_beside_them_is_that_of_the_whole_and_changes_no_gradient(self, chunk, temperature):
        """Sharp distributions too: a score of 400 above the others leaves shares of exactly 0."""
        hidden, weight, targets = head_case(5)
        targets[0, :3] = IGNORE
        hidden[1, 2] *= 400
        trained, factors = targets != IGNORE, torch.randn(2, 7, generator=torch.Generator().manual_seed(6))
        logprobs, spread = head_logprobs_and_entropy(hidden, weight, targets, temperature, chunk=chunk)
        expected = entropy(hidden @ weight.T, temperature)
        assert expected[1, 2] < 1e-6 < expected[0, 6]
        assert torch.allclose(spread[trained], expected[trained], atol=5e-6)
        assert torch.equal(logprobs, head_logprobs(hidden, weight, targets, temperature, chunk=chunk))

        def both(h, w):
            made, beside = head_logprobs_and_entropy(h, w, targets, temperature, chunk=chunk)
            assert made.requires_grad and not beside.requires_grad
            return made

        alone = outcome(lambda h, w: head_logprobs(h, w, targets, temperature, chunk=chunk), hidden, weight, factors)
        for one, other in zip(alone, outcome(both, hidden, weight, factors), strict=True):
            assert torch.equal(one, other)

    def test_small_ones_are_to_the_bit_what_they_were(self):
        hidden, weight, targets = head_case(3)
        expected = token_logprobs(functional.linear(hidden, weight), targets, 0.7)
        assert torch.equal(head_logprobs(hidden, weight, targets, 0.7), expected)

    def test_positions_that_are_not_trained_cost_nothing(self, monkeypatch):
        """Nine of fourteen are the prompt's: the products are of five rows, one forward and three backward."""
        monkeypatch.setattr(module, "PLAIN_BYTES", 0)
        hidden, weight, targets = head_case(3)
        targets[0], targets[1, 0], targets[1, 1:5] = IGNORE, 1, torch.tensor([1, IGNORE, 2, 3])
        targets[1, 5:] = torch.tensor([4, IGNORE])
        h, w = hidden.requires_grad_(), weight.requires_grad_()
        rows = []

        class Rows(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function.name().split(".")[0] in ("aten::mm", "aten::addmm_"):
                    rows.append(5 in (n for each in args if isinstance(each, torch.Tensor) for n in each.shape))
                return function(*args, **(kwargs or {}))

        assert (targets != IGNORE).sum() == 5
        with Rows():
            made = head_logprobs(h, w, targets)
            assert rows == [True]
            (made * torch.arange(14.0).view(2, 7)).sum().backward()
        assert rows == [True] * 4
        assert (made[targets == IGNORE] == 0).all() and (h.grad[targets == IGNORE] == 0).all()

    def test_nothing_to_train_has_no_gradient(self):
        hidden, weight, targets = head_case(9)
        nothing = torch.full_like(targets, IGNORE)
        found = outcome(lambda h, w: head_logprobs(h, w, nothing, chunk=2), hidden, weight)
        assert all((tensor == 0).all() for tensor in found)

    def test_a_temperature_that_is_not_positive_is_refused(self):
        hidden, weight, targets = head_case(1)
        for chunk in (None, 2):
            with pytest.raises(ValueError, match="temperature 0"):
                head_logprobs(hidden, weight, targets, 0.0, chunk=chunk)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_form_for_compilers_is_the_one_in_place(z_loss, weighted, compiled):

    draw = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(5, 33, generator=draw)
    goal = torch.randint(0, 33, (5, 1), generator=draw)
    factors = torch.randn(5, 1, generator=draw) if weighted else None
    expected = module._in_place(logits.clone(), goal, factors, z_loss, True, True)
    found = (module._fused() if compiled else module._at_once)(logits, goal, factors, z_loss, True, True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert [len(part) for part in module._at_once(logits, goal, factors, z_loss, False, False)] == [5, 0, 0]


class OnGpu:
    """What `_chosen` looks at of logits that lie on a GPU."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, positions):
        self.positions = positions

    def __len__(self):
        return self.positions


def test_a_gpu_gets_the_compiled_form_for_a_few_kinds_of_calls(monkeypatch):
    """Beyond what torch makes programs for, and where there is no compiler, the form in place is the smaller one."""
    monkeypatch.setattr(module, "_compiled", set())
    monkeypatch.setattr(module, "_can_fuse", lambda device: True)
    monkeypatch.setattr(module, "_fused", lambda: "compiled")
    assert [module._chosen(OnGpu(5), (kind,)) for kind in range(module.KINDS)] == ["compiled"] * module.KINDS
    assert module._chosen(OnGpu(5), ("one more",)) is module._in_place
    assert module._chosen(OnGpu(7), (0,)) == "compiled"
    assert module._chosen(OnGpu(1), (0,)) is module._in_place
    monkeypatch.setattr(module, "_can_fuse", lambda device: False)
    assert module._chosen(OnGpu(5), (0,)) is module._in_place


@pytest.mark.parametrize("lacking", ["nothing", "triton", "compiler", "headers", "a GPU that triton knows"])
def test_what_compiling_for_a_gpu_needs(monkeypatch, tmp_path, lacking):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if lacking == "triton" else "found")
    monkeypatch.setattr(module.shutil, "which", lambda name: None if lacking == "compiler" else name)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(
        module.sysconfig, "get_path", lambda name: str(tmp_path / "x" if lacking == "headers" else tmp_path)
    )
    capability = (6, 1) if lacking == "a GPU that triton knows" else (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    module._can_fuse.cache_clear()
    assert module._can_fuse(torch.device("cuda")) is (lacking == "nothing")
    module._can_fuse.cache_clear()


def test_the_programs_of_a_few_kinds_stay_below_what_torch_allows():
    """Lengths that change, with the compiler's first half alone: one program a kind, and one more for the first."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(module._at_once, backend="eager")
    draw = torch.Generator().manual_seed(0)
    kinds = [(33, 0.0, True, False), (33, 0.0, False, False), (33, 0.0, False, True), (33, 0.1, True, False)]
    kinds += [(50, 0.0, True, False), (50, 0.0, False, True)]
    assert len(kinds) == module.KINDS
    for vocab, z_loss, wanted, spread in kinds:
        for positions in (8, 5, 6):
            logits = torch.randn(positions, vocab, generator=draw)
            goal = torch.randint(0, vocab, (positions, 1), generator=draw)
            compiled(logits, goal, None, z_loss, wanted, spread)
    assert counters["stats"]["unique_graphs"] <= torch._dynamo.config.recompile_limit
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_chunks_give_what_the_cpu_gives_at_once(dtype):
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 50, 32, generator=draw), torch.randn(70, 32, generator=draw)
    targets = torch.randint(0, 70, (3, 50), generator=draw)
    targets[:, ::7] = IGNORE
    found = []
    for device, chunk in (("cpu", None), ("cuda", 40)):
        inputs = [x.detach().to(device, dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        head_cross_entropy(*inputs, targets.to(device), 0.01, chunk=chunk).sum().backward()
        found.append([x.grad.cpu().float() for x in inputs])
    for one, other in zip(*found, strict=True):
        close = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(one, other, rtol=close, atol=close * float(other.abs().max()))
