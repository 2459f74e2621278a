"""Keys of a pixel's own image are passed over."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.attention import KeyChunk, attend_chunks


def unit(count: int) -> Tensor:
    return F.normalize(torch.randn(count, 32), dim=1)


# in one block of rows, and in several
@pytest.mark.parametrize(("pixels", "keys", "samples"), [(50, 90, 20), (3000, 2000, 100)])
@pytest.mark.parametrize("scale", [2.0, 20.0])
def test_equal_to_masked_logits(pixels: int, keys: int, samples: int, scale: float) -> None:
    torch.manual_seed(pixels)
    queries, bank = unit(pixels), unit(keys)
    # some samples have no key, some keys are of samples that are not in the batch
    sample_ids = 7 * torch.randint(samples, (pixels,))
    key_ids = 7 * torch.randint(3, samples + 30, (keys,))
    chunks = [KeyChunk(*part) for part in zip(bank.split(700), key_ids.split(700), strict=True)]
    found = attend_chunks(queries, chunks, scale, sample_ids)
    logits = (queries @ bank.T * scale).double()
    logits.masked_fill_(sample_ids[:, None] == key_ids, -torch.inf)
    torch.testing.assert_close(found.lse.double(), logits.logsumexp(1), rtol=0, atol=1e-5)
    expected = logits.softmax(1) @ bank.double()
    torch.testing.assert_close(found.mixture.double(), expected, rtol=0, atol=2e-6)


def test_nothing_is_left_where_all_keys_are_of_the_own_sample() -> None:
    torch.manual_seed(0)
    queries, bank = unit(3000), unit(200)
    ids = torch.zeros(3000, dtype=torch.int64)
    found = attend_chunks(queries, [KeyChunk(bank, ids[:200])], 2.0, ids)
    assert float(found.lse.max()) < -200  # e^-200 of anything is nothing
    assert float(found.hardest.max()) < -1e29
