import pytest

from trivium.data.tokenizer import train
from trivium.models.config import ModelConfig
from trivium.models.transformer import Transformer

TEXT = (
    "The cat sat on the mat. A dog ran to the red house. Question: What is 2 + 3? Answer: The sum is 5. "
    "Yes, I can help you with that. Anna has a green apple in the garden, and the bird sings in the tree. "
)


@pytest.fixture(scope="session")
def tokenizer():
    return train([TEXT] * 4, 320)


@pytest.fixture(scope="session")
def model(tokenizer):
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    return Transformer(shape).init_weights(5).requires_grad_(False).eval()
