"""What a cloud learns of those who train through it: the labels too.

As in ``test_curious_cloud.py``, this is an attack that succeeds, and SECURITY.md says so.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from privatelora.training.trainer import answer_loss
from tests.partition.tiny import tiny_model
from tests.security.attacks import labels_of


def test_the_gradients_of_final_hidden_states_tell_the_labels() -> None:
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(1, 24, model.config.hidden_size, generator=generator, requires_grad=True)
    labels = torch.randint(model.config.vocab_size, (1, 24), generator=generator)
    norm, eps = model.model.norm.weight.detach(), model.config.rms_norm_eps
    logits = model.lm_head(F.rms_norm(hidden, norm.shape, norm, eps))
    answer_loss(logits, labels, torch.tensor([True])).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    head = model.lm_head.weight.detach()
    found = labels_of(hidden.grad[0], hidden.detach()[0], norm, eps, head)
    assert found == labels[0].tolist()
