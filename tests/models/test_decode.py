"""The written-out step against the network itself, which is the definition."""

import pytest
import torch

from trivium.models.decode import Decoding, can_decode
from trivium.models.lora import LoraConfig, adapt, adapters_of
from trivium.models.transformer import KVCache


def both_ways(model, tokens, *, padded, steps=6):
    """Return the logits of `steps` tokens read one by one after a prompt, by the network and by Decoding."""
    rows, length = 3, 7
    prompt, after = tokens(rows, length), tokens(rows, steps, seed=2)
    begins = torch.tensor([0, 3, 5]) if padded else torch.zeros(rows, dtype=torch.long)
    slots = torch.arange(length + steps)
    seen = slots >= begins[:, None]
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    found = []
    for written_out in (False, True):
        cache = KVCache(model.config, batch_size=rows, capacity=length + steps)
        with torch.no_grad():
            mask = seen[:, :length] if padded else None
            model(prompt, positions=positions[:, :length], cache=cache, attention_mask=mask)
            decoding = Decoding(model, cache, context=length + steps)
            visible = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None, None]
            visible = visible.to(model.model.embed_tokens.weight.dtype)
            made = []
            for step in range(steps):
                at = length + step
                if written_out:
                    how = {"start": 0, "visible": visible if padded else None}
                    made.append(decoding.read(after[:, step], positions[:, at], **how))
                else:
                    mask = seen[:, : at + 1] if padded else None
                    place = {"positions": positions[:, at : at + 1], "cache": cache, "attention_mask": mask}
                    made.append(model.logits(model(after[:, step : step + 1], **place)[:, -1]))
        assert cache.length == length + steps
        found.append(torch.stack(made))
    return found


@pytest.mark.parametrize("padded", [False, True])
def test_it_computes_what_the_network_computes(family, tokens, padded):
    """Weights of size 0.2 give logits of size 1 to 10; another order of fp32 sums moves them by a few 1e-6."""
    assert can_decode(family)
    network, written_out = both_ways(family, tokens, padded=padded)
    assert torch.allclose(network, written_out, atol=2e-5, rtol=1e-5)
    assert (network - network.mean(-1, keepdim=True)).abs().max() > 0.5


def test_in_bf16_it_is_as_near_to_the_truth_as_the_network(family, tokens):
    """The same bf16 weights in fp32 are the truth; both round to 8 bits on the way, in another order."""
    rounded = family.to(torch.bfloat16)
    network, written_out = both_ways(rounded, tokens, padded=True)
    exact, _ = both_ways(rounded.float(), tokens, padded=True)
    assert not torch.equal(network, exact)
    assert (written_out - exact).abs().mean() < 1.25 * (network - exact).abs().mean()


@pytest.mark.parametrize("targets", ["attention", "both"])
def test_adapters_count(family, tokens, targets):
    adapted = adapt(family, LoraConfig(rank=2, targets=targets), seed=1)
    with torch.no_grad():
        for adapter in adapters_of(adapted).values():
            adapter.lora_B.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(3))
    network, written_out = both_ways(adapted, tokens, padded=True)
    assert torch.allclose(network, written_out, atol=2e-5, rtol=1e-5)


def test_it_follows_the_weights_without_being_told(tiny, tokens):
    """An optimizer moves weights in place, also between the making of a step and its use."""
    model = tiny()
    cache = KVCache(model.config, batch_size=1, capacity=8)
    with torch.no_grad():
        model(tokens(1, 3), cache=cache)
        decoding = Decoding(model, cache, context=8)
        for parameter in model.parameters():
            parameter.mul_(1.1)
        kept = cache.length
        found = decoding.read(torch.tensor([9]), torch.tensor([3]), start=0, visible=None)
        cache.length = kept
        expected = model.logits(model(torch.tensor([[9]]), cache=cache)[:, -1])
    assert torch.allclose(found, expected, atol=1e-5)


def test_what_it_would_compute_otherwise_is_left_to_the_network(tiny):
    """Hooks, other modules in the layers' place and autocast."""
    model = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not can_decode(model)
    assert can_decode(model)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: 2 * out)
    assert not can_decode(model)
    handle.remove()
    model.model.layers[1] = torch.nn.Sequential(model.model.layers[1])
    assert not can_decode(model)


def test_a_full_cache_and_an_empty_one_say_so(tiny, tokens):
    model = tiny()
    cache = KVCache(model.config, batch_size=1, capacity=3)
    decoding = Decoding(model, cache, context=4)

    def read():
        return decoding.read(torch.tensor([9]), torch.tensor([2]), start=0, visible=None)

    with pytest.raises(ValueError, match="0 of 3"):
        read()
    with torch.no_grad():
        model(tokens(1, 3), cache=cache)
    with pytest.raises(ValueError, match="3 of 3"):
        read()
